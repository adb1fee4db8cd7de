"""Optimizer with weight decay by module type, and learning rate schedules by step."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

OWN_KEYS = ("lr", "weight_decay", "decay_norm_and_bias", "lr_reference_batch", "fused", "_target_")


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
    """
    module, _, name = settings["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    groups = decay_groups(net, settings["weight_decay"], settings["decay_norm_and_bias"])
    extra = {key: value for key, value in settings.items() if key not in OWN_KEYS}
    if "fused" in settings:
        extra["fused"] = may_fuse if settings["fused"] == "auto" else settings["fused"]
    return cls(groups, lr=effective_lr(settings, batch), **extra)


def decay_groups(net: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Parameter groups: weights of convolutions, linear layers and embeddings decay; biases, and all parameters of
    other modules (normalization, scales), only with `decay_norm_and_bias`."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    weighted = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention)
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            decays = decay_norm_and_bias or (isinstance(module, weighted) and not name.endswith("bias"))
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_schedulers(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], steps: int, epochs: int | None
) -> list[dict[str, Any]]:
    """Lightning's list of schedulers for conf/scheduler/*.yaml.

    Args:
        steps: optimizer steps of the whole run.
        epochs: of the whole run; None where the run ends by steps, and lengths must then be in steps.
    """
    name = settings["name"]
    a_unit = unit_steps(settings, steps, epochs)
    warmup = round(settings["warmup"] * a_unit)
    if name == "plateau":
        plateau = ReduceLROnPlateau(
            optimizer, mode=settings["mode"], factor=settings["factor"], patience=settings["patience"],
            min_lr=settings["min_lr"],
        )  # fmt: skip
        schedulers: list[dict[str, Any]] = [{"scheduler": plateau, "interval": "epoch", "monitor": settings["monitor"]}]
        if warmup:  # both multiply the current rate, so they compose
            ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
            schedulers.append({"scheduler": ramp, "interval": "step"})
        return schedulers
    factor = factor_of(settings, steps, a_unit, warmup)
    return [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]


def unit_steps(settings: dict[str, Any], steps: int, epochs: int | None) -> float:
    """Optimizer steps in one `scheduler.unit`: 1 for "step", those of an epoch for "epoch"."""
    if settings["unit"] == "step":
        return 1.0
    if epochs is None:
        raise ValueError(
            "scheduler.unit=epoch needs trainer.max_epochs, and the run ends by trainer.max_steps: "
            "set trainer.max_epochs, or give lengths in steps with scheduler.unit=step."
        )
    return steps / epochs


def factor_of(settings: dict[str, Any], steps: int, unit: float, warmup: int) -> Callable[[int], float]:
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
