"""What a run tells: of itself at its start and end, and how to go on."""

import logging
import platform
import shlex
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import EarlyStopping, Timer
from rich.console import Console
from rich.table import Table

from alexlab.analysis import standing
from alexlab.callbacks.throughput import Throughput
from alexlab.commands.plan import Plan
from alexlab.data.datamodule import MOST_THREADS, ImageFolders, cores
from alexlab.data.folder import ImageIndex
from alexlab.engine import config as configs
from alexlab.engine import launcher as launch
from alexlab.engine import naming, provenance
from alexlab.engine import run_dir as rundir
from alexlab.engine.devices import Devices, choose_precision
from alexlab.models.introspection import macs
from alexlab.tasks.classification import ImageClassifier

MUCH = 0.15  # share of the time that a device may wait for images

log = logging.getLogger("alexlab")


def facts_of(
    config: DictConfig, devices: Devices, data: ImageFolders, plan: Plan, model: ImageClassifier
) -> dict[str, Any]:
    return {
        "world_size": devices.world_size,
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "git": provenance.commit_of(Path(config.run_dir)),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-lightning", "alexlab")},
        "dataset": data.describe(),
        "precision": str(choose_precision(config.trainer.precision, devices.kind)),
        "effective_lr": plan.lr,
        "steps_per_epoch": plan.steps_per_epoch,
        "macs": macs(model.net, config.data.image_size),
        "hardware": hardware(devices),
    }


