"""Evaluate a run on its own test images or another folder: the task of eval.py."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from alexlab.commands import build as assemble
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fingerprint import changed_splits
from alexlab.data.transforms import SampleTransform
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import run_dir as rundir
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import UserError
from alexlab.engine.memory import keep_memory
from alexlab.tasks import load as loading
from alexlab.tasks.classification import ImageClassifier

MOST_RANKS = 65_536  # that a summary.json may tell of


def check_images(found: dict[str, Any], data: ImageFolders, its: DictConfig) -> None:
    """Tell where the run's own folder holds other images by now.

    Raises:
        UserError: its held-out images were drawn from it by fraction, and training's are among them now.
    """
    changed = changed_splits(found["alexlab"]["dataset"], data.describe())
    if changed and its.data.val_fraction is not None:
        raise UserError(
            f"{data.root} holds other images than in training, so that its split by data.val_fraction is another, "
            "with images of training among those held out: put the images back, or give others with data.root=PATH."
        )
    if changed:
        print(f"note: the files of {', '.join(changed)} in {data.root} are not those of the training any more.")


def read_other(data: ImageFolders, then: dict[str, Any]) -> None:
    """Read the images of a folder given by hand: the run's own split of it, where its images have moved there as they
    were; else all of its test/, val/ or class folders."""
    if data.val_fraction is not None:
        with contextlib.suppress(UserError):  # it holds other images, which may not be split so
            if not changed_splits(then, data.read().describe()):
                return
        data.splits = {}
        print(
            f"note: the run's images were drawn from one folder, and {data.root} is not as that was: all its images "
            "count, so none of them must be from training."
        )
    data.read_for_evaluation()


class TenCrops(torch.nn.Module):
    """A net that sees the corners and the middle of larger images, and their mirror images."""

    def __init__(self, net: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, images: Tensor) -> Tensor:
        """float (B, 3, R, R), R above `size` -> (B, num_classes), the logarithm of the ten crops' mean probability."""
        far = images.shape[-1] - self.size
        middle = round(far / 2)
        places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
        crops = [images[..., y : y + self.size, x : x + self.size] for y, x in places]
        crops += [crop.flip(-1) for crop in crops]
        told = torch.stack([self.net(crop.contiguous()).float().log_softmax(1) for crop in crops])
        return told.logsumexp(0) - math.log(len(crops))  # the mean's own logarithm would be -inf where all are small


def use_ten_crops(model: ImageClassifier, data: ImageFolders, size: int, crop_ratio: float) -> None:
    """As Krizhevsky et al. 2012 tested: crops of `size` out of a square of size / crop_ratio pixels (224 of 256).

    Raises:
        UserError: there is nothing around the middle.
    """
    square = round(size / crop_ratio)
    if square == size:
        raise UserError(
            f"crops=10 needs something around the {size} pixels that the net sees, and with the run's "
            f"augment.crop_ratio={crop_ratio} there is nothing: crops=1."
        )
    data.transforms["val"] = data.transforms["test"] = SampleTransform(square, "center", crop_ratio=1.0)
    model.net = TenCrops(model.net, size)


def settings_of(config: DictConfig, run_dir: Path) -> DictConfig:
    """The run's own config, with what eval.py was asked for, for one process and a network of known weights."""
    its = loading.config_of(run_dir)
    its.paths.logs = config.paths.logs  # not those of the machine that trained it, where indexes would be kept
    if config.data.root is not None:
        its.data.root = str(Path(config.data.root).expanduser().resolve())
        its.data.demo_seed = its.data.idx = None
    elif not Path(its.data.root).resolve().is_relative_to(Path(config.paths.data).resolve()):
        its.data.demo_seed = its.data.idx = None  # of a run from elsewhere: nothing is written where it says
    if config.data.num_workers is not None:
        its.data.num_workers = config.data.num_workers
    its.data.cache = None  # each image is read once
    its.data.on_error = config.data.on_error or its.data.on_error
    its.compile = its.compile if config.compile is None else config.compile
    its.trainer.accelerator = config.trainer.accelerator or its.trainer.accelerator
    its.trainer.precision = config.trainer.precision or its.trainer.precision
    its.trainer.devices, its.trainer.num_nodes, its.trainer.strategy = 1, 1, "auto"
    its.data.num_classes = None
    if its.trainer.limit_test_batches in (0, 0.0):  # training was not to test; who runs eval.py wants to
        its.trainer.limit_test_batches = None
    return its


