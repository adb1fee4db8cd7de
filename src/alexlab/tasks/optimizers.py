"""Optimizers with parameter groups for weight decay and learning rate; learning rate schedules by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from alexlab.engine.errors import UserError
from alexlab.engine.schema import mode_of
from alexlab.engine.targets import Trusted, locate
from alexlab.models.introspection import head_of

# keys of conf/optimizer/*.yaml that are used in this file; the rest are arguments of the optimizer's class
OUR_KEYS = {"_target_", "lr", "lr_reference_batch", "weight_decay", "decay_norm_and_bias", "fused"}
OUR_KEYS |= {"bias_lr_factor", "backbone_lr_factor"}
# modules whose weights decay
DECAYING = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True)
class OptimizerSettings:
    """What is needed to build the optimizer and the learning rate schedule.

    Attributes:
        optimizer, scheduler: plain values of conf/optimizer/*.yaml and conf/scheduler/*.yaml.
        images_per_step: images per optimizer step, over all devices and accumulated batches.
        steps: optimizer steps of the whole run. Lightning's own estimate would load the first training batches before
            the epoch is restored from a checkpoint.
        steps_per_epoch: optimizer steps in a whole epoch.
        trusted: packages that `_target_` may name, see engine/targets.py.
    """

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    images_per_step: int
    steps: int
    steps_per_epoch: int
    trusted: Trusted = ()

    def build(self, net: nn.Module, trainer: pl.Trainer, may_fuse: bool) -> Any:
        """Build what Lightning's `configure_optimizers` returns."""
        optimizer = build_optimizer(net, self.optimizer, self.images_per_step, may_fuse, self.trusted)
        epochs = trainer.check_val_every_n_epoch or 1
        return [optimizer], build_schedulers(optimizer, self.scheduler, self.steps, self.steps_per_epoch, epochs)


def effective_lr(settings: dict[str, Any], images_per_step: int) -> float:
    """Compute the learning rate: `lr`, or `lr * images_per_step / lr_reference_batch` (linear scaling, Goyal et al.
    2017)."""
    reference = settings.get("lr_reference_batch")
    return settings["lr"] * (images_per_step / reference if reference else 1.0)


def build_optimizer(
    net: nn.Module,
    settings: dict[str, Any],
    images_per_step: int,
    may_fuse: bool = True,
    trusted: Trusted = (),
) -> torch.optim.Optimizer:
    """Build the optimizer of conf/optimizer/*.yaml: `_target_` is the class, and the user's keys are its arguments.

    Args:
        may_fuse: whether `fused: auto` chooses the fused optimizer.

    Raises:
        UserError: `_target_` is not allowed, or the class refuses a setting.
    """
    cls = locate(settings["_target_"], trusted)
    lr = effective_lr(settings, images_per_step)
    groups = parameter_groups(net, lr, settings)
    arguments = {key: value for key, value in settings.items() if key not in OUR_KEYS}
    if "fused" in settings:
        arguments["fused"] = may_fuse if settings["fused"] == "auto" else settings["fused"]
    try:
        return cls(groups, lr=lr, **arguments)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"optimizer.{key}={value}" for key, value in arguments.items())
        raise UserError(
            f"{settings['_target_']} does not take these settings ({shown}): {error}. Remove a key with "
            f"~optimizer.{next(iter(arguments), 'KEY')}."
        ) from error


def parameter_groups(net: nn.Module, lr: float, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and learning rate.

    The weights of convolutions, linear layers and embeddings decay. Biases and the parameters of other modules
    (normalization, scales) decay only with `decay_norm_and_bias`. The learning rate is multiplied by `bias_lr_factor`
    for biases, and by `backbone_lr_factor` outside of the head.
    """
    weight_decay, all_decay = settings.get("weight_decay", 0.0), settings.get("decay_norm_and_bias", False)
    bias_factor, backbone_factor = settings.get("bias_lr_factor", 1.0), settings.get("backbone_lr_factor", 1.0)
    head = {id(p) for p in head_of(net).parameters()} if backbone_factor != 1 else None
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            is_bias = name.endswith("bias")
            decays = all_decay or (isinstance(module, DECAYING) and not is_bias)
            in_backbone = head is not None and id(parameter) not in head
            groups.setdefault((in_backbone, is_bias and bias_factor != 1, not decays), []).append(parameter)
    built: list[dict[str, Any]] = []
    for in_backbone, is_bias, is_plain in sorted(groups):  # checkpoints have the groups in this order
        name = ("no_decay" if is_plain else "decay") + "_bias" * is_bias + "_backbone" * in_backbone
        group_lr = lr * (bias_factor if is_bias else 1) * (backbone_factor if in_backbone else 1)
        decay = 0.0 if is_plain else weight_decay
        params = groups[in_backbone, is_bias, is_plain]
        built.append({"params": params, "weight_decay": decay, "name": name, "lr": group_lr})
    return built


def warmup_steps(settings: dict[str, Any], steps_per_epoch: int) -> int:
    """Compute the optimizer steps of the warm-up in conf/scheduler/*.yaml."""
    return round(settings["warmup"] * (steps_per_epoch if settings["unit"] == "epoch" else 1))


def build_schedulers(
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    steps: int,
    steps_per_epoch: int,
    check_val_every_n_epoch: int = 1,
) -> list[dict[str, Any]]:
    """Build Lightning's list of schedulers for conf/scheduler/*.yaml. The learning rate is logged as "lr".

    Args:
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps in a whole epoch, even if the run stops before the first epoch ends.
        check_val_every_n_epoch: epochs from one validation to the next, whose metric a plateau schedule reads.
    """
    warmup = warmup_steps(settings, steps_per_epoch)
    if settings["name"] != "plateau":
        factor = lr_factor(settings, steps, steps_per_epoch if settings["unit"] == "epoch" else 1, warmup)
        return [{"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"}]
    arguments = {key: settings[key] for key in ("factor", "patience", "min_lr")}
    plateau = ReduceLROnPlateau(optimizer, mode_of(settings["monitor"]), **arguments)
    schedulers: list[dict[str, Any]] = [{"scheduler": plateau, "interval": "epoch", "name": "lr"}]
    schedulers[0] |= {"frequency": check_val_every_n_epoch, "monitor": settings["monitor"]}
    if warmup:  # both multiply the current learning rate, so they combine
        ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        schedulers.append({"scheduler": ramp, "interval": "step", "name": "lr-warmup"})
    return schedulers


def lr_factor(settings: dict[str, Any], steps: int, unit: int, warmup: int) -> Callable[[int], float]:
    """Return the function from step (counted from 0) to the factor on the learning rate.

    Args:
        unit: optimizer steps in one unit of the settings' lengths.
        warmup: optimizer steps of the warm-up, which rises linearly from 1 / (warmup + 1).
    """
    name, floor = settings["name"], settings.get("min_factor", 0.0)
    span = max(1, steps - warmup)
    milestones = [round(milestone * unit) for milestone in settings.get("milestones", [])]
    period = max(1, round(settings.get("step_size", 1) * unit))
    gamma = settings.get("gamma", 0.1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / span)
        if name == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        if name == "linear":
            return floor + (1 - floor) * (1 - progress)
        if name == "step":
            return gamma ** (step // period)
        if name == "multistep":
            return gamma ** sum(step >= milestone for milestone in milestones)
        assert name == "constant", name
        return 1.0

    return factor


def state_tensors(settings: dict[str, Any], trusted: Trusted = ()) -> int:
    """Count the tensors that the optimizer stores for each parameter: 1 for SGD with momentum, 2 for AdamW."""
    net = nn.Linear(2, 3, bias=False)
    optimizer = build_optimizer(net, settings, 1, may_fuse=False, trusted=trusted)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state[net.weight]
    return sum(isinstance(value, torch.Tensor) and value.shape == net.weight.shape for value in state.values())
