"""What a run's network says of images: the task of predict.py."""

import csv
import glob
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

from alexlab.data import decode
from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import EXTENSIONS
from alexlab.data.loader import Loader
from alexlab.data.sampler import EvalBatchSampler
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import RunFailedError, UserError
from alexlab.engine.files import atomic_write
from alexlab.engine.process import cores
from alexlab.engine.schema import PredictConfig
from alexlab.tasks import load as loading

SHOWN = 10  # images in the table on the screen; the file has all


class Listed:
    """Images by their paths, whose classes are not known."""

    def __init__(self, paths: list[str]) -> None:
        self.paths, self.targets = paths, np.zeros(len(paths), np.int64)

    def path(self, i: int) -> str:
        return self.paths[i]

    def picture(self, i: int) -> decode.Picture:
        return decode.open_picture(self.paths[i])


def find_images(named: str) -> list[str]:
    """The image files that a file, a folder (at any depth) or a glob names, sorted.

    Raises:
        UserError: there are none.
    """
    place = Path(named).expanduser()
    if place.is_file():
        return [str(place)]
    pattern = f"{glob.escape(str(place))}/**/*" if place.is_dir() else str(place)
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())  # noqa: PTH207
    if place.is_dir():
        found = [path for path in found if path.lower().endswith(EXTENSIONS)]
    if not found:
        raise UserError(f"images={named}: no image is there; give a file, a folder or a quoted glob ('photos/*.jpg').")
    return found


def shown(path: str) -> str:
    """As `rundir.shown`; bytes that are no text, as names may hold, are shown as question marks."""
    return os.fsencode(rundir.shown(Path(path))).decode(errors="replace")


def predict(config: PredictConfig) -> None:
    """Write a line a class of the `config.topk` most probable ones of each image, and show the first images' best.

    Raises:
        UserError: no such run, or no images.
        RunFailedError: some could not be read; the others are written.
    """
    logs = Path(config.paths.logs)
    run_dir = rundir.find_run(str(config.run), logs, str(config.ckpt))
    paths = find_images(str(config.images))
    net, transform, classes = loading.load(run_dir, str(config.ckpt), logs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    workers = cores() if config.num_workers is None else config.num_workers
    images = ImageDataset(Listed(paths), transform.crop, seed=0, on_error="skip")
    loader = Loader(images, EvalBatchSampler(len(paths), config.batch_size), min(workers, len(paths)))
    out = Path(config.out).expanduser() if config.out else run_dir / "predictions.csv"
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give the file to write, as in out={out / 'predictions.csv'}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    topk = min(config.topk, len(classes))
    broken: dict[str, str] = {}
    table = Table(Column("image", overflow="fold"), "class", Column("probability", justify="right"))
    console = Console()
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
    with atomic_write(out, "x", newline="", **text) as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(["path", "rank", "class", "probability"])
        for place, (pixels, _, skipped, _) in enumerate(
            track(loader, "predicting", console=console, disable=not console.is_terminal)
        ):
            broken |= skipped
            if not len(pixels):
                continue
            start = place * config.batch_size
            whole = [path for path in paths[start : start + config.batch_size] if path not in skipped]
            logits = net(transform.normalize(pixels.to(device)))
            best = logits.float().softmax(1).topk(topk)
            for path, values, indices in zip(whole, best.values.tolist(), best.indices.tolist(), strict=True):
                for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1):
                    writer.writerow([path, rank, classes[index], f"{value:.6f}"])
                if table.row_count < SHOWN:
                    table.add_row(escape(shown(path)), escape(classes[indices[0]]), f"{values[0]:.4f}")
    if table.row_count:
        console.print(table)
    done = len(paths) - len(broken)
    print(f"{done} image{'s' if done != 1 else ''}, {topk} classes each: {rundir.shown(out)}", flush=True)
    if broken:
        told = list(broken.values())
        listed = "\n  ".join(shown(line) for line in told[:SHOWN])
        if len(broken) > SHOWN:
            rest = out.with_name(f"{out.stem}-broken.txt")
            with atomic_write(rest, "x", **text) as file:
                file.write("\n".join(told) + "\n")
            listed += f"\n  ... ({len(broken) - SHOWN} more, all in {rundir.shown(rest)})"
        raise RunFailedError(f"{len(broken)} of {len(paths)} images could not be read:\n  {listed}", 1)
