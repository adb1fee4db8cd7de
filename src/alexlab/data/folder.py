"""An ImageNet-style folder -> arrays: which images exist, and the class of each.

`root/train/<class>/*.jpg`, `root/val/<class>/*.jpg` and optionally `root/test/<class>/*.jpg`; or one folder of class
folders, split by fractions (stratified, by seed).
"""

import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
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

# suffixes of what decode.py reads
EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
EXTENSIONS += (".pbm", ".pnm", ".jfif", ".jpe", ".mpo", ".apng", ".dib", ".avif", ".avifs")
EXTENSIONS += (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c")
KNOWN = frozenset(extension.encode() for extension in EXTENSIONS)
# Names, in lower case, of folders that archives, network disks, systems and notebooks add: their thumbnails and deleted
# pictures are no training images. Hidden folders (.git, .ipynb_checkpoints, .@__thumb) and those of network disks that
# begin with @ (@eaDir, @Recycle) are skipped too.
SKIPPED = {"__macosx", "#recycle", "#snapshot", "~snapshot", "recycler", "recycled", "$recycle.bin", "lost+found"}
SKIPPED |= {"found.000", "_gsdata_", "_svn", "cvs", "__pycache__", "system volume information"}
SKIPPED |= {"network trash folder", "temporary items"}
# the usual names of the folders of splits, in any case
SPELLINGS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPELLINGS |= {"validate": "val", "test": "test", "testing": "test"}
# what other names of splits contain, as in seg_train, test_set and train2
SPLIT_WORD = re.compile(
    r"(?<![a-z])(train|val|test|eval|dev)(ing|id|idation|idate|uation)?(s|set|data|images?)?(?![a-z])"
)
REPORT_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class ImageIndex(Index):
    """The images of one split, in arrays: a million (path, class) tuples would take far more memory."""

    root: Path  # the folder that the names are relative to
    names: bytes  # all names joined, as bytes of the file system's encoding
    ends: np.ndarray  # int64 (N,): where in `names` the name of image i ends
    targets: np.ndarray  # int64 (N,): the class of image i, 0 to len(classes) - 1
    classes: tuple[str, ...]  # names of the class folders, sorted
    # number of files that are not images, by suffix; under "" of images outside of the class folders, and under "NAME/"
    # of folders that are skipped
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

    def file(self, i: int) -> str:
        return self.path(i)

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
            + ("" if classes is None else f" If the images have no labels, move {folder.name}/ elsewhere.")
        )
    forms: dict[str, str] = {}
    for name in (*(classes or ()), *present):
        if forms.setdefault(unicodedata.normalize("NFC", name), name) != name:
            raise UserError(
                f"{folder}: the class {name} exists twice, because its name is stored in two Unicode forms, as from "
                "macOS and from Linux: rename one folder, for instance with `convmv -f utf8 -t utf8 --nfc -r --notest`."
            )
    if classes is not None and (unknown := [name for name in present if name not in classes]):
        raise UserError(
            f"{folder} contains classes that the training images do not: {listed(unknown)}. "
            f"Training has {len(classes)} classes: {listed(classes)}. Rename or remove those folders."
        )
    labels = present if classes is None else classes
    real: dict[str, str] = {}
    names, lengths, counts = bytearray(), [], np.zeros(len(labels), np.int64)
    ignored: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                ignored[f"{entry.name}/"] += is_skipped(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                ignored["hidden" if entry.name.startswith(".") else ""] += 1
    with_folder = set(present)
    for target, label in enumerate(reported(labels, f"reading {folder}", f"of {len(labels):,} classes")):
        unused: Counter[str] = Counter()
        images = sorted(images_below(folder, label, visited, unused, real)) if label in with_folder else []
        if not images and classes is None:
            raise UserError(
                f"{folder / label} is a class without images: add images ({', '.join(EXTENSIONS[:4])}, ...) or remove "
                f"the folder.{' '.join(['', *unused_files(folder / label, unused)])}"
            )
        ignored.update(unused)
        counts[target] = len(images)
        names += b"".join(images)  # class by class: a million names as objects would take 100 MB
        lengths.append(np.fromiter(map(len, images), np.int64, len(images)))
    if not names:
        raise UserError(f"{folder} contains class folders but no image ({', '.join(EXTENSIONS[:4])}, ...).")
    targets = np.repeat(np.arange(len(labels)), counts)
    return ImageIndex(folder, bytes(names), np.cumsum(np.concatenate(lengths)), targets, labels, dict(+ignored))


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders in `folder`, sorted, without those that are skipped."""
    try:
        with os.scandir(folder) as entries:
            present = [entry for entry in entries if not is_skipped(entry.name)]
        for entry in present:
            if entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path):  # noqa: PTH110
                raise UserError(f"{entry.path} is a link to nothing: mount the disk that it leads to, or remove it.")
        return tuple(sorted(entry.name for entry in present if entry.is_dir()))
    except FileNotFoundError:
        raise UserError(f"{folder} does not exist: give the folder of the images with data.root=PATH.") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be read as a folder ({error.strerror}): give another data.root.") from None


def is_skipped(name: str) -> bool:
    """Return whether a folder of this name has no images of its own: it is hidden, or one of `SKIPPED`."""
    return (name[0] in ".@" and len(name) > 1) or name.lower() in SKIPPED


def modified_ns(folder: bytes) -> int:
    """Return when a name in `folder` was last added, removed or changed, in nanoseconds."""
    return os.stat(folder).st_mtime_ns  # noqa: PTH116, a Path per folder would take longer


def images_below(
    folder: Path, label: str, visited: dict[bytes, int], ignored: Counter[str], real: dict[str, str]
) -> list[bytes]:
    """Return the names of all images in `folder/label` at any depth, relative to `folder`; links are followed.

    Args:
        visited, ignored: filled; see `scan` and `ImageIndex`.
        real: filled with the real path of each folder, and the path that led to it.

    Raises:
        UserError: a link leads to a folder that was read already, or that contains the link; or splits are in a class.
    """
    images, mixed = list[bytes](), list[str]()
    top = os.fsencode(folder) + b"/"
    waiting = [os.fsencode(label)]
    while waiting:
        current = waiting.pop()
        before = len(waiting)
        prefix, path = current + b"/", os.path.normpath(os.fsdecode(top + current))
        refuse_twice(path, real)
        try:
            visited[top + current] = modified_ns(top + current)
            with os.scandir(top + current) as entries:
                for entry in entries:
                    name = entry.name
                    suffix = name[name.rfind(b".") :].lower()
                    if entry.is_dir():
                        if is_skipped(os.fsdecode(name)):
                            ignored[f"{os.fsdecode(name)}/"] += 1
                            continue
                        waiting.append(prefix + name)
                    elif name[0] == 46:  # a dot
                        ignored["hidden"] += suffix in KNOWN
                    elif suffix in KNOWN:
                        images.append(prefix + name)
                    else:
                        ignored[os.fsdecode(suffix) if b"." in name else "no suffix"] += 1
        except PermissionError:
            raise UserError(f"{path} may not be read: ask for read permission, or remove the folder.") from None
        below = {SPELLINGS.get(os.fsdecode(name.rpartition(b"/")[2]).lower()) for name in waiting[before:]} - {None}
        mixed += [path] if len(below) > 1 and label != "." else []
    if mixed:
        raise UserError(
            f"{mixed[0]} contains folders of several splits, which would be mixed: give data.root={mixed[0]}, or move "
            "the folders so that each split contains the classes, as in train/cat/1.jpg."
        )
    return images


def refuse_twice(folder: str, real: dict[str, str]) -> None:
    """Raise UserError if `real`, which is filled, has another path of this folder."""
    if (first := real.setdefault(os.path.realpath(folder), folder)) != folder:
        raise UserError(f"{folder} and {first} are the same folder, because one is a link: remove the link.")


# -- splits


def find_splits(
    root: Path,
    divided: bool = False,
    scan: Callable[[Path, tuple[str, ...] | None], ImageIndex] = scan,
) -> dict[str, ImageIndex]:
    """Read train/, val/ and test/ of `root`, as far as they exist; without train/, its class folders are train.

    Args:
        divided: data.val_fraction or data.folds will choose the val images, so class folders alone are allowed.
        scan: reads the images of one folder, given the classes of training; see `cached_scan`.
    """
    folders, present = split_folders(root), class_folders(root)
    rest = [root / name for name in present if root / name not in folders.values()]
    if alike := [path.name for path in rest if looks_like_split(path)]:
        raise UserError(
            f"{root} contains folders that are named like splits and not like classes ({listed(alike)}): rename them "
            "to train, val and test, or move what is not used elsewhere."
        )
    if "train" in folders:
        splits = {"train": scan(folders["train"], None)}
        held_out = [name for name in ("val", "test") if name in folders]
        return splits | {name: scan(folders[name], splits["train"].classes) for name in held_out}
    if not divided or folders:
        below = [root / name for name in present]
        below += [path / name for path in below[:8] for name in class_folders(path)]
        near = [path for path in (root.parent, *below) if (path / "train").is_dir()]
        hint = f" Did you mean data.root={near[0]}?" if near else ""
        raise UserError(
            f"{root} contains no train/ folder: it must contain train/ and val/ with one folder of images per class, "
            f"or class folders alone, to be split with data.val_fraction=0.1.{hint}"
        )
    return {"train": scan(root, None)}


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders train, val and test in `root`, as far as they exist, by any of `SPELLINGS`.

    Raises:
        UserError: two folders are the same split.
    """
    found: dict[str, Path] = {}
    names = class_folders(root)
    for name in names:
        split = SPELLINGS.get(name.lower())
        if split in found:
            raise UserError(f"{root} contains {found[split].name} and {name}, which are both {split}: remove one.")
        if split is not None:
            found[split] = root / name
    if [*found] == ["train"] and not class_folders(found["train"]):  # may be a class of trains, next to cars and buses
        classes = [root / name for name in names if not SPLIT_WORD.search(name.lower())]
        with_images = [any(path.suffix.lower() in EXTENSIONS for path in label.iterdir()) for label in classes]
        return {} if sum(with_images) > 1 else found
    return found


def looks_like_split(folder: Path) -> bool:
    """Return whether a part of a folder's name is that of a split, as in seg_train, and folders are all it contains."""
    within = SPLIT_WORD.search(folder.name.lower()) and class_folders(folder)
    return bool(within) and not any(path.is_file() and path.name[0] != "." for path in folder.iterdir())


# -- for messages, and for data that is written as a folder


def unused_files(folder: Path, ignored: dict[str, int]) -> list[str]:
    """Return a line for each kind of files and folders that are not used; see `ImageIndex.ignored`."""
    rest = dict(ignored)
    outside, hidden = rest.pop("", 0), rest.pop("hidden", 0)
    skipped = [f"{name} ({rest.pop(name):,})" for name in sorted(rest) if name.endswith("/")]
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(rest.items(), key=lambda item: -item[1]))
    lines = {
        f"folders of these names are skipped: {', '.join(skipped)}": skipped,
        f"hidden images are skipped: {hidden:,}": hidden,
        f"files without the suffix of an image are ignored: {counts}": counts,
        f"images outside of the class folders are ignored: {outside:,}": outside,
    }
    return [f"{folder}: {line}" for line, is_needed in lines.items() if is_needed]


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
