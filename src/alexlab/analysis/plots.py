"""Figures that Matplotlib draws without a display: top-5 bars, accuracy per class, training curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from alexlab.analysis.runs import read_metrics
from alexlab.engine.metrics import lower_is_better

RIGHT, OTHER, SECOND = "#c8553d", "#5b8db8", "#e0a030"
DPI = 110
MAX_BARS = 40  # classes in the figure of accuracies


def top5(
    images: Sequence[np.ndarray], truths: Sequence[str], best: Sequence[Sequence[tuple[str, float]]]
) -> Image.Image:
    """Draw images above bars of their most probable classes, the true class in another colour, as in AlexNet's paper.

    Args:
        images: each uint8 (H, W, 3).
        truths: the name of each image's true class.
        best: for each image (class name, probability from 0 to 1), the most probable first.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure((2.5 * columns, 3.75 * rows), dpi=DPI)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02 / rows, top=1 - 0.09 / rows)
    outer = figure.add_gridspec(rows, columns, hspace=0.1, wspace=0.06)
    for i, image in enumerate(images):
        inner = outer[divmod(i, columns)].subgridspec(2, 1, height_ratios=[2.2, 1.05], hspace=0.03)
        picture = figure.add_subplot(inner[0])
        picture.imshow(image)
        picture.set_axis_off()
        picture.set_title(_short(truths[i], 28), fontsize=9, fontweight="bold")
        bars = figure.add_subplot(inner[1])
        for place, (name, probability) in enumerate(best[i]):
            bars.barh(place, probability, color=RIGHT if name == truths[i] else OTHER, alpha=0.65)
            bars.text(0.02, place, f"{_short(name, 24)}  {probability:.0%}", va="center", fontsize=8)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6), xticks=[], yticks=[])
    return _image(figure)


def per_class(accuracies: Sequence[float | None], names: Sequence[str], of: str | None = None) -> Image.Image:
    """Draw a bar per class, the best at the top; of more than MAX_BARS classes the best and the worst.

    Args:
        accuracies: of each class, from 0 to 1; None for a class without images.
        of: the images and weights, for the title, such as "test, best.ckpt".
    """
    known = sorted(((acc, name) for acc, name in zip(accuracies, names, strict=True) if acc is not None), reverse=True)
    half = MAX_BARS // 2
    many = len(known) > MAX_BARS
    parts = [known[:half], known[-half:]] if many else [known]
    height = 1.1 + 0.22 * sum(len(part) for part in parts) + (0.5 if many else 0)
    figure = Figure((6.5, height), dpi=DPI, layout="tight")
    all_axes = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    mean = float(np.mean([acc for acc, _ in known]))
    for axes, part, which in zip(all_axes, parts, ("best", "worst"), strict=False):
        places = range(len(part))
        axes.barh(places, [acc for acc, _ in part], color=OTHER, height=0.72)
        axes.set_yticks(places, [_short(name, 32) for _, name in part], fontsize=8)
        axes.set(xlim=(0, 1.09), ylim=(len(part) - 0.4, -0.6), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.tick_params(axis="x", labelsize=8)
        axes.axvline(mean, color=RIGHT, linewidth=1)
        for place, (acc, _) in zip(places, part, strict=True):
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # covers the line of the mean
            axes.text(acc + 0.012, place, f"{acc:.1%}", va="center", fontsize=7, bbox=white)
        axes.spines[["top", "right"]].set_visible(False)
        title = f"acc1 by class{f' ({of})' if of else ''}, mean of classes {mean:.1%}"
        axes.set_title(f"{title}: the {half} {which} of {len(known)}" if many else title, fontsize=10)
    return _image(figure)


def curves(
    metrics_csv: Path, monitor: str | None = None, epoch_steps: int | None = None, mode: str | None = None
) -> Image.Image | None:
    """Draw loss, accuracy and learning rate over the epochs; None if nothing was measured.

    Args:
        metrics_csv: the file of a run.
        monitor: the metric whose best epoch is marked, such as "val/acc1".
        epoch_steps: optimizer steps per epoch; None if the first validation was at the end of an epoch.
        mode: whether the smallest ("min") or the largest ("max") of `monitor` is the best; None: by its name.

    Raises:
        UserError: the file cannot be read as a run's metrics.csv.
    """
    read = Curves(metrics_csv, epoch_steps)
    wanted = {
        "loss": [("train/loss", OTHER), ("val/loss", RIGHT)],
        "accuracy": [("train/acc1", OTHER), ("val/acc1", RIGHT), ("val/acc5", SECOND)],
        "learning rate": [(key, OTHER) for key in sorted(read.keys) if key.startswith("lr")][:1],
    }
    if (read.line("val/acc5")[1] == 1).all():  # as with up to five classes
        wanted["accuracy"].pop()
    panels = {title: [(k, c) for k, c in lines if len(read.line(k)[0])] for title, lines in wanted.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    figure = Figure((4.4 * len(panels), 3.5), dpi=DPI, layout="tight")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, colour in lines:
            x, y = read.line(key)
            label = "learning rate" if key.startswith("lr") else key
            axes.plot(x, y, color=colour, label=label, linewidth=1.5, marker="o" if len(x) < 3 else None, markersize=4)
            if key == monitor and not np.isnan(y).all():
                is_lower_better = mode == "min" if mode else lower_is_better(key)
                at = int(np.nanargmin(y) if is_lower_better else np.nanargmax(y))
                axes.plot(x[at], y[at], "*", color="black", markersize=9, label=f"best {y[at]:.4f}")
        if all(len(read.line(key)[0]) == 1 for key, _ in lines):  # else the axis would show hundredths of an epoch
            axes.set_xlim(0, 2 * read.line(lines[0][0])[0][0])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(read.unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if title == "accuracy":
            axes.set_ylim(0, 1.02)
        if title != "learning rate":
            axes.legend(fontsize=8, frameon=False)
    return _image(figure)


class Curves:
    """The columns of a metrics.csv over epochs, or over steps if no epoch was finished.

    Attributes:
        unit: "epoch" or "step".
    """

    def __init__(self, path: Path, epoch_steps: int | None = None) -> None:
        self.rows = read_metrics(path)
        self.keys = {key for row in self.rows for key in row}
        ends = [(int(row["step"]) + 1, int(row["epoch"]) + 1) for row in self.rows if {"val/loss", "epoch"} <= set(row)]
        steps = epoch_steps if isinstance(epoch_steps, int) and epoch_steps > 0 else 0
        if ends and not steps:
            steps = ends[0][0] // ends[0][1]  # the last validation may be within an epoch
        whole = any(step >= steps for step, _ in ends)
        self.steps, self.unit = (steps or 1, "epoch") if whole else (1, "step")

    def line(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y, both float64 (N,): the epochs or steps at which `key` was measured, and the values."""
        points = [((int(row["step"]) + 1) / self.steps, row[key]) for row in self.rows if key in row]
        return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _image(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)  # pyplot would look for a display
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _short(name: str, most: int) -> str:
    # Matplotlib would read a dollar sign as the start of a formula
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 1]}…"
