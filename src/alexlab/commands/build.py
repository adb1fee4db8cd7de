"""Build the parts of a run from the config: data, plan, task, callbacks, loggers, trainer.

Network, optimizer and checkpoint are tried here once, so that a mistake is reported before the run's directory exists.
`trusted` is, in each function, the packages that the config may name, see `targets`.
"""

import copy
import math
import os
import re
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric import loggers as fabric
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torchmetrics import MetricCollection

from alexlab.callbacks.checkpointing import Checkpointing
from alexlab.callbacks.freezing import Freezing
from alexlab.callbacks.grad_norm import GradNorm
from alexlab.callbacks.media import Media
from alexlab.callbacks.nan_guard import NanGuard
from alexlab.callbacks.preemption import Preemption
from alexlab.callbacks.progress import ProgressBar, ProgressReporter
from alexlab.callbacks.same_weights import SameWeights
from alexlab.callbacks.throughput import Throughput
from alexlab.commands import sweep
from alexlab.commands.build_transforms import build_callable, build_transforms, try_batch, try_transforms
from alexlab.commands.checks import check_ckpt
from alexlab.commands.plan import Plan, make_plan
from alexlab.data import sources
from alexlab.data.datamodule import ImageFolders
from alexlab.data.own_module import OwnDataModule
from alexlab.data.sources import Data
from alexlab.data.transforms import SampleTransform, height_width
from alexlab.data.user_transforms import UserTransforms
from alexlab.engine import checkpoint_io, launcher, naming, provenance, resume, targets
from alexlab.engine import run_dir as run_dirs
from alexlab.engine.config import look_up
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.errors import UserError, counted
from alexlab.engine.overrides import command_line
from alexlab.engine.ranks import Environment, Ranks
from alexlab.engine.schema import OWN_TRAINER_KEYS, TrainConfig, mode_of
from alexlab.engine.signals import SignalRecorder
from alexlab.engine.text import printable, shorten
from alexlab.loggers.csv_logger import CsvLogger
from alexlab.loggers.tracker import Tracker
from alexlab.models.alexnet import AlexNet
from alexlab.models.introspection import head_of, normalization
from alexlab.tasks import optimizers
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import BaseTask, RunInfo, RunModule, adopt
from alexlab.tasks.load import (
    check_classes,
    check_statistics,
    load_initial_weights,
    rebuild,
    saved_statistics,
    statistics_of,
)
from alexlab.tasks.metrics import TOP_K, better, build_metrics, try_metrics

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import WandbLogger

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
SHIPPED_LOGGERS = {  # all but W&B, by their keys
    "tensorboard": "alexlab.loggers.tensorboard_logger.TensorBoardLogger",
    "mlflow": "alexlab.loggers.mlflow_logger.MlflowLogger",
}


@dataclass
class Experiment:
    """The parts of a run."""

    devices: Devices
    data: Data
    plan: Plan
    task: RunModule
    trainer: pl.Trainer
    preemption: Preemption
    checkpointing: Checkpointing
    wandb: "WandbLogger | None"  # of rank 0, if the run logs to W&B
    trackers: list[Tracker]  # the remaining loggers of rank 0
    trusted: targets.Trusted = ()
    facts: dict[str, Any] = field(default_factory=dict)  # what is known before the run starts, for summary.json

    @property
    def is_pruned(self) -> bool:
        """Whether a sweep's pruner has stopped the run."""
        return any(getattr(callback, "pruned", False) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]

    @property
    def throughput(self) -> Throughput:
        return next(c for c in self.trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]

    def last_metrics(self) -> dict[str, Any]:
        """Return the last value of each metric; if a resumed run had no step left, the values of the checkpoint."""
        return {**self.checkpointing.restored_metrics, **self.trainer.callback_metrics}


