"""A run, from its composed config to its summary: the table of contents, and the place that instantiates."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from alexlab import checkpoint, launch
from alexlab import config as configs
from alexlab.augment import BatchAugment
from alexlab.callbacks.throughput import Throughput
from alexlab.classifier import ImageClassifier
from alexlab.cli import ROOT
from alexlab.data.datamodule import ImageFolders, cores
from alexlab.data.transforms import SampleTransform
from alexlab.errors import UserError
from alexlab.instantiate import build
from alexlab.optim import effective_lr
from alexlab.trainer import Devices, build_trainer, choose_precision, find_devices

if TYPE_CHECKING:
    from alexlab.loggers.wandb import Status, WandbLogger

log = logging.getLogger("alexlab")


def fit(config: DictConfig) -> float | None:
    """Train; the task of train.py, after `config.check`. Returns the best `config.monitor`, for a sweep to optimize."""
    config = configs.resolved(config)
    devices = find_devices(config)
    check_batch(config, devices)
    run_dir = Path(config.run_dir)
    if devices.nodes > 1 and not launch.external():
        raise UserError(
            f"trainer.num_nodes={devices.nodes} needs torchrun or srun to start the ranks on each machine: "
            "torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py ..."
        )
    if config.dry_run:
        dry_run(config, devices)
        return None
    if launch.rank() == 0:
        print(f"run directory: {run_dir}", flush=True)
        claim(config)
    if devices.world_size == 1 or launch.external():
        return fit_rank(config)
    build_data(config, devices).read()  # mistakes in the data are told once, here
    threads = max(1, cores() // devices.local)
    code = launch.spawn(run_dir, devices.world_size, threads, config.trainer.master_port)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        sys.exit(code)
    if code:
        mark_failed(run_dir, f"a rank left with exit code {code}")
        if launch.external() or code == 2:
            sys.exit(code)
        raise RuntimeError(f"the run in {run_dir} failed with exit code {code}; see its rank's message above.")
    return json.loads((run_dir / "summary.json").read_text())["best"].get(config.monitor)


def fit_rank(config: DictConfig) -> float | None:
    """Train as one rank, or alone."""
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    devices = find_devices(config)
    set_up_logging(run_dir)
    pl.seed_everything(config.seed, verbose=False)
    data = build_data(config, devices).read()
    model = build_model(config, data)
    if config.compile:
        model.net.compile()  # in place: the state dict's keys stay clean
    loggers, board = build_loggers(config)
    status: Status = "failed"
    error_text = None
    facts: dict[str, Any] = {
        "world_size": devices.world_size,
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "git": git_state(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-lightning", "alexlab")},
        "dataset": data.describe(),
        "precision": str(choose_precision(config.trainer.precision, devices.kind)),
        "effective_lr": effective_lr(configs.plain(config.optimizer), effective_batch(config)),
    }
    if board is not None:
        board.log_config(configs.plain(config))
        board.log_summary(facts)
    images = ", ".join(f"{name} {count:,}" for name, count in facts["dataset"]["images"].items())
    log.info(
        "%s: %s parameters | images: %s | %d classes",
        config.model.name,
        f"{facts['parameters']:,}",
        images,
        len(data.classes),
    )
    log.info(
        "%d x %s, %s | global batch %d | learning rate %g",
        devices.world_size, devices.kind, facts["precision"], config.data.batch_size, facts["effective_lr"],
    )  # fmt: skip
    if config.optimizer.get("lr_reference_batch"):
        log.info(
            "effective learning rate %g: optimizer.lr=%g for %d images a step, here %d",
            facts["effective_lr"], config.optimizer.lr, config.optimizer.lr_reference_batch, effective_batch(config),
        )  # fmt: skip
    result: dict[str, Any] = {"best": {}, "last": {}, "test": {}, "checkpoints": {}, "images_per_second": None}
    try:
        trainer = build_trainer(config, devices, loggers)
        trainer.fit(model, datamodule=data, ckpt_path=checked_ckpt(config, model), weights_only=True)
        result |= metrics_of(trainer, model, run_dir)
        if config.test:
            if (run_dir / "checkpoints/best.ckpt").is_file():
                path = run_dir / "checkpoints/best.ckpt"
                checkpoint.load_net(model.net, checkpoint.load(path), path)
            tested = trainer.test(model, datamodule=data, verbose=False)
            result["test"] = {key: float(value) for key, value in tested[0].items() if key.startswith("test/")}
        if trainer.world_size > 1:
            gathered: list[list[str]] = [[]] * trainer.world_size
            torch.distributed.all_gather_object(gathered, list(model.skipped))
            model.skipped = dict.fromkeys(path for paths in gathered for path in paths)
        status = "finished"
    except BaseException as error:
        number = interruption(error)
        if number is not None:
            status = "preempted"
            error_text = f"ended by {signal.Signals(number).name}"
            raise SystemExit(128 + number) from None
        error_text = f"{type(error).__name__}: {error}"
        raise
    finally:
        summary = {"status": status, **result, "seconds": round(time.monotonic() - start, 2), **facts}
        if error_text:
            summary["error"] = error_text
        if model.skipped:
            summary["skipped_images"] = list(model.skipped)
            log.warning("%d broken images were left out: %s", len(model.skipped), ", ".join(list(model.skipped)[:5]))
        if launch.rank() == 0:
            write_json(run_dir / "summary.json", summary)
        if board is not None:
            if status == "finished":
                board.log_checkpoint(run_dir / "checkpoints/best.ckpt", {"best": result["best"], **facts})
            board.log_summary({"status": status, "images_per_second": result["images_per_second"]})
            board.finish(status)
        if torch.distributed.is_initialized() and status == "finished":
            torch.distributed.destroy_process_group()
    if launch.rank() == 0:
        show_end(summary, run_dir, board.where if board is not None else None)
    return result["best"].get(config.monitor)


def interruption(error: BaseException) -> int | None:
    """The signal behind an exception of Lightning's loops, or None: SIGTERM has its own exception there, and Ctrl-C
    becomes an exit with code 1."""
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return signal.SIGINT
    return None


# -- the parts of a run


def build_data(config: DictConfig, devices: Devices) -> ImageFolders:
    d, a = config.data, config.augment
    size = d.image_size
    train = SampleTransform(size, a.crop, tuple(a.scale), tuple(a.ratio), a.crop_ratio, a.flip, a.policy)
    return ImageFolders(
        root=d.root, batch_size=d.batch_size, image_size=size, seed=config.seed, train_transform=train,
        eval_transform=SampleTransform(size, "center", crop_ratio=a.crop_ratio), num_workers=d.num_workers,
        val_fraction=d.val_fraction, test_fraction=d.test_fraction, num_classes=d.num_classes, on_error=d.on_error,
        demo_seed=d.demo_seed, class_names=d.class_names, world_size=devices.world_size, local_world_size=devices.local,
    )  # fmt: skip


def build_model(config: DictConfig, data: ImageFolders) -> ImageClassifier:
    a, m = config.augment, config.model
    num_classes = len(data.classes)
    config.data.num_classes = num_classes
    layout = config.trainer.channels_last
    net = build(m.net, num_classes=num_classes)
    try_net(net, config.data.image_size)
    return ImageClassifier(
        net=net,
        augment=BatchAugment(list(m.mean), list(m.std), num_classes, a.pca, a.erase, a.mixup, a.cutmix),
        class_names=data.readable_classes,
        optimizer=configs.plain(config.optimizer),
        scheduler=configs.plain(config.scheduler),
        seed=config.seed,
        batch_size=config.data.batch_size,
        label_smoothing=config.label_smoothing,
        provenance=provenance(config, data),
        channels_last=torch.cuda.is_available() if layout == "auto" else bool(layout),
    )


def try_net(net: torch.nn.Module, image_size: int) -> None:
    """One black image through the net, so that a size it cannot take is told before training."""
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, image_size, image_size))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"data.image_size={image_size} does not fit the network: {str(error).splitlines()[0]}"
        ) from error
    net.train(training)


def build_loggers(config: DictConfig) -> "tuple[list[Logger], WandbLogger | None]":
    """metrics.csv always; the others as `config.logger` says, on rank 0. W&B's is given by itself too."""
    run_dir = Path(config.run_dir)
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # Hydra's and ours lie there already
    loggers: list[Logger] = [CSVLogger(str(run_dir), name="", version="", flush_logs_every_n_steps=1)]
    board = None
    if launch.rank() > 0:
        return loggers, board
    if "wandb" in config.logger:
        from alexlab.loggers.wandb import WandbLogger

        settings = configs.plain(config.logger.wandb)
        settings["name"] = settings["name"] or run_dir.name
        board = WandbLogger(save_dir=str(run_dir), **settings)
        loggers.append(board)
    if "tensorboard" in config.logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(run_dir), name="", version="tensorboard"))
    return loggers, board


