"""What all indexes have in common. An index is the images of one split, of whatever kind."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from alexlab.data import decode
from alexlab.data.fingerprint import names_digest, of_sizes


class Index(ABC):
    """The images of one split: an `ImageIndex`, a `PreparedIndex`, an `ItemIndex` of any class, or a `Selection`."""

    root: Path  # the folder of the images
    targets: np.ndarray  # int64 (N,), or uint8 (N, len(classes)) of 0 and 1 if an image has any number of classes
    classes: tuple[str, ...]  # names of the classes, in the order of the targets
    # int64, int64 and float64 (N,), for splits and sampling; None if they are unknown
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None
    weights: np.ndarray | None = None
    raw_size: tuple[int, int] | None = None  # (width, height) if the images are stored as pixels of one size
    channels: tuple[int, ...] = tuple(decode.MODES)  # values of model.in_channels that the images can be read with

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, i: int) -> bytes:
        """Return the name of image i, which is part of the fingerprint."""
        return os.fsencode(self.path(i))

    @abstractmethod
    def path(self, i: int) -> str:
        """Return where image i is, for people."""

    def file(self, i: int) -> str | None:
        """Return the path of the file that is image i, or None if no file is."""
        return None

    @abstractmethod
    def picture(self, i: int) -> decode.AnyPicture:
        """Open image i. Raises OSError if it cannot be read, or is not an image."""

    def ahead(self, indices: np.ndarray) -> None:  # noqa: B027, most indexes need nothing
        """Get what is needed to read these images, all at once, if it is far away. This thread reads them next."""

    def subset(self, indices: np.ndarray) -> "Index":
        """Return the images `indices` (int64), in that order."""
        return Selection([self], indices)

    def names_digest(self) -> Any:
        """Return a hash of all names and classes, see fingerprint.py."""
        names = b"\0".join(map(self.name, range(len(self))))
        return names_digest(names, [self.targets], self.classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of names, classes and, if the kind of index knows them, sizes; see fingerprint.py."""
        return of_sizes(self.names_digest(), np.array([], np.int64))

    @property
    def names_fingerprint(self) -> str:
        """The fingerprint that older runs have, of names and classes alone."""
        return self.names_digest().hexdigest()[:16]


class Selection(Index):
    """Images of one or several indexes of the same classes, as an index. `rows`, int64 (N,), are their numbers among
    the images of all `parts`, one part after another."""

    def __init__(self, parts: Sequence[Any], rows: np.ndarray) -> None:
        self.parts, self.rows = tuple(parts), rows
        self.root, self.classes, self.channels = parts[0].root, parts[0].classes, parts[0].channels
        self.targets: Any = self._column("targets")
        self.weights, self.groups, self.folds = map(self._column, ("weights", "groups", "folds"))

    def _column(self, name: str) -> np.ndarray | None:
        columns = [column for part in self.parts if (column := getattr(part, name)) is not None]
        return np.concatenate(columns)[self.rows] if len(columns) == len(self.parts) else None

    def _at(self, i: int) -> tuple[Any, int]:
        """Return the index that has image i, and the number of the image in it."""
        row = int(self.rows[i])
        for part in self.parts:
            if row < len(part):
                return part, row
            row -= len(part)
        raise IndexError(i)

    def name(self, i: int) -> bytes:
        part, row = self._at(i)
        return part.name(row)

    def path(self, i: int) -> str:
        part, row = self._at(i)
        return part.path(row)

    def file(self, i: int) -> str | None:
        part, row = self._at(i)
        return part.file(row)

    def picture(self, i: int) -> decode.AnyPicture:
        part, row = self._at(i)
        return part.picture(row)

    def ahead(self, indices: np.ndarray) -> None:
        for part, rows, _ in self._by_part(indices):
            part.ahead(rows)

    def subset(self, indices: np.ndarray) -> "Selection":
        return Selection(self.parts, self.rows[indices])

    @functools.cached_property
    def raw_size(self) -> tuple[int, int] | None:  # type: ignore[override]
        sizes = {part.raw_size for part in self.parts}
        return sizes.pop() if len(sizes) == 1 else None

    def copy(self, indices: np.ndarray, out: Tensor) -> None:
        """Copy the pixels of images of one size into `out`, as `PreparedIndex.copy` does."""
        for part, rows, places in self._by_part(indices):
            if len(places) == len(indices):
                part.copy(rows, out)
            else:
                pixels = out.new_empty((len(places), *out.shape[1:]))
                part.copy(rows, pixels)
                out[places] = pixels

    def _by_part(self, indices: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """Yield each index with the images that it has: their numbers in it, and their places in `indices`."""
        rows, first = self.rows[indices], 0
        for part in self.parts:
            places = np.flatnonzero((first <= rows) & (rows < first + len(part)))
            if len(places):
                yield part, rows[places] - first, places
            first += len(part)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the indexes, of the columns, and of which images were selected; see fingerprint.py."""
        return of_sizes(self._digest([part.fingerprint for part in self.parts]), np.array([], np.int64))

    def names_digest(self) -> Any:
        return self._digest([part.names_fingerprint for part in self.parts])

    def _digest(self, of_parts: list[str]) -> Any:
        columns = (self.weights, self.groups, self.folds)
        return names_digest(b"", [self.rows], of_parts + [str(each.tolist()) for each in columns if each is not None])


def name_at(names: bytes, ends: np.ndarray, i: int) -> bytes:
    """Return name i of joined names, of which `ends` says where each ends."""
    return names[int(ends[i - 1]) if i else 0 : int(ends[i])]
