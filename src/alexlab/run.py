"""A run, from its composed config to its summary: the table of contents, and the place that instantiates."""

import faulthandler
import logging
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger

from alexlab import checkpoint, launch, optim, report, resume, rundir
from alexlab import config as configs
from alexlab import plan as plans
from alexlab.augment import BatchAugment
from alexlab.callbacks.preemption import Notes, Preempted, Preemption
from alexlab.classifier import ImageClassifier
from alexlab.data.datamodule import ImageFolders, cores
from alexlab.data.transforms import SampleTransform
from alexlab.errors import RunFailedError, UserError
from alexlab.instantiate import build
from alexlab.memory import keep_memory
from alexlab.models.parts import head_of
from alexlab.plan import Plan
from alexlab.trainer import Devices, build_trainer, check_settings, choose_precision, find_devices

if TYPE_CHECKING:
    from alexlab.loggers.wandb import Status, WandbLogger

log = logging.getLogger("alexlab")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB on a 0-1 scale


def fit(config: DictConfig) -> float | None:
    """Train; the task of train.py, after `rules.check`. Returns the best `config.monitor`, for a sweep to optimize.

    Whatever can be found wrong is found before the run's directory is made.
    """
    config = configs.resolved(config)
    devices = find_devices(config)
    if devices.nodes > 1 and not launch.external():
        raise UserError(
            f"trainer.num_nodes={devices.nodes} needs torchrun or srun to start the ranks on each machine: "
            "torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py ..."
        )
    if "wandb" in config.logger and config.logger.wandb.mode == "online":
        from alexlab.loggers.wandb import require_key

        require_key()
    check_settings(config)
    choose_precision(config.trainer.precision, devices.kind)  # told now where it cannot be
    data = build_data(config, devices).read()
    plan = plans.make_plan(config, devices.world_size, data.images)
    model = prepare_model(config, data, plan)
    if config.dry_run:
        if launch.rank() == 0:
            plans.show(plan, config, devices, data.images, model.net, len(data.classes))
        return None
    run_dir = Path(config.run_dir)
    alone = devices.world_size == 1 or launch.external()  # no ranks are started here
    if not alone:
        launch.free_port(config.trainer.master_port)  # told now where it is in use
    if launch.rank() == 0:
        states = optim.state_tensors(configs.plain(config.optimizer))
        rundir.check_space(run_dir, plans.checkpoint_bytes(model.net, config, states))
        rundir.claim(config)
        resume.take_best_along(config)
        print(f"run directory: {rundir.shown(run_dir)}", flush=True)
    if alone:
        return fit_rank(config, data, model)
    del model
    threads = max(1, cores() // devices.local)
    ended = launch.spawn(run_dir, devices.world_size, threads, config.trainer.master_port)
    if ended.by_signal:
        rundir.mark(run_dir, "preempted", ended.why)
        sys.exit(ended.code)
    if ended.code:
        rundir.mark(run_dir, "failed", ended.why)
        raise UserError(ended.why) if ended.code == 2 else RunFailedError(ended.why, ended.code)
    return rundir.read_summary(run_dir)["best"].get(config.monitor)


def fit_rank(
    config: DictConfig, data: ImageFolders | None = None, model: ImageClassifier | None = None
) -> float | None:
    """Train as one rank, or alone; leaves summary.json and a closed W&B run behind, however it ends."""
    run_dir = Path(config.run_dir)
    rundir.set_up_logging(run_dir)
    if hasattr(signal, "SIGUSR2"):  # kill -USR2 shows where each thread of a rank is
        faulthandler.register(signal.SIGUSR2, sys.__stderr__ or 2)
    with Notes().taken() as notes:
        try:
            summary, where = _fit_rank(config, data, model, notes)
        except Preempted as error:  # a second Ctrl-C, while the run was being closed
            raise SystemExit(128 + error.number) from None
    if launch.rank() == 0:
        report.show_end(summary, run_dir, where)
    return summary["best"].get(config.monitor)


def _fit_rank(
    config: DictConfig, data: ImageFolders | None, model: ImageClassifier | None, notes: Notes
) -> tuple[dict[str, Any], str | None]:
    """Returns the summary, and what shows the run in W&B."""
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    devices = find_devices(config)
    if devices.kind == "cpu":
        keep_memory()
    board: WandbLogger | None = None
    trainer: pl.Trainer | None = None
    facts: dict[str, Any] = {}
    result: dict[str, Any] = {"best": {}, "last": {}, "test": {}, "checkpoints": {}, "images_per_second": None}
    status: Status = "failed"
    try:
        data = data or build_data(config, devices).read()
        plan = plans.make_plan(config, devices.world_size, data.images)
        model = model or prepare_model(config, data, plan)
        if config.compile:
            model.net.compile()  # in place: the state dict's keys stay clean
        facts = report.facts_of(config, devices, data, plan, model)
        loggers, board = build_loggers(config)
        if board is not None:
            board.log_config(configs.plain(config))
            board.log_summary(facts)
        report.tell_start(config, devices, data, plan, facts)
        preemption = Preemption(notes, timedelta(minutes=config.trainer.timeout))
        callbacks = [*build_callbacks(config), preemption]
        trainer = build_trainer(config, devices, loggers, callbacks, plan.batches, type(model.net))
        preemption.install(trainer)
        model.keeps_best = resume.best_beside(config) is not None
        trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
        preemption.agree(trainer)
        report.tell_stop(trainer, data)
        validate_end(trainer, model, data)
        result |= report.metrics_of(trainer, model, run_dir)
        if config.test and config.trainer.limit_test_batches not in (0, 0.0):
            result["test"] = score_best(trainer, model, data, run_dir)
        gather_skipped(trainer, model)
        preemption.agree(trainer)
        status = "finished"
    except Preempted as error:
        status = "preempted"
        result["error"] = str(error)
        log.warning("%s. %s", error, report.how_to_go_on(config, run_dir))
        raise SystemExit(128 + error.number) from None
    except BaseException as error:
        result["error"] = f"{type(error).__name__}: {error}"
        log.error("failed: %s", result["error"], extra={"file_only": True})
        raise
    finally:
        notes.looked_at = True  # how it ended is settled: signals wait until that is written and told to W&B
        if trainer is not None and model is not None and status != "finished":
            result = report.metrics_of(trainer, model, run_dir) | {k: v for k, v in result.items() if v}
        if model is not None and model.skipped:
            result["skipped_images"] = list(model.skipped)
            log.warning("%d broken images were left out: %s", len(model.skipped), ", ".join(list(model.skipped)[:5]))
        summary = {"status": status, "seconds": round(time.monotonic() - start, 2), "test": {}, **result, **facts}
        if launch.rank() == 0:
            rundir.write_json(run_dir / "summary.json", summary)
        if torch.distributed.is_initialized() and status == "finished":
            torch.distributed.destroy_process_group()
        if status == "finished" and data is not None and config.callbacks.figures and launch.rank() == 0:
            draw_figures(config, data, devices, board)
        if board is not None:
            if status == "finished":
                board.log_checkpoint(run_dir / "checkpoints/best.ckpt", {"best": summary["best"]})
            board.log_summary({key: value for key, value in summary.items() if key not in facts})
            board.finish(status)
    return summary, board.where if board is not None else None


# -- the parts of a run


def build_data(config: DictConfig, devices: Devices) -> ImageFolders:
    d, a = config.data, config.augment
    size = d.image_size
    train = SampleTransform(
        size, a.crop, tuple(a.scale), tuple(a.ratio), a.crop_ratio, a.flip, a.policy, a.policy_ops, a.policy_magnitude,
        tuple((first, pixels) for first, pixels in a.get("sizes") or ()),
    )  # fmt: skip
    return ImageFolders(
        root=d.root, batch_size=d.batch_size, seed=config.seed, train_transform=train,
        eval_transform=SampleTransform(size, "center", crop_ratio=a.crop_ratio), num_workers=d.num_workers,
        val_fraction=d.val_fraction, test_fraction=d.test_fraction, num_classes=d.num_classes, on_error=d.on_error,
        demo_seed=d.demo_seed, idx=d.get("idx"), class_names=d.class_names, world_size=devices.world_size,
        local_world_size=devices.local, kept=str(Path(config.paths.logs, ".index")), kind=devices.kind,
        crop_on=d.get("crop_on") or "auto", cache=d.get("cache"),
    )  # fmt: skip


def build_model(config: DictConfig, data: ImageFolders, kind: str, plan: Plan | None = None) -> ImageClassifier:
    """The classifier around `config.model.net`, for devices of `kind`; without a plan for evaluation alone.

    Writes what is worked out here into the config: the number of classes, and mean and std that were left to the
    weights. The net and the optimizer are tried here, so that mistakes are told before training.
    """
    a, m = config.augment, config.model
    num_classes = len(data.classes)
    config.data.num_classes = num_classes
    layout = config.trainer.channels_last
    net = build(m.net, num_classes=num_classes)
    mean, std = normalization(net)
    m.mean, m.std = mean if m.mean == "auto" else m.mean, std if m.std == "auto" else m.std
    for size in {config.data.image_size, *(pixels for _, pixels in a.get("sizes") or ())}:
        try_net(net, size, num_classes)
    training: dict[str, Any] = {}
    if plan is not None:
        if config.finetune.freeze_epochs or config.finetune.backbone_lr_factor != 1:
            head_of(net, num_classes)
        optimizer, scheduler = configs.plain(config.optimizer), configs.plain(config.scheduler)
        optimizer["backbone_lr_factor"] = config.finetune.backbone_lr_factor
        optim.build_optimizer(net, optimizer, plan.step_images)
        training = {
            "optimizer": optimizer, "scheduler": scheduler, "step_images": plan.step_images, "steps": plan.steps,
            "steps_per_epoch": plan.steps_per_epoch, "label_smoothing": config.label_smoothing,
        }  # fmt: skip
    return ImageClassifier(
        net=net,
        augment=BatchAugment(
            list(m.mean), list(m.std), num_classes, a.pca, a.erase, a.mixup, a.cutmix, a.get("pca_by") or "eigenvalues"
        ),
        class_names=data.readable_classes,
        seed=config.seed,
        provenance={"config": configs.plain(config), **data.provenance()},
        monitor=config.monitor,
        channels_last=kind == "cuda" if layout == "auto" else bool(layout),
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
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{type(net).__name__} fails on an image of {image_size} x {image_size} pixels: "
            f"{str(error).splitlines()[0]} ({Path(line.filename).name}, line {line.lineno}). "
            f"Is {image_size}, of data.image_size or augment.sizes, right for it, and does it take three channels?"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        gives = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"the network must turn images into logits (B, {num_classes}), and gives {gives} for one image."
        )
    net.train(training)


def normalization(net: torch.nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that the net's weights belong to, where it tells as timm's do; else ImageNet's."""
    told = getattr(net, "pretrained_cfg", None) or {}
    return list(told.get("mean", IMAGENET_MEAN)), list(told.get("std", IMAGENET_STD))


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


def prepare_model(config: DictConfig, data: ImageFolders, plan: Plan) -> ImageClassifier:
    """The classifier from its seed, after a look whether `ckpt_path` fits."""
    pl.seed_everything(config.seed, verbose=False)
    model = build_model(config, data, find_devices(config).kind, plan)
    if config.init_from is not None:
        resume.start_from(config, model.net, data.classes)
    if config.ckpt_path is not None:
        config.ckpt_path = str(resume.find_ckpt(config, "ckpt_path", "last"))
        resume.check_ckpt(config, data, model, plan)
    return model


def validate_end(trainer: pl.Trainer, model: ImageClassifier, data: ImageFolders) -> None:
    """Validate the last weights where the run ended between two validations, as trainer.max_steps lets it."""
    if model.validated_at == trainer.global_step or trainer.limit_val_batches == 0 or not trainer.global_step:
        return
    before = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.callback_metrics.update(before)


def score_best(trainer: pl.Trainer, model: ImageClassifier, data: ImageFolders, run_dir: Path) -> dict[str, float]:
    """The test metrics of best.ckpt, or of the last weights where nothing was validated."""
    path = run_dir / "checkpoints/best.ckpt"
    sharded = isinstance(trainer.strategy, pl.strategies.FSDPStrategy)  # whose weights Lightning must lay out itself
    if path.is_file() and not sharded:
        checkpoint.load_net(model.net, checkpoint.load(path), path)
    ckpt_path = str(path) if path.is_file() and sharded else None
    tested = trainer.test(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    return {key: float(value) for key, value in tested[0].items() if key.startswith("test/")}


def draw_figures(config: DictConfig, data: ImageFolders, devices: Devices, board: "WandbLogger | None") -> None:
    """The figures of a trained run, on the first rank alone. What goes wrong with them is told; the run is well."""
    from alexlab import gallery  # and with it Matplotlib

    run_dir = Path(config.run_dir)
    saved = [name for name in ("best", "last") if (run_dir / f"checkpoints/{name}.ckpt").is_file()]
    try:
        log.info("drawing figures ...")
        drawn = gallery.draw(run_dir, data, config.monitor, saved[0], among=500, device=devices.kind) if saved else []
        tested = [run_dir / f"figures/{name}.png" for name in ("confusion_matrix", "per_class", "mistakes")]
        if board is not None and drawn:
            gallery.log_to(board, [*drawn, *(path for path in tested if path.is_file())])
    except (Exception, Preempted) as error:
        log.warning("some figures could not be drawn (%s: %s)", type(error).__name__, str(error)[:200])


def gather_skipped(trainer: pl.Trainer, model: ImageClassifier) -> None:
    """The broken images that any rank met."""
    if trainer.world_size > 1:
        gathered: list[dict[str, str]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(gathered, model.skipped)
        model.skipped = {path: why for skipped in gathered for path, why in skipped.items()}
