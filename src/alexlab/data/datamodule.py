"""The LightningDataModule: image folders -> batches for this rank."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from alexlab.data import class_names as names
from alexlab.data import demo, fashion_mnist
from alexlab.data import folder as folder_index
from alexlab.data.dataset import Files, ImageDataset
from alexlab.data.fast import archives, prepared
from alexlab.data.fast.caches import Index, Keeping
from alexlab.data.fast.device_cache import DeviceLoader
from alexlab.data.fast.folder_cache import scan_or_recall
from alexlab.data.folder import ImageIndex
from alexlab.data.loader import Loader
from alexlab.data.sampler import EvalBatches, InTurn, TrainBatches
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

MOST_THREADS = 12  # by default: more are slower, by Python's lock (benchmarks/threads.py)
SPLITS = ("train", "val", "test")


class ImageFolders(pl.LightningDataModule):
    """An ImageNet-style folder. `read()` finds the images; batches are (images uint8 (B, 3, H, W), targets int64 (B,),
    skipped paths).

    Args:
        root: holds train/, val/ and perhaps test/, each with a folder a class; or, with val_fraction, class folders; or
            what prepare.py made of them; or ImageNet's archives.
        batch_size: global: images a step over all devices; must divide by their number.
        num_workers: threads a device that decode; None takes the cores at hand, shared among this machine's
            devices, and at most MOST_THREADS.
        val_fraction, test_fraction: share of each class held out where `root` has no train/ and val/ (0 to 1).
        num_classes: None, or the number that the folder must hold.
        on_error: of a broken image: "raise" (its path is told) or "skip" (counted and listed).
        class_names: None, "imagenet" (its 1,000 synsets), "fashion_mnist", or a file with lines of a folder, a tab and
            its name.
        world_size: ranks of the run; one process alone gives all their batches in turn when it evaluates.
        demo_seed: write the built-in shapes into `root` first, from this seed.
        idx: write Fashion-MNIST into `root` first: see `fashion_mnist`.
        kept: the folder for the indexes of large folders; None reads the names anew each time.
        kind: of the devices: "cuda", "mps" or "cpu".
        crop_on: where images are cropped: "cpu", "device", or "auto", which is a GPU where that can be: with images of
            one size as pixels, and for training no policy.
        cache: None, "ram" (decoded images are kept in memory, as many as there is room for), or "device" (the images,
            which are cropped there, are kept on each device).
        timeout: seconds that images are waited for, as from a disk that hangs; None is for ever.
    """

    def __init__(
        self,
        root: str,
        batch_size: int,
        seed: int,
        train_transform: SampleTransform,
        eval_transform: SampleTransform,
        num_workers: int | None = None,
        val_fraction: float | None = None,
        test_fraction: float = 0.0,
        num_classes: int | None = None,
        on_error: str = "raise",
        demo_seed: int | None = None,
        idx: str | None = None,
        class_names: str | None = None,
        world_size: int = 1,
        local_world_size: int = 1,
        kept: str | None = None,
        kind: str = "cpu",
        crop_on: str = "auto",
        cache: str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size, self.seed = batch_size, seed
        self.transforms = {"train": train_transform, "val": eval_transform, "test": eval_transform}
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.expected_classes, self.on_error, self.demo_seed, self.idx = num_classes, on_error, demo_seed, idx
        self.class_names, self.kept, self.timeout = class_names, kept, timeout
        self.world_size, self.local_world_size = world_size, local_world_size
        shared = max(1, cores() // local_world_size)
        self.num_workers = min(MOST_THREADS, shared) if num_workers is None else num_workers
        self.kind, self.keeping = kind, Keeping(kind, crop_on, cache, local_world_size)
        self.splits: dict[str, Index] = {}
        self._readable: list[str] | None = None

    def read(self) -> "ImageFolders":
        """Find the images of all splits.

        Raises:
            UserError: a folder that is missing, empty, or does not fit the others.
        """
        if self.splits:
            return self
        if self.demo_seed is not None:
            demo.write_demo(self.root, seed=self.demo_seed)
        if self.idx is not None:
            fashion_mnist.write_fashion_mnist(self.root, self.idx)
        if prepared.is_prepared(self.root):
            self.splits = self._read_prepared()
        elif archives.is_archives(self.root):
            self._not_split("are ImageNet's archives, with a split of their own")
            self.splits = {**archives.read(self.root)}
        else:
            self.splits = {**(self._read_splits() if (self.root / "train").is_dir() else self._read_one_folder())}
        train = self.splits["train"]
        if len(train.classes) == 1:
            (label,) = train.classes
            inside = folder_index.class_folders(train.root / label) if isinstance(train, ImageIndex) else ()
            deeper = f": its folders are {folder_index.some(inside)}; are they the classes?" if inside else "."
            raise UserError(f"{train.root} holds one class, {label}, and there is nothing to tell apart{deeper}")
        if self.expected_classes is not None and self.expected_classes != len(train.classes):
            raise UserError(
                f"data.num_classes={self.expected_classes}, but {train.root} holds {len(train.classes)} classes: "
                "data.num_classes=null counts them; or point data.root elsewhere."
            )
        self.keeping.check(self.root, self.splits, self.transforms)
        return self

    def _read_prepared(self) -> dict[str, Index]:
        self._not_split("were split when they were prepared")
        if self._readable is None and self.class_names is None:
            self._readable = prepared.about(self.root)["readable_classes"]
        return {**prepared.read(self.root)}

    def _not_split(self, why: str) -> None:
        if self.val_fraction is not None or self.test_fraction > 0:
            raise UserError(
                f"data.val_fraction={self.val_fraction}, data.test_fraction={self.test_fraction}: the images of "
                f"{self.root} {why}: leave them out."
            )

    def _read_splits(self) -> dict[str, ImageIndex]:
        if self.val_fraction is not None or self.test_fraction > 0:
            raise UserError(
                f"data.val_fraction={self.val_fraction}, data.test_fraction={self.test_fraction}: they split class "
                f"folders, and {self.root} has train/ already: leave them out, or give data.root={self.root / 'train'}."
            )
        train = self._scan(self.root / "train")
        splits = {"train": train}
        for name in ("val", "test"):
            if (self.root / name).is_dir():
                splits[name] = self._scan(self.root / name, train.classes)
        if "val" not in splits:
            raise UserError(
                f"{self.root} has train/ but no val/: add {self.root / 'val'}, or point data.root at "
                f"{self.root / 'train'} and split it with data.val_fraction=0.1."
            )
        return splits

    def read_to_evaluate(self) -> "ImageFolders":
        """Find the images of a folder that need hold no training images: test/, else val/, else its class folders.

        Raises:
            UserError: as `read`.
        """
        if prepared.is_prepared(self.root):
            self.splits = {**prepared.read(self.root)}
            return self
        if archives.is_archives(self.root):
            self.splits = {"val": archives.read(self.root)["val"]}
            return self
        name = next((name for name in ("test", "val") if (self.root / name).is_dir()), None)
        self.splits = {name or "test": self._scan(self.root / name if name else self.root)}
        return self

    def _read_one_folder(self) -> dict[str, ImageIndex]:
        if self.val_fraction is None:
            inside = folder_index.class_folders(self.root)  # a missing folder is told as such
            beside = [self.root.parent, *(self.root / name for name in inside)]
            near = next((path for path in beside if (path / "train").is_dir()), None)
            raise UserError(
                f"{self.root} holds no train/ folder: it must hold train/ and val/ with a folder of images a class in "
                "each, or class folders alone, to be split with data.val_fraction=0.1."
                + (f" Did you mean data.root={near}?" if near else "")
            )
        splits = [name for name in folder_index.class_folders(self.root) if name in SPLITS]
        if splits:
            raise UserError(
                f"{self.root} holds {' and '.join(splits)} but no train/: add it, or point data.root at a folder of "
                "class folders to split it with data.val_fraction."
            )
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        return folder_index.split(
            self._scan(self.root), {name: part for name, part in fractions.items() if part > 0}, self.seed
        )

    def _scan(self, folder: Path, classes: tuple[str, ...] | None = None) -> ImageIndex:
        if self.kept is None:
            return folder_index.scan(folder, classes)
        return scan_or_recall(folder, classes, Path(self.kept))

    @property
    def classes(self) -> tuple[str, ...]:
        """The class folders' names, in the order of the targets."""
        return next(iter(self.splits.values())).classes

    @property
    def readable_classes(self) -> list[str]:
        """The classes' names for people, where the data's config has them ("n01440764": "tench")."""
        if self._readable is None:
            self._readable = names.readable(self.classes, self.class_names)
        return self._readable

    @readable_classes.setter
    def readable_classes(self, readable: list[str]) -> None:
        self._readable = readable

    def left_out(self) -> list[str]:
        """The files that are in no split, a line a folder and reason."""
        lines = []
        for index in self.splits.values():
            counts = dict(index.ignored) if isinstance(index, ImageIndex) else {}
            loose = counts.pop("", 0)
            if counts:
                told = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items(), key=lambda c: -c[1]))
                lines.append(f"{index.root}: files that are no images by their suffix are left out: {told}")
            if loose:
                lines.append(f"{index.root}: images beside the class folders are of no class, and left out: {loose:,}")
        return lines

    def lacking(self) -> list[str]:
        """The classes that a split has no image of, a line a split."""
        lines = []
        for name, index in self.splits.items():
            counts = np.bincount(index.targets, minlength=len(index.classes))
            empty = [index.classes[i] for i in np.flatnonzero(counts == 0)]
            if empty:
                lines.append(f"{name} holds no image of {len(empty)} classes: {folder_index.some(empty)}")
        return lines

    @property
    def images(self) -> dict[str, int]:
        """The number of images of each split."""
        return {name: len(index) for name, index in self.splits.items()}

    def describe(self) -> dict[str, Any]:
        """What identifies the data: root, classes, sizes and fingerprint of each split."""
        return {
            "root": str(self.root),
            "num_classes": len(self.classes),
            "images": self.images,
            "fingerprint": {name: index.fingerprint() for name, index in self.splits.items()},
        }

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, as plain values."""
        return {
            "classes": list(self.classes),
            "readable_classes": self.readable_classes,
            "dataset": self.describe(),
        }

    def setup(self, stage: str) -> None:
        self.read()

    def train_dataloader(self) -> Loader | DeviceLoader:
        sampler = self._sampler(self._rank)
        if self.trainer is not None:
            # Lightning's first iter() comes before its own set_epoch(), which reads this very number; after a resume
            # `current_epoch` is still that of the epoch before
            loop: Any = self.trainer.fit_loop
            sampler.set_epoch(loop.epoch_progress.current.processed)
            if loop.epoch_progress.total.processed < loop.epoch_progress.total.started:  # it goes on within an epoch
                sampler.begins_at = (sampler.epoch, loop.epoch_loop.batch_progress.current.completed)
        return self._loader("train", sampler)

    def _sampler(self, rank: int) -> TrainBatches:
        sampler = TrainBatches(len(self.splits["train"]), self.batch_size, self.seed, rank, self.world_size)
        sampler.repeats = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return sampler

    def images_of(self, epoch: int, batch: int, rank: int) -> list[str]:
        """The paths of training batch `batch` (from 0) of an epoch (from 0) on a rank."""
        return [self.splits["train"].path(i) for i, _ in next(self._sampler(rank).of(epoch, batch))]

    def val_dataloader(self) -> Loader | DeviceLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> Loader | DeviceLoader:
        return self._eval_loader(self.tested_split)

    @property
    def tested_split(self) -> str:
        """ "test", or "val" where there are no test images."""
        return "test" if "test" in self.splits else "val"

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _eval_loader(self, split: str) -> Loader | DeviceLoader:
        share = self.batch_size // self.world_size
        seed = self.seed if self._limited() else None  # a part must not be the first classes alone
        alone = self.trainer is None or self.trainer.world_size < self.world_size
        ranks = range(self.world_size) if alone else [self._rank]
        shares = [EvalBatches(len(self.splits[split]), share, rank, self.world_size, seed) for rank in ranks]
        return self._loader(split, InTurn(shares) if len(shares) > 1 else shares[0])

    def _limited(self) -> bool:
        trainer: Any = self.trainer
        if trainer is None:
            return False
        limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
        return not (isinstance(limit, float) and limit == 1.0)

    def _loader(self, split: str, batches: "TrainBatches | EvalBatches | InTurn") -> Loader | DeviceLoader:
        whole = self.keeping.left_whole(self.splits[split], self.transforms[split])
        index: Files = self.splits[split]
        if self.keeping.cache == "ram" and split != "test":  # which is read once
            index = self.keeping.in_ram(split, self.splits, self.trainer)
        dataset = ImageDataset(index, self.transforms[split], self.seed, self.on_error, whole)
        if self.keeping.cache == "device" and split != "test":
            held = self.keeping.on_device(split, dataset, self._device, self.num_workers, self.timeout)
            return DeviceLoader(dataset, batches, held)
        return Loader(dataset, batches, self.num_workers, self._device.type == "cuda", self.timeout)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device(self.kind)


def cores() -> int:
    """The cores that this process may use: a job of a scheduler often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinities
