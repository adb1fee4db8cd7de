"""A look at an .npz file that may be anybody's, before NumPy makes room for what it claims to hold."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format

# what NumPy and zipfile raise for files that are none, or damaged
BROKEN = (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError, EOFError, OverflowError, MemoryError,
          RuntimeError, zipfile.BadZipFile, zlib.error)  # fmt: skip
HEADERS = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}


def check(path: Path, most: int) -> None:
    """Raises one of `BROKEN` where its arrays would unpack to more than `most` bytes, or claim to be larger than what
    is packed of them."""
    with zipfile.ZipFile(path) as packed:
        entries = packed.infolist()
        if sum(entry.file_size for entry in entries) > most:
            raise ValueError(f"{path.name} would unpack to more than its images need")
        for entry in entries:
            with packed.open(entry) as file:
                shape, _, kind = HEADERS[format.read_magic(file)](file)
            if np.dtype(kind).hasobject or math.prod(map(abs, shape)) * kind.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} of {path.name} is no array of its size")