def metadata_of(config: DictConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """What is told of best.ckpt where it is uploaded. A test on val would stand there beside others' tests."""
    dataset = summary["dataset"]
    test = summary["test"] if "test" in dataset["images"] else {}
    return {
        "best": summary["best"], "epoch": summary["best_epoch"], "monitor": config.monitor, "test": test,
        "model": config.model.name, "name": naming.run_name(configs.told(config)),
        "num_classes": dataset["num_classes"], "image_size": config.data.image_size,
        "fingerprint": dataset["fingerprint"],
    }  # fmt: skip


def hardware(devices: Devices) -> dict[str, Any]:
    """What a rank of the run works on."""
    cuda = devices.kind == "cuda"
    return {
        "devices": devices.kind,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def seconds_since(start: float, trainer: pl.Trainer | None) -> float:
    """What a run took: the time since `start`, and before it, of a run that goes on, the time of training up to its
    checkpoint."""
    before = _rate(trainer).seconds_before if trainer is not None else 0.0
    return round(time.monotonic() - start + before, 2)


def _rate(trainer: pl.Trainer) -> Throughput:
    return next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]


def metrics_of(trainer: pl.Trainer, model: ImageClassifier, run_dir: Path) -> dict[str, Any]:
    rate = _rate(trainer)
    known = {**model.progress.get("metrics", {}), **trainer.callback_metrics}  # before, where nothing was left to do
    gpus = trainer.world_size if trainer.strategy.root_device.type == "cuda" else 0
    last = {key: round(float(value), 7) for key, value in known.items()}  # were float32
    folder = run_dir / "checkpoints"
    return {
        "best": dict(model.best),
        "best_epoch": model.best_epoch,
        "last": {
            k: v for k, v in last.items() if k.startswith(("train/", "val/")) and not k.endswith(("_best", "_step"))
        },
        "checkpoints": {n: f"checkpoints/{n}.ckpt" for n in ("best", "last") if (folder / f"{n}.ckpt").is_file()},
        "images_per_second": round(rate.total_images / rate.total_seconds, 1) if rate.total_seconds else None,
        "data_wait": round(rate.total_waited / rate.total_seconds, 4) if rate.total_seconds else None,
        "epochs": trainer.fit_loop.epoch_progress.current.completed,
        "steps": trainer.fit_loop.epoch_loop.global_step,
        "gpu_hours": round(gpus * rate.so_far()["seconds"] / 3600, 4),  # of training, resumes included
    }


def tell_start(config: DictConfig, devices: Devices, data: ImageFolders, plan: Plan, facts: dict[str, Any]) -> None:
    images = ", ".join(f"{name} {count:,}" for name, count in data.images.items())
    log.info(
        "%s: %s parameters | images: %s | %d classes",
        config.model.name, f"{facts['parameters']:,}", images, len(data.classes),
    )  # fmt: skip
    log.info(
        "%d x %s, %s | global batch %d | %d steps an epoch, %d in all | learning rate %g",
        devices.world_size, devices.kind, facts["precision"], plan.global_batch,
        plan.steps_per_epoch, plan.steps, plan.lr,
    )  # fmt: skip
    for line in [*data.left_out(), *data.lacking()]:
        log.warning("%s", line)
    for word in configs.withheld(config):
        log.warning(
            "%s: a secret by its variable's name, so this is what config.yaml has, and eval.py, predict.py and such "
            "get no more; if it is none, give the variable another name", word,
        )  # fmt: skip
    if plan.warmup >= plan.steps:
        log.warning(
            "the warm-up of %d steps is as long as the run: the rate never comes to %g; scheduler.warmup=0 has none",
            plan.warmup, plan.lr,
        )  # fmt: skip
    frozen, epochs = config.finetune.freeze_epochs, config.trainer.max_epochs
    if frozen and 0 < (epochs or 0) <= frozen:  # null and -1 are without end
        log.warning("finetune.freeze_epochs=%d: the head alone learns in all %d epochs", frozen, epochs)
    if frozen and not (config.model.net.get("pretrained") or config.init_from or config.ckpt_path):
        log.warning("finetune.freeze_epochs=%d keeps random weights as they are: give init_from=RUN, or "
                    "model.pretrained=true where the network has weights", frozen)  # fmt: skip
    if config.optimizer.get("lr_reference_batch"):
        log.info(
            "effective learning rate %g: optimizer.lr=%g for %d images a step, here %d",
            plan.lr, config.optimizer.lr, config.optimizer.lr_reference_batch, plan.step_images,
        )  # fmt: skip


def tell_stop(trainer: pl.Trainer, data: ImageFolders) -> None:
    """Say why a run ended before its last epoch, and what it waited for."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
            log.info("early stopping: no better %s in %d validations, the last in epoch %d.",
                     callback.monitor, callback.wait_count, callback.stopped_epoch + 1)  # fmt: skip
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            log.info("the time was up in epoch %d.", trainer.fit_loop.epoch_progress.current.ready)

    rate = _rate(trainer)
    if rate.total_seconds:
        log.info("%s", bound_by(round(rate.total_waited / rate.total_seconds, 4), data))


def bound_by(wait: float, data: ImageFolders) -> str:
    """Whether the input or the device held a training up, and what would help.

    Args:
        wait: share of the training's time in which the device waited for images.
    """
    if wait < MUCH:
        return f"bound by the device: it waited for images {wait:.0%} of the time."
    more = []
    free = min(MOST_THREADS, max(1, cores() // data.local_world_size))
    if data.num_workers < free:
        more.append(f"more threads (data.num_workers={free}, here {data.num_workers})")
    train = data.splits["train"]
    if isinstance(train, ImageIndex):
        more.append(f"images prepared once (python prepare.py data.root={data.root} out=PATH)")
    elif train.format == "jpeg":
        more.append("images prepared as pixels (prepare.py with format=raw)")
    elif data.kind == "cuda" and train.extent is None:
        more.append("pixels of one size, which the GPU crops (prepare.py with format=raw square=true)")
    whole = data.keeping.left_whole(train, data.transforms["train"]) is not None
    if data.keeping.cache is None and (whole or isinstance(train, ImageIndex)):
        more.append("data.cache=device, if they fit" if whole else "data.cache=ram, if they fit decoded")
    if data.transforms["train"].policy != "none":
        more.append("a lighter augment than its policy")
    helps = f"; what would help: {', or '.join(more)}" if more else ""
    return f"bound by the input: the device waited for images {wait:.0%} of the time{helps}."


def how_to_go_on(config: DictConfig, run_dir: Path) -> str:
    if not (run_dir / "checkpoints/last.ckpt").is_file():
        return "No checkpoint was written yet to go on from: start it anew (checkpoint.every_n_steps writes sooner)."
    return f"Go on with it: {how_to_resume(run_dir)}"


def of_signal(config: DictConfig, run_dir: Path, number: int) -> list[str]:
    """What to tell of a signal that has ended a run; asks SLURM for the job again, where that is wanted."""
    told = [f"ended by {signal.Signals(number).name}. {how_to_go_on(config, run_dir)}"]
    if config.resume.requeue and number == getattr(signal, "SIGUSR1", None):
        told.append(f"{launch.requeue()}.")
    return told


def how_to_resume(run_dir: Path) -> str:
    return f"python train.py resume={shlex.quote(rundir.shown(run_dir))}"


def show_standing(config: DictConfig) -> None:
    """Say how the run compares with those before it. What goes wrong with that is told; the run is well."""
    try:
        found = standing.stands(Path(config.run_dir), Path(config.paths.logs), config.monitor)
    except Exception as error:  # of directories that may be anybody's
        log.warning("how it compares with other runs could not be told (%s: %s)", type(error).__name__, error)
        return
    if found is not None:
        log.info("%s", found, extra={"file_only": True})
        print(f"stands:      {found}", flush=True)


def show_end(summary: dict[str, Any], run_dir: Path, where: str | None) -> None:
    status = "pruned" if summary.get("pruned") else summary["status"]
    title = f"{status} in {summary['seconds']:.0f} s, {summary['images_per_second']} images/s"
    tested = "test" if "test" in summary["dataset"]["images"] else "val, best.ckpt"
    table = Table(title=title)
    epoch = summary.get("best_epoch")
    for column in ("metric", f"best (epoch {epoch})" if epoch else "best", "last", tested):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in ("loss", "acc1", "acc5"):
        cells = [
            summary["best"].get(f"val/{name}"),
            summary["last"].get(f"val/{name}"),
            summary["test"].get(f"test/{name}"),
        ]
        table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    Console().print(table)
    log.info("%s; best %s; test %s", title, summary["best"], summary["test"], extra={"file_only": True})
    here = rundir.shown(run_dir)
    if where is None:
        board = run_dir / "tensorboard"
        where = f"tensorboard --logdir {rundir.shown(board)}" if board.is_dir() else f"python compare.py runs={here}"
    print(f"look at it:  {where}")
    print(f"evaluate it: python eval.py run={here}{'' if 'best' in summary['checkpoints'] else ' ckpt=last'}")
    print("compare:     python compare.py", flush=True)
