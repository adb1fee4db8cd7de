"""LightningDataModule: from a folder of images to batches for this rank. For images that are not files, copy arrays.py.

For images that are organized in another way, `find_splits` is the method to change: it returns one index per split, and
everything below it (loaders, samplers, caches, fingerprints) works with any `Index` (index.py). A subclass with another
`find_splits` can be named as `_target_` in conf/data, see docs/data.md.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from alexlab.data import class_names as names
from alexlab.data import demo, fashion_mnist, folder
from alexlab.data.dataset import ImageDataset
from alexlab.data.fast import archives, device_cache, prepared
from alexlab.data.fast.device_cache import CACHED, DeviceLoader
from alexlab.data.fast.folder_cache import cached_scan
from alexlab.data.folder import ImageIndex
from alexlab.data.index import Index, Selection
from alexlab.data.loader import Loader
from alexlab.data.sampler import EvalBatchSampler, TrainBatchSampler, sampling_weights
from alexlab.data.splits import class_counts, cross_validation, hold_out
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError
from alexlab.engine.process import cores

MAX_THREADS = 12  # by default: more are slower, because of the GIL (benchmarks/threads.py)


class ImageFolders(pl.LightningDataModule):
    """Load batches of an ImageNet-style folder, of the output of `alexlab prepare`, or of ImageNet's archives.

    `read()` finds the images. A batch is a `Batch`: images uint8 (B, C, H, W), targets, skipped paths. Most arguments
    are keys of conf/data/_base.yaml, and are explained in that file.

    Args:
        root: contains train/, val/ and optionally test/, each with one folder per class; or, with val_fraction, class
            folders; or prepared images; or ImageNet's archives.
        batch_size: images per batch over all devices, at least their number.
        world_size: number of ranks of the run. A process that evaluates alone yields the batches of all ranks.
        local_world_size: number of ranks on this machine.
        index_cache: the folder for saved indexes of large folders; None reads the file names each time.
        device: type of the devices: "cuda", "mps" or "cpu".
        timeout: seconds to wait for images if a disk hangs; None waits forever.
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
        class_names: str | None = None,
        world_size: int = 1,
        local_world_size: int = 1,
        demo_seed: int | None = None,
        idx: str | None = None,
        index_cache: str | None = None,
        device: str = "cpu",
        crop_on: str = "auto",
        cache: str | None = None,
        timeout: float | None = None,
        sampler: str = "shuffle",
        folds: int | None = None,
        fold: int | None = None,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.seed = Path(root), batch_size, seed
        self.transforms = {"train": train_transform, "val": eval_transform, "test": eval_transform}
        self.num_workers = default_threads(local_world_size) if num_workers is None else num_workers
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.num_classes, self.on_error, self.class_names = num_classes, on_error, class_names
        self.world_size, self.local_world_size = world_size, local_world_size
        self.demo_seed, self.idx, self.index_cache = demo_seed, idx, index_cache
        self.device, self.crop_on, self.cache, self.timeout = device, crop_on, cache, timeout
        self.sampler, self.folds, self.fold = sampler, folds, fold
        self.splits: Mapping[str, Index] = {}
        self.weights: np.ndarray | None = None  # of `sampler`
        self.chosen_split: str | None = None  # of a test
        self.train_batches: int | None = None  # of an epoch; None: as many as the images fill
        self._on_device: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- find the images

    def read(self) -> "ImageFolders":
        """Find the images of all splits. Raises UserError if they do not fit the config or each other."""
        if self.splits:
            return self
        splits = self.divide()
        train = splits["train"]
        if len(train.classes) == 1:
            only = train.root / train.classes[0]
            deeper = folder.class_folders(only) if isinstance(train, ImageIndex) and only.is_dir() else ()
            hint = f" {only.name}/ contains {folder.listed(deeper)}: are these the classes?" if deeper else ""
            raise UserError(f"{train.root} contains only one class, {train.classes[0]}: at least two are needed.{hint}")
        if self.num_classes not in (None, len(train.classes)):
            raise UserError(
                f"data.num_classes={self.num_classes}, but {train.root} contains {len(train.classes)} classes: "
                "data.num_classes=null counts them; or point data.root at another folder."
            )
        device_cache.check_device_input(self.crop_on, self.cache, self.device, splits, self.transforms)
        self.weights = sampling_weights(self.sampler, train)
        self.splits = splits
        self._check_channels()
        return self

    def divide(self) -> Mapping[str, Index]:
        """Find the images, and hold out val and test images from them by the fractions or folds of the config."""
        splits = self.find_splits()
        if self.folds is not None and self.fold is not None:
            return cross_validation(splits, self.folds, self.fold, self.seed, self.test_fraction)
        splits = hold_out(splits, {"val": self.val_fraction, "test": self.test_fraction}, self.seed)
        if "val" not in splits:
            raise UserError(f"{self.root} has no val images: hold out some with data.val_fraction=0.1.")
        return splits

    def find_splits(self) -> Mapping[str, Index]:
        """Return the index of each split: train, and val and test if they exist; `divide` holds out the rest."""
        if self.demo_seed is not None:
            demo.write_demo(self.root, seed=self.demo_seed)
        if self.idx is not None:
            fashion_mnist.write_fashion_mnist(self.root, self.idx)
        if (splits := self.read_prepared()) is not None:
            return splits
        if archives.is_archives(self.root):
            return archives.read(self.root)
        return folder.find_splits(self.root, self.val_fraction is not None or self.folds is not None, self._scan)

    def read_prepared(self) -> Mapping[str, Index] | None:
        """Return the splits of a set that `alexlab prepare` has written; None if `root` is none."""
        return prepared.read(self.root) if prepared.is_prepared(self.root) else None

    def read_for_evaluation(self, classes: tuple[str, ...]) -> None:
        """Find the images of a folder that needs no training images: test/, else val/, else its class folders.

        Args:
            classes: of the training, of which the folder may have only some.
        """
        if (splits := self.read_prepared()) is not None:
            self.splits = splits
        elif archives.is_archives(self.root):
            self.splits = {"val": archives.read(self.root)["val"]}
        else:
            folders = folder.split_folders(self.root)
            split = next((split for split in ("test", "val") if split in folders), "test")
            self.splits = {split: self._scan(folders.get(split, self.root), classes)}
        self._check_channels()

    def _check_channels(self) -> None:
        for split, index in self.splits.items():
            channels = self.transforms[split].channels
            if channels not in index.channels:
                values = " or ".join(map(str, index.channels))
                raise UserError(f"`model.in_channels={channels}` must be {values} for the images of {self.root}.")

    def _scan(self, path: Path, classes: tuple[str, ...] | None = None) -> ImageIndex:
        if self.index_cache is None:
            return folder.scan(path, classes)
        return cached_scan(path, classes, Path(self.index_cache))

    # -- facts about the images

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders, in the order of the targets."""
        return next(iter(self.splits.values())).classes

    @property
    def multilabel(self) -> bool:
        """Whether images have a list of labels, so that the targets of a split are 0 and 1, (N, num_classes)."""
        return next(iter(self.splits.values())).targets.ndim == 2

    @functools.cached_property
    def readable_classes(self) -> list[str]:
        """Names of the classes for people ("n01440764" is "tench"), in the order of the targets."""
        root = next(iter(self.splits.values())).root
        if self.class_names is None and prepared.is_prepared(root):
            return prepared.about(root)["readable_classes"]
        return names.readable(self.classes, self.class_names)

    @property
    def images(self) -> dict[str, int]:
        """The number of images of each split."""
        return {split: len(index) for split, index in self.splits.items()}

    @property
    def class_counts(self) -> list[int]:
        """The number of training images of each class, in the order of the targets."""
        return class_counts(self.splits["train"]).tolist()

    @property
    def test_split(self) -> str:
        """The split that a test uses, which is `chosen_split`, or "test", or "val" if the data has no test images."""
        return self.chosen_split or ("test" if "test" in self.splits else "val")

    def describe(self) -> dict[str, Any]:
        """Return what identifies the images, as plain values: see fingerprint.py for the two fingerprints."""
        described: dict[str, Any] = {
            "root": str(self.root),
            "num_classes": len(self.classes),
            "images": self.images,
            "fingerprint": {split: index.fingerprint for split, index in self.splits.items()},
            "names_fingerprint": {split: index.names_fingerprint for split, index in self.splits.items()},
        }
        train, val = self.splits.get("train"), self.splits.get("val")
        if isinstance(train, Selection) and isinstance(val, Selection):
            both = Selection(train.parts, np.sort(np.concatenate([train.rows, val.rows])))
            of_test = {split: text for split, text in described["fingerprint"].items() if split == "test"}
            described["fingerprint_of_folds"] = {"train and val": both.fingerprint, **of_test}
        return described

    def provenance(self) -> dict[str, Any]:
        """Return what a checkpoint saves about the images, as plain values."""
        return {"classes": list(self.classes), "readable_classes": self.readable_classes, "dataset": self.describe()}

    def notes(self) -> list[str]:
        """Return a line for each folder with unused files, and for each split in which classes have no images."""
        lines, used = [], set()
        for split, index in self.splits.items():
            for part in index.parts if isinstance(index, Selection) else (index,):
                if isinstance(part, ImageIndex):
                    used.add(part.root)
                    lines += folder.unused_files(part.root, part.ignored)
            empty = [index.classes[target] for target in np.flatnonzero(class_counts(index) == 0)]
            if empty:
                lines.append(f"{split} contains no image of {folder.listed(empty)}")
        siblings = folder.class_folders(self.root) if {path.parent for path in used} == {self.root} else ()
        if "train" in self.splits and (unused := [name for name in siblings if self.root / name not in used]):
            lines.append(f"{self.root}: these folders are not splits, and are not used: {folder.listed(unused)}")
        return list(dict.fromkeys(lines))  # splits of one folder ignore the same files

    def paths_of_batch(self, epoch: int, batch: int, rank: int) -> list[str]:
        """Return the paths of the images of a training batch (from 0) of an epoch (from 0) on a rank."""
        keys, train = next(self._train_sampler(rank).batches(epoch, batch)), self.splits["train"]
        return [train.path(draw % len(train)) for draw, _ in keys]

    # -- batches

    def setup(self, stage: str) -> None:
        self.read()

    def train_dataloader(self) -> Loader | DeviceLoader:
        sampler = self._train_sampler(self._rank)
        if self.trainer is not None:
            # Lightning iterates before it first calls set_epoch(), which then sets this same number. After a resume,
            # `current_epoch` is still that of the previous epoch.
            loop: Any = self.trainer.fit_loop
            sampler.set_epoch(loop.epoch_progress.current.processed)
            if loop.epoch_progress.total.processed < loop.epoch_progress.total.started:  # resumed within an epoch
                sampler.resume_at = (sampler.epoch, loop.epoch_loop.batch_progress.current.completed)
        return self._loader("train", sampler)

    def val_dataloader(self) -> Loader | DeviceLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> Loader | DeviceLoader:
        return self._eval_loader(self.test_split)

    def _train_sampler(self, rank: int) -> TrainBatchSampler:
        size = len(self.splits["train"])
        sampler = TrainBatchSampler(size, self.batch_size, self.seed, rank, self.world_size, self.weights)
        sampler.repeat = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return sampler

    def _eval_loader(self, split: str) -> Loader | DeviceLoader:
        trainer: Any = self.trainer
        seed = None
        if trainer is not None:
            limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
            if not (isinstance(limit, float) and limit == 1.0):
                seed = self.seed  # in the folder's order, the first batches would contain the first classes only
        alone = trainer is None or trainer.world_size < self.world_size
        ranks = range(self.world_size) if alone else [self._rank]
        per_rank = self.batch_size // self.world_size
        return self._loader(split, EvalBatchSampler(len(self.splits[split]), per_rank, ranks, self.world_size, seed))

    def _loader(self, split: str, sampler: TrainBatchSampler | EvalBatchSampler) -> Loader | DeviceLoader:
        size = self.splits[split].raw_size if self.crops_on_device(split) else None
        dataset = ImageDataset(self.splits[split], self.transforms[split], self.seed, self.on_error, size)
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device(self.device)
        if self.cache == "device" and split in CACHED:
            if split not in self._on_device:
                cached = device_cache.cache_on_device(dataset, device, self.num_workers, split, self.timeout)
                self._on_device[split] = cached
            return DeviceLoader(dataset, sampler, *self._on_device[split])
        return Loader(dataset, sampler, self.num_workers, device.type == "cuda", self.timeout)

    def crops_on_device(self, split: str) -> bool:
        """Check whether the device crops the images of a split, instead of the threads that decode them."""
        wanted = self.crop_on == "device" or (self.crop_on == "auto" and self.device == "cuda")
        return wanted and device_cache.why_not_on_device(self.splits[split], self.transforms[split]) is None

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0


def default_threads(local_world_size: int) -> int:
    """Return the default number of decoding threads per device of this machine."""
    return min(MAX_THREADS, max(1, cores() // local_world_size))
