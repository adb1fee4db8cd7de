"""Images by index: any class with `__len__` and `__getitem__(i) -> (image, label)`. docs/extending.md shows one."""

import contextlib
import functools
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexlab.data import decode
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fast.prepared import COLUMNS
from alexlab.data.fingerprint import of_sizes, sample
from alexlab.data.folder import SPELLINGS, listed
from alexlab.data.index import Index
from alexlab.engine import launcher
from alexlab.engine.errors import UserError

UNREADABLE = -1  # the checksum of an image that cannot be read
HASHED = 256  # images in memory whose pixels or bytes are part of the fingerprint


@dataclass(frozen=True)
class ItemIndex(Index):
    """The images of one split of a dataset by index."""

    root: Path  # the folder of the images, or the name of the class
    source: str  # the name of the dataset, for messages
    dataset: Any
    numbers: np.ndarray  # int64 (N,): the index in the dataset of image i of the split
    targets: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None
    weights: np.ndarray | None = None

    def name(self, i: int) -> bytes:
        """Return the name of image i, by default the number."""
        number, name = int(self.numbers[i]), getattr(self.dataset, "name", None)
        return os.fsencode(str(name(number) if callable(name) else number))

    def path(self, i: int) -> str:
        return f"{self.source}[{os.fsdecode(self.name(i))}]"

    def file(self, i: int) -> str | None:
        image = self.dataset[int(self.numbers[i])][0]
        return os.fspath(image) if isinstance(image, str | os.PathLike) else None

    def picture(self, i: int) -> decode.AnyPicture:
        """Open image i. Raises OSError if it cannot be read, and UserError if it is of a type that is no image."""
        return as_picture(self.dataset[int(self.numbers[i])][0], self.source)

    @functools.cached_property
    def channels(self) -> tuple[int, ...]:  # type: ignore[override]
        """See `Index`: by the first image."""
        with contextlib.suppress(OSError):
            picture = self.picture(0)
            if isinstance(picture, decode.Pixels) and picture.array.shape[2] not in decode.MODES:
                return (picture.array.shape[2],)
        return tuple(decode.MODES)

    def subset(self, indices: np.ndarray) -> "ItemIndex":
        part = replace(self, numbers=self.numbers[indices], targets=self.targets[indices])
        return replace(part, **columns_of(self, indices))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of names, classes, and sizes of files, or the content of some images in memory."""
        digest, are_files = self.names_digest(), self.file(0) is not None
        chosen = self.numbers[sample(digest.digest(), len(self), None if are_files else HASHED)]
        return of_sizes(digest, np.array([checksum(self.dataset, number) for number in chosen.tolist()], np.int64))


def columns_of(index: Any, indices: np.ndarray) -> dict[str, Any]:
    """Return the groups, folds and weights of the images `indices`, if the index has them."""
    return {key: getattr(index, key)[indices] for key in COLUMNS if getattr(index, key) is not None}


def as_picture(image: Any, source: str) -> decode.AnyPicture:
    """Open the bytes of a file, a path, an array uint8 (H, W) or (H, W, C), or an image of PIL."""
    if isinstance(image, bytes | Image.Image):
        return decode.Picture(image)
    if isinstance(image, str | os.PathLike):
        try:
            return decode.open_picture(os.fspath(image))
        except OSError as error:
            raise OSError(f"{image}: {error.strerror or error}") from None
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        return decode.Pixels(image if image.ndim == 3 else image[:, :, None])
    kind = f"array {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(
        f"{source} gives an image as {kind}: give the bytes of a file, a path, an array uint8 (H, W) or (H, W, C), or "
        "an image of PIL."
    )


def checksum(dataset: Any, number: int) -> int:
    """Return the size of a file, or a checksum of an image in memory; `UNREADABLE` if it cannot be read."""
    try:
        with decode.pillow_errors():
            image = dataset[number][0]
            if isinstance(image, str | os.PathLike):
                return os.stat(image).st_size  # noqa: PTH116
            return zlib.crc32(image if isinstance(image, bytes) else np.asarray(image).tobytes())
    except OSError:
        return UNREADABLE


def encode(labels: Any, classes: Any, where: Callable[[int], str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return targets, as in `ItemIndex`, and the names of the classes.

    Args:
        labels: a number or a name per image; or, if an image has any number of classes, a row of 0 and 1, or a set.
        classes: the names, in the order of the targets; None: those of the labels.
        where: names image i.

    Raises:
        UserError: a label is outside the classes, or of another type.
    """
    if len(labels) and isinstance(labels[0], set):
        rows = [row for row, several in enumerate(labels) for _ in several]
        if not rows:
            raise UserError(f"{where(0)}: neither this image nor another one has a label.")
        each, found = encode([label for several in labels for label in several], classes, lambda i: where(rows[i]))
        flags = np.zeros((len(labels), len(found)), np.uint8)
        flags[rows, each] = 1
        return flags, found
    array = np.asarray(labels)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    names = None if classes is None else tuple(map(str, classes))
    if array.dtype.kind in "US" and array.ndim == 1:
        unique = set(array.tolist())
        as_numbers = all(name.isdecimal() for name in unique)  # 2 comes before 10
        names = names or tuple(sorted(unique, key=lambda name: (int(name) if as_numbers else 0, name)))
        number = {name: target for target, name in enumerate(names)}
        targets, count = np.array([number.get(label, -1) for label in array.tolist()], np.int64), len(names)
    elif array.dtype.kind in "bui" and array.ndim in (1, 2):
        names = names or tuple(map(str, range(array.shape[1] if array.ndim == 2 else int(array.max()) + 1)))
        targets = array.astype(np.int64) if array.ndim == 1 else array
        count = len(names) if array.ndim == 1 else 2
    else:
        raise UserError(f"{where(0)}: labels must be whole numbers or names, not {array.dtype} {array.shape}.")
    wrong = ((targets < 0) | (targets >= count)).reshape(len(targets), -1).any(1)
    if wrong.any() or (array.ndim == 2 and array.shape[1] != len(names)):
        first = int(wrong.argmax())
        rule = f"one of the classes {listed(names)}" if array.ndim == 1 else f"{len(names)} of 0 or 1"
        raise UserError(f"{where(first)}: the label {array[first]} must be {rule}.")
    return targets if array.ndim == 1 else targets.astype(np.uint8), names


