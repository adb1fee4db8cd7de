"""`alexlab prepare`: write a compact copy of a folder of images, from which training reads fast.

Images are read, resized and written into shards, in the order of the index. Each shard is written to a temporary path
and renamed once it is complete, so that a preparation that was killed continues after the last complete shard.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
import torch

from alexlab.data import decode
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fast import prepared
from alexlab.data.fast.prepared import CRCS
from alexlab.data.fingerprint import changed_splits
from alexlab.data.folder import reported
from alexlab.data.index import Index
from alexlab.data.items import columns_of
from alexlab.data.reader_threads import ReaderThreads
from alexlab.data.sources import build_data, need_index
from alexlab.data.transforms import SampleTransform
from alexlab.engine import run_dir as rundir
from alexlab.engine.config import is_address
from alexlab.engine.errors import RunFailedError, UserError, counted
from alexlab.engine.files import atomic_write, remove_temporary
from alexlab.engine.overrides import command_line
from alexlab.engine.process import cores
from alexlab.engine.schema import PrepareConfig
from alexlab.engine.storage import PART, Bucket

T = TypeVar("T")

IS_PREPARED = "is a prepared set: give the folder of the images that it was made from."
PARTS = ".parts"  # the folder with the state of an unfinished preparation
SHOWN = 10  # broken files that are printed; prepared.json lists all
COLUMNS = ("shards", "offsets", "sizes", "heights", "widths", "source_heights", "source_widths", "lengths")


class Recipe(NamedTuple):
    """How images are written."""

    format: str  # "jpeg" or "raw"
    short_side: int  # of the results in pixels; smaller images keep their size
    quality: int  # of JPEGs, 1 to 100
    square: bool  # crop the middle square


class Converted(NamedTuple):
    """A converted image, or the reason why it could not be converted."""

    content: bytes = b""  # JPEG, or uint8 rows of RGB
    size: tuple[int, int] = (0, 0)  # (height, width)
    source_size: tuple[int, int] = (0, 0)
    broken: str | None = None  # the path and what is wrong with it


def prepare(config: PrepareConfig) -> None:
    """Write the images of `config.data` into `config.out`. Continues an unfinished copy, checks a complete one.

    With `config.stats`, print mean and std of the training images, and write nothing if `out` is null.

    Raises:
        UserError: no image of a split can be read, or `out` contains something else.
        RunFailedError: some images were broken and skipped, or a shard has changed since it was written.
    """
    if config.out is None and not config.stats:
        raise UserError("`out` is missing: give a new folder with out=PATH.")
    if is_address(config.data.root):
        raise UserError(f"data.root={config.data.root} {IS_PREPARED}")
    transform, threads = SampleTransform(config.short_side), config.num_workers or cores()
    facts: Any = {"seed": config.seed, "train_transform": transform, "eval_transform": transform, "world_size": 1}
    data = need_index(build_data(config.data, facts, trusted=None), "prepare")
    root = data.root = data.root.expanduser().resolve() if config.data.root else data.root
    if config.stats:
        print_stats(data.divide()["train"], config.short_side, threads)
    if config.out is None:
        return
    bucket, out = None, Path(config.out).expanduser().resolve()
    if is_address(config.out):  # shards are written to a folder of this machine, and removed when they have arrived
        name = hashlib.sha256(config.out.encode()).hexdigest()[:16]
        bucket, out = Bucket(config.out), Path(config.paths.data, ".prepare", name)
    if prepared.is_prepared(root):
        raise UserError(f"data.root={root} {IS_PREPARED}")
    if out == root or out.is_relative_to(root):
        raise UserError(f"out={out} is within data.root={root}, where nothing is written: choose another folder.")
    recipe = Recipe(config.format, config.short_side, config.quality, config.square)
    dataset = data.read().describe()
    job = {  # two preparations with the same job write the same bytes
        "format": recipe.format,
        "recipe": recipe._asdict(),
        "shard_mb": config.shard_mb,
        "classes": list(data.classes),
        "readable_classes": data.readable_classes,
        "source": {key: dataset[key] for key in ("images", "fingerprint", "names_fingerprint")},
    }
    check_out(out, job)
    if prepared.is_prepared(out):
        check_shards(out)
        return
    if bucket is not None and is_there(bucket, job, is_new=not out.exists()):
        return
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    remove_temporary(out)
    rundir.write_json(out / PARTS / "job.json", job)
    start, splits, broken = time.monotonic(), {}, dict[str, str]()
    for split, index in data.splits.items():
        shard_bytes = round(config.shard_mb * 1e6)
        splits[split], errors = write_split(out, split, index, recipe, shard_bytes, threads, bucket)
        broken |= errors
        if not splits[split]["images"]:
            raise UserError(f"no image of {split} could be read, such as {next(iter(errors.values()))}.")
    about = {"version": prepared.VERSION, **job, "splits": splits, "broken": broken}
    if bucket is None:
        rundir.write_json(out / prepared.ABOUT, about)
        shutil.rmtree(out / PARTS)
    else:
        bucket.write(prepared.ABOUT, json.dumps(about, indent=2).encode())
        shutil.rmtree(out)
    report(rundir.shown(out) if bucket is None else config.out, about, data, time.monotonic() - start)
    if broken:
        lines = "\n  ".join(list(broken.values())[:SHOWN])
        raise RunFailedError(
            f"{counted(len(broken), 'image')} could not be read ({prepared.ABOUT} lists all). The copy can be used "
            f"without them. To have them, replace the files and prepare again:\n  {lines}",
            1,
        )


def check_out(out: Path, job: dict[str, Any]) -> None:
    """Raise UserError if `out` contains anything but the result or a part of the same job."""
    path = out / prepared.ABOUT if prepared.is_prepared(out) else out / PARTS / "job.json"
    if path.is_file():
        compare_jobs(out, json.loads(path.read_text(encoding="utf-8")), job)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not a preparation: choose a new folder.")


def compare_jobs(out: Path | str, before: dict[str, Any], job: dict[str, Any]) -> None:
    """Raise UserError if what is in `out` was prepared from different images, or in another way."""
    differ = [key for key in job if key != "source" and before.get(key) != job[key]]
    if changed_splits(before["source"], job["source"]):
        differ.append("source")
    if differ:
        raise UserError(
            f"out={out} was prepared from different images or in a different way ({', '.join(differ)}): remove it, or "
            "choose another folder with out=PATH."
        )


def is_there(bucket: Bucket, job: dict[str, Any], is_new: bool) -> bool:
    """Check whether a bucket has the result of this job; then the shards are compared with their checksums.

    If `is_new`, no preparation of this machine is to be continued.

    Raises:
        UserError: the address has something else.
        RunFailedError: a shard has changed since it was written.
    """
    objects = bucket.list()
    if prepared.ABOUT not in objects:
        if objects and is_new:
            raise UserError(
                f"out={bucket.address} has objects, such as {next(iter(objects))}, and no {prepared.ABOUT}: choose "
                "another address, or remove them. A preparation continues on the machine where it began."
            )
        return False
    about = json.loads(bucket.read(prepared.ABOUT))
    compare_jobs(bucket.address, about, job)

    def hash_of(shard: dict[str, Any]) -> str:
        digest = hashlib.sha256()
        with contextlib.suppress(FileNotFoundError):  # it is lost
            for start in range(0, shard["bytes"], PART):
                digest.update(bucket.read_range(shard["file"], start, PART))
        return digest.hexdigest()

    compare_shards(bucket.address, about, hash_of)
    return True


def check_shards(out: Path) -> None:
    """Compare the shards of a prepared folder with their checksums; RunFailedError if one has changed."""
    prepared.read(out)

    def hash_of(shard: dict[str, Any]) -> str:
        with (out / shard["file"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    compare_shards(rundir.shown(out), prepared.about(out), hash_of)


def compare_shards(out: str, about: dict[str, Any], hash_of: Callable[[dict[str, Any]], str]) -> None:
    """Print that a prepared set is complete; RunFailedError if a shard has another hash than in prepared.json."""
    for part in about["splits"].values():
        for shard in part["shards"]:
            if hash_of(shard) != shard["sha256"]:
                changed = f"{out}/{shard['file']} has changed since it was written"
                raise RunFailedError(f"{changed}: remove {out} and prepare it again.", 1)
    images = ", ".join(f"{split} {part['images']:,}" for split, part in about["splits"].items())
    print(f"{out} is complete, and the checksums are right: {images} images.", flush=True)


# -- shards


def write_split(
    out: Path, split: str, index: Index, recipe: Recipe, shard_bytes: int, threads: int, bucket: Bucket | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the shards that do not exist yet, and send each to `bucket`, if one is given.

    Returns the split's entry of prepared.json, and the broken files.
    """

    def send(name: str) -> None:
        if bucket is not None and (out / name).exists():
            bucket.write(name, out / name)
            (out / name).unlink()

    parts: list[dict[str, np.ndarray]] = []
    shards: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    done = 0
    while (path := out / PARTS / f"{split}-{len(parts):05d}.json").is_file():
        state = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            parts.append({key: arrays[key] for key in arrays.files})
        shards.append(state["shard"])
        send(state["shard"]["file"])
        broken |= state["broken"]
        done = state["next"]
    if done:
        print(f"{split}: continuing after {done:,} of {len(index):,} images", flush=True)
    with ReaderThreads(threads) as pool:
        converted = in_order(pool, partial(convert, index, recipe), range(done, len(index)), 4 * threads)
        images = reported(converted, split, f"of {len(index) - done:,} images")
        while done < len(index):
            shard, part, errors, done = write_shard(out, split, len(parts), index, images, done, shard_bytes)
            state = {"shard": shard, "broken": errors, "next": done}
            rundir.write_json(out / PARTS / f"{split}-{len(parts):05d}.json", state)
            parts.append(part)
            shards.append(shard)
            send(shard["file"])
            broken |= errors
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    joined["ends"] = np.cumsum(joined.pop("lengths"))
    buffer = io.BytesIO()
    np.savez(buffer, **joined)  # type: ignore[arg-type]
    with atomic_write(out / f"{split}.npz") as file:
        file.write(buffer.getvalue())
    send(f"{split}.npz")
    entry: dict[str, Any] = {"images": len(joined["targets"]), "shards": [s for s in shards if s["bytes"]]}
    entry["arrays"] = {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    return entry, broken


def in_order(pool: ReaderThreads, function: Callable[[int], T], numbers: range, ahead: int) -> Iterator[T]:
    """Yield `function` of each number, which the threads call for at most `ahead` numbers in advance."""
    waiting: deque[Future[T]] = deque()
    for i in numbers:
        waiting.append(pool.submit(function, i))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_shard(
    out: Path, split: str, number: int, index: Index, images: Iterator[Converted], first: int, max_bytes: int
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str], int]:
    """Write one shard from image `first` on; return the shard's entry and arrays, broken files and the next image."""
    name = f"{split}-{number:05d}.shard"
    digest, written, i = hashlib.sha256(), 0, first
    rows: list[tuple[int, ...]] = []
    crcs: list[int] = []
    written_images: list[int] = []
    names, broken = bytearray(), dict[str, str]()
    tmp_path = out / PARTS / name
    with tmp_path.open("wb") as file:
        for image in images:
            if image.broken is not None:
                broken[index.path(i)] = image.broken
            else:
                file.write(image.content)
                digest.update(image.content)
                source, size = index.name(i), len(image.content)
                names += source
                rows.append((number, written, size, *image.size, *image.source_size, len(source)))
                crcs.append(zlib.crc32(image.content))
                written_images.append(i)
                written += size
            i += 1
            if written >= max_bytes:
                break
        file.flush()
        os.fsync(file.fileno())
    columns = np.array(rows, np.int64).reshape(-1, len(COLUMNS)).T
    part = dict(zip(COLUMNS, columns, strict=True)) | {"names": np.frombuffer(bytes(names), np.uint8)}
    part[CRCS] = np.array(crcs, np.uint32)
    numbers = np.array(written_images, np.int64)
    part |= {"targets": index.targets[numbers], **columns_of(index, numbers)}
    with atomic_write(out / PARTS / f"{split}-{number:05d}.npz", sync=True) as file:
        np.savez(file, **part)  # type: ignore[arg-type]
    if written:
        tmp_path.replace(out / name)
    return {"file": name, "bytes": written, "sha256": digest.hexdigest()}, part, broken, i