def build(
    config: TrainConfig,
    devices: Devices,
    recorder: SignalRecorder,
    trusted: targets.Trusted = (),
    ranks: Ranks | None = None,
) -> Experiment:
    """Build all parts of a run, once per rank.

    Raises:
        UserError: a mistake in the config, the images, the network, or a checkpoint that does not fit it.
    """
    ranks = ranks or Ranks()
    data = build_data(config, devices, build_transforms(config, trusted), trusted).read()
    if isinstance(data, OwnDataModule) and devices.local * devices.nodes != devices.world_size:
        raise UserError(
            f"{data.source}: Lightning divides the images, which needs as many ranks on each machine. This machine has "
            f"{devices.local} of {devices.world_size}."
        )
    plan = make_plan(config, devices.world_size, data.images, data.train_batches)
    pl.seed_everything(config.seed, verbose=False)
    if config.compile:
        check_compiler(devices.kind)
    task = build_task(config, data, devices.kind, plan, trusted)
    # rank 0 reads weights; `SameWeights` and the checkpoint plugin send them to all
    done = None
    if ranks.rank == 0 or config.trainer.strategy == "fsdp":
        done = load_checkpoint(config, task, data, plan, trusted)
    if config.compile:
        task.net.compile()  # in place: the names in the state dict stay
    loggers, wandb = build_loggers(config)
    trackers = build_trackers(config, done, trusted)
    loggers += [tracker.logger for tracker in trackers]
    preemption, checkpointing, callbacks = build_callbacks(config, recorder, plan, wandb, trusted, task.run.mode, ranks)
    is_own = isinstance(data, OwnDataModule)
    checkpointing.only_epochs = is_own
    trainer = build_trainer(config, devices, loggers, callbacks, plan.batches, type(task.net), is_own, ranks)
    preemption.install(trainer)
    checkpointing.install(trainer)
    return Experiment(devices, data, plan, task, trainer, preemption, checkpointing, wandb, trackers, trusted)


# -- data and task


def build_data(
    config: Any, devices: Devices, user: UserTransforms | None = None, trusted: targets.Trusted = ()
) -> Data:
    """Describe the images that the config names, and how to transform them; nothing is read yet."""
    d, a, channels = config.data, config.augment, config.model.in_channels
    sizes = tuple((first, pixels) for first, pixels in a.sizes or ())
    policy = (a.policy, a.policy_ops, a.policy_magnitude)
    crops = (a.crop, tuple(a.scale), tuple(a.ratio), a.crop_ratio, a.flip)
    train = SampleTransform(d.image_size, *crops, *policy, sizes, channels, user)
    if user is not None:
        try_transforms(train)
    facts = {
        "seed": config.seed,
        "train_transform": train,
        "eval_transform": SampleTransform(d.image_size, "center", crop_ratio=a.crop_ratio, channels=channels),
        "world_size": devices.world_size,
        "local_world_size": devices.local,
        "index_cache": str(config.paths.local / ".index"),
        "device": devices.kind,
        "timeout": 60 * config.trainer.timeout,
    }
    return sources.build_data(d, facts, trusted)


