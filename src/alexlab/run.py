"""A run, from its composed config to its summary: the table of contents, and the place that instantiates."""

import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger
from rich.console import Console
from rich.table import Table

from alexlab import checkpoint, launch, optim, rundir
from alexlab import config as configs
from alexlab import plan as plans
from alexlab.augment import BatchAugment
from alexlab.callbacks.preemption import Notes, Preempted, Preemption
from alexlab.callbacks.throughput import Throughput
from alexlab.classifier import ImageClassifier
from alexlab.data.datamodule import ImageFolders, cores
from alexlab.data.transforms import SampleTransform
from alexlab.errors import RunFailedError, UserError
from alexlab.instantiate import build
from alexlab.memory import keep_memory
from alexlab.plan import Plan
from alexlab.trainer import Devices, build_trainer, choose_precision, find_devices

if TYPE_CHECKING:
    from alexlab.loggers.wandb import Status, WandbLogger

log = logging.getLogger("alexlab")


def fit(config: DictConfig) -> float | None:
    """Train; the task of train.py, after `rules.check`. Returns the best `config.monitor`, for a sweep to optimize."""
    config = configs.resolved(config)
    devices = find_devices(config)
    if devices.nodes > 1 and not launch.external():
        raise UserError(
            f"trainer.num_nodes={devices.nodes} needs torchrun or srun to start the ranks on each machine: "
            "torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py ..."
        )
    data = build_data(config, devices).read()
    plan = plans.make_plan(config, devices.world_size, data.images)
    if config.dry_run:
        net = build_model(config, data, plan).net
        if launch.rank() == 0:
            plans.show(plan, config, devices, data.images, net, len(data.classes))
        return None
    run_dir = Path(config.run_dir)
    if launch.rank() == 0:
        print(f"run directory: {rundir.shown(run_dir)}", flush=True)
        rundir.claim(config)
    if devices.world_size == 1 or launch.external():
        return fit_rank(config, data)
    threads = max(1, cores() // devices.local)
    ended = launch.spawn(run_dir, devices.world_size, threads, config.trainer.master_port)
    if ended.by_signal:
        rundir.mark(run_dir, "preempted", ended.why)
        sys.exit(ended.code)
    if ended.code:
        rundir.mark(run_dir, "failed", ended.why)
        raise UserError(ended.why) if ended.code == 2 else RunFailedError(ended.why, ended.code)
    return rundir.read_summary(run_dir)["best"].get(config.monitor)


def fit_rank(config: DictConfig, data: ImageFolders | None = None) -> float | None:
    """Train as one rank, or alone; leaves summary.json and a closed W&B run behind, however it ends."""
    with Notes().taken() as notes:
        return _fit_rank(config, data, notes)


def _fit_rank(config: DictConfig, data: ImageFolders | None, notes: Notes) -> float | None:
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    devices = find_devices(config)
    rundir.set_up_logging(run_dir)
    if devices.kind == "cpu":
        keep_memory()
    board: WandbLogger | None = None
    model: ImageClassifier | None = None
    status: Status = "failed"
    summary: dict[str, Any] = {"best": {}, "last": {}, "test": {}, "checkpoints": {}, "images_per_second": None}
    try:
        pl.seed_everything(config.seed, verbose=False)
        data = data or build_data(config, devices).read()
        plan = plans.make_plan(config, devices.world_size, data.images)
        model = build_model(config, data, plan)
        states = optim.state_tensors(configs.plain(config.optimizer))
        rundir.check_space(run_dir, plans.checkpoint_bytes(model.net, config, states))
        resumed = checked_ckpt(config, model)
        if config.compile:
            model.net.compile()  # in place: the state dict's keys stay clean
        summary |= facts_of(config, devices, data, plan, model)
        loggers, board = build_loggers(config)
        if board is not None:
            board.log_config(configs.plain(config))
            board.log_summary(summary)
        tell_start(config, devices, data, plan, summary)
        preemption = Preemption(notes)
        trainer = build_trainer(config, devices, loggers, [*build_callbacks(config), preemption])
        preemption.install(trainer)
        trainer.fit(model, datamodule=data, ckpt_path=resumed, weights_only=True)
        summary |= metrics_of(trainer, model, run_dir)
        if config.test:
            summary["test"] = test_best(trainer, model, data, run_dir)
        gather_skipped(trainer, model)
        status = "finished"
    except Preempted as error:
        status = "preempted"
        summary["error"] = str(error)
        raise SystemExit(128 + error.number) from None
    except BaseException as error:
        summary["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        summary = {"status": status, "seconds": round(time.monotonic() - start, 2), **summary}
        if model is not None and model.skipped:
            summary["skipped_images"] = list(model.skipped)
            log.warning("%d broken images were left out: %s", len(model.skipped), ", ".join(list(model.skipped)[:5]))
        if launch.rank() == 0:
            rundir.write_json(run_dir / "summary.json", summary)
        if board is not None:
            if status == "finished":
                board.log_checkpoint(run_dir / "checkpoints/best.ckpt", {"best": summary["best"]})
            board.log_summary({key: summary[key] for key in ("status", "images_per_second", "seconds")})
            board.finish(status)
        if torch.distributed.is_initialized() and status == "finished":
            torch.distributed.destroy_process_group()
    if launch.rank() == 0:
        show_end(summary, run_dir, board.where if board is not None else None)
    return summary["best"].get(config.monitor)


# -- the parts of a run


def build_data(config: DictConfig, devices: Devices) -> ImageFolders:
    d, a = config.data, config.augment
    size = d.image_size
    train = SampleTransform(
        size, a.crop, tuple(a.scale), tuple(a.ratio), a.crop_ratio, a.flip, a.policy, a.policy_ops, a.policy_magnitude
    )
    return ImageFolders(
        root=d.root, batch_size=d.batch_size, image_size=size, seed=config.seed, train_transform=train,
        eval_transform=SampleTransform(size, "center", crop_ratio=a.crop_ratio), num_workers=d.num_workers,
        val_fraction=d.val_fraction, test_fraction=d.test_fraction, num_classes=d.num_classes, on_error=d.on_error,
        demo_seed=d.demo_seed, class_names=d.class_names, world_size=devices.world_size, local_world_size=devices.local,
    )  # fmt: skip


def build_model(config: DictConfig, data: ImageFolders, plan: Plan | None = None) -> ImageClassifier:
    """The classifier around `config.model.net`; without a plan for evaluation alone.

    The net and the optimizer are tried here, so that mistakes are told before training.
    """
    a, m = config.augment, config.model
    num_classes = len(data.classes)
    config.data.num_classes = num_classes
    layout = config.trainer.channels_last
    net = build(m.net, num_classes=num_classes)
    try_net(net, config.data.image_size, num_classes)
    training: dict[str, Any] = {}
    if plan is not None:
        optimizer, scheduler = configs.plain(config.optimizer), configs.plain(config.scheduler)
        optim.build_optimizer(net, optimizer, plan.step_images)
        training = {
            "optimizer": optimizer, "scheduler": scheduler, "step_images": plan.step_images, "steps": plan.steps,
            "steps_per_epoch": plan.steps_per_epoch, "label_smoothing": config.label_smoothing,
        }  # fmt: skip
    return ImageClassifier(
        net=net,
        augment=BatchAugment(list(m.mean), list(m.std), num_classes, a.pca, a.erase, a.mixup, a.cutmix),
        class_names=data.readable_classes,
        seed=config.seed,
        provenance={"config": configs.plain(config), "classes": list(data.classes), "dataset": data.describe()},
        channels_last=torch.cuda.is_available() if layout == "auto" else bool(layout),
        **training,
    )


def try_net(net: torch.nn.Module, image_size: int, num_classes: int) -> None:
    """One black image through the net, so that a size it cannot take is told before training.

    Raises:
        UserError: it cannot take that size, or gives something else than logits (1, num_classes).
    """
    training = net.training
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, 3, image_size, image_size))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"data.image_size={image_size} does not fit the network: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        gives = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"the network must turn images into logits (B, {num_classes}), and gives {gives} for one image."
        )
    net.train(training)


