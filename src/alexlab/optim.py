"""Optimizer with weight decay by module type, and learning rate schedules by step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from alexlab.errors import UserError
from alexlab.rules import mode_of
from alexlab.targets import locate

OWN_KEYS = ("bias_lr_factor", "lr", "weight_decay", "decay_norm_and_bias", "lr_reference_batch", "fused", "_target_")


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
    lr, factor = effective_lr(settings, batch), settings.get("bias_lr_factor", 1.0)
    decay, everywhere = settings.get("weight_decay", 0.0), settings.get("decay_norm_and_bias", False)
    groups = decay_groups(net, decay, everywhere, lr * factor if factor != 1 else None)
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


def decay_groups(
    net: nn.Module, weight_decay: float, decay_norm_and_bias: bool, bias_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups: weights of convolutions, linear layers and embeddings decay; biases, and all parameters of
    other modules (normalization, scales), only with `decay_norm_and_bias`.

    Args:
        bias_lr: the rate of biases, where it is another than the others'.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("decay", "no_decay", "decay_bias", "no_decay_bias")}
    seen: set[int] = set()
    weighted = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention)
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            bias = name.endswith("bias")
            decays = decay_norm_and_bias or (isinstance(module, weighted) and not bias)
            group = ("decay" if decays else "no_decay") + ("_bias" if bias and bias_lr is not None else "")
            groups[group].append(parameter)
    found = []
    for name, parameters in groups.items():
        own_rate = {"lr": bias_lr} if name.endswith("_bias") else {}
        decay = 0.0 if name.startswith("no_decay") else weight_decay
        if parameters:
            found.append({"params": parameters, "weight_decay": decay, "name": name, **own_rate})
    return found


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