def build_task(
    config: TrainConfig, data: Data, kind: str, plan: Plan | None = None, trusted: targets.Trusted = ()
) -> RunModule:
    """Build the task around `config.model.net`, and try network, optimizer, loss and metrics once.

    `kind` is of the devices; `plan` is None for evaluation only.
    """
    if isinstance(data, ImageFolders) and data.multilabel != config.data.multilabel:
        one = "one class per image, and task=multilabel needs a list of them: use data=table."
        raise UserError(f"{data.root} has {'lists of labels: add task=multilabel.' if data.multilabel else one}")
    num_classes, trains = len(data.classes), plan is not None
    net = build_net(config, num_classes, trains, trusted)
    if trains and (config.finetune.freeze_epochs or config.finetune.backbone_lr_factor != 1):
        head_of(net, num_classes)  # raises if the head is unknown
    if plan is not None and plan.device_batch == 1:
        try_one_image(net, height_width(config.data.image_size), config)
    if config.monitor == f"val/acc{TOP_K}" and num_classes <= TOP_K and "acc5" not in config.metrics.model_dump():
        raise UserError(
            f"`monitor={config.monitor}` is 1 with {num_classes} classes, whatever is learned: use val/acc1."
        )
    mean, std = statistics_of(config, net)
    advice = net.advice(std) if trains and isinstance(net, AlexNet) else None

    # loss and metrics get these facts if their constructors name them, and the task gets all of `known`
    facts = {"num_classes": num_classes, "num_labels": num_classes, "class_names": data.readable_classes}
    facts["task"] = "multilabel" if config.data.multilabel else "multiclass"  # of torchmetrics
    note = print if launcher.prints() else lambda line: None
    if advice is not None:
        note(f"note: {advice}")
    criterion = build_loss(config, data, facts, trusted, trains)
    metrics = build_metrics(config.metrics.model_extra or {}, trusted, facts, max(data.images.values()), note)
    known = {**facts, "net": net, "criterion": criterion, "metrics": metrics}
    known["optimizer"] = build_optimizer_settings(config, net, metrics, plan, trusted) if plan else None
    known["augment"] = build_augment(config, mean, std, num_classes, trains, trusted)
    layout = config.trainer.channels_last
    known["run"] = RunInfo(
        class_names=data.readable_classes,
        seed=config.seed,
        monitor=config.monitor,
        mode=mode_of_monitor(config, metrics),
        max_bad=config.data.max_bad,
        channels_last=kind == "cuda" if layout == "auto" else layout,
        global_batch=config.data.batch_size,
        provenance={
            "config": config.model_dump(exclude_unset=True),
            "sources": provenance.source_hashes(net),
            **data.provenance(),
        },
    )
    arguments = config.task.model_dump(exclude_unset=True) or config.task.model_dump()
    if arguments.get("teacher") is not None:
        teacher = arguments["teacher"]
        arguments["teacher"] = build_teacher(teacher, data, (mean, std), trusted, config.allow) if trains else None

    # the task
    words = "LightningModule: give a class derived from it, or from alexlab.tasks.base.BaseTask"
    task = targets.build_part("task", arguments, pl.LightningModule, words, trusted, known)
    named = targets.names_of(config.task.target, trusted)
    parts = {"criterion": "loss", "metrics": "metrics", "optimizer": "optimizer and scheduler"}
    if unused := [part for name, part in parts.items() if name not in named]:
        note(f"note: {config.task.target} does not take {', '.join(unused)}: these settings are not used.")
    if not isinstance(task, BaseTask):
        if config.monitor_mode is None and not re.search("loss|acc", config.monitor):
            raise UserError(
                f"`monitor={config.monitor}`: add monitor_mode=max or monitor_mode=min, whichever is better."
            )
        return adopt(task, known["augment"], known["run"])
    names = task.metric_names("val")
    if config.monitor not in names:
        raise UserError(
            f"`monitor={config.monitor}` is not a metric of the validation: choose one of {', '.join(names)}."
        )
    try_loss_and_metrics(config, task, criterion, num_classes)
    return task


def build_net(config: TrainConfig, num_classes: int, trains: bool, trusted: targets.Trusted = ()) -> nn.Module:
    """Build the network, and try it on a black image of each size."""
    m = config.model
    fetch = trains and config.ckpt_path is None  # otherwise a checkpoint gives all weights
    net = targets.build_network(m.net, num_classes, fetch=fetch, trusted=trusted)
    for size in {height_width(config.data.image_size), *((side, side) for _, side in config.augment.sizes or ())}:
        try_net(net, size, num_classes, m.in_channels)
    return net


def try_one_image(net: nn.Module, size: tuple[int, int], config: TrainConfig) -> None:
    """Raise UserError if the network cannot train on one image per device, as BatchNorm of a single value cannot."""
    try:
        with torch.no_grad():
            copy.deepcopy(net).train()(torch.zeros(1, config.model.in_channels, *size))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"`data.batch_size={config.data.batch_size}` gives one image per device and step, from which BatchNorm of "
            f"{type(net).__name__} cannot compute a variance: use at least two images per device."
        ) from None


def check_compiler(kind: str) -> None:
    """Raise UserError if what `compile=true` needs besides torch is missing."""
    names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    names = names if kind == "cpu" else [os.environ.get("CC", "gcc"), "cc", "clang"]
    missing = None if any(map(shutil.which, names)) else f"a compiler ({' or '.join(names)})"
    if missing is None and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing = "Python's headers (Python.h)"
    if missing is not None:
        raise UserError(
            f"`compile=true` needs {missing}, which this machine lacks: install it, as with `apt install g++ "
            "python3-dev`, or add compile=false."
        )


