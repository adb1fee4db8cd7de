"""Images of the index -> rows of a batch, uint8, each cropped by (seed, epoch, index)."""

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode
from alexlab.data.fast import gpu_crop as batch_crop
from alexlab.data.sample_rng import Draws, ManyDraws
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

Key = tuple[int, int]  # (index of the image, epoch), as the samplers yield them


class Batch(NamedTuple):
    """
    Attributes:
        images: uint8 (B, 3, H, W) in channels-last memory.
        targets: int64 (B,).
        skipped: the paths of broken images, which are not among the others, and what is wrong with each.
        cuts: of whole images, which are still to be cropped; None for those that are.
    """

    images: Tensor
    targets: Tensor
    skipped: dict[str, str]
    cuts: batch_crop.Cuts | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch there, cropped."""
        images, targets = (part.to(device, non_blocking=True) for part in (self.images, self.targets))
        if self.cuts is not None:
            boxes = self.cuts.boxes.to(device, non_blocking=True)
            images = batch_crop.crop(images, batch_crop.Cuts(boxes, self.cuts.side))
        return Batch(images, targets, self.skipped)


Broken = list[tuple[int, str]]  # rows, and what is wrong with the image


class Files(Protocol):
    """What an ImageIndex is, here."""

    @property
    def targets(self) -> np.ndarray: ...

    def path(self, i: int) -> str: ...

    def picture(self, i: int) -> decode.AnyPicture: ...


class WholeFiles(Files, Protocol):
    """Those of images of one size, which can be copied as they are."""

    def copy(self, numbers: np.ndarray, out: Tensor) -> None: ...


class ImageDataset:
    """The images of an index, written where they are wanted.

    Args:
        on_error: of a broken image: "raise", or "skip".
        whole: (width, height) of all images, which are then left whole, with what `Batch.to` needs to crop them.
    """

    def __init__(
        self,
        index: Files,
        transform: SampleTransform,
        seed: int,
        on_error: str = "raise",
        whole: tuple[int, int] | None = None,
    ) -> None:
        self.index, self.transform, self.seed, self.on_error, self.whole = index, transform, seed, on_error, whole

        self.reading: dict[int, int] = {}  # by its thread, the number of each image that is read just now

    def __len__(self) -> int:
        return len(self.index.targets)

    def room(self, keys: Sequence[Key], pinned: bool = False) -> Tensor:
        """Memory for the images of a batch: uint8 (B, 3, H, W), channels last."""
        side = self.transform.at(keys[0][1]).image_size if keys else 1
        width, height = self.whole or (side, side)
        return torch.empty((len(keys), height, width, 3), dtype=torch.uint8, pin_memory=pinned).permute(0, 3, 1, 2)

    def fill(self, keys: Sequence[Key], images: Tensor, stop: threading.Event | None = None) -> Broken:
        """Write each key's image into its row of `images`; returns those that are broken, whose rows hold anything.

        Args:
            stop: leaves the rest as it is once it is set.

        Raises:
            BrokenImageError: a broken image, unless such are skipped.
            UserError: there was no memory for one.
        """
        if self.whole is not None and keys:
            try:
                cast(WholeFiles, self.index).copy(_numbers(keys), images.permute(0, 2, 3, 1))
                return []
            except OSError:
                pass  # one after the other, to tell which
        broken: Broken = []
        rows, me = images.split(1), threading.get_ident()
        for row, (i, epoch) in enumerate(keys):
            if stop is not None and stop.is_set():
                break
            self.reading[me] = i
            try:
                if self.whole is None:
                    self.transform.at(epoch).write(self.index.picture(i), Draws(self.seed, epoch, i), rows[row])
                else:
                    cast(WholeFiles, self.index).copy(np.array([i]), rows[row].permute(0, 2, 3, 1))
            except OSError as error:
                found = decode.BrokenImageError(self.index.path(i), error)
                if self.on_error == "raise":
                    raise found from None
                broken.append((row, found.what))
            except (MemoryError, RuntimeError) as error:  # torch's own way to say so
                if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
                    error.add_note(f"while {self.index.path(i)} was read")
                    raise
                raise UserError(
                    f"{self.index.path(i)} needs more memory to be decoded than there is: make it smaller."
                ) from None
            except Exception as error:
                error.add_note(f"while {self.index.path(i)} was read")
                raise
        self.reading.pop(me, None)
        return broken

    def batch(self, keys: Sequence[Key], images: Tensor, broken: Broken) -> Batch:
        """`images`, as `fill` left them, with their targets and without the rows that are `broken`."""
        numbers = _numbers(keys)
        targets = torch.from_numpy(self.index.targets[numbers])
        cuts = self.cuts(numbers, keys[0][1]) if self.whole is not None and keys else None
        if not broken:
            return Batch(images, targets, {}, cuts)
        skipped = dict(broken)
        whole = [row for row in range(len(keys)) if row not in skipped]
        if cuts is not None:
            cuts = batch_crop.Cuts(cuts.boxes[whole], cuts.side)
        paths = {self.index.path(keys[row][0]): why for row, why in broken}
        return Batch(images[whole], targets[whole], paths, cuts)

    def cuts(self, numbers: np.ndarray, epoch: int) -> batch_crop.Cuts:
        """Of the images `numbers`, which are left whole."""
        assert self.whole is not None
        transform = self.transform.at(epoch)
        boxes = transform.cuts(*self.whole, ManyDraws((self.seed, epoch), numbers))
        return batch_crop.Cuts(torch.from_numpy(boxes), transform.image_size)


def _numbers(keys: Sequence[Key]) -> np.ndarray:
    return np.fromiter((i for i, _ in keys), np.int64, len(keys))
