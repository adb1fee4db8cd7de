"""Prepared images in a bucket: data=prepared data.root=s3://BUCKET/SET.

An image whose shard is not on this machine is read by a ranged request. Meanwhile one thread per machine downloads
whole shards to a cache on disk, those first from which most images were needed. It does not download again most of
the images that its own process has read by ranges. So the first batch comes at once, and after the first epoch images
are read as from a local folder. Images and their order are the same in each case.
"""

import atexit
import bisect
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fast import prepared
from alexlab.data.fast.prepared import PreparedIndex
from alexlab.data.index import Index
from alexlab.engine.config import is_address
from alexlab.engine.errors import UserError
from alexlab.engine.files import atomic_write
from alexlab.engine.storage import Bucket

START = 30.0  # seconds to wait for a server when a run starts
SPARE = 1 << 30  # bytes of the disk that stay free without `disk_cache_gb`
# A shard is read by several requests at once: with one, those for single images would take the whole link.
PIECE, PIECES = 512 << 10, 24
HEAD_START = 0.5  # seconds that the first batch has the link for itself
HELD = 256  # images that were read ahead and that a thread may keep: an image may occur twice in a batch
FILES = 256  # incomplete shards at once, each of which is an open file
TRIES = 3  # of reading bytes with the right checksum


class PreparedImages(ImageFolders):
    """The class of data=prepared: what `alexlab prepare` has written, in a folder or in a bucket.

    Args:
        disk_cache: the folder for shards of a bucket; each set has a folder in it.
        disk_cache_gb: the most GB in `disk_cache`, over all sets; None is what the disk has room for.
    """

    def __init__(
        self, root: str, *args: Any, disk_cache: str = "data/cache", disk_cache_gb: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(root, *args, **kwargs)
        if disk_cache_gb is not None and not (type(disk_cache_gb) in (int, float) and disk_cache_gb > 0):
            raise UserError(f"`data.disk_cache_gb={disk_cache_gb}` must be a number above 0, or null.")
        if is_address(disk_cache):
            raise UserError(f"`data.disk_cache={disk_cache}` must be a folder of this machine, no address.")
        self.address = root if is_address(root) else None
        if self.address is not None:
            self.root = self.address  # type: ignore[assignment]  # a Path would have one slash
        self.disk_cache, self.disk_cache_gb = Path(disk_cache), disk_cache_gb

    def read(self) -> "PreparedImages":
        if self.address is None and self.root.is_dir() and not prepared.is_prepared(self.root):
            raise UserError(
                f"`data.root={self.root}` has no {prepared.ABOUT}: give what alexlab prepare data.root={self.root} "
                "out=PATH has written, or use data=folder."
            )
        super().read()
        return self

    def read_prepared(self) -> Mapping[str, Index] | None:
        if self.address is None:
            return super().read_prepared()
        limit = None if self.disk_cache_gb is None else int(self.disk_cache_gb * 1e9)
        return read(self.address, self.disk_cache, limit, self.timeout)


def read(address: str, cache: Path, limit: int | None, patience: float | None) -> dict[str, "RemoteIndex"]:
    """Read the splits of a prepared set in a bucket. `limit` is that of `ShardCache`, `patience` that of `Bucket`.

    Raises:
        UserError: the address has no prepared set, a file is damaged, or the server does not answer.
    """
    # a mistake in the address is answered soon, and a server that breaks down during the training is waited for
    first = Bucket(address, None if patience is None else min(patience, START))
    try:
        text = first.read(prepared.ABOUT)
    except FileNotFoundError:
        first.list()  # finds a bucket that does not exist
        raise UserError(
            f"`data.root={address}` contains no {prepared.ABOUT}: write it with alexlab prepare out={address}."
        ) from None
    folder = cache / hashlib.sha256(address.encode() + text).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / prepared.ABOUT).is_file():
            with atomic_write(folder / prepared.ABOUT, sync=True) as file:
                file.write(text)
        content = prepared.about(folder)
        names = [*content["splits"], *(each["file"] for part in content["splits"].values() for each in part["shards"])]
        if strange := [name for name in names if not re.fullmatch(r"[\w-]+(\.shard)?", name)]:  # it would be a path
            raise UserError(
                f"{first.path(prepared.ABOUT)} has the name {strange[0]!r}: `alexlab prepare` writes none such."
            )
        with one_process(folder, ".lock"):  # on this machine
            for split, part in content["splits"].items():
                download_arrays(first, folder / f"{split}.npz", part.get("arrays"))
    except OSError as error:
        raise UserError(
            f"`data.disk_cache={cache}` cannot be written ({error.strerror}): choose another folder."
        ) from None
    shards = {each["file"]: each for part in content["splits"].values() for each in part["shards"]}
    held = ShardCache(Bucket(address, patience), folder, shards, limit)
    splits = {}
    for split, part in content["splits"].items():
        files = tuple(folder / each["file"] for each in part["shards"])
        splits[split] = RemoteIndex(**prepared.fields(folder, content, split), files=files, cache=held)
    return splits