def build_optimizer_settings(
    config: TrainConfig, net: nn.Module, metrics: MetricCollection, plan: Plan, trusted: targets.Trusted
) -> optimizers.OptimizerSettings:
    """Return the settings of optimizer and schedule, and try them on the network."""
    optimizer = config.optimizer.model_dump(exclude_unset=True)
    optimizer["backbone_lr_factor"] = config.finetune.backbone_lr_factor
    schedule = config.scheduler.model_dump(exclude_unset=config.scheduler.target is not None)
    run_length = plan.step_images, plan.steps, plan.steps_per_epoch
    mode = mode_of_monitor(config, metrics, config.scheduler.monitor)
    settings = optimizers.OptimizerSettings(optimizer, schedule, *run_length, trusted, mode)
    settings.build(net)
    return settings


def build_augment(
    config: TrainConfig, mean: list[float], std: list[float], num_classes: int, trains: bool, trusted: targets.Trusted
) -> BatchAugment:
    """Build what augments and normalizes batches on the device, and try the user's own `augment.batch`."""
    a = config.augment
    batch = build_callable(a.batch, "augment.batch", trusted) if a.batch is not None and trains else None
    augment = BatchAugment(mean, std, num_classes, a.pca, a.erase, a.mixup, a.cutmix, a.pca_by, batch)
    try_batch(augment, (config.model.in_channels, *height_width(config.data.image_size)))
    return augment


def build_loss(config: TrainConfig, data: Data, known: dict[str, Any], trusted: targets.Trusted, trains: bool) -> Any:
    """Build the loss of conf/loss; `class_weights` becomes a list of one number per class, in training only."""
    settings = config.loss.model_dump(exclude_unset=True) or config.loss.model_dump()
    named, smoothing = targets.names_of(config.loss.target, trusted), config.label_smoothing
    # null is unset
    settings = {k: v for k, v in settings.items() if v is not None or (k in named and k != "label_smoothing")}
    if smoothing and ("label_smoothing" not in named or settings.setdefault("label_smoothing", smoothing) != smoothing):
        raise UserError(
            f"`label_smoothing={smoothing}` would have no effect, because {config.loss.target} does not take it, or "
            "loss.label_smoothing has another value: remove one of them."
        )
    if settings.get("class_weights") is not None and "class_weights" in named:
        settings["class_weights"] = class_weights(settings["class_weights"], data) if trains else None
    criterion = targets.build_part("loss", settings, Callable, "loss: give a module, or a function", trusted, known)
    weights = criterion.parameters() if trains and isinstance(criterion, nn.Module) else ()
    if launcher.prints() and any(parameter.requires_grad for parameter in weights):
        print(f"note: {config.loss.target} has weights, which conf/optimizer does not train: a task of your own can.")
    return criterion


def class_weights(wanted: Any, data: Data) -> list[float]:
    """Return a weight per class: of a list, of a file of lines "class, weight", or `auto`.

    `auto` is images / (classes * images of the class), as scikit-learn's "balanced", which has the mean 1 over the
    images; for multi-label data, the images without the class / the images with the class.

    Raises:
        UserError: the weights do not fit the classes.
    """
    classes, shown = list(data.classes), f"`loss.class_weights={wanted}`"
    if wanted == "auto":
        if not isinstance(data, ImageFolders):
            raise UserError(f"{shown} counts the images of each class, which {data.source} does not list: give a list.")
        images, counts = data.images["train"], [max(count, 1) for count in data.class_counts]
        return [(images - n) / n if data.multilabel else images / (len(classes) * n) for n in counts]
    try:
        if isinstance(wanted, str):
            lines = [line.rpartition(",") for line in Path(wanted).expanduser().read_text().splitlines()]
            by_class = {name.strip(): weight for name, _, weight in lines}
            wanted = [by_class[name] for name in classes]
        weights = [float(weight) for weight in wanted]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{shown} must be auto, a list of numbers, or a file with a line `class, weight` for each class "
            f"({type(error).__name__}: {error})."
        ) from None
    if len(weights) != len(classes) or not all(0 <= weight < math.inf for weight in weights):
        raise UserError(f"{shown} must have one number of at least 0 for each of the {len(classes)} classes.")
    return weights


