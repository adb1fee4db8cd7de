"""Calculate batches, steps and the learning rate before a run starts. `dry_run=true` prints them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alexlab.engine import run_dir
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.errors import UserError, counted
from alexlab.tasks import optimizers

Images = dict[str, int]  # number of images of each split


@dataclass(frozen=True)
class Plan:
    """Batches, steps and learning rate of a run."""

    global_batch: int  # images per batch over all devices
    device_batch: int  # images per batch on one device; some have one more if the global batch does not divide
    step_images: int  # images per optimizer step: the global batch times the accumulated batches
    batches: int  # training batches per epoch
    steps_per_epoch: int  # optimizer steps
    steps: int  # optimizer steps of the whole run
    warmup: int  # optimizer steps of the warm-up
    lr: float  # the peak learning rate, scaled with the batch if `optimizer.lr_reference_batch` is set


def make_plan(config: Any, world_size: int, images: Images, train_batches: int | None = None) -> Plan:
    """Calculate the plan of `config` on `world_size` devices. Raises UserError if the batches do not fit.

    Args:
        train_batches: per epoch, of loaders that are not ours; None: whole batches of the training images.
    """
    t, batch = config.trainer, config.data.batch_size
    if batch < world_size:
        raise UserError(
            f"`data.batch_size={batch}` is the global batch, and there are {world_size} devices: choose "
            f"data.batch_size={world_size} or more."
        )
    if batch % world_size and train_batches is not None:
        below, above = batch // world_size * world_size, -(-batch // world_size) * world_size
        raise UserError(
            f"`data.batch_size={batch}` is the global batch and does not divide by {world_size} devices, which loaders "
            f"of your own need: choose data.batch_size={below} or {above}."
        )
    if images["train"] < batch:
        raise UserError(
            f"`data.batch_size={batch}` is larger than the {counted(images['train'], 'training image')}: choose "
            f"data.batch_size={max(world_size, images['train'])} or less."
        )
    overfit = t.overfit_batches or None  # replaces the three limits, as in Lightning
    available = train_batches or images["train"] // batch
    batches = _limited(available, "limit_train_batches", overfit or t.limit_train_batches)
    for split, key in (("val", "limit_val_batches"), ("test", "limit_test_batches")):
        if split in images:
            _limited(-(-images[split] // batch), key, overfit or getattr(t, key))
    steps_per_epoch = batches // t.accumulate_grad_batches
    if not steps_per_epoch:
        raise UserError(
            f"`trainer.accumulate_grad_batches={t.accumulate_grad_batches}` is more than the "
            f"{counted(batches, 'batch')} of an epoch: choose {batches} or less."
        )
    batches = steps_per_epoch * t.accumulate_grad_batches  # Lightning would make a last step of fewer batches
    interval = t.val_check_interval
    if isinstance(interval, int) and interval > batches:
        raise UserError(
            f"`trainer.val_check_interval={interval}` is more than the {counted(batches, 'batch')} of an epoch: choose "
            f"{batches} or less, or trainer.check_val_every_n_epoch=N to validate after several epochs."
        )
    step_images = batch * t.accumulate_grad_batches
    return Plan(
        global_batch=batch,
        device_batch=batch // world_size,
        step_images=step_images,
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        steps=total_steps(steps_per_epoch, t.max_epochs, t.max_steps),
        warmup=optimizers.warmup_steps(config.scheduler.model_dump(), steps_per_epoch),
        lr=optimizers.effective_lr(config.optimizer.model_dump(exclude_unset=True), step_images),
    )


def total_steps(steps_per_epoch: int, max_epochs: int | None, max_steps: int) -> int:
    """Return the optimizer steps of a whole run."""
    return min(end for end in (steps_per_epoch * (max_epochs or 0), max_steps) if end > 0)


def _limited(batches: int, key: str, limit: "int | float | None") -> int:
    """Return `batches` within Lightning's limit: a number of batches, or a fraction of them."""
    if limit is None:
        return batches
    if isinstance(limit, int):
        return min(batches, limit)
    if limit > 0 and int(batches * limit) == 0:
        raise UserError(
            f"`trainer.{key}={limit}` of {counted(batches, 'batch')} is less than one: give a number of batches "
            f"(trainer.{key}=1), or a fraction of at least {1 / batches:.3g}."
        )
    return int(batches * limit)


def show(plan: Plan, config: Any, devices: Devices, images: Images, net: nn.Module, classes: list[str]) -> None:
    """Print what `dry_run=true` shows."""
    settings, d = config.optimizer.model_dump(exclude_unset=True), config.data
    parameters = sum(p.numel() for p in net.parameters())
    reference = settings.get("lr_reference_batch")
    scaled = f" (optimizer.lr={settings['lr']:g} for {reference} images per step)" if reference else ""
    sizes = "".join(f", {side} from epoch {first} on" for first, side in config.augment.sizes or ())
    pixels = f"image_size {d.image_size}{sizes}, {config.model.in_channels} channels"
    per_device = f"{plan.device_batch}" + f" or {plan.device_batch + 1}" * (plan.global_batch % devices.world_size > 0)
    optimizer = settings["_target_"].rpartition(".")[2]
    schedule = config.scheduler.name or config.scheduler.target.rpartition(".")[2]
    warmup = f", {plan.warmup} of warm-up" if config.scheduler.name else ""
    names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    rows: dict[str, Any] = {
        "network": f"{config.model.name}, {parameters:,} parameters",
        "classes": f"{len(classes)}: {names}",
        "images": ", ".join(f"{name} {count:,}" for name, count in images.items()),
        "devices": f"{devices.world_size} x {devices.kind}, {choose_precision(config.trainer.precision, devices.kind)}",
        "global batch": f"{plan.global_batch} ({per_device} per device)",
        "images per optimizer step": plan.step_images,
        "data": f"{d.root or d.target}, {pixels}, augment={config.choices.get('augment')}",
        "learning rate": f"{plan.lr:g}{scaled}",
        "optimizer and schedule": f"{optimizer}, {schedule}",
        "steps": f"{plan.steps_per_epoch} per epoch, {plan.steps} in total{warmup}",
        "run directory": f"{run_dir.shown(Path(config.run_dir))} (not created)",
    }
    print("dry run")
    for key, value in rows.items():
        print(f"  {key:26} {value}")
