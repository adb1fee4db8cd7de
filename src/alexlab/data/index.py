"""What all indexes have in common. An index is the images of one split, of whatever kind."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from alexlab.data import decode
from alexlab.data.fingerprint import of_names


class Index:
    """The images of one split: `ImageIndex` of a folder, `PreparedIndex`, `ItemIndex` of any class, or a `Selection`.

    Attributes:
        root: the folder of the images.
        targets: int64 (N,), or uint8 (N, len(classes)) of 0 and 1 if an image has any number of classes.
        classes: names of the classes, in the order of the targets.
        groups, folds, weights: int64, int64 and float64 (N,), for splits and sampling; None if they are unknown.
        raw_size: (width, height) if the images are stored as pixels of one size, else None.
        channels: the values of model.in_channels that the images can be read with.
    """

    root: Path
    targets: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None
    weights: np.ndarray | None = None
    raw_size: tuple[int, int] | None = None
    channels: tuple[int, ...] = tuple(decode.MODES)

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, i: int) -> bytes:
        """Return the name of image i, which is part of the fingerprint."""
        raise NotImplementedError

    def path(self, i: int) -> str:
        """Return where image i is, for people."""
        raise NotImplementedError

    def picture(self, i: int) -> decode.AnyPicture:
        """Open image i. Raises OSError if it cannot be read, or is not an image."""
        raise NotImplementedError

    def subset(self, indices: np.ndarray) -> "Index":
        """Return the images `indices` (int64), in that order."""
        raise NotImplementedError

    def names_digest(self) -> Any:
        """Return a hash of all names and classes, see fingerprint.py."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of names, classes and sizes; see fingerprint.py."""
        raise NotImplementedError

    @property
    def names_fingerprint(self) -> str:
        """The fingerprint that older runs have: of names and classes alone."""
        return of_names(self.names_digest())


def name_at(names: bytes, ends: np.ndarray, i: int) -> bytes:
    """Return name i of joined names, of which `ends` says where each ends."""
    return names[int(ends[i - 1]) if i else 0 : int(ends[i])]
