"""The parts of a run, from its composed config: data, classifier, loggers, callbacks."""

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from alexlab import models
from alexlab.commands.plan import Plan
from alexlab.data.datamodule import ImageFolders
from alexlab.data.transforms import SampleTransform
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import launcher as launch
from alexlab.engine import naming as identity
from alexlab.engine import secrecy, sweeps
from alexlab.engine.devices import Devices
from alexlab.engine.errors import UserError
from alexlab.engine.targets import build, build_network, without_weights
from alexlab.loggers.csv_logger import MetricsLogger
from alexlab.models.introspection import head_of, normalization
from alexlab.tasks import optimizers as optim
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.classification import ImageClassifier

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import WandbLogger


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
        crop_on=d.get("crop_on") or "auto", cache=d.get("cache"), timeout=60 * config.trainer.timeout,
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
    own = m.net.get("num_classes", num_classes)
    if own != num_classes and plan is not None and config.resume.run is None:  # older runs' configs may have it
        raise UserError(
            f"model.net.num_classes={own}: the images are of {num_classes} classes, and the network is made for as "
            "many: take the key out."
        )
    known = plan is None or config.get("ckpt_path") is not None  # a checkpoint will give all weights
    net = build_network(m.net, num_classes, fetch=not known)
    m.mean, m.std = normalization(net, m.mean, m.std)
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
        provenance=secrecy.hidden({"config": configs.plain(config), **data.provenance()}),
        monitor=config.monitor,
        max_bad=config.data.get("max_bad"),
        leaves_nan=config.get("on_nan", "stop") != "stop",
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
        if isinstance(error, ValueError) and Path(line.filename).parent == Path(models.__file__).parent:
            raise UserError(str(error)) from error  # which says itself what it needs
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


def build_loggers(config: DictConfig) -> "tuple[list[Logger], WandbLogger | None]":
    """metrics.csv always; the others as `config.logger` says, on rank 0. W&B's is given by itself too."""
    run_dir = Path(config.run_dir)
    loggers: list[Logger] = [MetricsLogger(run_dir)]
    board = None
    if launch.rank() > 0:
        return loggers, board
    if "wandb" in config.logger:
        from alexlab.loggers.wandb_logger import WandbLogger

        settings = configs.told(config.logger.wandb)
        settings["name"] = settings["name"] or identity.readable(config)
        # of a sweep's jobs it is the sweep; else runs that differ in their seed alone are one
        settings["group"] = settings["group"] or identity.group_of(config)
        settings["tags"] = settings["tags"] or identity.tags_for(config)
        board = WandbLogger(save_dir=str(run_dir), **settings)
        loggers.append(board)
    if "tensorboard" in config.logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        # what a run that goes on logs again takes the place of what it had logged from there on
        step = checkpoint.load(Path(config.ckpt_path))["global_step"] if config.ckpt_path is not None else None
        loggers.append(TensorBoardLogger(str(run_dir), name="", version="tensorboard", purge_step=step))
    return loggers, board


def build_callbacks(config: DictConfig) -> list[pl.Callback]:
    """The entries of `config.callbacks` with a `_target_`: a user's own. And in a trial of Optuna's what may end it."""
    nodes = [configs.plain(node) for node in config.callbacks.values() if isinstance(node, DictConfig)]
    known = config.get("ckpt_path") is not None
    built = [build(without_weights(node) if known else node) for node in nodes if "_target_" in node]
    trial = sweeps.trial()
    if trial is not None:
        from alexlab.callbacks.pruning import Pruning

        built.append(Pruning(trial, sweeps.make_pruner(config.sweep, config.trainer.max_epochs), config.monitor))
    return built