def build_teacher(
    wanted: Any, data: Data, mean_std: tuple[list[float], list[float]], trusted: targets.Trusted, allow: Sequence[str]
) -> nn.Module:
    """Build the network that a distillation learns from: of a checkpoint, or of a mapping with a `_target_`.

    Raises:
        UserError: the teacher has other classes, or expects inputs that are not normalized with `mean_std`.
    """
    if isinstance(wanted, dict):
        teacher = targets.build_network(wanted, len(data.classes), fetch=True, trusted=trusted)
        published = (getattr(teacher, "pretrained_cfg", None) or {}).get("num_classes", len(data.classes))
        if wanted.get("pretrained") and published != len(data.classes):
            raise UserError(
                f"`task.teacher`: the published weights know {published} classes, and the images have "
                f"{len(data.classes)}, so the teacher's last layer would be random: train a teacher on these images."
            )
        check_statistics(f"task.teacher={wanted['_target_']}", normalization(teacher), mean_std)
        return teacher
    checkpoint = checkpoint_io.load(Path(wanted))
    check_classes(checkpoint, data.classes, data.root)
    teacher = rebuild(checkpoint, (*allow, *(trusted or ()))).eval()
    check_statistics(f"task.teacher={wanted}", saved_statistics(checkpoint, teacher), mean_std)
    return teacher


def mode_of_monitor(
    config: TrainConfig, metrics: MetricCollection, monitor: str | None = None
) -> Literal["min", "max"]:
    """Return whether less or more of `monitor`, by default `config.monitor`, is better.

    `monitor_mode` says so, or the metric's `higher_is_better`, or the name.

    Raises:
        UserError: the metric does not say.
    """
    wanted = monitor or config.monitor
    name, given = wanted.removeprefix("val/"), config.monitor_mode if wanted == config.monitor else None
    mode = given or (better(metrics[name]) if name in metrics else mode_of(wanted))
    if mode is None:
        raise UserError(
            f"`monitor={wanted}`: {type(metrics[name]).__name__} does not say whether more is better: add "
            "monitor_mode=max or monitor_mode=min."
        )
    return mode