@contextmanager
def one_process(folder: Path, name: str) -> Iterator[None]:
    """Let one process of this machine at a time run this block."""
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def download_arrays(bucket: Bucket, path: Path, entry: dict[str, Any] | None) -> None:
    """Download SPLIT.npz, if this machine does not have it yet."""
    if entry is None:
        raise UserError(
            f"{bucket.address} was prepared by an earlier version, without the checksums that reading from a bucket "
            "needs: prepare the images again."
        )
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]:
        return
    for _ in range(TRIES):
        try:
            content = bucket.read(path.name)
        except FileNotFoundError:
            break
        if hashlib.sha256(content).hexdigest() == entry["sha256"]:
            with atomic_write(path, sync=True) as file:
                file.write(content)
            return
    raise UserError(f"{bucket.path(path.name)} is missing or damaged: run alexlab prepare out={bucket.address} again.")


@dataclass(frozen=True)
class RemoteIndex(PreparedIndex):
    """The images of one split in a bucket. `cache` downloads the shards, `files` is where they then are."""

    cache: "ShardCache" = field(kw_only=True, repr=False)

    def path(self, i: int) -> str:
        shard = self.files[self.arrays["shards"][i]].name
        return f"{self.cache.bucket.path(shard)}:{os.fsdecode(self.name(i))}"

    def ahead(self, indices: np.ndarray) -> None:
        """Ask for the images that are not on this machine, all at once. `picture` of this thread then returns them."""
        far = [i for i in indices.tolist() if not self._is_here(int(self.arrays["shards"][i]))]
        self.cache.read_ahead([self._part(i) for i in far])

    def picture(self, i: int) -> decode.AnyPicture:
        shard, part = int(self.arrays["shards"][i]), self._part(i)
        if self._is_here(shard):
            if self.format != "jpeg":
                return super().picture(i)
            content = os.pread(self._files[shard], part[2], part[1])
            if zlib.crc32(content) == part[3]:
                return decode.Picture(content)
            self._files.pop(shard, None)  # not closed, because other threads may read it just now
            self.files[shard].unlink(missing_ok=True)  # the disk has changed it: fetched again
        content = self.cache.read(part)
        if self.format == "jpeg":
            return decode.Picture(content)
        return decode.Pixels(np.frombuffer(bytearray(content), np.uint8).reshape(self.shape(i)))

    def copy(self, indices: np.ndarray, out: Tensor) -> None:
        if all(self._is_here(shard) for shard in set(self.arrays["shards"][indices].tolist())):
            super().copy(indices, out)
            return
        self.ahead(indices)
        for i, row in zip(indices.tolist(), out, strict=True):
            picture = self.picture(i)
            assert isinstance(picture, decode.Pixels)
            row.copy_(torch.from_numpy(picture.array))

    def _part(self, i: int) -> "Part":
        shard, offset, size = (int(self.arrays[key][i]) for key in ("shards", "offsets", "sizes"))
        return self.files[shard].name, offset, size, int(self.arrays[prepared.CRCS][i])

    def _is_here(self, shard: int) -> bool:
        if shard not in self._files:
            file = self.cache.open(self.files[shard].name)
            if file is None:
                return False
            self._files[shard] = file
        return True


Part = tuple[str, int, int, int]  # shard, offset and size in bytes, CRC-32


