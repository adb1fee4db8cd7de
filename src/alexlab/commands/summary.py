"""Print and record the facts and the metrics of a run: at the start, at the end, and how to continue the run."""

import logging
import platform
import signal
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from pytorch_lightning.callbacks import EarlyStopping, Timer
from rich.console import Console
from rich.table import Column, Table

from alexlab.analysis import compare
from alexlab.analysis.drawing import fonts_for
from alexlab.data import first_look
from alexlab.data.datamodule import ImageFolders, default_threads
from alexlab.data.fast.prepared import PreparedIndex
from alexlab.data.folder import ImageIndex
from alexlab.data.sources import Data
from alexlab.data.transforms import height_width
from alexlab.engine import config as configs
from alexlab.engine import naming, provenance, run_dir
from alexlab.engine.config import ROOT, Plain, is_address
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.metrics import is_always_one
from alexlab.engine.overrides import command_line
from alexlab.engine.process import cores
from alexlab.engine.signals import of_submitit
from alexlab.engine.targets import packages_to_allow
from alexlab.models.introspection import macs
from alexlab.tasks.base import BaseTask, RunModule
from alexlab.tasks.metrics import better

if TYPE_CHECKING:
    from alexlab.commands.build import Experiment

INPUT_BOUND = 0.15  # a run is input-bound if it waits for data during this fraction of the time or more

IMBALANCED = 10  # a run warns if the largest class has this many times the images of the smallest

log = logging.getLogger("alexlab")


# -- facts for summary.json


def facts_of(config: Any, experiment: "Experiment") -> dict[str, Any]:
    """Return what is known of a run before it starts."""
    devices, net = experiment.devices, experiment.task.net
    return {
        "world_size": devices.world_size,
        "parameters": sum(p.numel() for p in net.parameters()),
        "git": provenance.commit_of(Path(config.run_dir)),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-lightning", "alexlab")},
        "dataset": experiment.data.describe(),
        "precision": str(choose_precision(config.trainer.precision, devices.kind)),
        "effective_lr": experiment.plan.lr,
        "steps_per_epoch": experiment.plan.steps_per_epoch,
        "macs": macs(net, (config.model.in_channels, *height_width(config.data.image_size))),
        "modes": modes_of(experiment.task),
        "hardware": hardware(devices),
    }


def modes_of(task: RunModule) -> dict[str, str]:
    """Return whether less or more is better ("min", "max") of `monitor` and of the metrics of conf/metrics."""
    metrics = task.metrics["val"].items() if isinstance(task, BaseTask) else ()
    modes: dict[str, str | None] = {name: better(metric) for name, metric in metrics}
    modes[task.run.monitor.removeprefix("val/")] = task.run.mode
    return {name: mode for name, mode in modes.items() if mode}


