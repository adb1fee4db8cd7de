"""Adapt a LightningDataModule of your own to a run."""

import hashlib
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden

from alexlab.data import class_names as names
from alexlab.data.dataset import Batch
from alexlab.engine.errors import UserError

# hooks that Lightning calls, passed on unchanged
HOOKS = ("prepare_data", "train_dataloader", "val_dataloader", "teardown", "state_dict", "load_state_dict")


class OwnDataModule(pl.LightningDataModule):
    """Pass Lightning's hooks on to `module`, and turn each batch into a `Batch`.

    A batch must be (images, targets): images uint8 (B, 3, H, W), which the task augments and normalizes, or float as
    the network takes them. The classes are `module.classes`, or 0 to data.num_classes - 1. `source` is the name of the
    module's class.
    """

    def __init__(
        self,
        module: pl.LightningDataModule,
        source: str,
        root: str,
        batch_size: int,
        num_classes: int | None = None,
        class_names: str | None = None,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.module, self.source, self.root = module, source, Path(root)
        self.batch_size, self.num_classes, self.class_names = batch_size, num_classes, class_names
        self.world_size = world_size
        self.splits: dict[str, Any] = {}  # empty, because the images have no index
        self.images: dict[str, int] = {}
        self.chosen_split: str | None = None  # of a test
        for hook in HOOKS:
            setattr(self, hook, getattr(module, hook))

    def read(self) -> "OwnDataModule":
        """Set up the module, and count images and batches. Raises UserError if it lacks what a run needs."""
        if self.images:
            return self
        self.module.prepare_data()
        self.module.setup("fit")
        for split in ("train", "val", "test"):
            hook = f"{split}_dataloader"
            if not is_overridden(hook, self.module, pl.LightningDataModule):
                if split == "test":
                    continue
                raise UserError(f"{self.source} has no {hook}: training needs train_dataloader and val_dataloader.")
            if split == "test":
                self.module.setup("test")
            loader = getattr(self.module, hook)()
            try:
                _, self.images[split] = len(loader), len(loader.dataset)
            except (TypeError, AttributeError):
                raise UserError(f"{self.source}.{hook} must return a DataLoader of a known length.") from None
        classes = getattr(self.module, "classes", None)
        if classes is None and self.num_classes is None:
            raise UserError(f"{self.source} has no attribute `classes`: add it, or give data.num_classes=N.")
        self.classes = tuple(map(str, range(self.num_classes or 0) if classes is None else classes))
        if self.num_classes not in (None, len(self.classes)):
            raise UserError(f"data.num_classes={self.num_classes}, but {self.source} has {len(self.classes)} classes.")
        self.readable_classes = names.readable(self.classes, self.class_names)
        return self

    @property
    def train_batches(self) -> int:
        """The training batches per epoch and rank. Raises UserError if data.batch_size is not their size."""
        loader = self.module.train_dataloader()
        size = getattr(loader, "batch_size", None) or self.batch_size // self.world_size
        if size * self.world_size != self.batch_size:
            raise UserError(
                f"{self.source} makes batches of {size} images on {self.world_size} devices, and data.batch_size="
                f"{self.batch_size}: set data.batch_size={size * self.world_size}."
            )
        if self.world_size == 1:
            return len(loader)
        own = -(-len(loader.dataset) // self.world_size)  # Lightning divides the images
        return own // size if getattr(loader, "drop_last", False) else -(-own // size)

    # -- facts

    @property
    def test_split(self) -> str:
        return self.chosen_split or ("test" if "test" in self.images else "val")

    def describe(self) -> dict[str, Any]:
        """Return what is known of the images. The fingerprints can only see the classes and the number of images."""
        known = {
            split: "sizes:" + hashlib.sha256(repr((self.source, self.classes, count)).encode()).hexdigest()[:16]
            for split, count in self.images.items()
        }
        facts = {"root": str(self.root), "num_classes": len(self.classes), "images": self.images}
        return {**facts, "fingerprint": known, "names_fingerprint": known}

    def provenance(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "readable_classes": self.readable_classes, "dataset": self.describe()}

    def notes(self) -> list[str]:
        gone = "batches depend on its own workers; resume starts at epoch ends; a fingerprint sees the classes and the "
        return [f"data from {self.source}: {gone}number of images alone; single images are not drawn as figures."]

    def paths_of_batch(self, epoch: int, batch: int, rank: int) -> list[str]:
        return [f"unknown, because {self.source} chooses them"]

    # -- Lightning's hooks

    def setup(self, stage: str) -> None:
        self.module.trainer = self.trainer
        self.module.setup(stage)

    def test_dataloader(self) -> Any:
        return self.module.test_dataloader() if self.test_split == "test" else self.module.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        match self.module.on_before_batch_transfer(batch, dataloader_idx):
            case [torch.Tensor() as images, torch.Tensor() as labels]:
                return Batch(images, labels, {})
        raise UserError(f"{self.source} gives batches of type {type(batch).__name__}: give (images, targets).")
