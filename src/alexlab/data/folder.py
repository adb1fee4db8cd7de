"""An ImageNet-style folder -> arrays: which files there are, and the class of each.

`root/train/<class>/*.jpg`, `root/val/<class>/*.jpg` and, where there is one, `root/test/<class>/*.jpg`; or one folder
of class folders, split by stated fractions (stratified, by seed).
"""

import contextlib
import hashlib
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from alexlab.data import decode
from alexlab.engine.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KNOWN = frozenset(ext.encode() for ext in EXTENSIONS)
TELL = 5.0  # seconds between what a long scan tells


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split, held in arrays: a Python list of a million (path, class) tuples would be copied into
    every process as its reference counts change.

    Attributes:
        root: the folder that the names are relative to.
        names: all names joined, as bytes of the file system's encoding.
        ends: int64 (N,): where in `names` the name of image i ends.
        targets: int64 (N,): its class, 0 to len(classes) - 1.
        classes: the class folders' names, sorted.
        ignored: how many files were left out, by their suffix, and under "" those beside the class folders; not hidden
            ones.
    """

    root: Path
    names: bytes
    ends: np.ndarray
    targets: np.ndarray
    classes: tuple[str, ...]
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, i: int) -> bytes:
        """Of image i, relative to `root`."""
        return self.names[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.name(i)))

    def picture(self, i: int) -> decode.Picture:
        """
        Raises:
            OSError: it cannot be read, or is not an image.
        """
        return decode.open_picture(self.path(i))

    def subset(self, keep: np.ndarray) -> "ImageIndex":
        """The images at the positions `keep` (int64), in that order."""
        starts = np.concatenate([[0], self.ends[:-1]])
        parts = [self.names[starts[i] : self.ends[i]] for i in keep]
        return _pack(self.root, parts, self.targets[keep], self.classes)

    def fingerprint(self) -> str:
        """16 hex digits of the names, targets and classes (not the pixels): two folders that differ in a file's name,
        a class or the number of images differ here."""
        digest = hashlib.sha256(self.names)
        digest.update(self.ends.tobytes())
        digest.update(self.targets.tobytes())
        digest.update("\0".join(self.classes).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def _pack(root: Path, names: list[bytes], targets: np.ndarray, classes: tuple[str, ...]) -> ImageIndex:
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return ImageIndex(root, b"".join(names), ends, np.asarray(targets, dtype=np.int64), classes)


def class_folders(folder: Path) -> tuple[str, ...]:
    """The sorted names of the class folders in `folder`; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))
    except FileNotFoundError:
        raise UserError(f"{folder} does not exist: give the folder of the images with data.root=PATH.") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, and a folder of images is needed: data.root=PATH.") from None
    except PermissionError:
        raise UserError(f"{folder} may not be read: ask for read permission, or copy the images.") from None


def changed(folder: bytes) -> int:
    """When a name in `folder` was last added, removed or changed, in nanoseconds."""
    return os.stat(folder).st_mtime_ns  # noqa: PTH116, a Path of each of thousands of folders takes longer


