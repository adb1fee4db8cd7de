"""`alexlab predict`: write the most probable classes of images to a CSV file."""

import csv
import glob
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from alexlab.commands.evaluate import kept_temperature
from alexlab.data import decode
from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import images_below, is_skipped, refuse_twice, unused_files
from alexlab.data.index import Index
from alexlab.data.loader import Loader
from alexlab.data.sampler import EvalBatchSampler
from alexlab.engine import mirror
from alexlab.engine import run_dir as run_dirs
from alexlab.engine.errors import RunFailedError, UserError, counted
from alexlab.engine.files import atomic_write
from alexlab.engine.process import cores
from alexlab.engine.schema import PredictConfig
from alexlab.engine.text import printable
from alexlab.tasks.load import config_of, load

SHOWN = 10  # images in what is printed; the file has all


class Listed(Index):
    """Images of unknown classes, by their paths."""

    def __init__(self, paths: list[str]) -> None:
        self.paths, self.targets, self.classes = paths, np.zeros(len(paths), np.int64), ()

    def path(self, i: int) -> str:
        return self.paths[i]

    def picture(self, i: int) -> decode.Picture:
        return decode.open_picture(self.paths[i])


def find_images(named: str, key: str = "images") -> list[str]:
    """Return the sorted paths of a file, of all images below a folder, or of the files of a glob.

    Of a folder, a line is printed for each kind of files that are not images.

    Raises:
        UserError: no image was found.
    """
    path = Path(named).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        ignored: Counter[str] = Counter()
        names = images_below(path, ".", {}, ignored, {})
        print(*(f"note: {printable(line)}\n" for line in unused_files(path, ignored)), sep="", end="", flush=True)
        paths = sorted(os.path.join(path, os.fsdecode(name.removeprefix(b"./"))) for name in names)
    else:
        real: dict[str, str] = {}
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]  # noqa: PTH207
        files = [file for file in files if not any(map(is_skipped, {*file.parts} - {*path.parts}))]
        for parent in sorted({str(file.parent) for file in files}):  # ** follows links, also in a circle
            refuse_twice(parent, real)
        paths = sorted(map(str, files))
    if not paths:
        raise UserError(f"`{key}={named}` names no image: give a file, a folder or a quoted glob ('photos/*.jpg').")
    return paths


def predict(config: PredictConfig) -> None:
    """Write one line per image and class, for the `config.topk` most probable classes, and print the first images.

    Raises:
        UserError: the run does not exist, or no image was found.
        RunFailedError: some images could not be read; those that could are written.
    """
    logs = config.paths.local
    mirror.download_named(config.paths, config.run, config.ckpt)
    run_dir = run_dirs.find_run(config.run, logs, config.ckpt)
    paths = find_images(config.images)
    net, transform, classes = load(run_dir, config.ckpt, logs, allow=config.allow)
    multilabel = config_of(run_dir).data.multilabel
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    if config.calibrated and multilabel:
        raise UserError("`calibrated=true` needs one class per image, and this run is multilabel: remove it.")
    temperature = kept_temperature(run_dir, run_dirs.ckpt_of(run_dir, config.ckpt)) if config.calibrated else 1.0
    if temperature is None:
        raise UserError(
            f"`calibrated=true`: {run_dirs.shown(run_dir)} has no temperature for this checkpoint: run python eval.py "
            f"run={run_dirs.shown(run_dir)} ckpt={config.ckpt} first."
        )
    workers = cores() if config.num_workers is None else config.num_workers
    images = ImageDataset(Listed(paths), transform.crop, seed=0, on_error="skip")
    loader = Loader(images, EvalBatchSampler(len(paths), config.batch_size), min(workers, len(paths)))
    out = Path(config.out).expanduser() if config.out else run_dir / "predictions.csv"
    if out.is_dir():
        raise UserError(f"`out={out}` is a folder: give a file, such as out={out / 'predictions.csv'}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    topk = min(config.topk, len(classes))
    broken: dict[str, str] = {}
    lines: list[str] = []  # of the first images, to print
    console = Console()
    writing = atomic_write(out, "x", encoding="utf-8", errors="surrogateescape", newline="")
    with writing as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(["path", "rank", "class", "probability"])
        batches = track(loader, "predicting", console=console, disable=not console.is_terminal)
        for number, (pixels, _, skipped, _) in enumerate(batches):
            broken |= skipped
            if not len(pixels):
                continue
            start = number * config.batch_size
            readable = [path for path in paths[start : start + config.batch_size] if path not in skipped]
            logits = net(transform.normalize(pixels.to(device)))
            logits = logits.float() / temperature
            probabilities = logits.sigmoid() if multilabel else logits.softmax(1)
            best = probabilities.topk(topk)
            for path, values, indices in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
                for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1):
                    writer.writerow([path, rank, classes[index], f"{value:.6f}"])
                if len(lines) < SHOWN:
                    lines.append(f"  {values[0]:.4f} {classes[indices[0]]}: {run_dirs.shown(Path(path))}")
    print("\n".join(lines))
    done = len(paths) - len(broken)
    print(f"{counted(done, 'image')}, {counted(topk, 'class')} each: {run_dirs.shown(out)}", flush=True)
    mirror.upload(config.paths, run_dir, [out])
    if broken:
        listed = "\n  ".join(printable(line) for line in list(broken.values())[:SHOWN])
        listed += f"\n  ... ({len(broken) - SHOWN} more)" if len(broken) > SHOWN else ""
        raise RunFailedError(f"{len(broken)} of {counted(len(paths), 'image')} could not be read:\n  {listed}", 1)