def try_loss_and_metrics(config: TrainConfig, task: BaseTask, criterion: Any, num_classes: int) -> None:
    """Pass random logits through loss and metrics, so that a mistake is found before training.

    Raises:
        UserError: the loss refuses the targets, as some refuse the soft ones of mixup and cutmix, or returns something
            else than one finite number; or a metric refuses the labels.
    """
    logits = torch.randn(8, num_classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % num_classes
    soft = torch.nn.functional.one_hot(labels, num_classes).float()
    kinds = {"labels, int64 (8,)": labels}
    if config.data.multilabel:
        kinds = {f"0 and 1, float32 (8, {num_classes})": soft}
    elif config.augment.mixup or config.augment.cutmix:
        mixed = f"the soft targets of augment.mixup and augment.cutmix, float32 (8, {num_classes})"
        kinds[mixed] = 0.8 * soft + 0.2 / num_classes
    for kind, targets_of_batch in kinds.items():
        try:
            loss = criterion(logits.clone().requires_grad_(), targets_of_batch)
            is_mean = loss.numel() == 1 and bool(torch.isfinite(loss)) and loss.requires_grad
        except Exception as error:  # of the user's code
            line = str(error).partition("\n")[0]
            raise UserError(f"loss: {config.loss.target} refuses {kind} ({line}): choose another loss.") from error
        if not is_mean:
            raise UserError(f"loss: {config.loss.target} must return one finite number, the mean of the batch.")
    labels = next(iter(kinds.values()))
    try_metrics(task.metrics["val"], task.probabilities(logits), task.labels_of(labels))


def load_checkpoint(
    config: TrainConfig, task: RunModule, data: Data, plan: Plan, trusted: targets.Trusted = ()
) -> int | None:
    """Load the weights of `init_from`, or check that training can continue from `ckpt_path`; return the steps done."""
    allowed = (*config.allow, *(trusted or ()))  # the checkpoint may be somebody else's
    if config.init_from is not None and config.ckpt_path is None:
        ckpt = Path(config.init_from)
        new_head = load_initial_weights(task.net, ckpt, data.classes, config, allowed)
        if launcher.prints():
            new = "; the last layer is new, because the classes differ" if new_head else ""
            print(f"initial weights: {run_dirs.shown(ckpt)}{new}", flush=True)
    if config.ckpt_path is not None:
        return check_ckpt(Path(config.ckpt_path), config, task.net, data, plan, allowed)
    return None


def try_net(net: nn.Module, size: tuple[int, int], num_classes: int, in_channels: int = 3) -> None:
    """Pass one black image of `size` (height, width) through the network.

    So a size that the network cannot take, or an output that is not logits (1, num_classes), is found before training.

    Raises:
        UserError: the network cannot take the size, or does not return logits (1, num_classes).
        Exception: a bug in the code of the network, such as a NameError.
    """
    training = net.training
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, in_channels, *size))
    except (RuntimeError, ValueError, AssertionError) as error:  # any other error is a bug
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames[1:] if f"{os.sep}site-packages{os.sep}" not in frame.filename]
        line = [*frames, *own][-1]  # of the network's code, if it is not a library's
        raise UserError(
            f"{type(net).__name__} fails on an image of {size[0]} x {size[1]} pixels: "
            f"{str(error).splitlines()[0]} ({Path(line.filename).name}, line {line.lineno}). Can it take "
            f"this `data.image_size` (or that of augment.sizes), and `model.in_channels={in_channels}`?"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{type(net).__name__} must return logits (B, {num_classes}), one for each class. For one image it returns "
            f"{shape}: give its last layer num_classes outputs."
        )
    net.train(training)


# -- loggers and callbacks


def build_loggers(config: TrainConfig) -> "tuple[list[Logger], WandbLogger | None]":
    """Build metrics.csv's logger, and on rank 0 W&B's. No file is written yet."""
    path, plain = Path(config.run_dir), config.model_dump(exclude_unset=True)
    loggers: list[Logger] = [CsvLogger(path)]
    wandb = None
    if launcher.rank() > 0:
        return loggers, wandb
    if config.logger.wandb is not None:
        from alexlab.loggers.wandb_logger import WandbLogger

        settings = config.logger.wandb.model_dump()
        # only these two: W&B shows the rest, in which a reference to a secret must stay a reference
        settings |= look_up({key: settings[key] for key in ("entity", "project")})
        settings["name"] = settings["name"] or naming.run_name(plain)
        of_sweep = shorten(printable(sweep.name_of(path) or ""), naming.MAX_GROUP)
        settings["group"] = settings["group"] or of_sweep or naming.group_name(plain)
        settings["tags"] = settings["tags"] or naming.tags(plain)
        wandb = WandbLogger(save_dir=str(path), **settings)
        loggers.append(wandb)
    return loggers, wandb


def build_trackers(config: TrainConfig, done: int | None = None, trusted: targets.Trusted = ()) -> list[Tracker]:
    """Build the remaining loggers of the config, on rank 0. Ours write nothing into the run directory yet.

    Args:
        done: steps of the checkpoint that the run continues. The steps after it are logged again.
    """
    ours = config.logger.model_dump(include={*SHIPPED_LOGGERS}, exclude_none=True)
    own = config.logger.model_extra or {}  # the user's
    mlflow, name = config.logger.mlflow, naming.run_name(config.model_dump(exclude_unset=True))
    if mlflow is not None and mlflow.tracking_uri and trusted is not None and "mlflow" not in trusted:
        raise UserError(
            f"logger.mlflow.tracking_uri={mlflow.tracking_uri} is from the config of a run, and would get your metrics "
            "and your MLFLOW_TRACKING_TOKEN. If you trust this run, add allow=[mlflow], here or in conf/allow.yaml."
        )
    known: dict[str, Any] = {
        "save_dir": config.run_dir,
        "logs": str(config.paths.local),
        "name": name,
        "run_name": name,
    }
    known |= {"version": Path(config.run_dir).name, "purge_step": done}
    trackers = []
    words = "logger: give a class derived from pytorch_lightning.loggers.Logger (not one of the package `lightning`)"
    for key, entry in ({**ours, **own} if launcher.rank() == 0 else {}).items():
        settings = look_up(entry) if key in own else {"_target_": SHIPPED_LOGGERS[key], **entry}
        allowed = trusted if key in own else None
        logger = targets.build_part(f"logger.{key}", settings, fabric.Logger, words, allowed, known)
        trackers.append(Tracker(key, logger))
    return trackers


