"""trainer.lr_find=true and trainer.batch_size_find=true: print a learning rate, and the largest batch, before a run.

Both train copies of the task, and leave the run's weights and random numbers as they were. The run itself uses the
values of its config: nothing that was found is set.
"""

import contextlib
import copy
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.memory import garbage_collection_cuda, is_oom_error
from pytorch_lightning.utilities.seed import isolate_rng

from alexlab.callbacks.freezing import Freezing
from alexlab.commands.build import plain_trainer
from alexlab.commands.plan import Plan
from alexlab.data.dataset import Batch
from alexlab.data.sources import Data
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.errors import UserError, counted
from alexlab.engine.run_dir import quiet_libraries
from alexlab.engine.schema import TrainConfig
from alexlab.tasks.base import RunModule
from alexlab.tasks.optimizers import OptimizerSettings, build_optimizer

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 100  # learning rates and optimizer steps of the range test
SMOOTHING = 0.9  # weight of the earlier losses in the running mean
DIVERGED = 4.0  # times the lowest loss: where the test stops
START_STEPS = 20  # steps before the rate can have an effect: their losses give the start and the noise
MIN_FALL = 0.02  # part of the start by which the loss must fall at least
FALL_FRACTION = 0.8  # part of the fall that is reached at the rate that is printed
RISE_FRACTION = 0.25  # part of the fall by which the loss rises again: what comes later is no part of the fall
ROWS, BAR = 15, 40  # of the printed curve
STEPS_OF_BATCH = 2  # the second one has the optimizer's state too


def find(config: TrainConfig, devices: Devices, data: Data, plan: Plan, task: RunModule) -> list[str]:
    """Do what `trainer.lr_find` and `trainer.batch_size_find` ask for; return the lines to print.

    Raises:
        UserError: there are several devices, a CPU for the batch, a task that builds its own optimizer, or not even
            one image fits on the GPU.
    """
    t = config.trainer
    wanted = [key for key in ("lr_find", "batch_size_find") if getattr(t, key)]
    if not wanted:
        return []
    if config.ckpt_path is not None:
        return [f"note: trainer.{wanted[0]}=true is ignored, because a resumed run keeps the values that it has."]
    if t.lr_find and not isinstance(getattr(task, "optimizer_settings", None), OptimizerSettings):
        raise UserError(
            f"`trainer.lr_find=true` needs a task that takes `optimizer`, and {type(task).__name__} builds its own "
            "optimizer: remove trainer.lr_find."
        )
    if devices.world_size > 1:
        raise UserError(
            f"`trainer.{wanted[0]}=true` searches on one device, and there are {devices.world_size}: search with "
            "trainer.devices=1 dry_run=true first, then train without it."
        )
    if t.batch_size_find and devices.kind == "cpu":
        raise UserError(
            "`trainer.batch_size_find=true` needs a GPU: on a CPU, time limits the batch, and a process that takes "
            "too much memory is killed."
        )
    quiet_libraries()
    lines = []
    with isolate_rng():
        if t.batch_size_find:
            lines += report_batch(largest_batch(config, devices.kind, data, task, plan), plan)
        if t.lr_find:
            lines += report_rates(*range_test(config, devices.kind, data, task, plan), plan.lr, config)
    return lines


# -- the learning rate


class DivergedError(Exception):
    """Ends the range test."""


class RangeTest(Callback):
    """Raise the learning rate from step to step, and record the loss of each (Smith 2015, arXiv 1506.01186).

    Groups with another rate than `lr`, the config's, such as biases, keep their ratio to it.
    """

    def __init__(self, lr: float, accumulate: int) -> None:
        self.lr, self.accumulate = lr, accumulate
        self.rates: list[float] = []
        self.losses: list[float] = []  # means of the batches of each step
        self.of_step: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ratios = [group["lr"] / self.lr for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rate = LOWEST * (HIGHEST / LOWEST) ** (trainer.global_step / (STEPS - 1))
        for group, ratio in zip(trainer.optimizers[0].param_groups, self.ratios, strict=True):
            group["lr"] = rate * ratio
        self.rate = rate

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.of_step.append(float(outputs["loss"]))
        if len(self.of_step) < self.accumulate:
            return
        loss, self.of_step = sum(self.of_step) / len(self.of_step), []
        if not math.isfinite(loss) or (self.losses and loss > DIVERGED * max(min(smooth([*self.losses, loss])), 1.0)):
            raise DivergedError
        self.rates.append(self.rate)
        self.losses.append(loss)


def range_test(
    config: TrainConfig, kind: str, data: Data, task: RunModule, plan: Plan
) -> tuple[list[float], list[float]]:
    """Train a copy of the task at rising learning rates, without a schedule; return the rates and the losses."""
    copied: Any = copy.deepcopy(task)
    settings: OptimizerSettings = copied.optimizer_settings
    copied.configure_optimizers = lambda: build_optimizer(
        copied.net, settings.optimizer, settings.images_per_step, may_fuse=False, trusted=settings.trusted
    )
    test = RangeTest(plan.lr, config.trainer.accumulate_grad_batches)
    freezing = [Freezing(config.finetune.freeze_epochs)] if config.finetune.freeze_epochs else []
    with contextlib.suppress(DivergedError):
        trainer_of(config, kind, [test, *freezing], STEPS, plan.batches).fit(copied, datamodule=data)
    return test.rates, test.losses


def smooth(losses: list[float]) -> list[float]:
    """Return the running mean of the losses, without the bias of the start."""
    means, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**number))
    return means


