"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) and the published variants."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexlab.models.lrn import LocalResponseNorm

# 1 / sqrt(1/2 - 1/(2 pi)): one over the standard deviation of a rectified unit Gaussian
RELU_GAIN = (0.5 - 0.5 / math.pi) ** -0.5
# With norm_hidden: the root of the sum of squares of the inputs of the last layer. A step changes a logit by about the
# learning rate times this number squared. Normalized units would give sqrt(4096) = 64, with which a learning rate of
# 0.1 overshoots: losses rose to 120. Of 4, 6, 8 and 64, 6 had the most even accuracies on photos5 from 0.003 to 0.1.
LAST_SCALE = 6.0
MIN_SIZE = 64  # pixels: smaller images leave nothing for the last maps

# (standard deviation of the weights, bias) of each layer: five convolutions, three linear layers
INITS: dict[str, list[tuple[float, float]]] = {
    "paper": [(0.01, bias) for bias in (0, 1, 0, 1, 1, 1, 1, 0)],
    "released": list(zip([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0], strict=True)),
    # Caffe's readme on biases: "1 gave flat loss"
    "caffe": list(zip([0.01] * 5 + [0.005] * 2 + [0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0], strict=True)),
}
# learning rates with which networks of these initializations learn: the paper's; the other two on photos5
RATES = {"paper": 0.01, "released": 0.001, "caffe": 0.02}