def build_callbacks(
    config: TrainConfig,
    recorder: SignalRecorder,
    plan: Plan,
    wandb: "WandbLogger | None",
    trusted: targets.Trusted = (),
    mode: str | None = None,
    ranks: Ranks | None = None,
) -> tuple[Preemption, Checkpointing, list[Callback]]:
    """Build the callbacks in the order in which Lightning must call them: the user's own first."""
    path, wanted = Path(config.run_dir), config.callbacks
    folder = path / "checkpoints"

    callbacks = build_own_callbacks(config, trusted)
    if (pruning := sweep.make_pruning_callback(config, launcher.rank())) is not None:
        callbacks.append(pruning)

    # stopping, checkpoints, NaN
    ranks = ranks or Ranks()
    preemption = Preemption(recorder, ranks)
    nan_guard = NanGuard(
        config.on_nan, folder / checkpoint_io.LAST, command_line("train", f"resume={run_dirs.shown(path)}")
    )
    every = config.checkpoint.every_n_steps, config.checkpoint.every_minutes
    is_own = resume.is_own(config.ckpt_path, path)
    checkpointing = Checkpointing(folder, preemption, nan_guard, *every, plan.steps_per_epoch, is_own)
    callbacks += [nan_guard, preemption, checkpointing]
    starts_from = config.init_from if config.ckpt_path is None else None
    if starts_from is not None and config.trainer.strategy != "fsdp":  # of which each rank reads the weights
        callbacks.append(SameWeights(ranks))

    # what is logged and shown, early stopping, averaged weights
    if wanted.lr_monitor:
        callbacks.append(LearningRateMonitor("step"))
    if wanted.model_summary:
        callbacks.append(pl.callbacks.RichModelSummary(wanted.model_summary))
    if wanted.device_stats:
        callbacks.append(pl.callbacks.DeviceStatsMonitor())
    if wanted.grad_norm:
        callbacks.append(GradNorm())
    if (patience := wanted.early_stopping) is not None:
        callbacks.append(
            pl.callbacks.EarlyStopping(config.monitor, patience=patience, mode=mode or mode_of(config.monitor))
        )
    if config.ema.decay is not None:
        callbacks.append(pl.callbacks.EMAWeightAveraging(decay=config.ema.decay))
    if config.finetune.freeze_epochs:
        callbacks.append(Freezing(config.finetune.freeze_epochs))
    kind = _progress_kind(wanted.progress)
    if kind == "rich":
        callbacks.append(ProgressBar(leave=True))
    callbacks.append(ProgressReporter(console=kind == "plain"))
    if wanted.figures:
        callbacks.append(Media(path / "figures", wandb, ranks=ranks))
    callbacks.append(Throughput(config.data.batch_size))  # last, so that callbacks do not count as waiting for data
    return preemption, checkpointing, callbacks


def build_own_callbacks(config: TrainConfig, trusted: targets.Trusted = ()) -> list[Callback]:
    """Build the user's own callbacks: the entries of `callbacks` that have a _target_."""
    built, words = [], "callback: give a class derived from pytorch_lightning.Callback"
    for name, entry in (config.callbacks.model_extra or {}).items():
        # a checkpoint has all weights
        settings = entry if config.ckpt_path is None else targets.without_weights(entry, trusted)
        built.append(targets.build_part(f"callbacks.{name}", look_up(settings), Callback, words, trusted))
    return built