class ItemData(ImageFolders):
    """Batches of the images of a class by index.

    Args:
        make: builds an object of the class, with split="train", "val" or "test" if `by_split`. A split without
            images, or for which it raises KeyError(split), does not exist.
        source: the name of the class.
        settings: of `ImageFolders`.
    """

    def __init__(self, make: Callable[..., Any], by_split: bool, source: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.make, self.by_split, self.source = make, by_split, source

    def find_splits(self) -> dict[str, Any]:
        parts = self._built_by_split() if self.by_split else self._divided(self.make())
        if "train" not in parts:
            raise UserError(
                f"{self.source} has no training images (data.root={self.root}): it has none for split=train, or raises "
                "KeyError(split)."
            )
        if "val" not in parts and self.val_fraction is None and self.folds is None:
            # an evaluation asks for `val_fraction`, to see if the split was random
            self.val_fraction = getattr(parts["train"].dataset, "val_fraction", None)
        return parts

    def _built_by_split(self) -> dict[str, ItemIndex]:
        parts: dict[str, ItemIndex] = {}
        for name in ("train", "val", "test"):
            try:
                dataset = self.make(split=name)
            except UserError as error:
                if not isinstance(error.__cause__, KeyError) or error.__cause__.args != (name,):
                    hint = " If such images do not exist, raise KeyError(split)."
                    raise UserError(f"split={name}: {error}{hint if name != 'train' else ''}") from error.__cause__
                continue
            if name == "test" and {*map(str, getattr(dataset, "targets", None) or ["unknown"])} <= {"-1", "None"}:
                if launcher.prints():
                    print(f"note: {self.source} hides the labels of test images, which are not used.", flush=True)
            elif len(dataset):
                classes = parts["train"].classes if "train" in parts else None
                parts[name] = self._index(dataset, f"{self.source}({name})", classes)
        return parts

    def _divided(self, dataset: Any) -> dict[str, ItemIndex]:
        """Divide one object by `dataset.splits`, a name per image, if that exists."""
        splits = [str(name).lower() for name in getattr(dataset, "splits", None) or ["train"] * len(dataset)]
        if unknown := set(splits) - SPELLINGS.keys():
            raise UserError(f"{self.source}: the split {min(unknown)} is none of {', '.join(SPELLINGS)}.")
        rows = {name: np.flatnonzero([SPELLINGS[each] == name for each in splits]) for name in ("train", "val", "test")}
        index = self._index(dataset, self.source, trained=rows["train"])
        return {name: index.subset(numbers) for name, numbers in rows.items() if len(numbers)}

    def _index(
        self, dataset: Any, source: str, of_train: tuple[str, ...] | None = None, trained: np.ndarray | None = None
    ) -> ItemIndex:
        """Make the index of all images of an object.

        Args:
            of_train: the classes, which those of training images in another object have decided.
            trained: the numbers of the training images; their labels decide the classes.
        """
        labels = getattr(dataset, "targets", None)
        if labels is None:
            if launcher.prints():
                print(f"note: {source} has no `targets`: all {len(dataset):,} images are read once.", flush=True)
            labels = [dataset[i][1] for i in range(len(dataset))]
        if len(labels) != len(dataset):
            raise UserError(f"{source} has {len(dataset)} images and {len(labels)} targets: give one per image.")
        classes = getattr(dataset, "classes", None)
        if of_train is not None and classes is not None and tuple(map(str, classes)) != of_train:
            raise UserError(f"{source} and the training images have different `classes`: give the same ones.")
        where, known = getattr(dataset, "where", lambda i: f"{source}[{i}]"), of_train or classes
        if known is None and trained is not None and 0 < len(trained) < len(labels):
            _, known = encode([labels[i] for i in trained.tolist()], None, lambda i: where(int(trained[i])))
        targets, names = encode(labels, known, where)
        given = getattr(dataset, "targets", None) is not None and len(labels)
        for i in sorted({0, len(labels) // 3, len(labels) - 1}) if given else ():
            with contextlib.suppress(OSError):  # a broken image
                label = dataset[i][1]
                if label is not None and (encode([label], names, where)[0][0] != targets[i]).any():
                    raise UserError(
                        f"{where(i)} has the label {label}, and its `targets` have {labels[i]}: give both in one order."
                    )
        columns = {key: getattr(dataset, key, None) for key in COLUMNS}
        arrays: dict[str, Any] = {key: np.asarray(column) for key, column in columns.items() if column is not None}
        return ItemIndex(self.root, source, dataset, np.arange(len(dataset)), targets, names, **arrays)
