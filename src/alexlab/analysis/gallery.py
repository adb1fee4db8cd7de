"""The figures of a trained run, for the end of a training and for `alexlab figures`.

First filters, top-5 bars, nearest neighbours and training curves are drawn from the run directory and the images.
The confusion matrix, the accuracy per class and the mistakes are drawn during the test (`callbacks/media.py`).
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alexlab.analysis import drawing as figures
from alexlab.analysis import plots
from alexlab.analysis.runs import read_metrics, recorded_mode, steps_per_epoch
from alexlab.data.fast.device_cache import Index
from alexlab.data.sources import Data
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import UserError
from alexlab.engine.files import make_folder
from alexlab.engine.process import cores
from alexlab.engine.targets import Trusted
from alexlab.models.introspection import first_convolution, head_of
from alexlab.tasks import load as loading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # validation images with their top-5 bars
QUERIES, NEIGHBOURS = 5, 6
BATCH = 64
NAMES = ("filters", "curves", "top5", "neighbours")
SIDE = 132  # pixels of an image among the neighbours


class FeatureExtractor:
    """Read images as in an evaluation, and compute a network's probabilities and last hidden layer."""

    def __init__(self, trained: loading.Trained, device: torch.device) -> None:
        self.net, self.transform, self.classes = trained
        self.net.to(device)
        self.device = device
        self.hidden: Tensor | None = None

        def store(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.hidden = inputs[0].mean((2, 3)) if inputs[0].dim() == 4 else inputs[0]

        with contextlib.suppress(UserError):  # without a known head, no neighbours are drawn
            head_of(self.net).register_forward_pre_hook(store)

    def read(self, index: Index, numbers: list[int]) -> dict[int, Tensor]:
        """Return the pixels of each image that can be read, uint8 (C, H, W), by the number of the image."""

        def pixels(number: int) -> Tensor | None:
            with contextlib.suppress(OSError):
                return self.transform.crop(index.picture(number))
            return None

        with ThreadPoolExecutor(cores()) as threads:  # decoding releases the GIL
            images = zip(numbers, threads.map(pixels, numbers), strict=True)
            return {number: image for number, image in images if image is not None}

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute on images, uint8 (N, C, H, W): probabilities (N, num_classes), and the last hidden layer (N, units)
        or None without a known head. Both are float32, on the CPU."""
        probabilities, hidden = [], []
        for part in pixels.split(BATCH):
            logits = self.net(self.transform.normalize(part.to(self.device)))
            probabilities.append(logits.float().softmax(1).cpu())
            if self.hidden is not None:
                hidden.append(self.hidden.float().cpu())
        return torch.cat(probabilities), torch.cat(hidden) if hidden else None

    def features(self, index: Index, numbers: list[int]) -> tuple[list[int], Tensor]:
        """Return the numbers of the images that can be read, and their last hidden layer (N, units).

        Reads one batch at a time, so that any number of images fits into memory. Only for networks with a head."""
        hidden: dict[int, Tensor] = {}
        for start in range(0, len(numbers), BATCH):
            if images := self.read(index, numbers[start : start + BATCH]):
                _, features = self.predict(torch.stack(list(images.values())))
                assert features is not None
                hidden |= zip(images, features, strict=True)
        return list(hidden), torch.stack(list(hidden.values())) if hidden else torch.empty(0, 0)


def spread(index: Index, count: int) -> list[int]:
    """Return up to `count` evenly spaced image numbers: images are sorted by class, so many classes are drawn."""
    count = min(count, len(index))
    return [int((i + 0.5) * len(index) / count) for i in range(count)]


def nearest(queries: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the nearest rows of `among` (N, D) to each of `queries` (Q, D) by Euclidean distance, as in figure 4 of
    AlexNet's paper: distances and row numbers, both (Q, count)."""
    smallest = torch.cdist(queries.double(), among.double()).topk(min(count, len(among)), largest=False)
    return smallest.values, smallest.indices


def pictures(
    run_dir: Path, trained: loading.Trained, data: Data, among: int, device: torch.device, monitor: str, weights: str
) -> Iterator[tuple[str, "Image.Image | Figure"]]:
    """Yield the name and the picture of each figure.

    Args:
        among: number of training images, evenly spaced, among which the neighbours are searched.
        monitor: the metric whose best epoch is marked in the curves.
        weights: the name of the checkpoint, for titles.
    """
    first = first_convolution(trained.net)
    if first is not None:
        yield "filters", figures.filters(first[0].weight.detach().float().cpu(), first[1])
    rows, summary = read_metrics(run_dir / "metrics.csv"), rundir.read_summary(run_dir)
    plot = plots.curves(rows, monitor, steps_per_epoch(summary, rows), recorded_mode(summary, monitor))
    if plot is not None:
        yield "curves", plot
    if not data.splits:  # of a LightningDataModule, whose images have no index
        return
    extractor = FeatureExtractor(trained, device)
    split = "val" if "val" in data.splits else data.test_split
    held_out, train, of = data.splits[split], data.splits.get("train"), f"{split}, {weights}"
    images = extractor.read(held_out, spread(held_out, SHOWN))
    if not images or loading.config_of(run_dir).data.multilabel:  # the rest is about images of one class each
        return
    pixels, names = list(images.values()), extractor.classes
    truths = [names[held_out.targets[number]] for number in images]
    probabilities, hidden = extractor.predict(torch.stack(pixels))
    best = [row.topk(min(5, len(row))) for row in probabilities]
    named = [[(names[k], p) for p, k in zip(*map(Tensor.tolist, each), strict=True)] for each in best]
    yield "top5", plots.top5([_array(image) for image in pixels], truths, named, of)
    if train is None or not among or hidden is None:
        return
    train_numbers, train_hidden = extractor.features(train, spread(train, among))
    if not train_numbers:
        return
    queries = np.linspace(0, len(pixels) - 1, min(QUERIES, len(pixels))).round().astype(int).tolist()
    _, places = nearest(hidden[queries], train_hidden, NEIGHBOURS)
    near = torch.tensor(train_numbers)[places].tolist()
    train_pixels = extractor.read(train, sorted({number for row in near for number in row}))
    drawn, captions = [], []
    for query, numbers in zip(queries, near, strict=True):
        drawn.append(_small(pixels[query]))
        captions.append((truths[query], f"of {split}"))
        for place, number in enumerate(numbers, 1):
            drawn.append(_small(train_pixels[number]))
            captions.append((names[train.targets[number]], f"of train, nearest {place}"))
    title = f"{of}: an image, and the training images with the nearest features (last hidden layer)"
    yield "neighbours", figures.tiles(drawn, title, captions, columns=1 + places.shape[1])


def _array(image: Tensor) -> np.ndarray:
    return figures.as_rgb(image.permute(1, 2, 0).numpy())


def _small(image: Tensor) -> np.ndarray:
    drawn = Image.fromarray(_array(image).copy())
    drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(drawn)


def draw(
    run_dir: Path,
    data: Data,
    monitor: str,
    ckpt: str = "best",
    among: int = 2000,
    device: str = "cpu",
    trusted: Trusted = (),
    kind: str = "png",
) -> list[Path]:
    """Write the figures of a run to RUN_DIR/figures, as png, svg or pdf, and return their paths."""
    trained = loading.load(run_dir, ckpt, check_sources=False, allow=trusted)
    folder = make_folder(run_dir, "figures")
    for name in NAMES:  # figures of another checkpoint or of different images
        (folder / f"{name}.{kind}").unlink(missing_ok=True)
    written = []
    weights = f"{ckpt}.ckpt" if ckpt in ("best", "last") else Path(ckpt).name
    for name, picture in pictures(run_dir, trained, data, among, torch.device(device), monitor, weights):
        written.append(figures.save(picture, folder / f"{name}.{kind}"))
    return written


def log_to(loggers: list[Any], paths: list[Path], step: int) -> None:
    """Log the figures as figures/<name> to each logger that has `log_image`."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            for path in paths:
                logger.log_image(f"figures/{path.stem}", [Image.open(path)], step=step)
