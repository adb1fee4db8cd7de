"""Decoded images that are kept in memory, which all ranks of a machine share.

An image is kept as its decoder gave it, at each scale that was asked for: what is cut out of it is the same, bit for
bit, as without. Whoever decodes an image first writes it; all others find it.
"""

import logging
import mmap
import os
import threading
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode
from alexlab.data.dataset import Files, WholeFiles
from alexlab.engine.errors import UserError

FACTORS = (1, 2, 4, 8)
ENOUGH = 4  # images that do not fit, after which no other is tried: a smaller one may still fit after the first
FIXED = 16  # of an image that has one scale alone, beside its orientation
PER_IMAGE = 8 * len(FACTORS) + 4 + 4 + 1  # bytes of what is known of an image

log = logging.getLogger("alexlab")


class RamCache:
    """An index whose pictures are kept; see `Files`.

    Args:
        room: bytes that may be used, of which none are taken before they are needed.
        ranks, rank: how many processes share the memory, and which this one is.
        shared: where another rank's memory is found; None makes it, here.
    """

    def __init__(self, index: Files, room: int, ranks: int = 1, rank: int = 0, shared: str | None = None) -> None:
        self.index, self.targets, count = index, index.targets, len(index.targets)
        table = -(-count * PER_IMAGE // mmap.PAGESIZE) * mmap.PAGESIZE
        self.where, memory = _memory(table + room, ranks, shared)
        self.kept = np.frombuffer(memory, np.int64, 4 * count).reshape(count, 4)  # where an image begins, or 0
        self.sizes = np.frombuffer(memory, np.int32, 2 * count, 32 * count).reshape(count, 2)
        self.kinds = np.frombuffer(memory, np.uint8, count, 40 * count)
        self.memory = np.frombuffer(memory, np.uint8)
        # a part for each rank to write to, so that they need not agree about each image
        self.next, self.end = table + room // ranks * rank, table + room // ranks * (rank + 1)
        self.room, self.refused, self.full = room, 0, False
        self._lock = threading.Lock()

    def path(self, i: int) -> str:
        return self.index.path(i)

    def picture(self, i: int) -> decode.AnyPicture:
        """
        Raises:
            OSError: as the index does.
        """
        if self.kept[i].any():
            return _Kept(self, i)
        picture = self.index.picture(i)
        return picture if self.full else _Kept(self, i, picture)

    def copy(self, numbers: np.ndarray, out: Tensor) -> None:
        """As PreparedIndex.copy."""
        found = [self.recall(i, 1) for i in numbers.tolist()]
        held = [torch.from_numpy(pixels) for pixels in found if pixels is not None]
        if len(held) == len(out):
            torch.stack(held, out=out)
            return
        cast(WholeFiles, self.index).copy(numbers, out)
        for i, before, pixels in zip(numbers.tolist(), found, out.numpy(), strict=True):
            if before is None:
                self.keep(i, pixels, 1, (out.shape[2], out.shape[1]), 1 + FIXED)

    def recall(self, i: int, factor: int) -> np.ndarray | None:
        """The pixels of image i as they were stored, at 1/factor, or None."""
        start = int(self.kept[i, factor.bit_length() - 1])
        if not start:
            return None
        width, height = (-(-int(side) // factor) for side in self.sizes[i])
        return self.memory[start : start + 3 * width * height].reshape(height, width, 3)

    def keep(self, i: int, pixels: np.ndarray, factor: int, size: tuple[int, int], kind: int) -> None:
        """
        Args:
            size: (width, height) of the whole image as it is stored.
            kind: its orientation, with FIXED where it has one scale.
        """
        with self._lock:
            start, past = self.next, self.next + -(-pixels.nbytes // 64) * 64
            if past > self.end or self.full:
                self.refused += 1
                if self.refused == ENOUGH:
                    self._tell()
                self.full |= self.refused >= ENOUGH
                return
            self.next = past
        np.copyto(self.memory[start : start + pixels.nbytes], pixels.reshape(-1))
        self.sizes[i], self.kinds[i] = size, kind
        self.kept[i, factor.bit_length() - 1] = start  # last: it says that all else is there

    def _tell(self) -> None:
        count = int((self.kept != 0).any(1).sum())
        log.warning(
            "data.cache=ram: the memory at hand, %.1f GB, is full with %s of %s images; the others are read each time.",
            self.room / 1e9, f"{count:,}", f"{len(self.targets):,}",
        )  # fmt: skip


class _Kept:
    """An image that is kept, or that will be once its pixels are asked for."""

    def __init__(self, cache: RamCache, i: int, picture: decode.AnyPicture | None = None) -> None:
        self.cache, self.i, self.picture = cache, i, picture
        if picture is None:
            width, height = (int(side) for side in cache.sizes[i])
            self.orientation = int(cache.kinds[i]) % FIXED
            self.size = (height, width) if self.orientation >= 5 else (width, height)
        else:
            self.size, self.orientation = picture.size, picture.orientation

    def pixels(self, factor: int = 1, bottom: int | None = None) -> tuple[np.ndarray, int]:
        cache, i = self.cache, self.i
        if self.picture is None and cache.kinds[i] >= FIXED:
            factor = 1
        found = cache.recall(i, factor)
        if found is not None:
            return found, factor
        picture = self.picture or cache.index.picture(i)
        try:
            pixels, factor_found = picture.pixels(factor)
        except OSError:
            return self._unkept(factor, bottom)
        scaled = isinstance(picture, decode.Picture) and picture.jpeg != b""
        if scaled and picture.image is not None:  # type: ignore[attr-defined]
            return self._unkept(factor, bottom)
        size = self.size[::-1] if self.orientation >= 5 else self.size
        cache.keep(i, pixels, factor_found, size, self.orientation + (0 if scaled else FIXED))
        return pixels, factor_found

    def _unkept(self, factor: int, bottom: int | None) -> tuple[np.ndarray, int]:
        """Of a damaged JPEG: what it gives depends on how much of it is asked for."""
        return self.cache.index.picture(self.i).pixels(factor, bottom)


def _memory(size: int, ranks: int, shared: str | None) -> tuple[str, mmap.mmap]:
    """Zeroes that are no memory before they are written to, and where other processes find them. They are no file:
    nothing is left behind, however the processes end.

    Raises:
        UserError: several ranks cannot share memory here.
    """
    if ranks == 1:
        return "", mmap.mmap(-1, size)
    try:
        if shared is None:
            file = os.memfd_create("alexlab")
            os.ftruncate(file, size)
        else:
            file = os.open(shared, os.O_RDWR)
        return f"/proc/{os.getpid()}/fd/{file}", mmap.mmap(file, size)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"data.cache=ram: the ranks of a machine share their memory by /proc, as Linux has it, and here that fails "
            f"({error}): data.cache=null."
        ) from None


def memory_at_hand() -> int:
    """Bytes that this machine, or this container of it, has left for processes."""
    try:
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):  # macOS: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([left, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]))


def _left_in_groups(told: Path, root: Path) -> list[int]:
    """Bytes that are left in each control group with a limit that this process is in: its own, and those around it."""
    found = []
    for line in told.read_text().splitlines() if told.is_file() else []:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, files, cached = root, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in kinds.split(","):
            files, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
            top = root / "memory"
        else:
            continue
        inner = top / path.lstrip("/")
        for group in dict.fromkeys([inner, *inner.parents, top]):
            if group != top and top not in group.parents:
                continue
            try:
                most, used = (int((group / name).read_text()) for name in files)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit, or not to be seen from within a container
                continue
            found.append(most - used + int(stat.get(cached, 0)))
    return found
