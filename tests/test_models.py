"""The networks against the paper's and torchvision's numbers."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from alexlab.models.alexnet import AlexNet
from alexlab.models.lrn import LocalResponseNorm
from alexlab.models.zoo import alexnet_owt, load_but_head, timm_net, torchvision_net


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


@pytest.mark.parametrize("maps", [3, 16])
def test_lrn_is_the_papers_formula(maps: int) -> None:
    a = np.random.default_rng(0).normal(0, 50, (2, maps, 3, 3))
    expected = np.empty_like(a)
    for i in range(maps):
        near = a[:, max(0, i - 2) : min(maps - 1, i + 2) + 1]
        expected[:, i] = a[:, i] / (2 + 1e-4 * (near**2).sum(1)) ** 0.75
    np.testing.assert_allclose(LocalResponseNorm()(torch.from_numpy(a)).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lrn_equals_torchs(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 24, 9, 9) * 30).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, torchs = LocalResponseNorm(alpha=1e-4, divide=True), nn.LocalResponseNorm(5, 1e-4, 0.75, 2)
    weights = torch.randn(2, 24, 9, 9)
    (ours(x) * weights).sum().backward()
    (torchs(y) * weights).sum().backward()
    torch.testing.assert_close(ours(x), torchs(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_owt_is_torchvisions() -> None:
    theirs = torchvision.models.alexnet().eval()
    ours = alexnet_owt(1000).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(ours(images), theirs(images))


def test_weights_load_but_for_a_head_of_other_size() -> None:
    source = torchvision_net("resnet18", 5)
    net = torchvision_net("resnet18", 3)
    before = net.fc.weight.clone()
    load_but_head(net, source.state_dict())
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    assert torch.equal(net.fc.weight, before)
    with pytest.raises(ValueError, match="another network's"):
        load_but_head(net, {k: v for k, v in source.state_dict().items() if "layer1" not in k})


def test_unknown_names_and_weights_that_cannot_be_had(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"model.name=resnet19: torchvision has no such network. Did you mean resnet"):
        torchvision_net("resnet19", 3)
    with pytest.raises(ValueError, match=r"model.name=resnet19x: timm has no such network"):
        timm_net("resnet19x", 3)
    assert timm_net("resnet18", 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r"pretrained=true: the weights of alexnet cannot be had .*Connect once, put"):
        alexnet_owt(10, pretrained=True)


def test_lrn_beta_other_than_the_papers() -> None:
    x = torch.randn(1, 8, 2, 2)
    torch.testing.assert_close(
        LocalResponseNorm(beta=0.5, divide=True)(x), nn.LocalResponseNorm(5, 1e-4, 0.5, 2)(x), rtol=1e-5, atol=1e-6
    )
    assert math.isclose(LocalResponseNorm().beta, 0.75)
