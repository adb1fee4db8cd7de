"""Cache the index of a large folder with the logs, so that a million names are read once.

A folder's modification time changes with each file that is added, removed or renamed in it. So a saved index is valid
as long as all folders have the modification times that they had when they were read. Sizes of files are not saved: if a
file is written again in place, the size changes, but the folder's modification time does not.
"""

import hashlib
import json
import logging
import os
import time
import zipfile
from pathlib import Path

import numpy as np

from alexlab.data.folder import ImageIndex, modified_ns, scan
from alexlab.engine.files import atomic_write

log = logging.getLogger("alexlab")

MIN_IMAGES = 10_000  # fewer names are read about as fast as a saved index
SETTLED = 2.0  # seconds: a folder that changed within them may change again within one tick of the file system's clock


def cached_scan(folder: Path, classes: tuple[str, ...] | None, cache_dir: Path) -> ImageIndex:
    """Return the index that `folder.scan` returns, from a saved file if no folder has changed since.

    Args:
        folder, classes: see `folder.scan`.
        cache_dir: the folder of saved indexes, created if needed; it must not be within the images' folder.
    """
    parts = [os.fsencode(folder.absolute()), *(os.fsencode(name) for name in classes or ())]
    file = cache_dir / (hashlib.sha256(b"\0".join(parts)).hexdigest()[:24] + ".npz")
    index = _load(file, folder)
    if index is None:
        start, visited = time.time(), dict[bytes, int]()
        index = scan(folder, classes, visited)
        if len(index) >= MIN_IMAGES and max(visited.values()) / 1e9 < start - SETTLED:
            _save(file, index, visited)
    return index


def _load(file: Path, folder: Path) -> ImageIndex | None:
    """Return the saved index if all folders still have the same modification times, else None."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if any(modified_ns(os.fsencode(path)) != ns for path, ns in about["folders"].items()):
                return None
            names, classes = arrays["names"].tobytes(), tuple(about["classes"])
            return ImageIndex(folder, names, arrays["ends"], arrays["targets"], classes, about["ignored"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # it does not exist, or is damaged: the folder is read again


def _save(file: Path, index: ImageIndex, visited: dict[bytes, int]) -> None:
    folders = {os.fsdecode(path): ns for path, ns in visited.items()}
    about = json.dumps({"classes": index.classes, "ignored": index.ignored, "folders": folders}).encode()
    names, packed = (np.frombuffer(each, np.uint8) for each in (index.names, about))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as opened:
            np.savez(opened, about=packed, names=names, ends=index.ends, targets=index.targets)
    except OSError as error:
        log.warning("the names in %s will be read again next time: %s cannot be written (%s)", index.root, file, error)
