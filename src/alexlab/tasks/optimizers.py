"""Optimizer with weight decay by module type, and learning rate schedules by step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from alexlab.engine.errors import UserError
from alexlab.engine.rules import mode_of
from alexlab.engine.targets import locate
from alexlab.models.introspection import head_of

OWN_KEYS = (
    "bias_lr_factor", "backbone_lr_factor", "lr", "weight_decay", "decay_norm_and_bias", "lr_reference_batch", "fused",
    "_target_",
)  # fmt: skip


def effective_lr(settings: dict[str, Any], batch: int) -> float:
    """The rate that is used: `lr`, or lr * batch / lr_reference_batch (the linear rule of Goyal et al. 2017).

    Args:
        batch: images an optimizer step, over all devices and accumulated batches.
    """
    reference = settings.get("lr_reference_batch")
    return settings["lr"] * (batch / reference if reference else 1.0)


def build_optimizer(
    net: nn.Module, settings: dict[str, Any], batch: int, may_fuse: bool = True
) -> torch.optim.Optimizer:
    """`settings` is conf/optimizer/*.yaml: `_target_` names the class, what is not ours goes to it as it is.

    Args:
        may_fuse: what `fused: auto` means here.

    Raises:
        UserError: a class from elsewhere than `targets.ALLOWED`, or one that refuses a setting.
    """
    cls = locate(settings["_target_"])
    lr, decay = effective_lr(settings, batch), settings.get("weight_decay", 0.0)
    groups = decay_groups(net, decay, settings.get("decay_norm_and_bias", False))
    groups = split_rates(groups, net, lr, settings.get("bias_lr_factor", 1.0), settings.get("backbone_lr_factor", 1.0))
    extra = {key: value for key, value in settings.items() if key not in OWN_KEYS}
    if "fused" in settings:
        extra["fused"] = may_fuse if settings["fused"] == "auto" else settings["fused"]
    try:
        return cls(groups, lr=lr, **extra)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"optimizer.{key}={value}" for key, value in extra.items())
        raise UserError(
            f"{settings['_target_']} does not take these settings ({shown}): {error}. A key is taken out with "
            f"~optimizer.{next(iter(extra), 'KEY')}."
        ) from error


def decay_groups(net: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Parameter groups: weights of convolutions, linear layers and embeddings decay; biases, and all parameters of
    other modules (normalization, scales), only with `decay_norm_and_bias`."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    seen: set[int] = set()
    weighted = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention)
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            decays = decay_norm_and_bias or (isinstance(module, weighted) and not name.endswith("bias"))
            groups["decay" if decays else "no_decay"].append(parameter)
    decays_by = {"decay": weight_decay, "no_decay": 0.0}
    return [{"params": ps, "weight_decay": decays_by[name], "name": name} for name, ps in groups.items() if ps]


def split_rates(
    groups: list[dict[str, Any]], net: nn.Module, lr: float, bias_factor: float, backbone_factor: float
) -> list[dict[str, Any]]:
    """`groups` with rates of their own for biases, and for all that is not the head, where their factor is not 1."""
    biases = {id(p) for name, p in net.named_parameters() if bias_factor != 1 and name.endswith("bias")}
    head = {id(p) for p in head_of(net).parameters()} if backbone_factor != 1 else None
    parts: list[dict[str, Any]] = []
    for slow in (False, True):
        for bias in (False, True):
            for group in groups:
                mine = [
                    p
                    for p in group["params"]
                    if (id(p) in biases) == bias and (head is not None and id(p) not in head) == slow
                ]
                name = group["name"] + ("_bias" if bias else "") + ("_backbone" if slow else "")
                rate = lr * (bias_factor if bias else 1) * (backbone_factor if slow else 1)
                if mine:
                    own = {"lr": rate} if rate != lr else {}
                    parts.append({**group, "params": mine, "name": name, **own})
    return parts


def warmup_steps(settings: dict[str, Any], steps_per_epoch: int) -> int:
    """Optimizer steps of the warm-up of conf/scheduler/*.yaml."""
    return round(settings["warmup"] * (steps_per_epoch if settings["unit"] == "epoch" else 1))


def build_schedulers(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], steps: int, steps_per_epoch: int
) -> list[dict[str, Any]]:
    """Lightning's list of schedulers for conf/scheduler/*.yaml; the rate is logged under "lr".

    Args:
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps in a whole epoch, also where the run ends before one.
    """
    name = settings["name"]
    unit = steps_per_epoch if settings["unit"] == "epoch" else 1
    warmup = warmup_steps(settings, steps_per_epoch)
    if name == "plateau":
        plateau = ReduceLROnPlateau(
            optimizer, mode=mode_of(settings["monitor"]), factor=settings["factor"], patience=settings["patience"],
            min_lr=settings["min_lr"],
        )  # fmt: skip
        schedulers: list[dict[str, Any]] = [
            {"scheduler": plateau, "interval": "epoch", "monitor": settings["monitor"], "name": "lr"}
        ]
        if warmup:  # both multiply the current rate, so they compose
            ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
            schedulers.append({"scheduler": ramp, "interval": "step", "name": "lr-warmup"})
        return schedulers
    factor = factor_of(settings, steps, unit, warmup)
    return [{"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"}]


def factor_of(settings: dict[str, Any], steps: int, unit: int, warmup: int) -> Callable[[int], float]:
    """step -> factor on the rate; step 0 is the first. Warm-up rises linearly from 1 / (warmup + 1)."""
    name, floor = settings["name"], settings.get("min_factor", 0.0)
    span = max(1, steps - warmup)
    edges = [round(edge * unit) for edge in settings.get("milestones", [])]
    period = max(1, round(settings.get("step_size", 1) * unit))
    gamma = settings.get("gamma", 0.1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / span)
        if name == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        if name == "linear":
            return floor + (1 - floor) * (1 - done)
        if name == "step":
            return gamma ** (step // period)
        if name == "multistep":
            return gamma ** sum(step >= edge for edge in edges)
        assert name == "constant", name
        return 1.0

    return factor


def state_tensors(settings: dict[str, Any]) -> int:
    """Tensors of a parameter's size that the optimizer keeps for each: 1 for SGD with momentum, 2 for AdamW."""
    net = nn.Linear(2, 3, bias=False)
    optimizer = build_optimizer(net, settings, 1, may_fuse=False)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state[net.weight]
    return sum(isinstance(value, torch.Tensor) and value.shape == net.weight.shape for value in state.values())
