"""Optimizers with parameter groups for weight decay and learning rate; learning rate schedules by step."""

import inspect
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from alexlab.engine.errors import UserError, did_you_mean
from alexlab.engine.schema import mode_of
from alexlab.engine.targets import Trusted, build, locate, names_of
from alexlab.models.introspection import depths_of, head_of

# keys of conf/optimizer/*.yaml that are used in this file; the rest are arguments of the optimizer's class
OUR_KEYS = {"_target_", "lr", "lr_reference_batch", "weight_decay", "decay_norm_and_bias", "fused"}
OUR_KEYS |= {"bias_lr_factor", "backbone_lr_factor", "layer_decay"}
# modules whose weights decay
DECAYING = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True)
class OptimizerSettings:
    """What is needed to build the optimizer and the learning rate schedule."""

    optimizer: dict[str, Any]  # plain values of conf/optimizer/*.yaml
    scheduler: dict[str, Any]  # plain values of conf/scheduler/*.yaml
    images_per_step: int  # per optimizer step, over all devices and accumulated batches
    # optimizer steps of the whole run; Lightning's own estimate would load the first training batches before the epoch
    # is restored from a checkpoint
    steps: int
    steps_per_epoch: int  # optimizer steps in a whole epoch
    trusted: Trusted = ()  # packages that `_target_` may name, see engine/targets.py
    mode: Literal["min", "max"] | None = None  # whether less of `scheduler.monitor` is better; None: by the name

    def build(self, net: nn.Module, trainer: pl.Trainer | None = None) -> Any:
        """Build what Lightning's `configure_optimizers` returns; without a trainer, to try the settings.

        If 16-mixed clips gradients, the optimizer is not fused: a fused one unscales them after clipping.

        Raises:
            UserError: a mistake in the settings.
        """
        if trainer is None:
            try_step(self.optimizer, self.trusted)
        clips_scaled = trainer is not None and trainer.precision == "16-mixed" and bool(trainer.gradient_clip_val)
        optimizer = build_optimizer(net, self.optimizer, self.images_per_step, not clips_scaled, self.trusted)
        epochs = (trainer and trainer.check_val_every_n_epoch) or 1
        run = (self.steps, self.steps_per_epoch, epochs, self.trusted, self.mode)
        return [optimizer], build_schedulers(optimizer, self.scheduler, *run)


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
    """Build the optimizer of `conf/optimizer/*.yaml`: the class `_target_`, with the user's keys as arguments.

    Args:
        may_fuse: whether `fused: auto` chooses the fused optimizer, if the class has one.

    Raises:
        UserError: `_target_` is not allowed, the class refuses a setting, or the network has no known layers.
    """
    name = settings["_target_"]
    cls = locate(name, trusted)
    lr = effective_lr(settings, images_per_step)
    groups = parameter_groups(net, lr, settings)
    arguments = {key: value for key, value in settings.items() if key not in OUR_KEYS}
    known = names_of(name, trusted)
    if "fused" in settings and (settings["fused"] != "auto" or "fused" in known):
        arguments["fused"] = may_fuse if settings["fused"] == "auto" else settings["fused"]
    wanted = arguments | ({"weight_decay": settings["weight_decay"]} if settings.get("weight_decay") else {})
    unknown = [key for key in wanted if key not in known]
    if unknown and isinstance(cls, type):
        shown = ", ".join(f"optimizer.{key}={wanted[key]}" for key in unknown)
        removed = " ".join(f"~optimizer.{key}" for key in unknown)
        hint = did_you_mean(unknown[0], [*OUR_KEYS, *known], "`optimizer.{}`")
        raise UserError(f"{name} does not take these settings: {shown}. Remove them with {removed}.{hint}")
    try:
        optimizer = cls(groups, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        shown = ", ".join(f"optimizer.{key}={value}" for key, value in arguments.items())
        raise UserError(f"{name} cannot be built from its settings ({shown}): {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer._target_={name} builds a {type(optimizer).__name__}, which is no optimizer.")
    return optimizer


def parameter_groups(net: nn.Module, lr: float, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and learning rate.

    The weights of convolutions, linear layers and embeddings decay. Biases and the parameters of other modules
    (normalization, scales) decay only with `decay_norm_and_bias`. The learning rate is multiplied by `bias_lr_factor`
    for biases, by `backbone_lr_factor` outside of the head, and by `layer_decay` for each layer between the parameter's
    and the logits, as in BEiT (Bao et al. 2022) and timm.
    """
    weight_decay, all_decay = settings.get("weight_decay", 0.0), settings.get("decay_norm_and_bias", False)
    bias_factor, backbone_factor = settings.get("bias_lr_factor", 1.0), settings.get("backbone_lr_factor", 1.0)
    head = {id(p) for p in head_of(net).parameters()} if backbone_factor != 1 else None
    layer_decay, named = settings.get("layer_decay"), dict(net.named_parameters())
    depths = depths_of(net) if layer_decay is not None else {}
    below = {id(named[name]): depth for name, depth in depths.items()}  # layers from each to the head
    groups: dict[tuple[int, bool, bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            is_bias = name.endswith("bias")
            decays = all_decay or (isinstance(module, DECAYING) and not is_bias)
            in_backbone = head is not None and id(parameter) not in head
            kind = (below.get(id(parameter), 0), in_backbone, is_bias and bias_factor != 1, not decays)
            groups.setdefault(kind, []).append(parameter)
    built: list[dict[str, Any]] = []
    for kind in sorted(groups):  # checkpoints have the groups in this order
        depth, in_backbone, is_bias, is_plain = kind
        name = ("no_decay" if is_plain else "decay") + "_bias" * is_bias + "_backbone" * in_backbone
        name += f"_{depth}_below_head" if depth else ""
        group_lr = lr * (bias_factor if is_bias else 1) * (backbone_factor if in_backbone else 1)
        group_lr *= (layer_decay or 1) ** depth
        decay = 0.0 if is_plain else weight_decay
        built.append({"params": groups[kind], "weight_decay": decay, "name": name, "lr": group_lr})
    return built


def warmup_steps(settings: dict[str, Any], steps_per_epoch: int) -> int:
    """Compute the optimizer steps of the warm-up in `conf/scheduler/*.yaml`: 0 for a `_target_`, as it is unknown."""
    if settings.get("_target_"):
        return 0
    return round(settings["warmup"] * (steps_per_epoch if settings["unit"] == "epoch" else 1))


def build_schedulers(
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    steps: int,
    steps_per_epoch: int,
    check_val_every_n_epoch: int = 1,
    trusted: Trusted = (),
    mode: Literal["min", "max"] | None = None,
) -> list[dict[str, Any]]:
    """Build Lightning's list of schedulers for `conf/scheduler/*.yaml`. The learning rate is logged as "lr".

    For `steps`, `steps_per_epoch`, `trusted` and `mode` see `OptimizerSettings`. A plateau schedule reads the metric of
    a validation every `check_val_every_n_epoch` epochs.

    Raises:
        UserError: `_target_` is not allowed, refuses a setting, or is no schedule that a run can step and resume.
    """
    monitor = settings.get("monitor")
    mode = mode or (mode_of(monitor) if monitor else "min")
    by_metric = {"reduce_on_plateau": True, "monitor": monitor, "frequency": check_val_every_n_epoch}
    if settings.get("_target_"):
        interval = settings.get("interval", "epoch")
        known: dict[str, Any] = lengths(settings, steps, steps_per_epoch, trusted)
        known |= {"max_lr": [group["lr"] for group in optimizer.param_groups], "t_in_epochs": interval == "epoch"}
        known |= {"mode": mode} if monitor else {}
        scheduler = build_own_scheduler(optimizer, settings, known, trusted)
        return [{"scheduler": scheduler, "interval": interval, "name": "lr", **(by_metric if monitor else {})}]
    warmup = warmup_steps(settings, steps_per_epoch)
    if settings["name"] != "plateau":
        factor = lr_factor(settings, steps, steps_per_epoch if settings["unit"] == "epoch" else 1, warmup)
        return [{"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"}]
    arguments = {key: settings[key] for key in ("factor", "patience", "min_lr")}
    plateau = ReduceLROnPlateau(optimizer, mode, **arguments)
    schedulers: list[dict[str, Any]] = [{"scheduler": plateau, "interval": "epoch", "name": "lr", **by_metric}]
    if warmup:  # both multiply the current learning rate, so they combine
        ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        schedulers.append({"scheduler": ramp, "interval": "step", "name": "lr-warmup"})
    return schedulers


def build_own_scheduler(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], known: dict[str, Any], trusted: Trusted
) -> Any:
    """Build the schedule `_target_` of torch, timm or the user.

    Schedules within it, as SequentialLR's, get the optimizer too.

    Args:
        known: passed if the constructor names it and the settings do not.
    """
    name, monitor = settings["_target_"], settings.get("monitor")

    def built(node: Any, of: torch.optim.Optimizer) -> Any:
        if isinstance(node, list):
            return [built(value, of) for value in node]
        if not isinstance(node, dict) or "_target_" not in node:
            return node
        return build({key: built(value, of) for key, value in node.items()}, trusted, {"optimizer": of})

    def built_for(of: torch.optim.Optimizer) -> Any:
        own = {key: built(value, of) for key, value in settings.items() if key not in ("interval", "monitor")}
        return build(own, trusted, known, optimizer=of)

    scheduler = built_for(optimizer)

    # what a run needs of it
    is_schedule = all(hasattr(scheduler, part) for part in ("step", "state_dict", "load_state_dict"))
    if not is_schedule or getattr(scheduler, "optimizer", None) is not optimizer:
        raise UserError(
            f"scheduler._target_={name} builds a {type(scheduler).__name__}, which is no schedule of the optimizer: "
            "derive it from torch.optim.lr_scheduler.LRScheduler."
        )
    if type(scheduler).__name__ == "PlateauLRScheduler":
        raise UserError(f"{name} does not save its counters, so no run could resume: use scheduler=plateau.")
    metrics = [argument for key, argument in inspect.signature(scheduler.step).parameters.items() if key != "epoch"]
    if monitor is None and any(argument.default is argument.empty for argument in metrics):
        raise UserError(f"`scheduler.monitor` is missing: {name} needs a metric, such as `monitor: ${{monitor}}`.")
    if monitor is not None and not metrics:
        raise UserError(f"`scheduler.monitor={monitor}` has no effect: {name} reads no metric. Remove the key.")
    check_state(name, scheduler.state_dict())
    if name.startswith("torch.optim.lr_scheduler.") and not metrics:  # the constructors take any type of value
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": group["lr"]} for group in optimizer.param_groups]
        trial = built_for(toy := torch.optim.SGD(groups, momentum=0.9))
        try:
            toy.step()
            trial.step()
        except Exception as error:
            raise UserError(f"{name} fails in its first step: {error}. Check the values in the yaml.") from error
    return scheduler


def lengths(settings: dict[str, Any], steps: int, steps_per_epoch: int, trusted: Trusted) -> dict[str, int]:
    """Return the arguments of the schedule `_target_` that follow from the length of the run, in units of `interval`.

    `total_iters` is only that of PolynomialLR: it is the length of a warm-up in LinearLR and ConstantLR.
    """
    named = names_of(settings["_target_"], trusted)
    by_epoch, epochs = settings.get("interval") != "step", -(-steps // steps_per_epoch)
    total = epochs if by_epoch else steps
    known = {"total_steps": total, "T_max": total, "t_initial": total}
    known |= {"total_iters": total} if settings["_target_"].endswith(".PolynomialLR") else {}
    if settings.get("warmup_prefix", "warmup_prefix" not in named):  # timm adds the warm-up to t_initial
        known["t_initial"] -= settings.get("warmup_t", 0)
    known |= {"epochs": epochs, "steps_per_epoch": 1 if by_epoch else steps_per_epoch}
    if {"epochs", "steps_per_epoch"} & settings.keys():  # OneCycleLR prefers total_steps
        del known["total_steps"]
    return {key: value for key, value in known.items() if key in named and key not in settings}


def check_state(name: str, state: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint with this state could not be read: checkpoints are read without running code."""
    try:
        torch.save(state, buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # whatever the user's objects raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: checkpoints need tensors and plain values from state_dict() ({reason}).") from error


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
    decay = max(1, round(settings.get("decay_fraction", 0.2) * steps))  # wsd

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / span)
        if name == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        if name == "linear":
            return floor + (1 - floor) * (1 - progress)
        if name == "wsd":  # MiniCPM (Hu et al. 2024), with the 1 - sqrt of Hägele et al. 2024
            fall = min(1.0, max(0, step - steps + decay) / decay)
            return floor + (1 - floor) * (1 - math.sqrt(fall))
        if name == "step":
            return gamma ** (step // period)
        if name == "multistep":
            return gamma ** sum(step >= milestone for milestone in milestones)
        assert name == "constant", name
        return 1.0

    return factor


def try_step(settings: dict[str, Any], trusted: Trusted = ()) -> None:
    """Raise UserError if the optimizer fails in the first step, or if no checkpoint can hold the state."""
    net = nn.Linear(2, 3, bias=False)
    optimizer = build_optimizer(net, {**settings, "layer_decay": None}, 1, may_fuse=False, trusted=trusted)

    def closure() -> Any:  # Lightning passes one to `step`
        loss = net(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{settings['_target_']} fails in its first step: {error}") from error
    check_state(settings["_target_"], optimizer.state_dict())
