"""The Lightning Trainer of a run: devices, precision, callbacks, loggers."""

import inspect
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichModelSummary,
)
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from alexlab.callbacks.freezing import Freezing
from alexlab.callbacks.grad_norm import GradNorm
from alexlab.callbacks.lr_monitor import LearningRateLogger
from alexlab.callbacks.media import Media
from alexlab.callbacks.progress import ProgressBar, ProgressReporter
from alexlab.callbacks.same_config import SameConfig
from alexlab.callbacks.throughput import Throughput
from alexlab.engine import launcher as launch
from alexlab.engine.checkpoint_io import AtomicCheckpointIO
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.errors import UserError
from alexlab.engine.rules import mode_of

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
OWN_KEYS = ("strategy", "channels_last", "tf32", "cudnn_benchmark", "timeout", "master_port", "precision")


def check_settings(config: DictConfig) -> None:
    """Raises UserError where a key of `trainer` is neither ours nor Lightning's."""
    known = {*OWN_KEYS, *inspect.signature(pl.Trainer.__init__).parameters}
    unknown = sorted(key for key in config.trainer if key not in known)
    if unknown:
        raise UserError(
            f"trainer.{unknown[0]} is not a setting of Lightning's Trainer: remove it, or see its name there."
        )


def build_trainer(
    config: DictConfig,
    devices: Devices,
    loggers: list[Logger],
    more: Sequence[Callback] = (),
    batches: int | None = None,
    net_type: type[nn.Module] = nn.Module,
) -> pl.Trainer:
    """Lightning's Trainer for `config`, with `more` callbacks.

    Args:
        batches: training batches an epoch, where they are worked out already.
        net_type: of the network, which FSDP shards as one unit.
    """
    run_dir = Path(config.run_dir)
    settings: dict[str, Any] = {key: value for key, value in dict(config.trainer).items() if key not in OWN_KEYS}
    settings["accelerator"] = {"cuda": "gpu"}.get(devices.kind, devices.kind)
    if isinstance(config.trainer.devices, int) or config.trainer.devices == "auto":
        settings["devices"] = devices.local
    settings["num_nodes"] = devices.nodes
    if batches is not None:  # at least one line of numbers an epoch
        steps = max(1, batches // settings["accumulate_grad_batches"])
        settings["log_every_n_steps"] = min(settings["log_every_n_steps"], steps)
        settings["overfit_batches" if settings["overfit_batches"] else "limit_train_batches"] = batches
    if devices.kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.trainer.tf32
    if settings["profiler"] is not None:
        settings["profiler"] = PROFILERS[settings["profiler"]](dirpath=run_dir, filename="profile")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if "ALEXLAB_RANKS" in os.environ:
        plugins.append(LightningEnvironment())  # reads what launch.spawn put there
    callbacks = [*more, *_callbacks(config, run_dir, loggers)]
    return pl.Trainer(
        **settings,
        precision=choose_precision(config.trainer.precision, devices.kind),
        strategy=_strategy(config, devices, net_type),
        plugins=plugins,
        benchmark=config.trainer.cudnn_benchmark and devices.kind == "cuda",
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),  # a user's own
        logger=loggers,
        default_root_dir=str(run_dir),
        enable_model_summary=False,
        enable_progress_bar=_progress_kind(config) == "rich",
        use_distributed_sampler=False,
    )


def _strategy(config: DictConfig, devices: Devices, net_type: type[nn.Module]) -> "Strategy | str":
    timeout = timedelta(minutes=config.trainer.timeout)
    if config.trainer.strategy == "fsdp":
        mixed = "mixed" in str(choose_precision(config.trainer.precision, devices.kind))
        whole = MixedPrecision(torch.float32, torch.float32, torch.float32)
        return FSDPStrategy(
            timeout=timeout,
            state_dict_type="full",
            # without a unit below the LightningModule, the test after the fit would find it wrapped twice
            auto_wrap_policy=ModuleWrapPolicy({net_type}),
            # autocast does the mixing, as under DDP; Lightning's choice keeps BatchNorm's averages in bf16
            mixed_precision=whole if mixed else None,
        )
    if devices.world_size == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="nccl" if devices.kind == "cuda" else "gloo",
        timeout=timeout,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the classifier averages BatchNorm's statistics before each validation
        find_unused_parameters=config.finetune.freeze_epochs > 0,  # those of frozen layers get no gradient
    )


def _callbacks(config: DictConfig, run_dir: Path, loggers: list[Logger]) -> list[Callback]:
    wanted = config.callbacks
    callbacks: list[Callback] = [SameConfig(config)]
    if wanted.lr_monitor:
        callbacks.append(LearningRateLogger("step"))
    if wanted.model_summary:
        callbacks.append(RichModelSummary(wanted.model_summary))
    if wanted.device_stats:
        callbacks.append(DeviceStatsMonitor())
    if wanted.get("grad_norm"):
        callbacks.append(GradNorm())
    if wanted.early_stopping is not None:
        callbacks.append(EarlyStopping(config.monitor, patience=wanted.early_stopping, mode=mode_of(config.monitor)))
    if config.ema.decay is not None:
        callbacks.append(EMAWeightAveraging(decay=config.ema.decay))
    if config.finetune.freeze_epochs:
        callbacks.append(Freezing(config.finetune.freeze_epochs))
    kind = _progress_kind(config)
    if kind == "rich":
        callbacks.append(ProgressBar(leave=True))
    callbacks.append(ProgressReporter(console=kind == "plain"))
    board = next((logger for logger in loggers if isinstance(logger, pl.loggers.WandbLogger)), None)
    if wanted.figures:
        callbacks.append(Media(run_dir / "figures", board))  # type: ignore[arg-type]
    callbacks.append(Throughput(config.data.batch_size))  # last: the others' time is not waiting for data
    return callbacks


def _progress_kind(config: DictConfig) -> str:
    kind = config.callbacks.progress
    return kind if kind != "auto" else "rich" if sys.stdout.isatty() and launch.rank() == 0 else "plain"
