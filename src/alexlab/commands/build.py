"""Build the parts of a run from the config: data, plan, task, callbacks, loggers, trainer.

Network, optimizer and checkpoint are tried here once, so that a mistake is reported before the run's directory exists.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from alexlab import models
from alexlab.callbacks.checkpointing import Checkpointing
from alexlab.callbacks.freezing import Freezing
from alexlab.callbacks.grad_norm import GradNorm
from alexlab.callbacks.lr_monitor import LearningRateLogger
from alexlab.callbacks.media import Media
from alexlab.callbacks.nan_guard import NanGuard
from alexlab.callbacks.preemption import Preemption, SignalRecorder
from alexlab.callbacks.progress import ProgressBar, ProgressReporter
from alexlab.callbacks.same_config import SameConfig
from alexlab.callbacks.throughput import Throughput
from alexlab.commands import sweep
from alexlab.commands.checks import check_ckpt
from alexlab.commands.plan import Plan, make_plan
from alexlab.data import sources
from alexlab.data.own_module import OwnDataModule
from alexlab.data.sources import Data
from alexlab.data.transforms import SampleTransform
from alexlab.engine import checkpoint_io, launcher, naming, provenance, resume, targets
from alexlab.engine import run_dir as run_dirs
from alexlab.engine.config import look_up
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.errors import UserError
from alexlab.engine.schema import OWN_TRAINER_KEYS, TrainConfig, mode_of
from alexlab.loggers.csv_logger import CsvLogger
from alexlab.models.introspection import head_of, normalization
from alexlab.tasks import optimizers
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import RunInfo
from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.load import load_initial_weights
from alexlab.tasks.losses import CrossEntropy

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import WandbLogger

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


@dataclass
class Experiment:
    """The parts of a run.

    Attributes:
        wandb: the W&B logger of rank 0, if the run has one.
        trusted: packages that the config may name, see `targets`.
        facts: what is known before the run starts, for summary.json.
    """

    devices: Devices
    data: Data
    plan: Plan
    task: ImageClassifier
    trainer: pl.Trainer
    preemption: Preemption
    checkpointing: Checkpointing
    wandb: "WandbLogger | None"
    trusted: targets.Trusted = ()
    facts: dict[str, Any] = field(default_factory=dict)

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


def build(config: TrainConfig, devices: Devices, recorder: SignalRecorder, trusted: targets.Trusted = ()) -> Experiment:
    """Build all parts of a run, once per rank.

    Args:
        trusted: packages that the config may name, see `targets`.

    Raises:
        UserError: a mistake in the config, the images, the network, or a checkpoint that does not fit it.
    """
    data = build_data(config, devices, trusted).read()
    plan = make_plan(config, devices.world_size, data.images, data.train_batches)
    pl.seed_everything(config.seed, verbose=False)
    task = build_task(config, data, devices.kind, plan, trusted)
    done = load_checkpoint(config, task, data, plan, trusted)
    if config.compile:
        task.net.compile()  # in place: the names in the state dict stay
    loggers, wandb = build_loggers(config, done)
    preemption, checkpointing, callbacks = build_callbacks(config, recorder, plan, wandb, trusted)
    is_own = isinstance(data, OwnDataModule)
    checkpointing.only_epochs = is_own
    trainer = build_trainer(config, devices, loggers, callbacks, plan.batches, type(task.net), is_own)
    preemption.install(trainer)
    checkpointing.install(trainer)
    return Experiment(devices, data, plan, task, trainer, preemption, checkpointing, wandb, trusted)


# -- data and task


def build_data(config: Any, devices: Devices, trusted: targets.Trusted = ()) -> Data:
    """Describe the images that the config's `data` and `augment` name; nothing is read yet.

    Args:
        trusted: packages that the config may name, see `targets`.
    """
    d, a = config.data, config.augment
    sizes = tuple((first, pixels) for first, pixels in a.sizes or ())
    policy = (a.policy, a.policy_ops, a.policy_magnitude)
    train = SampleTransform(d.image_size, a.crop, tuple(a.scale), tuple(a.ratio), a.crop_ratio, a.flip, *policy, sizes)
    facts = {
        "seed": config.seed,
        "train_transform": train,
        "eval_transform": SampleTransform(d.image_size, "center", crop_ratio=a.crop_ratio),
        "world_size": devices.world_size,
        "local_world_size": devices.local,
        "index_cache": str(Path(config.paths.logs, ".index")),
        "device": devices.kind,
        "timeout": 60 * config.trainer.timeout,
    }
    return sources.build_data(d, facts, trusted)


def build_task(
    config: TrainConfig, data: Data, kind: str, plan: Plan | None = None, trusted: targets.Trusted = ()
) -> ImageClassifier:
    """Build the task around `config.model.net`, and try its network and optimizer once.

    Args:
        kind: of the devices.
        plan: None for evaluation only.
    """
    a, m, num_classes = config.augment, config.model, len(data.classes)
    has_weights = plan is None or config.ckpt_path is not None  # a checkpoint gives all weights
    net = targets.build_network(m.net, num_classes, fetch=not has_weights, trusted=trusted)
    for size in {config.data.image_size, *(pixels for _, pixels in a.sizes or ())}:
        try_net(net, size, num_classes)
    settings = None
    if plan is not None:
        if config.finetune.freeze_epochs or config.finetune.backbone_lr_factor != 1:
            head_of(net, num_classes)
        optimizer = config.optimizer.model_dump(exclude_unset=True)
        optimizer["backbone_lr_factor"] = config.finetune.backbone_lr_factor
        optimizers.build_optimizer(net, optimizer, plan.step_images, trusted=trusted)
        settings = optimizers.OptimizerSettings(
            optimizer, config.scheduler.model_dump(), plan.step_images, plan.steps, plan.steps_per_epoch, trusted
        )
    layout = config.trainer.channels_last
    origin = {"config": config.model_dump(exclude_unset=True), "sources": provenance.source_hashes(net)}
    run = RunInfo(
        class_names=data.readable_classes,
        seed=config.seed,
        monitor=config.monitor,
        max_bad=config.data.max_bad,
        channels_last=kind == "cuda" if layout == "auto" else layout,
        provenance={**origin, **data.provenance()},
    )
    mean, std = normalization(net, m.mean, m.std)
    augment = BatchAugment(mean, std, num_classes, a.pca, a.erase, a.mixup, a.cutmix, a.pca_by)
    task = ImageClassifier(net, augment, CrossEntropy(config.label_smoothing), optimizer=settings, run=run)
    metrics = task.metric_names("val")
    if config.monitor not in metrics:
        raise UserError(
            f"`monitor={config.monitor}` is not a metric of the validation: choose one of {', '.join(metrics)}."
        )
    return task


def load_checkpoint(
    config: TrainConfig, task: ImageClassifier, data: Data, plan: Plan, trusted: targets.Trusted = ()
) -> int | None:
    """Load the weights of `init_from`, or check that training can continue from `ckpt_path`; return its steps."""
    path = Path(config.run_dir)
    if config.init_from is not None:
        ckpt, mean_std = Path(config.init_from), normalization(task.net, config.model.mean, config.model.std)
        allowed = (*config.allow, *(trusted or ()))  # the checkpoint may be somebody else's
        new_head = load_initial_weights(task.net, ckpt, data.classes, config.data.image_size, *mean_std, allowed)
        if launcher.prints():
            new = "; the last layer is new, because the classes differ" if new_head else ""
            print(f"initial weights: {run_dirs.shown(ckpt)}{new}", flush=True)
    if config.ckpt_path is not None:
        return check_ckpt(
            Path(config.ckpt_path),
            config.model_dump(exclude_unset=True),
            task.net,
            data.describe(),
            list(data.classes),
            plan,
            resumes=config.resume.run is not None,
            finished=run_dirs.read_summary(path).get("status") == "finished",
            trusted=(*config.allow, *(trusted or ())),
        )
    return None


def try_net(net: nn.Module, image_size: int, num_classes: int) -> None:
    """Pass one black image through the network, so that a size that it cannot take is found before training.

    Raises:
        UserError: the network cannot take the size, or does not return logits (1, num_classes).
        Exception: a bug in the code of the network, such as a NameError.
    """
    training = net.training
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:  # any other error is a bug
        line = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and Path(line.filename).parent == Path(models.__file__).parent:
            raise UserError(str(error)) from error  # a network of alexlab.models explains its own rule
        raise UserError(
            f"{type(net).__name__} fails on an image of {image_size} x {image_size} pixels: "
            f"{str(error).splitlines()[0]} ({Path(line.filename).name}, line {line.lineno}). Can it take "
            f"`data.image_size={image_size}` (or that of augment.sizes), and three channels?"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"The network must return logits (B, {num_classes}), and returns {shape} for one image.")
    net.train(training)


# -- loggers and callbacks


def build_loggers(config: TrainConfig, done: int | None = None) -> "tuple[list[Logger], WandbLogger | None]":
    """Build the loggers of this rank: metrics.csv always, and on rank 0 those of the config. No file is written yet.

    Args:
        done: steps of the checkpoint that the run continues. The steps after it are logged again.
    """
    path, plain = Path(config.run_dir), config.model_dump(exclude_unset=True)
    loggers: list[Logger] = [CsvLogger(path)]
    wandb = None
    if launcher.rank() > 0:
        return loggers, wandb
    if config.logger.wandb is not None:
        from alexlab.loggers.wandb_logger import WandbLogger

        settings = config.logger.wandb.model_dump()
        # only these two: W&B shows all other texts, and a reference to a secret must stay a reference there
        settings |= look_up({key: settings[key] for key in ("entity", "project")})
        settings["name"] = settings["name"] or naming.run_name(plain)
        settings["group"] = settings["group"] or sweep.name_of(path) or naming.group_name(plain)
        settings["tags"] = settings["tags"] or naming.tags(plain)
        wandb = WandbLogger(save_dir=str(path), **settings)
        loggers.append(wandb)
    if config.logger.tensorboard is not None:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(path), name="", version="tensorboard", purge_step=done))
    return loggers, wandb


def build_callbacks(
    config: TrainConfig,
    recorder: SignalRecorder,
    plan: Plan,
    wandb: "WandbLogger | None",
    trusted: targets.Trusted = (),
) -> tuple[Preemption, Checkpointing, list[Callback]]:
    """Build the callbacks in the order in which Lightning must call them: the user's own first."""
    path, wanted = Path(config.run_dir), config.callbacks
    folder = path / "checkpoints"

    callbacks = build_own_callbacks(config, trusted)
    if (pruning := sweep.make_pruning_callback(config, launcher.rank())) is not None:
        callbacks.append(pruning)

    # stopping, checkpoints, NaN
    preemption = Preemption(recorder, timedelta(minutes=config.trainer.timeout))
    nan_guard = NanGuard(config.on_nan, folder / checkpoint_io.LAST, f"python train.py resume={run_dirs.shown(path)}")
    restores_best = False  # whether the best value of the checkpoint, whose best.ckpt exists, is still the best
    if config.ckpt_path is not None:
        ckpt = Path(config.ckpt_path)
        restores_best = resume.is_own(ckpt, path) or resume.best_of_same_run(ckpt, config.monitor) is not None
    every = config.checkpoint.every_n_steps, config.checkpoint.every_minutes
    checkpointing = Checkpointing(folder, preemption, nan_guard, *every, plan.steps_per_epoch, restores_best)
    callbacks += [nan_guard, preemption, checkpointing, SameConfig(config.model_dump(exclude_unset=True))]

    # what is logged and shown, early stopping, averaged weights
    if wanted.lr_monitor:
        callbacks.append(LearningRateLogger("step"))
    if wanted.model_summary:
        callbacks.append(pl.callbacks.RichModelSummary(wanted.model_summary))
    if wanted.device_stats:
        callbacks.append(pl.callbacks.DeviceStatsMonitor())
    if wanted.grad_norm:
        callbacks.append(GradNorm())
    if (patience := wanted.early_stopping) is not None:
        monitor = config.monitor
        callbacks.append(pl.callbacks.EarlyStopping(monitor, patience=patience, mode=mode_of(monitor)))
    if config.ema.decay is not None:
        callbacks.append(pl.callbacks.EMAWeightAveraging(decay=config.ema.decay))
    if config.finetune.freeze_epochs:
        callbacks.append(Freezing(config.finetune.freeze_epochs))
    kind = _progress_kind(wanted.progress)
    if kind == "rich":
        callbacks.append(ProgressBar(leave=True))
    callbacks.append(ProgressReporter(console=kind == "plain"))
    if wanted.figures:
        callbacks.append(Media(path / "figures", wandb))
    callbacks.append(Throughput(config.data.batch_size))  # last: it must not count callbacks as waiting for data
    return preemption, checkpointing, callbacks


def build_own_callbacks(config: TrainConfig, trusted: targets.Trusted = ()) -> list[Callback]:
    """Build the user's own callbacks: the entries of `callbacks` that have a _target_."""
    built = []
    for name, entry in (config.callbacks.model_extra or {}).items():
        # a checkpoint has all weights
        settings = entry if config.ckpt_path is None else targets.without_weights(entry, trusted)
        callback = targets.build(look_up(settings), trusted)
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks.{name}._target_={entry['_target_']} builds a {type(callback).__name__}, which is no "
                "callback: give a class derived from pytorch_lightning.Callback."
            )
        built.append(callback)
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
    plugins: list[Any] = [checkpoint_io.AtomicCheckpointIO()]
    if launcher.RANKS in os.environ:
        plugins.append(LightningEnvironment())  # reads what launcher.run_workers has set
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
    return DDPStrategy(
        process_group_backend="nccl" if devices.kind == "cuda" else "gloo",
        timeout=timeout,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the task averages BatchNorm's statistics before each validation
        find_unused_parameters=config.finetune.freeze_epochs > 0,  # frozen layers get no gradient
    )