def scan(folder: Path, classes: tuple[str, ...] | None = None, visited: dict[bytes, int] | None = None) -> ImageIndex:
    """Read the names of all images below `folder/<class>/`, at any depth, sorted within their class.

    Args:
        folder: holds one folder a class.
        classes: the classes of the training split: others here are refused, and so are missing ones in training.
        visited: gets each folder that was read, with the time of its last change in nanoseconds.

    Raises:
        UserError: no class folders, an empty class, a class that `classes` does not hold, or a link in a circle.
    """
    visited = {} if visited is None else visited
    with contextlib.suppress(OSError):  # told by `class_folders`
        visited[os.fsencode(folder)] = changed(os.fsencode(folder))
    here = class_folders(folder)
    if not here:
        raise UserError(
            f"{folder} holds no class folders: it must hold one folder of images a class, as in "
            f"{folder.name}/cat/1.jpg and {folder.name}/dog/2.jpg."
        )
    unknown = [name for name in here if classes is not None and name not in classes]
    if classes is not None and unknown:
        raise UserError(
            f"{folder} holds classes that the training images do not: {some(unknown)}. "
            f"Training has {len(classes)} classes: {some(classes)}. Rename or remove those folders."
        )
    labels = classes if classes is not None else here
    joined, lengths, counts = bytearray(), [], np.zeros(len(labels), np.int64)
    ignored = Counter({"": loose_images(folder)})
    told, present = time.monotonic(), set(here)
    for target, label in enumerate(labels):
        found = _images(folder, label, visited, ignored) if label in present else []
        if not found and classes is None:
            raise UserError(
                f"{folder / label} is a class without images: put images there ({', '.join(EXTENSIONS[:4])}, ...) "
                "or remove the folder."
            )
        found.sort()
        counts[target] = len(found)
        joined += b"".join(found)  # here and not at the end: a million names as objects would be 100 MB
        lengths.append(np.fromiter(map(len, found), np.int64, len(found)))
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            print(
                f"reading {folder}: {target + 1:,} of {len(labels):,} classes, {counts.sum():,} images ...",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    if not joined:
        raise UserError(f"{folder} holds class folders but no image ({', '.join(EXTENSIONS[:4])}, ...).")
    targets = np.repeat(np.arange(len(labels)), counts)
    return ImageIndex(folder, bytes(joined), np.cumsum(np.concatenate(lengths)), targets, labels, dict(+ignored))


def loose_images(folder: Path) -> int:
    """The number of images beside the class folders, which belong to none."""
    with os.scandir(os.fsencode(folder)) as entries:
        return sum(
            entry.name[entry.name.rfind(b".") :].lower() in KNOWN
            and not entry.name.startswith(b".")
            and not entry.is_dir()
            for entry in entries
        )


def _images(folder: Path, label: str, visited: dict[bytes, int], ignored: Counter[str]) -> list[bytes]:
    """The names of all images of a class, relative to `folder`, as bytes; links to folders are followed.

    Raises:
        UserError: a folder that may not be read, or a link to one that it lies in.
    """
    found: list[bytes] = []
    top = os.fsencode(folder) + b"/"
    waiting: list[tuple[bytes, tuple[bytes, ...]]] = [(os.fsencode(label), ())]
    while waiting:
        here, above = waiting.pop()
        prefix = here + b"/"
        try:
            visited[top + here] = changed(top + here)
            with os.scandir(top + here) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == 46:  # a dot: hidden
                        continue
                    ending = name[name.rfind(b".") :]
                    if (ending in KNOWN or ending.lower() in KNOWN) and not (
                        entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and entry.is_dir())
                    ):
                        found.append(prefix + name)
                    elif entry.is_dir():
                        within = (*above, os.path.realpath(top + here))
                        if os.path.realpath(top + prefix + name) in within:
                            raise UserError(
                                f"{os.fsdecode(top + prefix + name)} is a link to a folder that it lies in: remove it."
                            )
                        waiting.append((prefix + name, within))
                    else:
                        ignored[os.fsdecode(ending.lower()) if b"." in name else "no suffix"] += 1
        except PermissionError:
            raise UserError(
                f"{os.fsdecode(top + here)} may not be read: ask for read permission, or remove the folder."
            ) from None
    return found


def split(index: ImageIndex, fractions: dict[str, float], seed: int) -> dict[str, ImageIndex]:
    """Split one folder at random by (seed, class), each class in the same proportions.

    Args:
        fractions: of the images that each split but `train` takes, e.g. {"val": 0.1, "test": 0.1}, each in 0..1.

    Raises:
        UserError: a class with too few images for every split to get one.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("train", *fractions)}
    for target, label in enumerate(index.classes):
        members = np.flatnonzero(index.targets == target)
        np.random.Generator(np.random.PCG64([seed, target])).shuffle(members)
        taken = 0
        for name, fraction in fractions.items():
            size = max(1, round(len(members) * fraction)) if fraction > 0 else 0
            parts[name].append(np.sort(members[taken : taken + size]))
            taken += size
        if taken >= len(members):
            raise UserError(
                f"{index.root / label} holds {len(members)} images, and at least {taken + 1} are needed for each of "
                f"train, {', '.join(fractions)} to get one: add images, or lower data.val_fraction and "
                "data.test_fraction."
            )
        parts["train"].append(np.sort(members[taken:]))
    whole = {name: index.subset(np.concatenate(members)) for name, members in parts.items() if len(members)}
    return whole | {"train": replace(whole["train"], ignored=index.ignored)}


def some(names: "tuple[str, ...] | list[str]", limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