def check_batch(config: DictConfig, devices: Devices) -> None:
    batch, world = config.data.batch_size, devices.world_size
    if batch % world:
        raise UserError(
            f"data.batch_size={batch} is the global batch and does not divide by {world} devices: choose "
            f"data.batch_size={max(world, batch // world * world)} or {-(-batch // world) * world}."
        )


def effective_batch(config: DictConfig) -> int:
    return config.data.batch_size * config.trainer.accumulate_grad_batches


def checked_ckpt(config: DictConfig, model: ImageClassifier) -> str | None:
    """`ckpt_path`, after a look whether it fits the network."""
    if config.ckpt_path is None:
        return None
    path = Path(config.ckpt_path)
    found = checkpoint.load(path)
    checkpoint.load_net(model.net, found, path)
    if "optimizer_states" not in found:
        raise UserError(f"ckpt_path={path} holds weights alone, and training cannot go on from it: give last.ckpt.")
    return str(path)


def provenance(config: DictConfig, data: ImageFolders) -> dict[str, Any]:
    return {"config": configs.plain(config), "classes": list(data.classes), "dataset": data.describe()}


def metrics_of(trainer: pl.Trainer, model: ImageClassifier, run_dir: Path) -> dict[str, Any]:
    rate = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
    last = {key: float(value) for key, value in trainer.callback_metrics.items()}
    folder = run_dir / "checkpoints"
    return {
        "best": dict(model.best),
        "last": {
            k: v for k, v in last.items() if k.startswith(("train/", "val/")) and not k.endswith(("_best", "_step"))
        },
        "checkpoints": {n: f"checkpoints/{n}.ckpt" for n in ("best", "last") if (folder / f"{n}.ckpt").is_file()},
        "images_per_second": round(rate.total_images / rate.total_seconds, 1) if rate.total_seconds else None,
    }