def read_images(
    config: DictConfig, its: DictConfig, found: dict[str, Any], devices: Devices, run_dir: Path
) -> ImageFolders:
    """The images to score, in the order and batches of training's own test where they are the run's own."""
    data = assemble.build_data(its, devices)
    if config.data.root is None:
        data.read()
    else:
        read_other(data, found["alexlab"]["dataset"])
    loading.check_classes(found, data.classes, data.root)
    data.readable_classes = loading.readable_classes(found, its)
    if its.trainer.limit_test_batches is None:  # the very batches of training's own test, whose sums round alike
        ranks = rundir.read_summary(run_dir).get("world_size", 1)
        data.world_size = ranks if isinstance(ranks, int) and 1 <= ranks <= MOST_RANKS else 1
    if config.data.root is None:
        check_images(found, data, its)
    for line in data.notes():
        print(f"note: {line}")
    return data


def named(metric: str, crops: int) -> str:
    """A metric's own name where it is of ten crops an image."""
    return metric if crops == 1 else f"{metric}_{crops}crops"


def show(result: dict[str, Any], run_dir: Path, out: Path) -> None:
    print(f"run: {rundir.shown(run_dir)} ({rundir.read_summary(run_dir).get('status', 'running or killed')})")
    crops = ", ten crops each" if result["crops"] == 10 else ""
    print(f"{result['images']} images of {result['split']}, {Path(result['checkpoint']).name}{crops}")
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key in ("loss", "acc1", "acc5"):
        name = named(key, result["crops"])
        table.add_row(name, f"{result[name]:.4f}")
    for name, value in list(result["per_class_acc1"].items())[:20]:
        table.add_row(escape(f"acc1 of {name}"), "no image" if value is None else f"{value:.4f}")
    Console().print(table)
    skipped = result["skipped_images"]
    if skipped:
        print(f"{len(skipped)} broken images were left out: {', '.join(skipped[:5])}")
    print(f"written to {rundir.shown(out)}", flush=True)


class Tested(NamedTuple):
    """A run, tested anew."""

    config: DictConfig
    data: ImageFolders
    model: ImageClassifier
    checkpoint: Path
    precision: str
    device: str
    metrics: dict[str, float]


def score(config: DictConfig, run_dir: Path, callbacks: Sequence[pl.Callback] = ()) -> Tested:
    """Rebuild a run from its own config and test it as `config` (conf/eval.yaml) asks."""
    its = settings_of(config, run_dir)
    path = rundir.ckpt_of(run_dir, str(config.ckpt))
    found = checkpoint.load(path)
    devices = find_devices(its)
    if devices.kind == "cpu":
        keep_memory()
    if config.trainer.precision is None and devices.kind == "cpu" and its.trainer.precision in ("16-mixed", 16):
        print("note: the run's trainer.precision=16-mixed needs a GPU; evaluated in 32-true.")
        its.trainer.precision = "32-true"
    precision = choose_precision(its.trainer.precision, devices.kind)
    rundir.quiet_libraries()
    data = read_images(config, its, found, devices, run_dir)
    pl.seed_everything(its.seed, verbose=False)
    model = assemble.build_model(its, data, devices.kind)
    loading.load_net(model.net, found, path)
    loading.check_own(found, its, path, run_dir)
    loading.warn_of_changed_sources(found, model.net, path)
    if its.compile:
        model.net.compile()
    if config.get("crops") == 10:
        use_ten_crops(model, data, its.data.image_size, its.augment.crop_ratio)
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(devices.kind, devices.kind), devices=1, logger=False, precision=precision,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        limit_test_batches=its.trainer.limit_test_batches, use_distributed_sampler=False, inference_mode=True,
    )  # fmt: skip
    tested = trainer.test(model, datamodule=data, verbose=False)[0]
    metrics = {key.removeprefix("test/"): float(value) for key, value in tested.items()}
    return Tested(its, data, model, path, str(precision), devices.kind, metrics)


def evaluate(config: DictConfig) -> float:
    """Test a run, print and write the numbers. Returns top-1."""
    run_dir = rundir.find_run(str(config.run), Path(config.paths.logs), str(config.ckpt))
    tested = score(config, run_dir)
    matrix = tested.model.confusion_matrix.double()
    share = [float(hits / count) if count else None for hits, count in zip(matrix.diag(), matrix.sum(1), strict=True)]
    result: dict[str, Any] = {
        "checkpoint": str(tested.checkpoint),
        "split": tested.data.test_split,
        "images": int(matrix.sum()),
        "crops": config.crops,
        "root": str(tested.data.root),
        "precision": tested.precision,
        "skipped_images": list(tested.model.skipped),
        **{named(key, config.crops): value for key, value in tested.metrics.items()},
        "per_class_acc1": dict(zip(tested.data.readable_classes, share, strict=True)),
    }
    out = run_dir / ("eval.json" if config.crops == 1 else f"eval-{config.crops}crops.json")
    rundir.write_json(out, result)
    show(result, run_dir, out)
    return tested.metrics["acc1"]