def build_loggers(config: DictConfig) -> "tuple[list[Logger], WandbLogger | None]":
    """metrics.csv always; the others as `config.logger` says, on rank 0. W&B's is given by itself too."""
    run_dir = Path(config.run_dir)
    loggers: list[Logger] = [CSVLogger(str(run_dir), name="", version="", flush_logs_every_n_steps=1)]
    board = None
    if launch.rank() > 0:
        return loggers, board
    if "wandb" in config.logger:
        from alexlab.loggers.wandb import WandbLogger

        settings = configs.plain(config.logger.wandb)
        settings["name"] = settings["name"] or rundir.name_of(run_dir)
        board = WandbLogger(save_dir=str(run_dir), **settings)
        loggers.append(board)
    if "tensorboard" in config.logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(run_dir), name="", version="tensorboard"))
    return loggers, board


def build_callbacks(config: DictConfig) -> list[pl.Callback]:
    """The entries of `config.callbacks` with a `_target_`: a user's own."""
    nodes = config.callbacks.values()
    return [build(node) for node in nodes if isinstance(node, DictConfig) and "_target_" in node]


def checked_ckpt(config: DictConfig, model: ImageClassifier) -> str | None:
    """`ckpt_path`, after a look whether it fits the network."""
    if config.ckpt_path is None:
        return None
    path = Path(config.ckpt_path).expanduser()
    found = checkpoint.load(path)
    checkpoint.load_net(model.net, found, path)
    if "optimizer_states" not in found:
        raise UserError(f"ckpt_path={path} holds weights alone, and training cannot go on from it: give last.ckpt.")
    return str(path)