def fallen(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate at which the running mean of the losses has done `FALL_FRACTION` of the fall to the minimum.

    The minimum is the first one after which the loss rises by `RISE_FRACTION` of the fall. None if the fall is within
    the noise of single steps.
    """
    if len(losses) <= START_STEPS:
        return None
    means, start = smooth(losses), statistics.fmean(losses[:START_STEPS])
    noise, lowest = max(statistics.stdev(losses[:START_STEPS]), MIN_FALL * start), start
    for mean in means[START_STEPS:]:
        if mean - lowest > RISE_FRACTION * (start - lowest) and start - lowest > noise:
            break
        lowest = min(lowest, mean)
    if start - lowest <= noise:
        return None
    return next(
        rate
        for rate, mean in zip(rates[START_STEPS:], means[START_STEPS:], strict=True)
        if mean <= start - FALL_FRACTION * (start - lowest)
    )


def report_rates(rates: list[float], losses: list[float], lr: float, config: TrainConfig) -> list[str]:
    """Return the curve and the rate as lines."""
    rate, means = fallen(rates, losses), smooth(losses)
    rows = range(0, len(rates), max(1, len(rates) // ROWS))
    most = max((means[i] for i in rows), default=1.0)
    lines = ["learning rate   loss (running mean)"]
    lines += [f"{rates[i]:13.1e}   {means[i]:<7.4g} {'#' * round(BAR * means[i] / most)}" for i in rows]
    if rate is None:
        return [*lines, f"No rate is clearly good: the loss falls by less than the noise. This run uses {lr:.3g}."]
    reference = config.optimizer.lr_reference_batch
    shown = rate * config.optimizer.lr / lr  # of optimizer.lr, which may be for another batch
    scaled = f" (for lr_reference_batch={reference})" if reference else ""
    at = f"At {rate:.2g}, {FALL_FRACTION:.0%} of the fall is reached"
    return [*lines, f"{at}: try optimizer.lr={shown:.2g}{scaled}. This run uses {lr:.3g}."]


# -- the batch


def largest_batch(config: TrainConfig, kind: str, data: Data, task: RunModule, plan: Plan) -> int:
    """Return the largest batch, up to all training images, with which two steps of a copy of the task fit.

    Sizes are doubled until one does not fit; the range is then halved until it is an eighth of the size.
    """
    first: Any = next(iter(data.train_dataloader()))
    first = first if isinstance(first, Batch) else data.on_before_batch_transfer(first, 0)

    def fits(size: int) -> bool:
        rows = torch.arange(size) % len(first.targets)
        batch = first._replace(images=first.images[rows], targets=first.targets[rows])
        if first.crops is not None:
            batch = batch._replace(crops=(first.crops[0][rows], first.crops[1]))
        try:
            copied = copy.deepcopy(task)
            if config.compile:
                copied.net.compile()
            decay = config.ema.decay
            ema: list[Callback] = [] if decay is None else [pl.callbacks.EMAWeightAveraging(decay=decay)]
            trainer_of(config, kind, ema, STEPS_OF_BATCH).fit(copied, train_dataloaders=itertools.repeat(batch))
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            return False
        finally:
            if kind == "cuda":
                garbage_collection_cuda()
        return True

    return search(fits, plan.device_batch, data.images["train"])


def search(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Return the largest size from 1 to `most` that fits, to an eighth, or 0; `start` is tried first."""
    good, bad = 0, most + 1
    size = min(start, most)
    while size > good and bad - good > max(1, good // 8):
        if fits(size):
            good = size
        else:
            bad = size
        size = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


def report_batch(size: int, plan: Plan) -> list[str]:
    if not size:
        raise UserError("`trainer.batch_size_find=true`: not even one image fits: lower data.image_size.")
    power = 2 ** int(math.log2(size))
    text = f"The largest batch per device is {counted(size, 'image')}: try data.batch_size={power}. This run uses "
    return [f"{text}{plan.device_batch}. With another batch, another optimizer.lr is best."]


# -- both


def trainer_of(
    config: TrainConfig, kind: str, callbacks: list[Callback], steps: int, batches: int | None = None
) -> pl.Trainer:
    """Build a Trainer with the run's precision and clipping, for `steps` optimizer steps; `batches` are an epoch's."""
    t = config.trainer
    return plain_trainer(
        kind,
        choose_precision(t.precision, kind),
        callbacks,
        max_epochs=-1,
        max_steps=steps,
        limit_train_batches=batches,
        accumulate_grad_batches=t.accumulate_grad_batches,
        limit_val_batches=0,
        gradient_clip_val=t.gradient_clip_val,
        gradient_clip_algorithm=t.gradient_clip_algorithm,
        deterministic=t.deterministic,  # a global setting, as the next one
        benchmark=t.cudnn_benchmark and kind == "cuda",
    )
