"""Cache the index of a large folder with the logs, so that a million names are read once, by one process.

A folder's modification time changes with each file that is added, removed or renamed in it. So a saved index is valid
as long as all folders have the modification times that they had when they were read. Sizes of files are not saved: if a
file is written again in place, the size changes, but the folder's modification time does not.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
import zipfile
from pathlib import Path

import numpy as np

from alexlab.data.folder import ImageIndex, class_folders, modified_ns, scan
from alexlab.engine.files import atomic_write

log = logging.getLogger("alexlab")

MIN_IMAGES = 10_000  # fewer names are read about as fast as a saved index
SETTLED = 2.0  # seconds: a folder that changed within them may change again within one tick of the file system's clock
VERSION = 2  # of the file format


def cached_scan(folder: Path, classes: tuple[str, ...] | None, cache_dir: Path) -> ImageIndex:
    """Return the index that `folder.scan` returns, from a saved file if no folder has changed since.

    Args:
        folder, classes: see `folder.scan`.
        cache_dir: the folder of saved indexes, created if needed; it must not be within the images' folder.
    """
    parts = [os.fsencode(folder.absolute()), *(os.fsencode(name) for name in classes or ())]
    file = cache_dir / (hashlib.sha256(b"\0".join(parts)).hexdigest()[:24] + ".npz")
    index = _load(file, folder)
    if index is not None:
        return index
    if not _is_large(folder):
        return scan(folder, classes)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):  # Windows and some file systems have no such locks
            cache_dir.mkdir(parents=True, exist_ok=True)
            import fcntl

            fcntl.flock(stack.enter_context((cache_dir / "lock").open("wb")), fcntl.LOCK_EX)
        index = _load(file, folder)  # another process may have read the folder meanwhile
        if index is None:
            start, visited = time.time(), dict[bytes, int]()
            index = scan(folder, classes, visited)
            if len(index) >= MIN_IMAGES and max(visited.values()) / 1e9 < start - SETTLED:
                _save(file, index, visited)
    return index


def _is_large(folder: Path) -> bool:
    """Check whether the folder has at least MIN_IMAGES files, without reading further."""
    files = 0
    for label in class_folders(folder):
        for _, _, names in os.walk(folder / label):
            files += len(names)
            if files >= MIN_IMAGES:
                return True
    return False


def _load(file: Path, folder: Path) -> ImageIndex | None:
    """Return the saved index if all folders still have the same modification times, else None."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if int(arrays["version"]) != VERSION:
                return None
            folders = arrays["folders"].tobytes().split(b"\0")
            if any(modified_ns(path) != ns for path, ns in zip(folders, arrays["times"].tolist(), strict=True)):
                return None
            classes = tuple(os.fsdecode(name) for name in arrays["classes"].tobytes().split(b"\0"))
            ignored = json.loads(arrays["ignored"].tobytes())
            return ImageIndex(folder, arrays["names"].tobytes(), arrays["ends"], arrays["targets"], classes, ignored)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # it does not exist, or is damaged: the folder is read again


def _save(file: Path, index: ImageIndex, visited: dict[bytes, int]) -> None:
    arrays = {
        "version": np.array(VERSION),
        "names": np.frombuffer(index.names, np.uint8),
        "ends": index.ends,
        "targets": index.targets,
        "classes": np.frombuffer(b"\0".join(map(os.fsencode, index.classes)), np.uint8),
        "ignored": np.frombuffer(json.dumps(index.ignored).encode(), np.uint8),
        "folders": np.frombuffer(b"\0".join(visited), np.uint8),
        "times": np.array(list(visited.values()), np.int64),
    }
    try:
        with atomic_write(file) as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        log.warning("the names in %s will be read again next time: %s cannot be written (%s)", index.root, file, error)