@dataclass(eq=False)
class ShardCache:
    """Downloads shards of a set, and reads single images of those that are not here yet.

    Only one process of a machine downloads shards: the one that holds a lock. It stays within `limit`: shards of other
    sets that were opened the longest time ago are removed for new ones. Those of this set are not, because in each
    epoch all are needed: what does not fit continues to be read by ranges.

    While this process holds the lock, it writes the images that it reads by ranges into their shard's `PartialShard`.
    """

    bucket: Bucket
    folder: Path  # of the set
    shards: dict[str, Any]  # name -> {"bytes", "sha256"}, as in prepared.json
    limit: int | None  # bytes in the parent of `folder`; None is what the disk has room for

    def __post_init__(self) -> None:
        self.shards_of = Bucket(self.bucket.address, self.bucket.patience)  # which has connections of its own
        self.missed: Counter[str] = Counter()  # images that were needed, by shard
        self.given_up: set[str] = set()
        self.partial: dict[str, PartialShard | None] = {}  # by name; None while a shard with all bytes is checked
        self._collects = False  # whether this process holds the lock, and the disk had room for the last shard
        self._changing = threading.Lock()
        self._is_fetching = False
        self._of_thread = threading.local()
        atexit.register(self._leave)

    def open(self, name: str) -> int | None:
        """Open a shard; None if it is not on this machine."""
        path = self.folder / name
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != self.shards[name]["bytes"]:  # damaged: fetched again
            os.close(file)
            path.unlink(missing_ok=True)
            return None
        fcntl.flock(file, fcntl.LOCK_SH)  # as long as it is open, `_make_room` of no process removes it
        with suppress(OSError):
            os.utime(path)  # the time of use
        return file

    def read_ahead(self, parts: list[Part]) -> None:
        """Read images for this thread, all at once."""
        held: dict[Part, bytes | None] = getattr(self._of_thread, "contents", {})
        if len(held) > HELD:
            held = {}
        held |= {part: content for part in parts if part not in held and (content := self._read_part(part)) is not None}
        wanted = [part for part in dict.fromkeys(parts) if part not in held]
        if wanted:
            contents = self.bucket.read_ranges([part[:3] for part in wanted])
            held |= dict(zip(wanted, contents, strict=True))
            self._miss(wanted)
        self._of_thread.contents = held

    def read(self, part: Part) -> bytes:
        """Return the bytes of an image. Raises OSError if they are not those that were written."""
        name, offset, size, crc = part
        content = getattr(self._of_thread, "contents", {}).get(part)
        if content is None:
            self._miss([part])
        for _ in range(TRIES):
            if content is None:
                content = self.bucket.read_range(name, offset, size)
            if zlib.crc32(content) == crc:
                self._write_part(name, offset, content)
                return content
            content = None
        raise OSError("its bytes in the bucket are not those that were written")

    # -- parts of shards

    def _write_part(self, name: str, offset: int, content: bytes) -> None:
        """Write an image into the file of its shard, if this process completes the shard and the disk has room."""
        with self._changing, suppress(OSError):  # a full disk: the thread that completes the shard warns of it
            partial = self.partial.get(name) or (self._begin(name) if self._collects else None)
            if partial is not None and not partial.has(offset, len(content)):
                partial.write(content, offset)

    def _read_part(self, part: Part) -> bytes | None:
        """Return an image of a shard that is not complete, None if its bytes are missing. `read` checks them."""
        name, offset, size, _ = part
        with self._changing, suppress(OSError):
            partial = self.partial.get(name)
            if partial is not None and partial.has(offset, size):
                return os.pread(partial.file, size, offset)
        return None

    def _begin(self, name: str) -> "PartialShard | None":
        """Create the file of a shard; None if one exists, or without room. The caller holds `_changing`."""
        if name in self.partial or name in self.given_up or (self.folder / name).exists():
            return None
        if len(self.partial) >= FILES:
            return None
        if not self._make_room(self.shards[name]["bytes"]):
            self._collects = False
            return None
        path = self.folder / f".{name}.{os.getpid()}.tmp"
        partial = PartialShard(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))
        fcntl.flock(partial.file, fcntl.LOCK_SH)  # `_make_room` removes the file if this process is killed
        os.truncate(partial.file, self.shards[name]["bytes"])  # which `_make_room` of other processes counts
        self.partial[name] = partial
        return partial

    # -- whole shards

    def _miss(self, parts: list[Part]) -> None:
        with self._changing:
            self.missed.update(part[0] for part in parts)
            if not self._is_fetching:
                self._is_fetching = True
                threading.Thread(target=self._fetch_all, name="alexlab fetcher", daemon=True).start()

    def _next(self) -> str | None:
        """Return the missing shard from which most images were needed, partial ones first; None if none is missing."""
        with self._changing:
            for name, _ in sorted(self.missed.most_common(), key=lambda each: each[0] not in self.partial):
                if name not in self.given_up and not (self.folder / name).exists():
                    return name
            self._is_fetching = self._collects = False
            return None

    def _fetch_all(self) -> None:
        try:
            with one_process(self.folder, ".fetching"):
                try:
                    self._complete_all()
                finally:
                    with self._changing:
                        self._collects = False
                        for partial in filter(None, self.partial.values()):
                            partial.remove()
                        self.partial.clear()
        except UserError as error:
            warn(f"no more shards are downloaded: {error}")
        except OSError as error:
            what = error.strerror or error
            warn(f"`data.disk_cache={self.folder.parent}`: {what}: other images are read from the bucket in each epoch")

    def _complete_all(self) -> None:
        for left in self.folder.glob(".*.shard.*.tmp"):  # by a process that was killed
            left.unlink()
        self._collects = True
        time.sleep(HEAD_START)
        while (name := self._next()) is not None:
            with self._changing:
                partial = self.partial.get(name) or self._begin(name)
            if partial is None:
                limit = "" if self.limit is None else f" within disk_cache_gb={self.limit / 1e9:g}"
                raise OSError(f"no room for further shards{limit}")
            self._complete(name, partial)

    def _complete(self, name: str, partial: "PartialShard") -> None:
        """Download the missing bytes of a shard; warn if the shard in the bucket is missing or damaged."""
        try:
            for _ in range(TRIES):
                while gaps := self._gaps(name, partial):
                    if self.limit is None and shutil.disk_usage(self.folder).free < SPARE:  # others write to it, too
                        raise OSError(f"less than {SPARE / 1e9:.0f} GB of the disk are free")
                    for gap, content in zip(gaps, self.shards_of.read_ranges(gaps), strict=True):
                        if content is None or len(content) < gap[2]:
                            raise FileNotFoundError
                        with self._changing:
                            partial.write(content, gap[1])
                with partial.path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest == self.shards[name]["sha256"]:
                    os.fsync(partial.file)
                    partial.path.replace(self.folder / name)
                    return
                partial.parts.clear()  # each byte again
            raise FileNotFoundError
        except FileNotFoundError:
            self.given_up.add(name)
            warn(f"{self.bucket.path(name)} is missing or damaged: its images are read one by one.")
        finally:
            with self._changing:
                del self.partial[name]
                partial.remove()

    def _gaps(self, name: str, partial: "PartialShard") -> list[tuple[str, int, int]]:
        """Return the next bytes that a shard lacks, as `Bucket.read_ranges` takes them."""
        with self._changing:
            gaps = list(itertools.islice(partial.gaps(self.shards[name]["bytes"]), PIECES))
            self.partial[name] = partial if gaps else None  # without gaps, this thread alone writes
            return [(name, *gap) for gap in gaps]

    def _leave(self) -> None:
        """Remove incomplete shards at the end of the process. The lock stays locked, so that no thread writes more."""
        self._changing.acquire()
        for partial in filter(None, self.partial.values()):
            partial.path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Remove shards of other sets, as far as `size` bytes more need it; False if that is not enough."""
        held: dict[Path, os.stat_result] = {}
        for path in self.folder.parent.glob("*/.*.shard.*.tmp" if self.limit is None else "*/*.shard*"):
            with suppress(FileNotFoundError):
                held[path] = path.stat()
        if self.limit is None:
            missing = sum(max(0, each.st_size - 512 * each.st_blocks) for each in held.values())  # not written yet
            return shutil.disk_usage(self.folder).free > size + missing + SPARE
        total = sum(each.st_size for each in held.values())
        old = [path for path in held if path.parent != self.folder]
        for path in sorted(old, key=lambda each: held[each].st_mtime):
            if total + size > self.limit and is_unused(path):
                path.unlink(missing_ok=True)
                total -= held[path].st_size
        return total + size <= self.limit


@dataclass(eq=False)
class PartialShard:
    """A file with some bytes of a shard, and holes for the remaining ones."""

    path: Path
    file: int  # its descriptor
    # sorted (start, end) of the bytes that are written, none of which touch
    parts: list[tuple[int, int]] = field(default_factory=list)

    def has(self, offset: int, size: int) -> bool:
        at = bisect.bisect_right(self.parts, offset, key=itemgetter(0)) - 1
        return at >= 0 and self.parts[at][1] >= offset + size

    def gaps(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield where bytes are missing in a shard of `size` bytes, as (offset, size) of at most PIECE bytes."""
        position = 0
        for start, end in itertools.chain(self.parts, [(size, size)]):
            yield from ((each, min(PIECE, start - each)) for each in range(position, start, PIECE))
            position = end

    def write(self, content: bytes, offset: int) -> None:
        start, end = offset, offset + len(content)
        while offset < end:
            offset += os.pwrite(self.file, content[offset - start :], offset)
        first = bisect.bisect_left(self.parts, start, key=itemgetter(1))  # the parts that it touches become one
        last = bisect.bisect_right(self.parts, end, key=itemgetter(0))
        touched = [*self.parts[first:last], (start, end)]
        self.parts[first:last] = [(min(touched)[0], max(part[1] for part in touched))]

    def remove(self) -> None:
        os.close(self.file)
        self.path.unlink(missing_ok=True)


def is_unused(path: Path) -> bool:
    """Check whether no process reads a shard."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
