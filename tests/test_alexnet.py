"""AlexNet against the paper's numbers."""

import pytest
import torch
from torch import nn

from alexlab.models.alexnet import AlexNet
from alexlab.models.zoo import alexnet_owt


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts() -> None:
    with torch.device("meta"):
        assert parameters(AlexNet(1000)) == 60_965_224
        assert parameters(alexnet_owt(1000)) == 61_100_840


def test_macs_of_the_paper_network() -> None:
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()  # type: ignore[operator, index]

    net = AlexNet(1000)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)  # type: ignore[arg-type]
    net(torch.zeros(1, 3, 224, 224))
    assert total / 1e6 == pytest.approx(724.4, abs=0.05)


def test_map_sizes_at_224() -> None:
    sizes = []
    net = AlexNet(10)
    for i in range(1, 6):
        getattr(net, f"conv{i}").register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:])))
    net(torch.zeros(1, 3, 224, 224))
    assert sizes == [(96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]


@pytest.mark.parametrize("size", [64, 96, 227, 256])
@pytest.mark.parametrize("norm", ["lrn", "bn", "none"])
def test_other_sizes(size: int, norm: str) -> None:
    assert AlexNet(7, norm=norm).eval()(torch.zeros(1, 3, size, size)).shape == (1, 7)


def test_too_small_images_and_wrong_words() -> None:
    with pytest.raises(ValueError, match=r"at least 64 pixels, and these have 63 x 63: set data.image_size=64"):
        AlexNet(7)(torch.zeros(1, 3, 63, 63))
    for wrong, words in (({"norm": "x"}, "norm=x"), ({"init": "x"}, "init=x"), ({"dropout": 1}, "dropout=1")):
        with pytest.raises(ValueError, match=words):
            AlexNet(7, **wrong)  # type: ignore[arg-type]


def test_all_gradients_are_finite_and_not_zero() -> None:
    torch.manual_seed(0)
    net = AlexNet(10)
    nn.functional.cross_entropy(net(torch.randn(4, 3, 96, 96)), torch.arange(4)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_paper_init() -> None:
    net = AlexNet(1000, init="paper")
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        layer = getattr(net, name)
        assert float(layer.weight.std()) == pytest.approx(0.01, rel=0.05)
        assert (layer.bias == (1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0)).all()
