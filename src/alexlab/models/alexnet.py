"""AlexNet (Krizhevsky, Sutskever, Hinton 2012), and its variant with BatchNorm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexlab.models.lrn import LocalResponseNorm

# 1 / sqrt(1/2 - 1/(2 pi)): one over the standard deviation of a rectified unit Gaussian
RELU_GAIN = (0.5 - 0.5 / math.pi) ** -0.5
MIN_SIZE = 64  # pixels: below, the last maps are smaller than a pooling window


class AlexNet(nn.Module):
    """Five convolutions, two of 4,096 hidden units, one of classes.

    Args:
        num_classes: size of the logits.
        in_channels: 3 for RGB.
        norm: "lrn" (the paper's), "bn" (BatchNorm after each ReLU of the convolutions) or "none".
        dropout: probability, on the outputs of both hidden layers.
        init: "paper" (weights N(0, 0.01), biases 1 in conv2, conv4, conv5 and the hidden layers), which belongs to
            inputs of 0-255 minus the mean; or "centered" (each unit's weights sum to zero, and its output has
            deviation 1), which belongs to inputs of deviation 1 and learns from the first step.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        norm: str = "lrn",
        dropout: float = 0.5,
        init: str = "centered",
    ) -> None:
        super().__init__()
        if norm not in ("lrn", "bn", "none"):
            raise ValueError(f"norm={norm}: must be lrn, bn or none.")
        if init not in ("paper", "centered"):
            raise ValueError(f"init={init}: must be paper or centered.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be from 0 to below 1.")
        self.conv1 = nn.Conv2d(in_channels, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        maps = (96, 256, 384, 384, 256)
        norms = []
        for i, count in enumerate(maps, 1):
            layer: nn.Module = nn.Identity()
            if norm == "bn":
                layer = nn.BatchNorm2d(count)
            elif norm == "lrn" and i <= 2:
                layer = LocalResponseNorm()
            norms.append(layer)
        self.norm1, self.norm2, self.norm3, self.norm4, self.norm5 = norms
        self.pool = nn.MaxPool2d(3, stride=2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(dropout)
        self._init(init)

    def forward(self, x: Tensor) -> Tensor:
        """float (B, in_channels, H, W) -> logits (B, num_classes). Shapes below are for 224 pixels.

        Raises:
            ValueError: images smaller than 64 pixels.
        """
        if min(x.shape[-2:]) < MIN_SIZE:
            raise ValueError(
                f"AlexNet needs images of at least {MIN_SIZE} pixels, and these have {x.shape[-2]} x {x.shape[-1]}: "
                f"set data.image_size={MIN_SIZE} or more."
            )
        x = F.pad(x, (0, 3, 0, 3))  # right and bottom, as the released code
        x = self.pool(self.norm1(F.relu(self.conv1(x))))  # 96 x 55 x 55 -> 27 x 27
        x = self.pool(self.norm2(F.relu(self.conv2(x))))  # 256 x 27 x 27 -> 13 x 13
        x = self.norm3(F.relu(self.conv3(x)))  # 384 x 13 x 13
        x = self.norm4(F.relu(self.conv4(x)))  # 384 x 13 x 13
        x = self.norm5(F.relu(self.conv5(x)))  # 256 x 13 x 13
        x = self.pool(x)  # 256 x 6 x 6
        if x.shape[-2:] != (6, 6):
            x = F.adaptive_avg_pool2d(x, 6)
        x = x.flatten(1)
        x = self.dropout(F.relu(self.fc6(x)))  # 4096
        x = self.dropout(F.relu(self.fc7(x)))  # 4096
        return self.fc8(x)

    def _init(self, how: str) -> None:
        for name, layer in self.named_children():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            assert layer.bias is not None
            if how == "centered":
                nn.init.normal_(layer.weight)
                with torch.no_grad():
                    # All pictures share the positive mean of the ReLUs below; weights that sum to zero do not pass it
                    # on, and without it eight layers deep the pictures look alike and nothing is learned at first.
                    layer.weight -= layer.weight.flatten(1).mean(1).view(-1, *[1] * (layer.weight.ndim - 1))
                    gain = 1.0 if name in ("conv1", "fc8") else RELU_GAIN
                    layer.weight *= gain / layer.weight[0].numel() ** 0.5
                nn.init.zeros_(layer.bias)
            else:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(layer.bias, float(name in ("conv2", "conv4", "conv5", "fc6", "fc7")))
