"""A folder of images -> a compact copy that trains fast: the task of prepare.py.

Images are read, scaled down and written in the index's order into shards. A shard is written beside its place and
renamed with its arrays, so that a killed preparation goes on after the last whole one.
"""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from alexlab.data import decode
from alexlab.data.datamodule import ImageFolders, Index, cores
from alexlab.data.fast import prepared
from alexlab.data.fast.prepared import PreparedIndex
from alexlab.data.loader import decoding_threads
from alexlab.data.transforms import SampleTransform
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import RunFailedError, UserError

PARTS = ".parts"  # the folder of what a preparation has done so far
SHOWN = 10  # broken files told on the screen; prepared.json has all
TELL = 10.0  # seconds between what a long preparation tells without a terminal


class Recipe(NamedTuple):
    """How images are written.

    Attributes:
        format: "jpeg" or "raw".
        short_side: of the results in pixels; smaller images stay as they are.
        quality: of JPEGs, 1 to 100.
        square: keep the middle square alone.
    """

    format: str
    short_side: int
    quality: int
    square: bool


class Image(NamedTuple):
    """An image as it is written, or why it is not."""

    content: bytes = b""
    height: int = 0
    width: int = 0
    source: tuple[int, int] = (0, 0)  # height, width
    broken: str | None = None


def prepare(config: DictConfig) -> None:
    """Write `config.out` from `config.data.root`, or go on with it.

    Raises:
        UserError: images that cannot be read, or a folder that holds something else.
        RunFailedError: some images were broken; the others are written.
    """
    root, out = Path(config.data.root).expanduser().resolve(), Path(config.out).expanduser().resolve()
    recipe = Recipe(config.format, config.short_side, config.quality, config.square)
    if prepared.is_prepared(root):
        raise UserError(f"data.root={root} is a prepared folder already: give the images that it was made from.")
    if out == root or out.is_relative_to(root):
        raise UserError(f"out={out} lies within data.root={root}, which is left as it is: choose another place.")
    data = read_folder(config, root)
    job = describe(config, data, recipe)
    start_or_go_on(out, job)
    if prepared.is_prepared(out):
        check_whole(out)
        return
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    rundir.write_json(out / PARTS / "job.json", job)
    began, splits, broken = time.monotonic(), {}, dict[str, str]()
    threads = cores() if config.num_workers is None else max(1, config.num_workers)
    for split, index in data.splits.items():
        splits[split], gone = write_split(out, split, index, recipe, round(config.shard_mb * 1e6), threads)
        broken |= gone
    for split, part in splits.items():
        if not part["images"]:
            raise UserError(f"no image of {split} could be read, such as {next(iter(broken.values()))}.")
    told = {"version": prepared.VERSION, **job, "splits": splits, "broken": broken}
    rundir.write_json(out / prepared.ABOUT, told)
    for left in (out / PARTS).iterdir():
        left.unlink()
    (out / PARTS).rmdir()
    show(out, told, data, time.monotonic() - began)
    if broken:
        listed = "\n  ".join(list(broken.values())[:SHOWN])
        more = f"\n  ... ({len(broken) - SHOWN} more, all in {out / prepared.ABOUT})" if len(broken) > SHOWN else ""
        raise RunFailedError(f"{len(broken)} images could not be read, and are left out:\n  {listed}{more}", 1)


def read_folder(config: DictConfig, root: Path) -> ImageFolders:
    plain = SampleTransform(config.short_side)
    return ImageFolders(
        root=str(root), batch_size=1, seed=config.seed, train_transform=plain, eval_transform=plain,
        val_fraction=config.data.val_fraction, test_fraction=config.data.test_fraction,
        class_names=config.data.class_names,
    ).read()  # fmt: skip


def describe(config: DictConfig, data: ImageFolders, recipe: Recipe) -> dict[str, Any]:
    """What is to be done: two preparations that agree in it write the same bytes."""
    return {
        "format": recipe.format,
        "recipe": recipe._asdict(),
        "shard_mb": config.shard_mb,
        "classes": list(data.classes),
        "readable_classes": data.readable_classes,
        "source": {"images": data.images, "fingerprint": data.describe()["fingerprint"]},
    }