def convert(index: Index, recipe: Recipe, i: int) -> Converted:
    """Convert image i."""
    try:
        picture = index.picture(i)
        width, height = picture.size
        size, _, result = fit(width, height, recipe)
        jpeg = isinstance(picture, decode.Picture) and picture.orientation == 1 and picture.jpeg
        if recipe.format == "jpeg" and size == result == (height, width) and jpeg:
            picture.pixels()  # fails if it is not complete
            return Converted(jpeg, result, (height, width))
        pixels = resized(picture, recipe).permute(1, 2, 0).numpy()
    except OSError as error:
        return Converted(broken=decode.BrokenImageError(index.path(i), error).reason)
    if recipe.format == "jpeg":
        return Converted(simplejpeg.encode_jpeg(pixels, recipe.quality, "RGB", "420"), result, (height, width))
    return Converted(pixels.tobytes(), result, (height, width))


def resized(picture: decode.AnyPicture, recipe: Recipe, channels: int = 3) -> torch.Tensor:
    """Return the image as the recipe says: uint8 (channels, height, width)."""
    width, height = picture.size
    size, at, result = fit(width, height, recipe)
    out = torch.empty((1, *result, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    decode.crop_resize(picture, (0, 0, width, height), size, at, out)
    return out[0]


def fit(width: int, height: int, recipe: Recipe) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return (height, width) that an image is resized to, and (top, left) and (height, width) of the crop of that."""
    short = min(width, height, recipe.short_side)
    if recipe.square and recipe.format == "raw":
        short = recipe.short_side  # all images of one size
    size = (short, max(1, short * width // height)) if height <= width else (max(1, short * height // width), short)
    if not recipe.square:
        return size, (0, 0), size
    return size, (round((size[0] - short) / 2), round((size[1] - short) / 2)), (short, short)


# -- mean and std of the channels


def print_stats(index: Index, short_side: int, threads: int) -> None:
    """Print mean and std of each channel on a 0-1 scale, over the pixels of all images; each image counts alike.

    Images are resized as in a preparation, because resizing makes the std smaller. The channels are RGB if the images
    can be read so.

    Raises:
        UserError: all images are broken, or a channel has the same value everywhere.
    """
    channels, recipe = 3 if 3 in index.channels else index.channels[0], Recipe("raw", short_side, 0, square=False)

    def moments(i: int) -> np.ndarray | None:
        """Return the mean of the values and of their squares, (2, channels)."""
        try:
            pixels = resized(index.picture(i), recipe, channels).double().flatten(1) / 255
        except OSError:
            return None
        return torch.stack([pixels.mean(1), pixels.square().mean(1)]).numpy()

    count, total = 0, np.zeros((2, channels))
    with ReaderThreads(threads) as pool:
        parts = in_order(pool, moments, range(len(index)), 4 * threads)
        for part in reported(parts, "statistics", f"of {len(index):,} images"):
            if part is not None:
                count, total = count + 1, total + part
    if not count:
        raise UserError(f"no training image could be read, such as {index.path(0)}.")
    mean, squares = total / count
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    words = [f"model.{key}=[{','.join(f'{x:.4f}' for x in each)}]" for key, each in (("mean", mean), ("std", std))]
    if std.min() < 0.00005:
        raise UserError(f"{words[1]} must be above 0: all pixels of the training images have the same value.")
    print(f"mean and std of {count:,} training images: '{words[0]}' '{words[1]}'", flush=True)


def report(out: str, about: dict[str, Any], data: ImageFolders, seconds: float) -> None:
    """Print the numbers of images, unused files and classes without images, the size and the speed."""
    for line in data.notes():
        print(f"note: {line}")
    parts = about["splits"]
    for split, part in parts.items():
        shards = counted(len(part["shards"]), "shard")
        print(f"{split}: {part['images']:,} of {len(data.splits[split]):,} images in {shards}")
    size = sum(shard["bytes"] for part in parts.values() for shard in part["shards"])
    images = sum(part["images"] for part in parts.values())
    print(f"{size / 1e6:,.1f} MB, {images / seconds:,.0f} images/s")
    print("train with it:", command_line("train", "data=prepared", f"data.root={out}"), flush=True)