def _progress_kind(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "rich" if sys.stdout.isatty() and launcher.rank() == 0 else "plain"


# -- trainer


def build_trainer(
    config: TrainConfig,
    devices: Devices,
    loggers: list[Logger],
    callbacks: Sequence[Callback],
    batches: int | None = None,
    net_type: type[nn.Module] = nn.Module,
    divides_images: bool = False,
    ranks: Ranks | None = None,
) -> pl.Trainer:
    """Build Lightning's Trainer.

    Args:
        batches: training batches per epoch, if they are known.
        net_type: class of the network, which FSDP shards as one unit.
        divides_images: let Lightning divide the images among the ranks, for loaders that are not ours.
    """
    t, path = config.trainer, Path(config.run_dir)
    settings = t.model_dump(exclude={*OWN_TRAINER_KEYS, "accelerator", "num_nodes"})
    settings["devices"] = t.devices if isinstance(t.devices, list) else devices.local
    if batches is not None:
        steps = max(1, batches // t.accumulate_grad_batches)
        settings["log_every_n_steps"] = min(t.log_every_n_steps, steps)  # at least one row of metrics per epoch
        settings["overfit_batches" if t.overfit_batches else "limit_train_batches"] = batches
    if devices.kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = t.tf32
    if t.profiler is not None:
        settings["profiler"] = PROFILERS[t.profiler](dirpath=path, filename="profile")
    plugins: list[Any] = [checkpoint_io.AtomicCheckpointIO(ranks)]
    if ranks is not None and ranks.size > 1:
        plugins.append(Environment())
    return pl.Trainer(
        **settings,
        accelerator={"cuda": "gpu"}.get(devices.kind, devices.kind),
        num_nodes=devices.nodes,
        precision=choose_precision(t.precision, devices.kind),
        strategy=_strategy(config, devices, net_type),
        plugins=plugins,
        benchmark=t.cudnn_benchmark and devices.kind == "cuda",
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in callbacks),  # a user's own
        logger=loggers,
        default_root_dir=str(path),
        enable_model_summary=False,
        enable_progress_bar=_progress_kind(config.callbacks.progress) == "rich",
        use_distributed_sampler=divides_images,
    )


def plain_trainer(kind: str, precision: Any, callbacks: Sequence[Callback], **settings: Any) -> pl.Trainer:
    """Build a Trainer for one device of this kind that writes and prints nothing; `settings` are Lightning's."""
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(kind, kind),
        devices=1,
        precision=precision,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )


def _strategy(config: TrainConfig, devices: Devices, net_type: type[nn.Module]) -> "Strategy | str":
    timeout = timedelta(minutes=config.trainer.timeout)
    several = devices.kind == "cuda" and devices.world_size > 1 and config.trainer.strategy != "fsdp"
    if config.trainer.grad_compression is not None and not several:
        raise UserError(
            f"`trainer.grad_compression={config.trainer.grad_compression}` needs trainer=ddp on several GPUs, and this "
            f"run has {counted(devices.world_size, 'device')} ({devices.kind}): set it to null."
        )
    if config.trainer.strategy == "fsdp":
        is_mixed = "mixed" in str(choose_precision(config.trainer.precision, devices.kind))
        float32 = MixedPrecision(torch.float32, torch.float32, torch.float32)
        return FSDPStrategy(
            timeout=timeout,
            state_dict_type="full",
            # without a unit below the LightningModule, the test after the training would find it wrapped twice
            auto_wrap_policy=ModuleWrapPolicy({net_type}),
            # autocast mixes the precisions, as under DDP; Lightning's default would keep BatchNorm's averages in bf16
            mixed_precision=float32 if is_mixed else None,
        )
    if devices.world_size == 1:
        return "auto"
    compress = default_hooks.bf16_compress_hook if config.trainer.grad_compression == "bf16" else None
    return DDPStrategy(
        ddp_comm_hook=compress,
        process_group_backend="nccl" if devices.kind == "cuda" else "gloo",
        timeout=timeout,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the task averages BatchNorm's statistics before each validation
        find_unused_parameters=config.finetune.freeze_epochs > 0,  # frozen layers get no gradient
    )
