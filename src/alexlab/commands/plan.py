"""What a run will do, worked out before it starts: batches, steps, rates. `dry_run=true` prints it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from alexlab.engine import config as configs
from alexlab.engine import run_dir as rundir
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.errors import UserError
from alexlab.tasks import optimizers as optim

Images = dict[str, int]  # of each split


@dataclass(frozen=True)
class Plan:
    """Counts of a run.

    Attributes:
        global_batch: images a batch over all devices.
        device_batch: images a batch on one device.
        step_images: images an optimizer step: global batch times accumulated batches.
        batches: training batches an epoch.
        steps_per_epoch: optimizer steps an epoch.
        steps: optimizer steps of the whole run.
        warmup: of these, those of the warm-up.
        left_out: training images that an epoch does not see, other ones each time.
        lr: the rate at its full height, scaled with the batch if that was asked for.
    """

    global_batch: int
    device_batch: int
    step_images: int
    batches: int
    steps_per_epoch: int
    steps: int
    warmup: int
    left_out: int
    lr: float


def make_plan(config: DictConfig, world_size: int, images: Images) -> Plan:
    """The counts of `config` on `world_size` devices.

    Raises:
        UserError: a batch that does not divide or is larger than the training images, or limits that leave no batch.
    """
    t, batch = config.trainer, config.data.batch_size
    if batch % world_size:
        below, above = max(world_size, batch // world_size * world_size), -(-batch // world_size) * world_size
        raise UserError(
            f"data.batch_size={batch} is the global batch and does not divide by {world_size} devices: choose "
            f"data.batch_size={below} or {above}."
        )
    if images["train"] < batch:
        most = max(world_size, images["train"] // world_size * world_size)
        raise UserError(
            f"data.batch_size={batch} is larger than the {images['train']} training images: choose "
            f"data.batch_size={most} or less."
        )
    overfit = t.overfit_batches or None  # stands in for the three limits, as in Lightning
    batches = _limited(images["train"] // batch, "limit_train_batches", overfit or t.limit_train_batches)
    for split, key in (("val", "limit_val_batches"), ("test", "limit_test_batches")):
        if split in images:
            _limited(-(-images[split] // batch), key, overfit or t[key])
    steps_per_epoch = batches // t.accumulate_grad_batches
    if not steps_per_epoch:
        raise UserError(
            f"trainer.accumulate_grad_batches={t.accumulate_grad_batches} is more than the {batches} batches of an "
            f"epoch: choose {batches} or less."
        )
    batches = steps_per_epoch * t.accumulate_grad_batches  # a last step of fewer batches would be a smaller one
    ends = [end for end in (steps_per_epoch * (t.max_epochs or 0), t.max_steps) if end > 0]
    step_images = batch * t.accumulate_grad_batches
    return Plan(
        global_batch=batch,
        device_batch=batch // world_size,
        step_images=step_images,
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        steps=min(ends),
        warmup=optim.warmup_steps(configs.plain(config.scheduler), steps_per_epoch),
        left_out=images["train"] - batches * batch,
        lr=optim.effective_lr(configs.plain(config.optimizer), step_images),
    )


def _limited(batches: int, key: str, limit: "int | float | None") -> int:
    """`batches` within Lightning's limit: a number of them, or a share."""
    if limit is None:
        return batches
    if isinstance(limit, int):
        return min(batches, limit)
    if limit > 0 and int(batches * limit) == 0:
        raise UserError(
            f"trainer.{key}={limit} of {batches} batches is less than one: give a number of batches "
            f"(trainer.{key}=1), or a share of at least {1 / batches:.3g}."
        )
    return int(batches * limit)


def checkpoint_bytes(net: nn.Module, config: DictConfig, states: int) -> dict[str, int]:
    """About how large the checkpoints become.

    Args:
        states: tensors of a parameter's size that the optimizer keeps for it.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    averages = weights if config.ema.decay is not None else 0
    trained = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    last = weights + averages + states * trained
    return {"best": weights + averages, "last": last, "previous": last}


def show(plan: Plan, config: DictConfig, devices: Devices, images: Images, net: nn.Module, classes: int) -> None:
    """Print the essentials: the task of dry_run=true."""
    settings = configs.plain(config.optimizer)
    parameters = sum(p.numel() for p in net.parameters())
    size = checkpoint_bytes(net, config, optim.state_tensors(settings))
    reference = settings.get("lr_reference_batch")
    scaled = f" (optimizer.lr={settings['lr']:g} for {reference} images a step)" if reference else ""
    sizes, finetune = config.augment.get("sizes"), config.finetune
    pixels = f"{config.data.image_size} pixels"
    pixels += f" ({', '.join(f'{side} from epoch {first} on' for first, side in sizes)})" if sizes else ""
    tuned = f"; x {finetune.backbone_lr_factor:g} but for the head" if finetune.backbone_lr_factor != 1 else ""
    tuned += f"; the head alone for {finetune.freeze_epochs} epochs" if finetune.freeze_epochs else ""
    rows: dict[str, Any] = {
        "network": f"{config.model.name}, {parameters:,} parameters, {classes} classes",
        "images": ", ".join(f"{name} {count:,}" for name, count in images.items()),
        "devices": f"{devices.world_size} x {devices.kind}, {choose_precision(config.trainer.precision, devices.kind)}",
        "global batch": f"{plan.global_batch} ({plan.device_batch} a device)",
        "images an optimizer step": plan.step_images,
        "data": f"{config.data.root}, {pixels}, augment={config.choices.get('augment')}",
        "learning rate": f"{plan.lr:g}{scaled}{tuned}",
        "schedule": f"{settings['_target_'].rpartition('.')[2]}, {config.scheduler.name}",
        "steps": f"{plan.steps_per_epoch} an epoch, {plan.steps} in all, {plan.warmup} of warm-up",
        "left out an epoch": f"{plan.left_out} images, others each time",
        "checkpoints": f"about {size['last'] / 1e6:.0f} MB (last, and one before), {size['best'] / 1e6:.0f} MB (best)",
        "run directory": f"{rundir.shown(Path(config.run_dir))} (not made)",
    }
    table = Table(title="dry run", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)