# -- the run directory


def claim(config: DictConfig) -> None:
    """Write config.yaml into the run's directory, which must be a new one."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} holds a run already: choose another hydra.run.dir, or remove it.")
    configs.save(config, run_dir / "config.yaml")


def set_up_logging(run_dir: Path) -> None:
    """train.log on rank 0, warnings and notes on the console."""
    logger = logging.getLogger("alexlab")
    logger.setLevel(logging.INFO)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logging.captureWarnings(True)
    for noisy in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    if launch.rank() > 0:
        return
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(run_dir / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(console)
    logger.addHandler(file)


def git_state() -> dict[str, Any]:
    """Commit and whether files differ from it; null outside a repository."""

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": bool(changes) if changes is not None else None}


def write_json(path: Path, values: dict[str, Any]) -> None:
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    beside.replace(path)


def mark_failed(run_dir: Path, why: str) -> None:
    """Say in summary.json that the run failed, where no rank could say so itself."""
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else {}
    if summary.get("status") in (None, "finished"):
        write_json(path, {**summary, "status": "failed", "error": why})


# -- what is shown


def show_end(summary: dict[str, Any], run_dir: Path, where: str | None) -> None:
    table = Table(title=f"{summary['status']} in {summary['seconds']:.0f} s, {summary['images_per_second']} images/s")
    for column in ("metric", "best", "last", "test"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in ("loss", "acc1", "acc5"):
        cells = [
            summary["best"].get(f"val/{name}"),
            summary["last"].get(f"val/{name}"),
            summary["test"].get(f"test/{name}"),
        ]
        table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    Console().print(table)
    print(f"look at it:  {where or f'python compare.py runs={run_dir}'}")
    print(f"evaluate it: python eval.py run={run_dir}")
    print("compare:     python compare.py", flush=True)


def dry_run(config: DictConfig, devices: Devices) -> None:
    data = build_data(config, devices).read()
    model = build_model(config, data)
    epochs, accumulate = config.trainer.max_epochs, config.trainer.accumulate_grad_batches
    batches = len(data.splits["train"]) // config.data.batch_size
    steps = -(-batches // accumulate)
    parameters = sum(p.numel() for p in model.net.parameters())
    rows = {
        "network": f"{config.model.name}, {parameters:,} parameters, {len(data.classes)} classes",
        "images": ", ".join(f"{name} {len(index):,}" for name, index in data.splits.items()),
        "devices": f"{devices.world_size} x {devices.kind}, {choose_precision(config.trainer.precision, devices.kind)}",
        "global batch": f"{config.data.batch_size} ({config.data.batch_size // devices.world_size} a device)",
        "images an optimizer step": effective_batch(config),
        "learning rate": effective_lr(configs.plain(config.optimizer), effective_batch(config)),
        "steps": f"{steps} an epoch, {steps * epochs if epochs and epochs > 0 else config.trainer.max_steps} in all",
        "left out an epoch": f"{len(data.splits['train']) - batches * config.data.batch_size} images, others each time",
        "checkpoint": f"about {parameters * 8 / 1e6:.0f} MB (last), {parameters * 4 / 1e6:.0f} MB (best)",
    }
    table = Table(title="dry run", show_header=False)
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)
