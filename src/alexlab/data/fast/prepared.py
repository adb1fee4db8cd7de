"""A folder that prepare.py has read once: images as JPEG or raw pixels, one after the other in a few large files.

`prepared.json` is written last, so that its being there says that all is whole. Beside it lie a `SPLIT.npz` with arrays
of where each image is, and the shards.
"""

import functools
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode
from alexlab.data.fast import npz
from alexlab.engine.errors import UserError

VERSION = 1
ABOUT = "prepared.json"
MOST, MOST_EACH = 10**6, 5_000  # bytes of a SPLIT.npz's arrays, and of those for each image, its name included
LEAST = 100  # bytes of an image
LARGEST = 2**26  # bytes of a prepared.json
ARRAYS = ("targets", "shards", "offsets", "sizes", "heights", "widths", "source_heights", "source_widths", "ends")


@dataclass(frozen=True)
class PreparedIndex:
    """The images of one split.

    Attributes:
        root: the prepared folder.
        format: "jpeg" or "raw" (uint8 rows of RGB).
        files: the shards.
        classes: the class folders' names, sorted.
        names: the source files' names, joined, as bytes; `arrays["ends"]` says where each ends.
        arrays: (N,) each, see ARRAYS; `offsets` and `sizes` in bytes, heights and widths in pixels.
        recipe: what the images were made with, for the fingerprint.
    """

    root: Path
    format: str
    files: tuple[Path, ...]
    classes: tuple[str, ...]
    names: bytes
    arrays: dict[str, np.ndarray]
    recipe: str

    @property
    def targets(self) -> np.ndarray:
        return self.arrays["targets"]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, i: int) -> bytes:
        """Of image i's source, relative to its folder."""
        ends = self.arrays["ends"]
        return self.names[int(ends[i - 1]) if i else 0 : int(ends[i])]

    def path(self, i: int) -> str:
        """Where image i is, for people: the shard and the source's name."""
        return f"{self.files[self.arrays['shards'][i]]}:{os.fsdecode(self.name(i))}"

    def picture(self, i: int) -> decode.AnyPicture:
        """
        Raises:
            OSError: it cannot be read.
        """
        shard, offset, size = (int(self.arrays[key][i]) for key in ("shards", "offsets", "sizes"))
        if self.format == "jpeg":
            content = os.pread(self._files[shard], size, offset)
            if len(content) < size:
                raise OSError("its shard is shorter than it was")
            return decode.Picture(content)
        self._look_at(shard)
        shape = (int(self.arrays["heights"][i]), int(self.arrays["widths"][i]), 3)
        return decode.Pixels(np.frombuffer(self._maps[shard], np.uint8, size, offset).reshape(shape))

    @functools.cached_property
    def extent(self) -> tuple[int, int] | None:
        """(width, height) of the images where they are pixels of one size."""
        sizes = {(int(w), int(h)) for w, h in set(zip(self.arrays["widths"], self.arrays["heights"], strict=True))}
        return sizes.pop() if self.format == "raw" and len(sizes) == 1 else None

    def copy(self, numbers: np.ndarray, out: Tensor) -> None:
        """Copy the pixels of these images, all of one size, into `out`: uint8 (N, height, width, 3).

        In one call of torch's, as threads that come back to Python for each image wait for each other: 1.5 times as
        fast with two.

        Raises:
            OSError: one cannot be read.
        """
        assert self.extent is not None
        width, height = self.extent
        shards = self.arrays["shards"][numbers].tolist()
        places = (self.arrays["offsets"][numbers] // (3 * width * height)).tolist()
        for shard in set(shards):
            self._look_at(shard)
        torch.stack([self._blocks[shard][place] for shard, place in zip(shards, places, strict=True)], out=out)

    def _look_at(self, shard: int) -> None:
        """To read from a map past the end of its file would end the process, without a word."""
        if os.fstat(self._files[shard]).st_size < len(self._maps[shard]):
            raise OSError("its shard is shorter than it was")

    @functools.cached_property
    def _blocks(self) -> list[Tensor]:
        """The shards as uint8 (images, height, width, 3)."""
        assert self.extent is not None
        width, height = self.extent
        return [torch.frombuffer(part, dtype=torch.uint8).view(-1, height, width, 3) for part in self._maps]

    @functools.cached_property
    def _files(self) -> list[int]:
        return [os.open(path, os.O_RDONLY) for path in self.files]

    @functools.cached_property
    def _maps(self) -> list[mmap.mmap]:
        # pages are read where they are used, in C, while other threads run; written to they would be this process's own
        return [mmap.mmap(file, 0, access=mmap.ACCESS_COPY) for file in self._files]

    def fingerprint(self) -> str:
        """16 hex digits of names, targets, classes and how the images were made."""
        digest = hashlib.sha256(self.names)
        for key in ("ends", "targets", "heights", "widths"):
            digest.update(self.arrays[key].tobytes())
        digest.update("\0".join([*self.classes, self.recipe]).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def check(split: str, told: dict[str, Any], held: dict[str, np.ndarray], names: int, sizes: list[int]) -> None:
    """Raises ValueError where a split's arrays would lead outside of its files: they may be anybody's."""
    count = told["splits"][split]["images"]
    for key, array in held.items():
        if array.shape != (count,) or array.dtype.kind not in "iu":
            raise ValueError(f"{key} of {split} are not {count} whole numbers")
    wide = {key: array.astype(np.int64) for key, array in held.items()}
    limits = {"targets": len(told["classes"]), "shards": len(sizes)}
    for key, most in limits.items():
        if count and not (wide[key].min() >= 0 and wide[key].max() < most):
            raise ValueError(f"{key} of {split} are not from 0 to {most - 1}")
    if not count:
        return
    steps = np.diff(wide["ends"], prepend=0)
    if steps.min() < 0 or wide["ends"][-1] > names:
        raise ValueError(f"the names of {split} do not fit their lengths")
    ends = wide["offsets"] + wide["sizes"]
    if min(wide["offsets"].min(), wide["sizes"].min()) < 0 or (ends > np.array(sizes)[wide["shards"]]).any():
        raise ValueError(f"images of {split} lie outside of their shards")
    area = 3 * wide["heights"] * wide["widths"]
    if told["format"] == "raw" and (area != wide["sizes"]).any():
        raise ValueError(f"images of {split} have other sizes than their pixels")


def is_prepared(root: Path) -> bool:
    return (root / ABOUT).is_file()


def about(root: Path) -> dict[str, Any]:
    """What prepare.py says of the folder.

    Raises:
        UserError: it was not prepared by this version.
    """
    try:
        if (root / ABOUT).stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        told = json.loads((root / ABOUT).read_text(encoding="utf-8"))
        version = told["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{root / ABOUT} cannot be read ({error}): prepare the images anew with prepare.py.") from None
    if version != VERSION:
        raise UserError(f"{root} was prepared in form {version}, and this is for form {VERSION}: prepare it anew.")
    return told


def read(root: Path) -> dict[str, PreparedIndex]:
    """The splits of a prepared folder.

    Raises:
        UserError: a part is missing, or shorter or longer than it was.
    """
    try:
        return _read(root, about(root))
    except npz.BROKEN as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{root} is not what prepare.py writes ({error}): prepare the images anew.") from None


def _read(root: Path, told: dict[str, Any]) -> dict[str, PreparedIndex]:
    splits = {}
    if told["format"] not in ("jpeg", "raw"):
        raise ValueError(f"its format is {str(told['format'])[:40]!r}")
    if not (isinstance(told["classes"], list) and all(isinstance(name, str) for name in told["classes"])):
        raise ValueError("its classes are no names")
    for split, part in told["splits"].items():
        files = []
        for shard in part["shards"]:
            if Path(shard["file"]).name != shard["file"] or split not in ("train", "val", "test"):
                raise ValueError(f"{split}: {shard['file']} lies elsewhere")
            path = root / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
                raise UserError(f"{path} {found}: copy it again, or remove {root / ABOUT} and run prepare.py again.")
            files.append(path)
        held_bytes = sum(shard["bytes"] for shard in part["shards"])
        npz.check(root / f"{split}.npz", MOST + MOST_EACH * min(part["images"], held_bytes // LEAST))
        with np.load(root / f"{split}.npz", allow_pickle=False) as arrays:
            held = {key: arrays[key] for key in ARRAYS}
            names = arrays["names"].tobytes()
        check(split, told, held, len(names), [shard["bytes"] for shard in part["shards"]])
        splits[split] = PreparedIndex(
            root, told["format"], tuple(files), tuple(told["classes"]), names, held, json.dumps(told["recipe"])
        )
    return splits