def hardware(devices: Devices) -> dict[str, Any]:
    """Return the hardware of one rank."""
    cuda = devices.kind == "cuda"
    return {
        "devices": devices.kind,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def metrics_of(experiment: "Experiment", path: Path) -> dict[str, Any]:
    """Return what a run has measured so far, in the form of summary.json."""
    trainer, task, rate = experiment.trainer, experiment.task, experiment.throughput
    gpus = trainer.world_size if trainer.strategy.root_device.type == "cuda" else 0
    last = {
        key: round(float(value), 7)  # they were float32
        for key, value in experiment.last_metrics().items()
        if key.startswith(("train/", "val/")) and not key.endswith(("_best", "_step"))
    }
    ckpts = {name: f"checkpoints/{name}.ckpt" for name in ("best", "last")}
    sizes = [{"step": step, "world_size": size} for step, size in experiment.checkpointing.world_sizes]
    return {
        "best": dict(task.best),
        "best_epoch": task.best_epoch,
        "last": last,
        "checkpoints": {name: ckpt for name, ckpt in ckpts.items() if (path / ckpt).is_file()},
        "images_per_second": round(rate.total_images / rate.total_seconds, 1) if rate.total_seconds else None,
        "data_wait": round(rate.total_waited / rate.total_seconds, 4) if rate.total_seconds else None,
        "epochs": trainer.fit_loop.epoch_progress.current.completed,
        "steps": trainer.fit_loop.epoch_loop.global_step,
        "gpu_hours": round(gpus * rate.total_seconds / 3600, 4),  # of training, resumed parts included
        **({"world_sizes": sizes} if len(sizes) > 1 else {}),
    }


def metadata_of(config: Any, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of best.ckpt in W&B. A test on val is omitted: it would look like a test on test/."""
    dataset = summary["dataset"]
    return {
        "best": summary["best"],
        "epoch": summary["best_epoch"],
        "monitor": config.monitor,
        "test": summary["test"] if "test" in dataset["images"] else {},
        "model": config.model.name,
        "name": naming.run_name(config.model_dump(exclude_unset=True)),
        "num_classes": dataset["num_classes"],
        "image_size": config.data.image_size,
        "fingerprint": dataset["fingerprint"],
    }


# -- printed at the start


def report_start(config: Any, experiment: "Experiment") -> None:
    """Log what starts, and warn of settings that are allowed but rarely meant."""
    data, plan, devices, facts = experiment.data, experiment.plan, experiment.devices, experiment.facts
    images = ", ".join(f"{name} {count:,}" for name, count in data.images.items())
    names = ", ".join(data.readable_classes[:5]) + (", ..." if len(data.classes) > 5 else "")
    log.info(f"{config.model.name}: {facts['parameters']:,} parameters | images: {images}")
    log.info(f"{len(data.classes)} classes: {names}")
    log.info(
        f"{devices.world_size} x {devices.kind}, {facts['precision']} | global batch {plan.global_batch} | "
        f"{plan.steps_per_epoch} steps per epoch, {plan.steps} in total | learning rate {plan.lr:g}"
    )
    for line in [*data.notes(), *first_look.warnings_of(data.splits)]:
        log.warning("%s", line)
    missing = fonts_for("".join(set().union(*data.readable_classes)))[1] if config.callbacks.figures else ""
    if missing:
        log.warning(f"Figures show boxes for {missing[:20]}: install a font with these letters, such as Noto Sans CJK.")
    counts = data.class_counts if isinstance(data, ImageFolders) else []
    rarest, most = min(filter(None, counts), default=0), max(counts, default=0)
    has_weights = (config.loss.model_extra or {}).get("class_weights") is not None
    if counts and config.data.sampler == "shuffle" and not has_weights and most >= IMBALANCED * rarest:
        rare, frequent = (data.readable_classes[counts.index(count)] for count in (rarest, most))
        has_lists = data.splits["train"].targets.ndim == 2
        sampler = "" if has_lists else "data.sampler=balanced draws the classes equally often, and "
        log.warning(
            f"{frequent} has {most:,} training images, and {rare} has {rarest:,}: {sampler}loss.class_weights=auto "
            "weights them in the loss."
        )
    if plan.warmup >= plan.steps:
        log.warning(
            f"The warm-up of {plan.warmup} steps is as long as the run, so the learning rate never reaches "
            f"{plan.lr:g}: scheduler.warmup=0 switches it off."
        )
    frozen = config.finetune.freeze_epochs
    if frozen and not (config.model.pretrained or config.init_from or config.ckpt_path):
        log.warning(
            f"`finetune.freeze_epochs={frozen}` keeps random weights frozen: give init_from=RUN, or "
            "model.pretrained=true if the network has published weights."
        )


# -- printed at the end


def report_stop(experiment: "Experiment") -> None:
    """Log why a run stopped before the last epoch, and whether the input or the device limits the speed."""
    trainer, rate = experiment.trainer, experiment.throughput
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
            validations, epoch = callback.wait_count, callback.stopped_epoch + 1
            log.info(
                f"Early stopping: {callback.monitor} did not improve in {validations} validations; the last one was in "
                f"epoch {epoch}."
            )
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            log.info(f"trainer.max_time was reached in epoch {trainer.fit_loop.epoch_progress.current.ready}.")
    if rate.total_seconds:
        log.info(bound_by(round(rate.total_waited / rate.total_seconds, 4), experiment.data))


def bound_by(wait: float, data: Data) -> str:
    """Return what limits the speed if the device waited for data in the fraction `wait` of the time, and what helps."""
    if wait < INPUT_BOUND:
        return f"Device-bound: the device waited for data {wait:.0%} of the time."
    if not isinstance(data, ImageFolders):
        return f"Input-bound: the device waited for {data.source} {wait:.0%} of the time. Try more workers."
    hints = []
    most = default_threads(data.local_world_size)
    if data.num_workers < most:
        hints.append(f"data.num_workers={most} (now {data.num_workers})")
    train = getattr(data.splits["train"], "parts", [data.splits["train"]])[0]
    if not isinstance(train, PreparedIndex):
        divided = not isinstance(train, ImageIndex) or data.val_fraction is not None or data.folds is not None
        same = "alexlab prepare with the same keys of data, and out=PATH"
        hints.append(
            f"prepared data ({same if divided else command_line('prepare', f'data.root={data.root}', 'out=PATH')})"
        )
    elif train.format == "jpeg":
        hints.append("data prepared as pixels (alexlab prepare with format=raw)")
    if data.transforms["train"].policy != "none":
        hints.append("augment.policy=none")
    tries = f" Try {', or '.join(hints)}." if hints else ""
    return f"Input-bound: the device waited for data {wait:.0%} of the time.{tries}"


def show_end(config: Any, summary: dict[str, Any], views: Sequence[str | None], in_sweep: bool) -> None:
    """Print the table of best, last and test metrics, and the next commands.

    Args:
        views: where each logger shows the run: an address or a command.
        in_sweep: print one line, because the sweep ends with a table of its jobs.
    """
    path, monitor, logs = Path(config.run_dir), config.monitor, config.paths.local
    status = "pruned" if summary.get("pruned") else summary["status"]
    title = f"{status} in {summary['seconds']:.0f} s, {summary['images_per_second']} images/s"
    tested = "test" if "test" in summary["dataset"]["images"] else "val, best.ckpt"
    epoch = summary.get("best_epoch")
    best, last, test = summary["best"], summary["last"], summary["test"]
    log.info(f"{title}; best {best}; test {test}", extra={"file_only": True})
    if in_sweep:
        of_test = f"test/{monitor.partition('/')[2]}" if tested == "test" else ""
        measured = {monitor: best.get(monitor), of_test: test.get(of_test)}
        parts = [title, *(f"{key} {value:.4f}" for key, value in measured.items() if value is not None)]
        print(", ".join([*parts, f"best epoch {epoch} of {summary['epochs']}"] if epoch else parts))
        return
    numbers = [f"best (epoch {epoch})" if epoch else "best", "last", *([tested] if test else [])]
    table = Table("metric", *(Column(name, justify="right") for name in numbers), title=title)
    for name in dict.fromkeys(key.partition("/")[2] for key in (*best, *last, *test) if "train/" not in key):
        cells = best.get(f"val/{name}"), last.get(f"val/{name}"), test.get(f"test/{name}")
        if is_always_one(name, cells, summary["dataset"].get("num_classes")):
            continue
        table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells[: len(numbers)]))
    Console().print(table)
    (shown, of_bucket), words = named(path, config.paths), [] if "best" in summary["checkpoints"] else ["ckpt=last"]
    words += allowing(config.model_dump(exclude_unset=True))
    print("look at it: ", next(filter(None, views), command_line("compare", f"runs={shown}", *of_bucket)))
    print("evaluate it:", command_line("eval", f"run={shown}", *of_bucket, *words))
    of_logs = of_bucket or ([] if logs == ROOT / "logs" else [f"paths.logs={run_dir.shown(logs)}"])
    print("compare:    ", command_line("compare", *of_logs), flush=True)


def show_standing(config: Any) -> None:
    """Print the rank of the run among earlier ones. If that fails, warn only, because the run is complete."""
    try:
        standing = compare.standing(Path(config.run_dir), config.paths.local, config.monitor)
    except Exception as error:  # run directories may hold anything
        log.warning(f"The run could not be compared with other runs ({type(error).__name__}: {error}).")
        return
    if standing is not None:
        log.info(standing, extra={"file_only": True})
        print(f"rank:        {standing}", flush=True)


# -- how to continue


def allowing(config: Plain) -> list[str]:
    """Return the word that allows the packages of a run's config in another command: ["allow=[mypkg]"], or []."""
    packages = sorted(packages_to_allow(config, configs.read(configs.CONF / "allow.yaml")["allow"] or []))
    return [f"allow=[{','.join(packages)}]"] if packages else []


def named(path: Path, paths: Any) -> tuple[str, list[str]]:
    """Return how a command names a run, and the overrides that it needs: those of a bucket work on each machine."""
    if not is_address(paths.logs):
        return run_dir.shown(path), []
    own_scratch = [] if paths.scratch == f"{ROOT}/logs" else [f"paths.scratch={paths.scratch}"]
    return run_dir.name_of(path), [f"paths.logs={paths.logs}", *own_scratch]


def how_to_continue(path: Path, paths: Any) -> str:
    if not (path / "checkpoints/last.ckpt").is_file():
        return "No checkpoint was written yet: start the run again (checkpoint.every_n_steps writes one sooner)."
    name, words = named(path, paths)
    words = [f"resume={name}", *words, *allowing(configs.read(path / "config.yaml"))]
    return f"Resume the run with: {command_line('train', *words)}"


def of_signal(config: Any, number: int) -> str:
    """Return what to print after a signal has stopped a run."""
    return f"Stopped by {signal.Signals(number).name}. {how_to_continue(Path(config.run_dir), config.paths)}"


def is_requeued(config: Any, number: int | None, is_lost: bool = False) -> bool:
    """Check whether SLURM must be asked to queue the job again: after SIGUSR1 or submitit's signal, or because a rank
    was lost."""
    return config.resume.requeue and (is_lost or (number is not None and number in (signal.SIGUSR1, of_submitit())))