class AlexNet(nn.Module):
    """Five convolutions, two hidden linear layers and the classifier.

    The layers have the names of torchvision's AlexNet, so that torchvision's weights fit if the settings are equal.

    Args:
        num_classes: number of logits.
        in_channels: of the images: 1 for grey, 3 for RGB, 4 for RGBA.
        maps: number of maps (output channels) of each of the five convolutions.
        groups: of the second, fourth and fifth convolution; 2 in the paper, which split them over two GPUs.
        padding: of the first convolution: pixels on each side, or "right_bottom" for 3 pixels on these two sides, as in
            the released code.
        conv_bias: whether the convolutions have biases.
        pool: side of the pooling windows, which are 2 pixels apart: 3 overlap, as in the paper; 2 do not.
        ceil_mode: pool incomplete windows at the border too, as Caffe does.
        norm: "lrn", "bn" (BatchNorm) or "none", after the ReLU.
        normed: the convolutions that `norm` follows, counted from 1.
        lrn: settings of `LocalResponseNorm`; the defaults are the paper's.
        map_size: side of the last maps; maps of another size are averaged to this size.
        hidden: units of the two hidden layers.
        norm_hidden: BatchNorm after the ReLU of the hidden layers too. The second one starts with weights of
            `LAST_SCALE` / sqrt(units) instead of 1, so that the network learns over a wide range of learning rates.
        dropout: probability of setting a unit to zero, from 0 to below 1.
        dropout_before: place dropout before the hidden layers, as torchvision does, instead of after them.
        init: "centered", for inputs with standard deviation 1, which learns from the first step: the weights of each
            unit sum to zero, and the outputs have standard deviation 1. "paper", "released" (Krizhevsky's code) and
            "caffe" were made for inputs of 0-255 minus the mean. "torch" is torch's default.

    Raises:
        ValueError: `norm`, `init`, `dropout` or `padding` has another value than these.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        maps: Sequence[int] = (96, 256, 384, 384, 256),
        groups: int = 2,
        padding: int | str = "right_bottom",
        conv_bias: bool = True,
        pool: int = 3,
        ceil_mode: bool = False,
        norm: str = "lrn",
        normed: Sequence[int] = (1, 2),
        lrn: dict[str, Any] | None = None,
        map_size: int = 6,
        hidden: Sequence[int] = (4096, 4096),
        norm_hidden: bool = False,
        dropout: float = 0.5,
        dropout_before: bool = False,
        init: str = "centered",
    ) -> None:
        super().__init__()
        if norm not in ("lrn", "bn", "none"):
            raise ValueError(f"norm={norm} must be lrn, bn or none.")
        if init not in (*INITS, "centered", "torch"):
            raise ValueError(f"init={init} must be one of {', '.join((*INITS, 'centered', 'torch'))}.")
        self.map_size, self.init = map_size, init
        layers: list[nn.Module] = [nn.ZeroPad2d((0, 3, 0, 3))] if padding == "right_bottom" else []
        pads = (0 if padding == "right_bottom" else int(padding), 2, 1, 1, 1)
        channels = in_channels
        for number, out in enumerate(maps, 1):
            kernel, stride = {1: (11, 4), 2: (5, 1)}.get(number, (3, 1))
            pad, conv_groups = pads[number - 1], groups if number in (2, 4, 5) else 1
            layers.append(nn.Conv2d(channels, out, kernel, stride, pad, groups=conv_groups, bias=conv_bias))
            layers.append(nn.ReLU(inplace=True))
            if norm != "none" and number in normed:
                layers.append(nn.BatchNorm2d(out) if norm == "bn" else LocalResponseNorm(**(lrn or {})))
            if number in (1, 2, 5):
                layers.append(Pool(pool, stride=2, ceil_mode=ceil_mode))
            channels = out
        self.features = nn.Sequential(*layers)
        drop = nn.Dropout(dropout)
        relus: list[nn.Module] = [nn.ReLU(inplace=True), nn.ReLU(inplace=True)]
        if norm_hidden:  # as pairs: the linear layers keep their names
            norms = [nn.BatchNorm1d(units) for units in hidden]
            nn.init.constant_(norms[1].weight, LAST_SCALE / hidden[1] ** 0.5)
            relus = [nn.Sequential(relu, norm) for relu, norm in zip(relus, norms, strict=True)]
        first = [nn.Linear(channels * map_size**2, hidden[0]), relus[0]]
        second = [nn.Linear(hidden[0], hidden[1]), relus[1]]
        both = [drop, *first, drop, *second] if dropout_before else [*first, drop, *second, drop]
        self.classifier = nn.Sequential(*both, nn.Linear(hidden[1], num_classes))
        self._init(init)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, num_classes) of float images (B, in_channels, H, W). Comments: shapes at 224 pixels."""
        if min(x.shape[-2:]) < MIN_SIZE:
            raise ValueError(
                f"AlexNet needs images of at least {MIN_SIZE} pixels, and these have {x.shape[-2]} x {x.shape[-1]}: "
                f"set data.image_size={MIN_SIZE} or more."
            )
        x = self.features(x)  # 96 x 55 x 55 -> 27 -> 256 x 27 x 27 -> 13 -> 384 -> 384 -> 256 x 13 x 13 -> 6
        if x.shape[-2:] != (self.map_size, self.map_size):
            x = F.adaptive_avg_pool2d(x, self.map_size)
        return self.classifier(x.flatten(1))  # 9216 -> 4096 -> 4096 -> num_classes

    @property
    def layers(self) -> list[nn.Conv2d | nn.Linear]:
        """The five convolutions and three linear layers."""
        return [layer for layer in self.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]

    def advice(self, std: Sequence[float]) -> str | None:
        """Return what the published initializations need in order to learn; None for the rest.

        Args:
            std: of the pixels from 0 to 1, by which the images are divided.
        """
        if self.init not in INITS:
            return None
        text = (
            f"init={self.init} learns from pixels of 0 to 255 minus the mean (model.std of 1/255), with a learning "
            f"rate of about {RATES[self.init]:g}, after a plateau of up to several hundred steps."
        )
        times = 255 * sum(std) / len(std)
        size = f"{times:.2g} times smaller" if times > 1 else f"{1 / times:.2g} times larger"
        return text if 0.5 < times < 2 else f"{text} With this model.std the inputs are {size}."

    def _init(self, how: str) -> None:
        for number, layer in enumerate(self.layers if how != "torch" else ()):
            if how == "centered":
                nn.init.normal_(layer.weight)
                with torch.no_grad():
                    # ReLU outputs have a positive mean that all images share. Weights that sum to zero remove it. If it
                    # added up over eight layers, all images would look alike, and nothing would be learned at first.
                    layer.weight -= layer.weight.flatten(1).mean(1).view(-1, *[1] * (layer.weight.ndim - 1))
                    gain = 1.0 if number in (0, 7) else RELU_GAIN
                    layer.weight *= gain / layer.weight[0].numel() ** 0.5
                bias = 0.0
            else:
                std, bias = INITS[how][number]
                nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)


class Pool(nn.MaxPool2d):
    """Max pooling that turns maps smaller than the window into one value each."""

    kernel_size: int

    def forward(self, x: Tensor) -> Tensor:
        """Pool maps (B, C, H, W) to (B, C, H', W')."""
        small = min(x.shape[-2:]) < self.kernel_size
        return F.max_pool2d(x, self.kernel_size, self.stride, ceil_mode=self.ceil_mode or bool(small))
