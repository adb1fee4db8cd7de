"""The AlexNet family against published numbers: of the paper, the released code, Caffe and other listings."""

from typing import Any

import pytest
import torch
from conftest import ROOT
from conftest import config_of as compose
from torch import nn

from alexlab.engine.targets import build
from alexlab.models.alexnet import AlexNet
from alexlab.models.lrn import LocalResponseNorm
from alexlab.models.pretrained import one_weird_trick

FAMILY = sorted(path.stem for path in (ROOT / "conf/model").glob("alexnet*.yaml"))


def net_of(name: str, num_classes: int = 1000, **more: Any) -> AlexNet:
    return build(compose(f"model={name}").model.net, num_classes=num_classes, **more)


def narrow(name: str) -> AlexNet:
    """Build a network with few hidden units, which hold nine tenths of the weights; its convolutions are complete."""
    hidden = (128, 128)
    return one_weird_trick(10, hidden=hidden) if name == "alexnet_owt" else net_of(name, 10, hidden=hidden)


def normalized(name: str, pixels: torch.Tensor) -> torch.Tensor:
    """Normalize pixels (0-1) with the mean and std of the network's config."""
    model = compose(f"model={name}").model
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (model.mean, model.std))
    return (pixels - mean) / std


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def macs(net: nn.Module, size: int) -> float:
    """Count the multiply-accumulates of one image, in millions, with hooks."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()  # type: ignore[operator, index]

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)  # type: ignore[arg-type]
    net.eval()(torch.zeros(1, 3, size, size, device="meta"))
    return total / 1e6


@pytest.mark.parametrize(
    ("name", "expected", "size", "million_macs"),
    [
        ("alexnet", 60_965_224, 224, 724.4),
        ("alexnet_caffe", 60_965_224, 227, 724.4),
        ("alexnet_krizhevsky2012", 60_965_224, 224, 724.4),
        ("alexnet_bn", 60_965_224 + 2 * (96 + 256 + 384 + 384 + 256 + 4096 + 4096), 224, 724.4),
        ("alexnet_owt", 61_100_840, 224, 714.2),
        ("alexnet_wide", 61_264_904, 224, 861.3),
        ("alexnet_half", 1_927_912 - 352, 224, 267),  # the listing counts 352 running statistics of BatchNorm, too
    ],
)
def test_parameters_and_macs(name: str, expected: int, size: int, million_macs: float) -> None:
    with torch.device("meta"):  # only shapes count
        net = net_of(name)
    assert parameters(net) == expected
    assert macs(net, size) == pytest.approx(million_macs, abs=0.05 if million_macs != 267 else 0.5)


def test_parameters_of_two_classes_and_of_the_ungrouped_network() -> None:
    with torch.device("meta"):
        wide, half, ungrouped = net_of("alexnet_wide", 2), net_of("alexnet_half", 2), net_of("alexnet", groups=1)
    assert parameters(wide) == 57_176_098
    statistics = sum(b.numel() for name, b in half.named_buffers() if "running" in name)
    assert (parameters(half), statistics, parameters(half) + statistics) == (1_798_818, 352, 1_799_170)
    assert parameters(ungrouped) == 62_378_344
    assert macs(ungrouped, 224) == pytest.approx(1135.3, abs=0.05)


def losses_of_training(lr: float, **arguments: Any) -> list[float]:
    """Train 20 steps on 32 images whose middle is brighter by class, with momentum 0.9."""
    torch.manual_seed(0)
    maps, normed = (8, 16, 16, 16, 8), (1, 2, 3, 4, 5)
    net = AlexNet(4, maps=maps, norm="bn", normed=normed, hidden=(1024, 1024), dropout=0.2, **arguments)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    images, targets, losses = torch.randn(32, 3, 64, 64), torch.arange(32) % 4, list[float]()
    images[:, :, 16:48, 16:48] += targets[:, None, None, None].float()
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("lr", [0.003, 0.01, 0.03, 0.1])
def test_with_normalized_hidden_layers_no_learning_rate_from_0_003_to_0_1_overshoots(lr: float) -> None:
    losses = losses_of_training(lr, norm_hidden=True)
    assert max(losses) < 1.2 * losses[0]
    assert losses[-1] < 0.6 * losses[0]


def test_without_normalized_hidden_layers_a_learning_rate_of_0_1_overshoots() -> None:
    assert not max(losses_of_training(0.1)) < 100, "or the test above shows nothing; NaN is not below 100"


def test_normalized_hidden_layers_keep_the_names_of_the_linear_layers_and_start_small() -> None:
    with torch.device("meta"):
        old, new = net_of("alexnet_bn", norm_hidden=False).state_dict(), net_of("alexnet_bn").state_dict()
        assert not any("classifier.1." in name for name in AlexNet().state_dict()), "off unless a yaml sets it"
    assert [name for name in old if name not in new] == []
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert [name for name in new if name not in old] == [f"classifier.{n}.1.{part}" for n in (1, 4) for part in of_norm]
    net = AlexNet(2, maps=(8, 16, 16, 16, 8), hidden=(64, 256), norm_hidden=True)
    first, second = (net.classifier[n][1].weight for n in (1, 4))
    assert (first == 1).all()
    torch.testing.assert_close(second, torch.full((256,), 6 / 16))


@pytest.mark.parametrize(("init", "rate"), [("paper", "0.01"), ("released", "0.001"), ("caffe", "0.02")])
def test_fragile_initializations_say_how_they_learn(init: str, rate: str) -> None:
    net = AlexNet(2, maps=(8, 16, 16, 16, 8), hidden=(8, 8), init=init)
    advice = net.advice([1 / 255] * 3)
    assert advice is not None
    assert advice.startswith(f"init={init} learns from pixels of 0 to 255 minus the mean (model.std of 1/255), with")
    assert f"a learning rate of about {rate}, after a plateau" in advice
    assert str(net.advice([0.229, 0.224, 0.225])).endswith("With this model.std the inputs are 58 times smaller.")
    assert str(net.advice([1 / 2550] * 3)).endswith("With this model.std the inputs are 10 times larger.")
    assert AlexNet(2, maps=(8, 16, 16, 16, 8), hidden=(8, 8)).advice([0.2]) is None


PAPER = [(96, 55), (96, 27), (256, 27), (256, 13), (384, 13), (384, 13), (256, 13), (256, 6)]
HALF = [(48, 54), (48, 26), (128, 26), (128, 12), (192, 12), (192, 12), (128, 12), (128, 5)]


@pytest.mark.parametrize("name", ["alexnet", "alexnet_krizhevsky2012", "alexnet_caffe", "alexnet_bn", "alexnet_half"])
def test_each_layer_has_the_published_shape(name: str) -> None:
    expected, features = (HALF, 3200) if name == "alexnet_half" else (PAPER, 9216)
    size = 227 if name == "alexnet_caffe" else 224
    found = []
    net = narrow(name).eval()
    for layer in net.features:
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            layer.register_forward_hook(lambda _, __, out: found.append(tuple(out.shape[1:])))
    net(torch.zeros(1, 3, size, size))
    assert found == [(maps, side, side) for maps, side in expected]
    assert net.classifier[0].in_features == features


def test_pooling_without_overlap_has_maps_of_the_same_size() -> None:
    """By hand: 55 -> 27 -> 13 -> 6 with windows of 3 and of 2, each 2 apart."""
    net = AlexNet(2, maps=(8, 16, 16, 16, 8), hidden=(8, 8), pool=2).eval()
    found = []
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(lambda _, inputs, out: found.append((inputs[0], out)))
    net(torch.randn(1, 3, 224, 224))
    assert [out.shape[-1] for _, out in found] == [27, 13, 6]
    before, after = found[0]
    torch.testing.assert_close(after[0, 0, 0, 1], before[0, 0, :2, 2:4].max())


def test_the_first_convolution_is_padded_on_the_right_and_at_the_bottom() -> None:
    net = narrow("alexnet").eval()
    images = torch.randn(1, 3, 224, 224)
    conv, seen = net.layers[0], []
    handle = conv.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    net(images)
    handle.remove()
    torch.testing.assert_close(seen[0][..., :54, :54], conv(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_images_of_other_sizes_give_logits(name: str) -> None:
    net = narrow(name).eval()
    for size in (64, 65, 130, 256):
        assert net(torch.zeros(1, 3, size, size)).shape == (1, 10), size


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_other_numbers_of_channels_give_logits(channels: int) -> None:
    net = AlexNet(7, in_channels=channels, hidden=(16, 16))
    assert net.eval()(torch.zeros(1, channels, 64, 64)).shape == (1, 7)


def test_images_that_are_too_small_and_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 64 pixels, and these have 63 x 63: set data.image_size=64"):
        AlexNet(7, hidden=(16, 16))(torch.zeros(1, 3, 63, 63))
    for wrong, words in (
        ({"norm": "x"}, "norm=x must be lrn, bn or none"),
        ({"init": "x"}, "init=x must be one of paper, released, caffe, centered, torch"),
    ):
        with pytest.raises(ValueError, match=words):
            AlexNet(7, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILY)
def test_all_gradients_are_finite_and_nonzero(name: str) -> None:
    torch.manual_seed(0)
    net = narrow(name)
    nn.functional.cross_entropy(net(normalized(name, torch.rand(4, 3, 96, 96))), torch.arange(4)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_on_extreme_pixels(name: str, dtype: torch.dtype) -> None:
    """Black, white, stripes and noise."""
    torch.manual_seed(0)
    net = narrow(name)
    stripes = (torch.arange(96) % 2.0).expand(3, 96, 96)
    noise = torch.randint(0, 2, (3, 96, 96)).float()
    with torch.autocast("cpu", dtype):
        logits = net(normalized(name, torch.stack([torch.zeros(3, 96, 96), torch.ones(3, 96, 96), stripes, noise])))
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


PAPER_BIAS = [0, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("init", "stds", "biases"),
    [
        ("paper", [0.01] * 8, PAPER_BIAS),
        ("released", [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], PAPER_BIAS),
        ("caffe", [0.01] * 5 + [0.005, 0.005, 0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
    ],
)
def test_each_layer_is_initialized_as_published(init: str, stds: list[float], biases: list[float]) -> None:
    torch.manual_seed(0)
    for layer, std, bias in zip(AlexNet(1000, init=init, hidden=(512, 512)).layers, stds, biases, strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.03)
        assert abs(float(layer.weight.detach().mean())) < 0.05 * std
        assert (layer.bias == bias).all()


def test_centered_init_gives_outputs_of_deviation_one() -> None:
    torch.manual_seed(0)
    net = AlexNet(1000, norm="none").eval()
    found = []
    for layer in net.layers:
        assert layer.weight.flatten(1).sum(1).abs().max() < 1e-4
        layer.register_forward_hook(lambda _, __, out: found.append(float(out.detach().std())))
    net(torch.randn(8, 3, 224, 224))
    assert found[0] == pytest.approx(1, rel=0.05)
    assert max(found) < 2, "max pooling raises it a little, and it does not grow from layer to layer"
    assert min(found) > 0.5


def test_a_grouped_convolution_equals_two_convolutions_of_half_the_maps() -> None:
    """The paper's network ran on two GPUs."""
    torch.manual_seed(0)
    grouped = AlexNet(10, hidden=(16, 16)).layers[1]
    maps = torch.randn(2, 96, 27, 27)
    halves = []
    for half in range(2):
        conv = nn.Conv2d(48, 128, 5, padding=2)
        conv.weight.data = grouped.weight.data[128 * half : 128 * (half + 1)]
        conv.bias.data = grouped.bias.data[128 * half : 128 * (half + 1)]
        halves.append(conv(maps[:, 48 * half : 48 * (half + 1)]))
    torch.testing.assert_close(grouped(maps), torch.cat(halves, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "alpha", "k", "groups"),
    [("alexnet", 1e-4, 2.0, 1), ("alexnet_caffe", 1e-4 / 5, 1.0, 1), ("alexnet_krizhevsky2012", 1e-4 / 5, 2.0, 2)],
)
def test_each_variant_has_its_own_normalization(name: str, alpha: float, k: float, groups: int) -> None:
    norms = [layer for layer in narrow(name).features if isinstance(layer, LocalResponseNorm)]
    assert len(norms) == 2
    for norm in norms:
        assert norm.alpha / (norm.size if norm.divide else 1) == pytest.approx(alpha)
        assert (norm.size, norm.beta, norm.k, norm.groups) == (5, 0.75, k, groups)


def test_biases_of_the_released_code_learn_twice_as_fast() -> None:
    assert compose("model=alexnet_krizhevsky2012").optimizer.bias_lr_factor == 2
    assert compose("model=alexnet").optimizer.bias_lr_factor == 1
