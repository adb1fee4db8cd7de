"""Which parts of any network are its first filters and its head."""

from typing import Any

from torch import nn

from alexlab.errors import UserError


def head_of(net: nn.Module) -> nn.Module:
    """The layer that gives the logits: what timm calls the classifier, else the last linear or convolutional layer.

    Raises:
        UserError: there is none.
    """
    told: Any = getattr(net, "get_classifier", None)
    if told is not None and isinstance(told(), nn.Linear | nn.Conv2d):
        return told()
    layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError(f"{type(net).__name__} has neither linear nor convolutional layers, so no head is found.")
    return layers[-1]


def first_convolution(net: nn.Module) -> tuple[nn.Conv2d, int] | None:
    """The network's first convolution, and the groups that its maps are in for the second; None where there is none.

    The paper's network has two: its first 48 filters were one GPU's and turned out grey, the others' coloured.
    """
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not layers:
        return None
    groups = layers[1].groups if len(layers) > 1 else 1
    return layers[0], groups if groups < layers[0].out_channels else 1  # not a group a map, as in depthwise layers