def test_best(trainer: pl.Trainer, model: ImageClassifier, data: ImageFolders, run_dir: Path) -> dict[str, float]:
    """The test metrics of best.ckpt, or of the last weights where nothing was validated."""
    path = run_dir / "checkpoints/best.ckpt"
    sharded = isinstance(trainer.strategy, pl.strategies.FSDPStrategy)  # whose weights Lightning must lay out itself
    if path.is_file() and not sharded:
        checkpoint.load_net(model.net, checkpoint.load(path), path)
    ckpt_path = str(path) if path.is_file() and sharded else None
    tested = trainer.test(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    return {key: float(value) for key, value in tested[0].items() if key.startswith("test/")}


def gather_skipped(trainer: pl.Trainer, model: ImageClassifier) -> None:
    """The broken images that any rank met."""
    if trainer.world_size > 1:
        gathered: list[list[str]] = [[]] * trainer.world_size
        torch.distributed.all_gather_object(gathered, list(model.skipped))
        model.skipped = dict.fromkeys(path for paths in gathered for path in paths)


# -- what is told


def facts_of(
    config: DictConfig, devices: Devices, data: ImageFolders, plan: Plan, model: ImageClassifier
) -> dict[str, Any]:
    return {
        "world_size": devices.world_size,
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "git": rundir.git_state(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-lightning", "alexlab")},
        "dataset": data.describe(),
        "precision": str(choose_precision(config.trainer.precision, devices.kind)),
        "effective_lr": plan.lr,
    }


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
    if config.optimizer.get("lr_reference_batch"):
        log.info(
            "effective learning rate %g: optimizer.lr=%g for %d images a step, here %d",
            plan.lr, config.optimizer.lr, config.optimizer.lr_reference_batch, plan.step_images,
        )  # fmt: skip


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
    here = rundir.shown(run_dir)
    print(f"look at it:  {where or f'python compare.py runs={here}'}")
    print(f"evaluate it: python eval.py run={here}")
    print("compare:     python compare.py", flush=True)
