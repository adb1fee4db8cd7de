"""Facts about any network: the head, the first filters, mean and std of the inputs, and the cost of one image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alexlab.engine.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB on a 0-1 scale


def head_of(net: nn.Module, num_classes: int | None = None) -> nn.Module:
    """Return the layer that gives the logits: timm's classifier if it is one, else the last linear or convolutional
    layer.

    Args:
        num_classes: number of outputs that the layer must have; None skips this check.

    Raises:
        UserError: the network has no such layer, or it does not have `num_classes` outputs.
    """
    classifier = getattr(net, "get_classifier", lambda: None)()
    layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError(f"{type(net).__name__} has neither linear nor convolutional layers, so it has no known head.")
    head = classifier if isinstance(classifier, nn.Linear | nn.Conv2d) else layers[-1]
    outputs = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    if num_classes is not None and (outputs != num_classes or isinstance(classifier, tuple)):
        raise UserError(
            f"{type(net).__name__} has no single last layer that gives the {num_classes} logits, so the head is "
            "unknown: leave finetune.freeze_epochs=0 finetune.backbone_lr_factor=1, and give init_from=RUN only if "
            "the classes are that run's."
        )
    return head


def heads_of(net: nn.Module, num_classes: int | None = None) -> tuple[nn.Module, ...]:
    """Return the layers that give the logits: several for some of timm's networks, else `head_of`."""
    several = getattr(net, "get_classifier", lambda: None)()
    return several if isinstance(several, tuple) else (head_of(net, num_classes),)


def depths_of(net: Any) -> dict[str, int]:
    """Return how many layers each parameter, by name, is below the head.

    Raises:
        UserError: the network has no `group_matcher`, with which timm's networks number their layers.
    """
    if not hasattr(net, "group_matcher"):
        raise UserError(
            f"`optimizer.layer_decay`: the layers of {type(net).__name__} are unknown. Use model=timm, or give the "
            "network a method group_matcher as timm's have."
        )
    try:
        from timm.models import group_parameters
    except ImportError:
        raise UserError("`optimizer.layer_decay` needs the extra: pip install 'alexlab[timm]'.") from None
    numbers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    return {name: max(numbers.values()) - number for name, number in numbers.items()}


def first_convolution(net: nn.Module) -> tuple[nn.Conv2d, int] | None:
    """Return the first convolution, and the number of groups of the second; None without a convolution.

    AlexNet has two groups: the 48 filters on one GPU became grey, and the 48 on the second GPU became coloured.
    """
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not layers:
        return None
    groups = layers[1].groups if len(layers) > 1 else 1
    return layers[0], groups if groups < layers[0].out_channels else 1  # a depthwise layer has no such groups


def last_maps(net: nn.Module, image: torch.Tensor) -> nn.Module:
    """Return the last layer whose feature maps are as large as those of the last convolution, after the activation.

    Args:
        net: in eval mode.
        image: float (1, C, H, W), as the network gets it.

    Raises:
        UserError: the network has fewer than two convolutions, or the last one gives maps of one pixel.
    """
    outputs: list[tuple[nn.Module, torch.Size]] = []  # in the order in which the layers end

    def store(layer: nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            outputs.append((layer, output.shape[2:]))

    hooks = [module.register_forward_hook(store) for module in net.modules() if module is not net]
    try:
        with torch.no_grad():
            net(image)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = [size for layer, size in outputs if isinstance(layer, nn.Conv2d) and size.numel() > 1]
    # the patches of a vision transformer are of one convolution, whose maps are far from the logits
    if not sizes or sum(isinstance(layer, nn.Conv2d) for layer, _ in outputs) == 1:
        raise UserError(
            f"Grad-CAM needs at least two convolutions, the last with feature maps of more than one pixel, and "
            f"{type(net).__name__} has none such: vision transformers are not supported."
        )
    return [layer for layer, size in outputs if size == sizes[-1]][-1]


def normalization(
    net: nn.Module,
    mean: "Sequence[float] | str" = "auto",
    std: "Sequence[float] | str" = "auto",
    in_channels: int = 3,
) -> tuple[list[float], list[float]]:
    """Return mean and std of the inputs, of each channel on a 0-1 scale.

    "auto" is what the published weights were trained with, from `pretrained_cfg` as timm's networks have it, else
    ImageNet's. Three numbers, of RGB, are converted. Grey gets their luma: the exact mean of grey, and a std that is
    exact if the three channels vary together. Alpha gets mean 1, so that opaque images give 0, and the mean std of RGB.
    """
    published = getattr(net, "pretrained_cfg", None) or {}
    mean = published.get("mean", IMAGENET_MEAN) if isinstance(mean, str) else mean
    std = published.get("std", IMAGENET_STD) if isinstance(std, str) else std
    mean, std = list(mean), list(std)
    if in_channels == 1:
        mean, std = ([_luma(*values)] if len(values) == 3 else values for values in (mean, std))
    elif in_channels == 4:
        mean, std = mean if len(mean) == 4 else [*mean, 1.0], std if len(std) == 4 else [*std, sum(std) / 3]
    return mean, std


def _luma(red: float, green: float, blue: float) -> float:
    """Return 0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601), which is exact for three equal numbers."""
    return blue + 0.299 * (red - blue) + 0.587 * (green - blue)


def macs(net: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Count the multiply-accumulates of convolutions, linear layers and attention for one image of `shape` (C, H, W).

    This is half of what torch's counter returns, which counts multiplications and additions. Only shapes are used:
    nothing is computed, and neither weights nor random numbers change. The result is None if the network cannot run
    without values.
    """
    training = net.training
    shapes = {name: value.to("meta") for name, value in (*net.named_parameters(), *net.named_buffers())}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            torch.func.functional_call(net.eval(), shapes, (torch.empty(1, *shape, device="meta"),))
    except (RuntimeError, NotImplementedError, ValueError):  # the network creates tensors on a real device
        return None
    finally:
        net.train(training)
    return counted.get_total_flops() // 2