def start_or_go_on(out: Path, job: dict[str, Any]) -> None:
    """Raises UserError where `out` holds anything but a part of the same job."""
    found = out / prepared.ABOUT if prepared.is_prepared(out) else out / PARTS / "job.json"
    if found.is_file():
        before = json.loads(found.read_text(encoding="utf-8"))
        differ = [key for key in job if before.get(key) != job[key]]
        if differ:
            raise UserError(
                f"out={out} was prepared from other images or in another way ({', '.join(differ)}): remove it, or "
                "choose another out=PATH."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not a preparation: choose a new folder.")


def check_whole(out: Path) -> None:
    """Compare a prepared folder's shards with their checksums.

    Raises:
        RunFailedError: one is not as it was written.
    """
    told = prepared.about(out)
    prepared.read(out)
    for part in told["splits"].values():
        for shard in part["shards"]:
            with (out / shard["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise RunFailedError(
                        f"{out / shard['file']} is not as it was written: remove {out} and prepare it anew.", 1
                    )
    images = ", ".join(f"{split} {part['images']:,}" for split, part in told["splits"].items())
    print(f"{rundir.shown(out)} is whole, and its checksums are right: {images} images.", flush=True)


def write_split(
    out: Path, split: str, index: Index, recipe: Recipe, shard_bytes: int, threads: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the shards that are not there yet; returns what prepared.json says of the split, and the broken files."""
    parts: list[dict[str, np.ndarray]] = []
    shards: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    done = 0
    while (told := out / PARTS / f"{split}-{len(parts):05d}.json").is_file():
        state = json.loads(told.read_text(encoding="utf-8"))
        with np.load(told.with_suffix(".npz"), allow_pickle=False) as arrays:
            parts.append({key: arrays[key] for key in arrays.files})
        shards.append(state["shard"])
        broken |= state["broken"]
        done = state["next"]
    if done:
        print(f"{split}: going on after {done:,} of {len(index):,} images", flush=True)
    with decoding_threads(threads) as pool, Told(split, len(index), done) as advance:
        images = in_order(pool, index, recipe, done, 4 * threads)
        while done < len(index):
            shard, part, gone, done = write_shard(out, split, len(parts), index, images, done, shard_bytes, advance)
            rundir.write_json(
                out / PARTS / f"{split}-{len(parts):05d}.json", {"shard": shard, "broken": gone, "next": done}
            )
            parts.append(part)
            shards.append(shard)
            broken |= gone
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    joined["ends"] = np.cumsum(joined.pop("lengths"))
    beside = out / PARTS / f"{split}.npz"
    np.savez(beside, **joined)  # type: ignore[arg-type]
    beside.replace(out / f"{split}.npz")
    return {"images": len(joined["targets"]), "shards": [s for s in shards if s["bytes"]]}, broken


def in_order(pool: ThreadPoolExecutor, index: Index, recipe: Recipe, first: int, ahead: int) -> Iterator[Image]:
    waiting: deque[Future[Image]] = deque()
    for i in range(first, len(index)):
        waiting.append(pool.submit(convert, index, i, recipe))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_shard(
    out: Path, split: str, number: int, index: Index, images: Iterator[Image], first: int, most: int, advance: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str], int]:
    """One shard from image `first` on: what to say of it, its arrays, the broken files, and the next image."""
    name = f"{split}-{number:05d}.shard"
    digest, written, i = hashlib.sha256(), 0, first
    rows: list[tuple[int, ...]] = []
    names, broken = bytearray(), dict[str, str]()
    beside = out / PARTS / name
    with beside.open("wb") as file:
        for image in images:
            if image.broken is not None:
                broken[index.path(i)] = image.broken
            else:
                file.write(image.content)
                digest.update(image.content)
                source = index.name(i)
                names += source
                size = len(image.content)
                where = (int(index.targets[i]), number, written, size)
                rows.append((*where, image.height, image.width, *image.source, len(source)))
                written += size
            i += 1
            advance(i)
            if written >= most:
                break
        file.flush()
        os.fsync(file.fileno())
    columns = np.array(rows, np.int64).reshape(-1, 9).T
    keys = ("targets", "shards", "offsets", "sizes", "heights", "widths", "source_heights", "source_widths", "lengths")
    part = dict(zip(keys, columns, strict=True)) | {"names": np.frombuffer(bytes(names), np.uint8)}
    with (out / PARTS / f"{split}-{number:05d}.npz").open("wb") as file:
        np.savez(file, **part)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    if written:
        beside.replace(out / name)
    return {"file": name, "bytes": written, "sha256": digest.hexdigest()}, part, broken, i


def convert(index: Index, i: int, recipe: Recipe) -> Image:
    """Image i as it is written."""
    try:
        picture = index.picture(i)
        width, height = picture.size
        size, (top, left), kept = fitted(width, height, recipe)
        whole = (size, kept) == ((height, width), (height, width))
        jpeg = isinstance(picture, decode.Picture) and picture.orientation == 1 and picture.jpeg
        if recipe.format == "jpeg" and whole and jpeg:
            picture.pixels()  # whether it is whole
            return Image(jpeg, height, width, (height, width))
        out = torch.empty((1, *kept, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        decode.crop_resize(picture, (0, 0, width, height), size, (top, left), out)
    except OSError as error:
        return Image(broken=decode.BrokenImageError(index.path(i), error).what)
    pixels = out[0].permute(1, 2, 0).numpy()
    if recipe.format == "jpeg":
        content = simplejpeg.encode_jpeg(pixels, recipe.quality, "RGB", "420")
    else:
        content = pixels.tobytes()
    return Image(content, *kept, (height, width))


def fitted(width: int, height: int, recipe: Recipe) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(height, width) that an image is scaled to, (top, left) and (height, width) of what is kept of that."""
    short = min(width, height, recipe.short_side)
    if recipe.square and recipe.format == "raw":
        short = recipe.short_side  # all of one size
    size = (short, max(1, short * width // height)) if height <= width else (max(1, short * height // width), short)
    if not recipe.square:
        return size, (0, 0), size
    return size, (round((size[0] - short) / 2), round((size[1] - short) / 2)), (short, short)


class Told:
    """A bar on a terminal, else a line now and then; gives what to call with the number of images done."""

    def __init__(self, split: str, total: int, done: int) -> None:
        self.split, self.total, self.first, self.began = split, total, done, time.monotonic()
        self.told = self.began
        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Any:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(f"preparing {self.split}", total=self.total, completed=self.first)
        return self.advance

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            rate = (done - self.first) / (self.told - self.began)
            left = (self.total - done) / max(rate, 1e-9) / 60
            print(
                f"{self.split}: {done:,} of {self.total:,} images, {rate:,.0f}/s, {left:.0f} min to go",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def bytes_of(index: Index) -> int:
    if isinstance(index, PreparedIndex):  # of archives
        return int(index.arrays["sizes"].sum())
    return sum(Path(index.path(i)).stat().st_size for i in range(len(index)))


def show(out: Path, told: dict[str, Any], data: ImageFolders, seconds: float) -> None:
    """Counts, classes that a split lacks, and the space that is saved."""
    before = sum(bytes_of(index) for index in data.splits.values())
    after = sum(shard["bytes"] for part in told["splits"].values() for shard in part["shards"])
    print("".join(f"note: {line}\n" for line in data.left_out()), end="")
    for split, part in told["splits"].items():
        print(f"{split}: {part['images']:,} of {len(data.splits[split]):,} images in {len(part['shards'])} shards")
        with np.load(out / f"{split}.npz", allow_pickle=False) as arrays:
            missing = sorted(set(range(len(data.classes))) - set(np.unique(arrays["targets"]).tolist()))
        if missing:
            names = ", ".join(data.classes[k] for k in missing[:SHOWN])
            print(
                f"  without an image there: {names}{f', ... ({len(missing)} in all)' if len(missing) > SHOWN else ''}"
            )
    images = sum(part["images"] for part in told["splits"].values())
    print(
        f"{before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB ({after / max(before, 1):.2f}), {images / seconds:,.0f} "
        f"images/s\ntrain from it: python train.py data=prepared data.root={rundir.shown(out)}",
        flush=True,
    )  # fmt: skip
