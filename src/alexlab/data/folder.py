"""An ImageNet-style folder -> arrays: which images exist, and the class of each.

`root/train/<class>/*.jpg`, `root/val/<class>/*.jpg` and optionally `root/test/<class>/*.jpg`; or one folder of class
folders, split by fractions (stratified, by seed).
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alexlab.data import decode
from alexlab.data.fingerprint import names_digest, of_sizes, sample
from alexlab.data.index import Index, name_at
from alexlab.engine.errors import UserError

T = TypeVar("T")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KNOWN = frozenset(extension.encode() for extension in EXTENSIONS)
REPORT_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class ImageIndex(Index):
    """The images of one split, in arrays: a million (path, class) tuples would take far more memory.

    Attributes:
        root: the folder that the names are relative to.
        names: all names joined, as bytes of the file system's encoding.
        ends: int64 (N,): where in `names` the name of image i ends.
        targets: int64 (N,): the class of image i, 0 to len(classes) - 1.
        classes: names of the class folders, sorted.
        ignored: number of files that are not images, by suffix, and under "" of images outside of the class folders.
    """

    root: Path
    names: bytes
    ends: np.ndarray
    targets: np.ndarray
    classes: tuple[str, ...]
    ignored: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_names(
        cls, root: Path, names: Sequence[bytes], targets: Sequence[int] | np.ndarray, classes: tuple[str, ...]
    ) -> "ImageIndex":
        """Make an index from one name (relative to `root`) and one target per image."""
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(root, b"".join(names), ends, np.asarray(targets, dtype=np.int64), classes)

    def name(self, i: int) -> bytes:
        return name_at(self.names, self.ends, i)

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.name(i)))

    def picture(self, i: int) -> decode.Picture:
        return decode.open_picture(self.path(i))

    def subset(self, indices: np.ndarray) -> "ImageIndex":
        names = [self.name(i) for i in indices.tolist()]
        part = ImageIndex.from_names(self.root, names, self.targets[indices], self.classes)
        return replace(part, ignored=self.ignored)

    @functools.cached_property
    def fingerprint(self) -> str:
        digest, sizes = self.names_digest(), []
        for i in sample(digest.digest(), len(self)).tolist():
            try:
                sizes.append(os.stat(self.path(i)).st_size)  # noqa: PTH116, a Path per file would take longer
            except OSError:
                sizes.append(-1)  # such as a broken link, which is an error when the image is read
        return of_sizes(digest, np.array(sizes, np.int64))

    def names_digest(self) -> Any:
        return names_digest(self.names, [self.ends, self.targets], self.classes)


# -- reading the names


def scan(folder: Path, classes: tuple[str, ...] | None = None, visited: dict[bytes, int] | None = None) -> ImageIndex:
    """Read the names of all images in `folder/<class>/` at any depth, sorted within their class.

    Args:
        folder: contains one folder per class.
        classes: the classes of the training split, which the folder may not exceed. None is for the training split
            itself, where every class needs an image.
        visited: filled with each folder that was read, and the time of its last change in nanoseconds.

    Raises:
        UserError: no class folders, an empty class, a class that `classes` lacks, or a link in a circle.
    """
    visited = {} if visited is None else visited
    with contextlib.suppress(OSError):  # `class_folders` reports it
        visited[os.fsencode(folder)] = modified_ns(os.fsencode(folder))
    present = class_folders(folder)
    if not present:
        raise UserError(
            f"{folder} contains no class folders: it must contain one folder of images per class, as in "
            f"{folder.name}/cat/1.jpg and {folder.name}/dog/2.jpg."
        )
    if classes is not None and (unknown := [name for name in present if name not in classes]):
        raise UserError(
            f"{folder} contains classes that the training images do not: {listed(unknown)}. "
            f"Training has {len(classes)} classes: {listed(classes)}. Rename or remove those folders."
        )
    labels = present if classes is None else classes
    names, lengths, counts = bytearray(), [], np.zeros(len(labels), np.int64)
    with os.scandir(folder) as entries:
        outside = [e for e in entries if e.name[0] != "." and e.name.lower().endswith(EXTENSIONS) and not e.is_dir()]
    ignored = Counter({"": len(outside)})
    with_folder = set(present)
    for target, label in enumerate(reported(labels, f"reading {folder}", f"of {len(labels):,} classes")):
        images = sorted(_images_of_class(folder, label, visited, ignored)) if label in with_folder else []
        if not images and classes is None:
            raise UserError(
                f"{folder / label} is a class without images: add images ({', '.join(EXTENSIONS[:4])}, ...) or remove "
                "the folder."
            )
        counts[target] = len(images)
        names += b"".join(images)  # class by class: a million names as objects would take 100 MB
        lengths.append(np.fromiter(map(len, images), np.int64, len(images)))
    if not names:
        raise UserError(f"{folder} contains class folders but no image ({', '.join(EXTENSIONS[:4])}, ...).")
    targets = np.repeat(np.arange(len(labels)), counts)
    return ImageIndex(folder, bytes(names), np.cumsum(np.concatenate(lengths)), targets, labels, dict(+ignored))


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders in `folder`, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))
    except FileNotFoundError:
        raise UserError(f"{folder} does not exist: give the folder of the images with data.root=PATH.") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file: give a folder of images with data.root=PATH.") from None
    except PermissionError:
        raise UserError(f"{folder} may not be read: ask for read permission, or copy the images.") from None


def modified_ns(folder: bytes) -> int:
    """Return when a name in `folder` was last added, removed or changed, in nanoseconds."""
    return os.stat(folder).st_mtime_ns  # noqa: PTH116, a Path per folder would take longer


def _images_of_class(folder: Path, label: str, visited: dict[bytes, int], ignored: Counter[str]) -> list[bytes]:
    """Return the names of all images of a class, relative to `folder`; links to folders are followed."""
    images: list[bytes] = []
    top = os.fsencode(folder) + b"/"
    waiting: list[tuple[bytes, tuple[bytes, ...]]] = [(os.fsencode(label), ())]  # (folder, real paths of its parents)
    while waiting:
        current, parents = waiting.pop()
        prefix = current + b"/"
        try:
            visited[top + current] = modified_ns(top + current)
            with os.scandir(top + current) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == 46:  # a dot: hidden
                        continue
                    suffix = name[name.rfind(b".") :].lower()
                    if entry.is_dir():
                        within = (*parents, os.path.realpath(top + current))
                        if os.path.realpath(top + prefix + name) in within:
                            path = os.fsdecode(top + prefix + name)
                            raise UserError(f"{path} is a link to a folder that contains it: remove the link.")
                        waiting.append((prefix + name, within))
                    elif suffix in KNOWN:
                        images.append(prefix + name)
                    else:
                        ignored[os.fsdecode(suffix) if b"." in name else "no suffix"] += 1
        except PermissionError:
            path = os.fsdecode(top + current)
            raise UserError(f"{path} may not be read: ask for read permission, or remove the folder.") from None
    return images


# -- splits


def find_splits(
    root: Path,
    divided: bool = False,
    scan: Callable[[Path, tuple[str, ...] | None], ImageIndex] = scan,
) -> dict[str, ImageIndex]:
    """Read train/, val/ and test/ of `root`, as far as they exist; without train/, its class folders are train.

    Args:
        divided: data.val_fraction or data.folds will choose the val images, so that there may be class folders alone.
        scan: reads the images of one folder, given the classes of training; see `cached_scan`.
    """
    present = class_folders(root)
    if "train" in present:
        splits = {"train": scan(root / "train", None)}
        held_out = [name for name in ("val", "test") if name in present]
        return splits | {name: scan(root / name, splits["train"].classes) for name in held_out}
    if not divided or {"val", "test"} & {*present}:
        near = [path for path in (root.parent, *(root / name for name in present)) if (path / "train").is_dir()]
        hint = f" Did you mean data.root={near[0]}?" if near else ""
        raise UserError(
            f"{root} contains no train/ folder: it must contain train/ and val/ with one folder of images per class, "
            f"or class folders alone, to be split with data.val_fraction=0.1.{hint}"
        )
    return {"train": scan(root, None)}


# -- for messages, and for data that is written as a folder


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message; the rest of many is counted."""
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


def reported(items: Iterable[T], doing: str, unit: str) -> Iterator[T]:
    """Yield `items`, and print every ten seconds how many were used."""
    last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > REPORT_EVERY:
            last = time.monotonic()
            print(f"{doing}: {count:,} {unit} ...", file=sys.stderr, flush=True)


@contextlib.contextmanager
def new_folder(root: Path, marker: str) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `root` at the end of the block, so that a kill leaves no part.

    Args:
        root: does not exist, or is empty.
        marker: a name in `root`. If another process was faster and has written it, that process's folder is kept.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        try:
            if root.is_dir():
                root.rmdir()
            temporary.rename(root)
        except OSError:
            if not (root / marker).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
