"""A first look at the images before a training, for what is rarely meant: pictures of one colour, and equal files.

Each part stops when the time is over, so that a slow disk does not delay a run. Broken images are reported elsewhere.
"""

import contextlib
import hashlib
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path

import numpy as np

from alexlab.data.fingerprint import sample
from alexlab.data.index import Index
from alexlab.data.items import UNREADABLE, ItemIndex, checksum

PICTURES, FILES = 0.5, 1.5  # seconds
PER_CLASS = 4  # pictures
MOST_FILES = 50_000  # of a split, whose sizes are compared
MOST_ITEMS = 200  # of a split, whose content is compared
NARROW = 64  # values that all pictures have between them, apart from the 0.5 % of the lowest and of the highest
FLAT = 2.0  # standard deviation of the pixels of each channel, 0 to 255; photographs have 10 and more

File = tuple[str, str, bytes]  # path, split, labels


def warnings_of(splits: Mapping[str, Index]) -> list[str]:
    """Return a sentence for each thing that is rarely meant."""
    return [*_flat_pictures(splits), *_equal_files(splits), *_equal_items(splits)]


def _flat_pictures(splits: Mapping[str, Index]) -> Iterator[str]:
    """Look at pictures of training: one of each class, then the next one of each, until the time is over."""
    index = splits.get("train")
    if index is None or index.targets.ndim != 1:
        return
    order = np.argsort(index.targets, kind="stable")
    starts = np.searchsorted(index.targets[order], np.arange(len(index.classes) + 1)).tolist()
    flat, seen, lowest, highest, end = list[str](), 0, 255, 0, time.monotonic() + PICTURES
    for n in range(PER_CLASS):
        for first, after in itertools.pairwise(starts):
            if first + n >= after or time.monotonic() > end:
                continue
            i = int(order[first + n])
            try:
                picture = index.picture(i)
                factor = 8 if min(picture.size) >= 256 else 1  # small pictures would become a few pixels
                pixels, _ = picture.pixels(factor, channels=index.channels[0])
            except OSError:
                continue
            seen += 1
            low, high = np.percentile(pixels[:: pixels.shape[0] // 64 + 1], [0.5, 99.5])
            lowest, highest = min(lowest, int(low)), max(highest, int(high))
            if pixels.std(axis=(0, 1)).max() < FLAT:
                flat.append(index.path(i))
    if flat:
        yield f"Pictures of nearly one colour: {len(flat):,} of the first {seen:,} training images, such as {flat[0]}."
    if len(flat) < seen and highest - lowest < NARROW:
        yield (
            f"The first {seen:,} training images have only the values {lowest} to {highest} of 0 to 255, such as 14 "
            "bits in 16: save them over the whole range."
        )


def _equal_files(splits: Mapping[str, Index]) -> Iterator[str]:
    """Find files with the same bytes in different splits or classes."""
    files: list[File] = []
    for split, index in splits.items():
        rows = sample(bytes(16), len(index), MOST_FILES).tolist()
        with contextlib.suppress(OSError):  # an object of a class by index may read the image
            for i in rows:
                if (path := index.file(i)) is None:
                    break
                files.append((path, split, index.targets[i].tobytes()))
    groups, end = [files], time.monotonic() + FILES
    for key in (_size, _digest):
        groups = [equal for group in groups for equal in _divided(group, key, end)]
    for column, what in ((1, "in two splits"), (2, "in two classes")):
        different = [{file[column]: file[0] for file in group} for group in groups]
        found = [[*paths.values()] for paths in different if len(paths) > 1]
        if found:
            first, second, *_ = found[0]
            count = f"{len(found):,} pictures are" if len(found) > 1 else "1 picture is"
            yield f"{count} {what}, with identical bytes, such as {first} and {second}."


def _equal_items(splits: Mapping[str, Index]) -> Iterator[str]:
    """Find images with the same content in different splits of a class by index, which may ignore `split`."""
    indexes = dict[str, ItemIndex]()
    with contextlib.suppress(OSError):
        for split, index in splits.items():
            if isinstance(index, ItemIndex) and len(index) and index.file(0) is None:
                indexes[split] = index
    rows = {split: sample(bytes(16), len(index), MOST_ITEMS).tolist() for split, index in indexes.items()}
    seen, equal, end = dict[int, tuple[str, str]](), list[tuple[str, str]](), time.monotonic() + FILES
    for step in itertools.zip_longest(*rows.values()):
        for (split, index), i in zip(indexes.items(), step, strict=True):
            if i is None or time.monotonic() > end:
                continue
            content = checksum(index.dataset, int(index.numbers[i]))
            first, path = seen.setdefault(content, (split, index.path(i)))
            if first != split and content != UNREADABLE:
                equal.append((path, index.path(i)))
    if equal:
        a, b = equal[0]
        yield f"Of the images that were compared, {len(equal):,} are in two splits, such as {a} and {b}."


def _divided(group: list[File], key: Callable[[str], Hashable], end: float) -> Iterator[list[File]]:
    """Divide files by a key, and yield the parts with files of more than one split or class."""
    parts: dict[Hashable, list[File]] = defaultdict(list)
    for file in group:
        try:
            if time.monotonic() < end:
                parts[key(file[0])].append(file)
        except OSError:
            continue
    for part in parts.values():
        if len({file[1:] for file in part}) > 1:
            yield part


def _size(path: str) -> int:
    return os.stat(path).st_size  # noqa: PTH116, a Path per file would take longer


def _digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()
