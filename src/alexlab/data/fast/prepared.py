"""A folder that `prepare` has written: images as JPEG or as raw pixels, one after another in a few large files.

`prepared.json` is written last, so everything is complete if it exists. The remaining files are one `SPLIT.npz`
per split, with arrays that say where each image is, and the shards.
"""

import functools
import json
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode
from alexlab.data.fingerprint import names_digest, of_sizes
from alexlab.data.index import Index, name_at
from alexlab.engine.errors import UserError

VERSION = 1
ABOUT = "prepared.json"
COLUMNS = ("groups", "folds", "weights")
CRCS = "crcs"  # CRC-32 of each image's bytes, which sets of earlier versions do not have
ARRAYS = ("targets", "shards", "offsets", "sizes", "heights", "widths", "source_heights", "source_widths", "ends")


@dataclass(frozen=True)
class PreparedIndex(Index):
    """The images of one split."""

    root: Path
    format: str  # "jpeg" or "raw" (uint8 rows of RGB)
    files: tuple[Path, ...]  # the shards
    classes: tuple[str, ...]
    names: bytes  # of the source files, joined; `arrays["ends"]` says where each ends
    # (N,) each, see ARRAYS and CRCS; `offsets` and `sizes` in bytes, heights and widths in pixels; `targets` are
    # (N, num_classes) if an image has any number of classes
    arrays: dict[str, np.ndarray]
    recipe: str  # how the images were made, for the fingerprint
    source: str = ""  # the fingerprint of the images that they were made from
    # of a table that the images were listed in, if it had them
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None
    weights: np.ndarray | None = None
    # by shard, filled by the threads that read
    _files: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _maps: dict[int, mmap.mmap] = field(default_factory=dict, init=False, repr=False)
    _blocks: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def targets(self) -> np.ndarray:  # type: ignore[override]
        return self.arrays["targets"]

    def name(self, i: int) -> bytes:
        """Return the source of image i, relative to the folder that was prepared."""
        return name_at(self.names, self.arrays["ends"], i)

    def path(self, i: int) -> str:
        """Return where image i is, for people: the shard and the name of the source."""
        return f"{self.files[self.arrays['shards'][i]]}:{os.fsdecode(self.name(i))}"

    def picture(self, i: int) -> decode.AnyPicture:
        shard, offset, size = (int(self.arrays[key][i]) for key in ("shards", "offsets", "sizes"))
        if self.format == "jpeg":
            content = os.pread(self.file_of(shard), size, offset)
            if len(content) < size:
                raise OSError("its shard is shorter than it was")
            return decode.Picture(content)
        return decode.Pixels(np.frombuffer(self.map_of(shard), np.uint8, size, offset).reshape(self.shape(i)))

    def shape(self, i: int) -> tuple[int, int, int]:
        """Return (height, width, 3) of image i, if the images are stored as pixels."""
        return int(self.arrays["heights"][i]), int(self.arrays["widths"][i]), 3

    @property
    def channels(self) -> tuple[int, ...]:  # type: ignore[override]
        """See `Index`: `prepare` stores RGB."""
        return (3,) if self.format == "raw" else (1, 3, 4) if self.recipe == "archive" else (1, 3)

    @functools.cached_property
    def raw_size(self) -> tuple[int, int] | None:  # type: ignore[override]
        sizes = set(zip(self.arrays["widths"].tolist(), self.arrays["heights"].tolist(), strict=True))
        return sizes.pop() if self.format == "raw" and len(sizes) == 1 else None

    def copy(self, indices: np.ndarray, out: Tensor) -> None:
        """Copy the pixels of images of one size into `out`: uint8 (N, height, width, 3). Raises OSError if it cannot.

        One call of torch copies all images. If two threads returned to Python for each image, they would wait for the
        GIL, and take 1.5 times as long.
        """
        assert self.raw_size is not None
        width, height = self.raw_size
        shards = self.arrays["shards"][indices].tolist()
        places = (self.arrays["offsets"][indices] // (3 * width * height)).tolist()
        for shard in set(shards):
            content = self.map_of(shard)
            if shard not in self._blocks:  # as (images, height, width, 3)
                self._blocks[shard] = torch.frombuffer(content, dtype=torch.uint8).view(-1, height, width, 3)
        torch.stack([self._blocks[shard][place] for shard, place in zip(shards, places, strict=True)], out=out)

    def file_of(self, shard: int) -> int:
        """Return the descriptor of a shard's file, which stays open."""
        if shard not in self._files:
            self._files[shard] = os.open(self.files[shard], os.O_RDONLY)
        return self._files[shard]

    def map_of(self, shard: int) -> mmap.mmap:
        """Return a shard in memory. Raises OSError if it was truncated: to read past its end would kill the process."""
        file = self.file_of(shard)
        if shard not in self._maps:
            # pages are read on first use, in C and without the GIL; a page that is written is copied first
            self._maps[shard] = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
        if os.fstat(file).st_size < len(self._maps[shard]):
            raise OSError("its shard is shorter than it was")
        return self._maps[shard]

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of names, classes, sizes in bytes, recipe and source; see fingerprint.py."""
        return of_sizes(self.names_digest(), self.arrays["sizes"], self.source)

    def names_digest(self) -> Any:
        arrays = [self.arrays[key] for key in ("ends", "targets", "heights", "widths")]
        return names_digest(self.names, arrays, [*self.classes, self.recipe])


def is_prepared(root: Path) -> bool:
    return (root / ABOUT).is_file()


def about(root: Path) -> dict[str, Any]:
    """Read prepared.json. Raises UserError if it cannot be read, or another version wrote it."""
    try:
        content = json.loads((root / ABOUT).read_text(encoding="utf-8"))
        version = content["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / ABOUT} cannot be read ({error}): run alexlab prepare again, from scratch.") from None
    if version != VERSION:
        raise UserError(
            f"{root} was prepared in format {version}, and this program reads format {VERSION}: prepare it again."
        )
    return content


def read(root: Path) -> dict[str, PreparedIndex]:
    """Read the splits of a prepared folder. Raises UserError if a file is missing or damaged."""
    content = about(root)
    try:
        return {split: _read_split(root, content, split) for split in content["splits"]}
    except UserError:
        raise
    except Exception as error:  # json, NumPy, zipfile and zlib raise many kinds for damaged files
        raise UserError(f"{root} is not what `alexlab prepare` writes ({error}): prepare the images again.") from None


def _read_split(root: Path, content: dict[str, Any], split: str) -> PreparedIndex:
    files = []
    for shard in content["splits"][split]["shards"]:
        path = root / shard["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise UserError(
                f"{path} has {size:,} bytes instead of {shard['bytes']:,}: copy it again, or remove {root / ABOUT} and "
                "run alexlab prepare again."
            )
        files.append(path)
    return PreparedIndex(**fields(root, content, split), files=tuple(files))


def fields(root: Path, content: dict[str, Any], split: str) -> dict[str, Any]:
    """Return the arguments of `PreparedIndex` for a split, without `files`. `content` is that of prepared.json."""
    part = content["splits"][split]
    with np.load(root / f"{split}.npz", allow_pickle=False) as held:
        arrays = {key: held[key] for key in (*ARRAYS, CRCS) if key in held or key in ARRAYS}
        names, columns = held["names"].tobytes(), {key: held[key] for key in COLUMNS if key in held}
    if len(arrays["targets"]) != part["images"]:
        raise ValueError(f"{split}.npz lists {len(arrays['targets'])} images instead of {part['images']}")
    source = content.get("source", {}).get("fingerprint", {}).get(split, "")
    found = {"root": root, "format": content["format"], "classes": tuple(content["classes"]), "names": names}
    return {**found, "arrays": arrays, "recipe": json.dumps(content["recipe"]), "source": source, **columns}
