"""Where images are cropped, and where they are kept: `data.crop_on` and `data.cache`."""

import functools
from pathlib import Path
from typing import Any

import torch

from alexlab.data.dataset import ImageDataset
from alexlab.data.fast.device_cache import OnDevice
from alexlab.data.fast.prepared import PreparedIndex
from alexlab.data.fast.ram_cache import RamCache, memory_at_hand
from alexlab.data.folder import ImageIndex
from alexlab.data.transforms import LONG, SampleTransform
from alexlab.engine.errors import UserError

Index = ImageIndex | PreparedIndex
SHARE = 0.7  # of the memory at hand that a cache may take
KEPT = ("train", "val")  # the test split is read once


class Keeping:
    """See `ImageFolders` for its arguments."""

    def __init__(self, kind: str, crop_on: str, cache: str | None, local_world_size: int) -> None:
        self.crop_on, self.cache, self.kind, self.local_world_size = crop_on, cache, kind, local_world_size
        self.on_cpu = crop_on == "cpu" or (crop_on == "auto" and kind != "cuda")
        self._in_ram: dict[str, RamCache] = {}
        self._on_device: dict[str, OnDevice] = {}

    def left_whole(self, index: Index, transform: SampleTransform) -> tuple[int, int] | None:
        """(width, height) of the images where the device crops them."""
        if self.on_cpu or why_on_cpu(index, transform) is not None:
            return None
        assert isinstance(index, PreparedIndex)
        return index.extent

    def check(self, root: Path, splits: dict[str, Index], transforms: dict[str, SampleTransform]) -> None:
        """Raises UserError where images cannot be cropped or kept on the device as asked."""
        if self.cache != "device" and self.crop_on != "device":
            return
        asked = "data.cache=device" if self.cache == "device" else "data.crop_on=device"
        if self.on_cpu:
            raise UserError(
                f"data.cache=device keeps images that are cropped there, and data.crop_on={self.crop_on} crops them on "
                "the CPU here: add data.crop_on=device, or take data.cache=ram."
            )
        for split in KEPT:
            why = why_on_cpu(splits[split], transforms[split])
            if why is not None:
                raise UserError(f"{asked}, but {why} (the {split} images of {root}). Or leave it out.")
        if self.cache == "device" and self.kind == "cuda":
            check_fits(bytes_of(splits), torch.cuda.get_device_properties(0).total_memory)

    def in_ram(self, split: str, splits: dict[str, Index], trainer: Any) -> RamCache:
        """The split's images, kept in memory that the ranks of a machine share.

        Args:
            trainer: Lightning's, or None; all of its ranks call this together.
        """
        if split not in self._in_ram:
            index = splits[split]
            room = int(SHARE * self._at_hand * len(index) / sum(len(splits[name]) for name in KEPT))
            alone = trainer is None or trainer.world_size == 1
            self._in_ram[split] = RamCache(index, room) if alone else self._shared(index, room, trainer)
        return self._in_ram[split]

    def on_device(
        self, split: str, dataset: ImageDataset, device: torch.device, num_workers: int, timeout: float | None
    ) -> OnDevice:
        if split not in self._on_device:
            self._on_device[split] = OnDevice(dataset, device, num_workers, split, timeout)
        return self._on_device[split]

    @functools.cached_property
    def _at_hand(self) -> int:
        return memory_at_hand()

    def _shared(self, index: Index, room: int, trainer: Any) -> RamCache:
        """In memory that each machine's first rank makes, for all of its ranks."""
        first = RamCache(index, room, self.local_world_size) if trainer.local_rank == 0 else None
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, first and (trainer.node_rank, first.where, room))
        where, room = next(told[1:] for told in found if told and told[0] == trainer.node_rank)
        return first or RamCache(index, room, self.local_world_size, trainer.local_rank, where)


def why_on_cpu(index: Index, transform: SampleTransform) -> str | None:
    """Why the device cannot crop the images, and what would help."""
    extent = index.extent if isinstance(index, PreparedIndex) else None
    if extent is None or max(extent) > LONG * transform.crop_ratio * min(extent):  # see SampleTransform.cut
        return (
            "the device crops images of one size that are kept as pixels, and these are others: prepare them with "
            "python prepare.py data.root=PATH out=PATH format=raw square=true"
        )
    if transform.policy != "none":
        return f"augment.policy={transform.policy} works on cropped images, on the CPU: augment.policy=none"
    return None


def bytes_of(splits: dict[str, Index]) -> int:
    """Of pixels, in all splits that are kept."""
    indexes = [splits[split] for split in KEPT]
    return sum(int(index.arrays["sizes"].sum()) for index in indexes if isinstance(index, PreparedIndex))


def check_fits(needed: int, there: int) -> None:
    """Raises UserError where `needed` bytes are too many for a device of `there`."""
    if needed > SHARE * there:
        raise UserError(
            f"data.cache=device: the images are {needed / 1e9:.1f} GB, and of the device's {there / 1e9:.1f} GB at "
            f"most {SHARE:.0%} may be theirs: data.cache=ram, or prepare them with a smaller short_side."
        )
