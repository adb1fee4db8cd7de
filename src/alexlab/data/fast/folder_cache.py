"""The index of a large folder, kept beside the logs: a million names are read once, and by one process.

A folder's time of last change moves with each file that is added, removed or renamed in it, so an index is right as
long as all its folders have the times that they had when they were read.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alexlab.data.fast import npz
from alexlab.data.folder import ImageIndex, changed, class_folders, scan

try:
    import fcntl
except ImportError:  # not on Windows: each process reads for itself
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("alexlab")

FROM = 10_000  # images; fewer are read faster than they are worth a file
SETTLED = 2.0  # seconds: a folder that changed so shortly before it was read may change again within the same tick
VERSION = 2


def scan_or_recall(folder: Path, classes: tuple[str, ...] | None, kept: Path) -> ImageIndex:
    """`index.scan`, or what it found last time, as long as no folder has changed since.

    Args:
        folder, classes: see `index.scan`.
        kept: the folder of kept indexes; made when it is needed, and never inside of the images' folder.

    Raises:
        UserError: as `index.scan`.
    """
    whole = folder.absolute()
    name = hashlib.sha256(b"\0".join([os.fsencode(whole), *(os.fsencode(c) for c in classes or ())])).hexdigest()[:24]
    file = kept / f"{name}.npz"
    index = _recall(file, folder)
    if index is not None:
        return index
    if not _is_large(folder):
        return scan(folder, classes)
    with _one_at_a_time(kept / "lock"):
        index = _recall(file, folder)  # another process may have read it meanwhile
        if index is None:
            began, visited = time.time(), dict[bytes, int]()
            index = scan(folder, classes, visited)
            if len(index) >= FROM and max(visited.values()) / 1e9 < began - SETTLED:
                _keep(file, index, visited)
    return index


def _is_large(folder: Path) -> bool:
    """Whether at least `FROM` files are there; it looks no further, and leaves nothing behind."""
    files = 0
    for label in class_folders(folder):
        for _, _, names in os.walk(folder / label):
            files += len(names)
            if files >= FROM:
                return True
    return False


def _recall(file: Path, folder: Path) -> ImageIndex | None:
    """The kept index, if all its folders are as they were."""
    try:
        npz.check(file, file.stat().st_size)  # nothing in it is compressed
        with np.load(file, allow_pickle=False) as held:
            if int(held["version"]) != VERSION:
                return None
            folders = held["folders"].tobytes().split(b"\0")
            if any(changed(path) != time for path, time in zip(folders, held["times"].tolist(), strict=True)):
                return None
            classes = tuple(os.fsdecode(name) for name in held["classes"].tobytes().split(b"\0"))
            ignored = json.loads(held["ignored"].tobytes())
            index = ImageIndex(folder, held["names"].tobytes(), held["ends"], held["targets"], classes, ignored)
            return index if _fits(index) else None
    except npz.BROKEN:
        return None  # not there, or not whole: read anew


def _fits(index: ImageIndex) -> bool:
    """Whether each array is what `scan` makes: whole numbers, targets that grow, names one after the other."""
    ends, targets = index.ends, index.targets
    if ends.dtype != np.int64 or targets.dtype != np.int64 or ends.shape != targets.shape or ends.ndim != 1:
        return False
    steps = np.diff(ends, prepend=0)
    counted = isinstance(index.ignored, dict) and all(isinstance(n, int) for n in index.ignored.values())
    return bool(
        len(ends) and steps.min() > 0 and ends[-1] == len(index.names) and counted
        and targets[0] >= 0 and np.diff(targets, prepend=0).min() >= 0 and targets[-1] < len(index.classes)
        and _stays_below(index)
    )  # fmt: skip


def _stays_below(index: ImageIndex) -> bool:
    """Whether all names lead to files in the folder."""
    letters = np.frombuffer(index.names, np.uint8)
    starts = np.concatenate([[0], index.ends[:-1]])
    if (letters[starts] == ord("/")).any() or b"\0" in index.names:
        return False
    if b".." not in index.names:  # a million names are looked at one by one in a second
        return True
    return not any(b".." in index.names[a:b].split(b"/") for a, b in zip(starts, index.ends, strict=True))


def _keep(file: Path, index: ImageIndex, visited: dict[bytes, int]) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as opened:
            np.savez(
                opened, version=np.array(VERSION), names=np.frombuffer(index.names, np.uint8), ends=index.ends,
                targets=index.targets, times=np.array(list(visited.values()), np.int64),
                folders=np.frombuffer(b"\0".join(visited), np.uint8),
                ignored=np.frombuffer(json.dumps(index.ignored).encode(), np.uint8),
                classes=np.frombuffer(b"\0".join(map(os.fsencode, index.classes)), np.uint8),
            )  # fmt: skip
        beside.replace(file)
    except OSError as error:
        log.warning("the names in %s are read anew next time: %s cannot be written (%s)", index.root, file, error)
        with contextlib.suppress(OSError):
            beside.unlink()


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Where nothing can be locked (a folder that may not be written, a file system without locks), each reads alone."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            opened = stack.enter_context(lock.open("wb"))
            if fcntl is not None:
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield
