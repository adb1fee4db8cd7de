"""Of any network: its first filters, its head, and what an image costs it."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alexlab.engine.errors import UserError


def head_of(net: nn.Module, num_classes: int | None = None) -> nn.Module:
    """The layer that gives the logits: what timm calls the classifier, else the last linear or convolutional layer.

    Args:
        num_classes: what it must give, where it matters that it is the head.

    Raises:
        UserError: there is none, or it does not give `num_classes` numbers.
    """
    head = _last_layer(net)
    gives = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    several = isinstance(getattr(net, "get_classifier", lambda: None)(), tuple)
    if num_classes is not None and (gives != num_classes or several):
        raise UserError(
            f"{type(net).__name__} has no last layer alone that gives the {num_classes} logits, so its head is not "
            "known: leave finetune.freeze_epochs=0 finetune.backbone_lr_factor=1, and give init_from=RUN only where "
            "the classes are that run's."
        )
    return head


def heads_of(net: nn.Module, num_classes: int | None = None) -> tuple[nn.Module, ...]:
    """`head_of`, or the several classifiers that timm tells of.

    Raises:
        UserError: as `head_of`.
    """
    several = getattr(net, "get_classifier", lambda: None)()
    return several if isinstance(several, tuple) else (head_of(net, num_classes),)


def _last_layer(net: nn.Module) -> "nn.Linear | nn.Conv2d":
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


def macs(net: nn.Module, image_size: int) -> int | None:
    """Multiplications (with their additions) in convolutions, linear layers and attention, of one image's forward pass.

    Half of what torch's own counter says, which counts both. It sees shapes alone: nothing is computed, and neither
    weights nor random numbers change. None of a network that cannot run so.
    """
    training = net.training
    shapes = {name: value.to("meta") for name, value in (*net.named_parameters(), *net.named_buffers())}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            torch.func.functional_call(net.eval(), shapes, (torch.empty(1, 3, image_size, image_size, device="meta"),))
    except (RuntimeError, NotImplementedError, ValueError):  # it makes tensors of its own on the way
        return None
    finally:
        net.train(training)
    return counted.get_total_flops() // 2
