"""Plots for a report, drawn by Matplotlib without a display: top-5 bars, accuracy by class, training curves."""

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from alexlab.engine.errors import UserError

RIGHT, OTHER, SECOND = "#c8553d", "#5b8db8", "#e0a030"
DPI = 110
LARGEST = 2**26  # bytes of a metrics.csv
MOST_CLASSES = 40  # with a bar of their own


def top5(
    images: Sequence[np.ndarray], truths: Sequence[str], best: Sequence[Sequence[tuple[str, float]]]
) -> Image.Image:
    """Images over the bars of their most probable classes, the true one's in its own colour, as in the paper's figure.

    Args:
        images: uint8 (H, W, 3).
        truths: their classes.
        best: for each image, (class, probability from 0 to 1) from the most probable on.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = _figure(2.5 * columns, 3.75 * rows)
    outer = figure.add_gridspec(
        rows, columns, hspace=0.1, wspace=0.06, left=0.01, right=0.99, bottom=0.02 / rows, top=1 - 0.09 / rows
    )
    for i, image in enumerate(images):
        inner = outer[divmod(i, columns)].subgridspec(2, 1, height_ratios=[2.2, 1.05], hspace=0.03)
        picture = figure.add_subplot(inner[0])
        picture.imshow(image)
        picture.set_axis_off()
        picture.set_title(_short(truths[i], 28), fontsize=9, fontweight="bold")
        bars = figure.add_subplot(inner[1])
        names, shares = [name for name, _ in best[i]], [share for _, share in best[i]]
        bars.barh(
            range(len(names)), shares, color=[RIGHT if name == truths[i] else OTHER for name in names], alpha=0.65
        )
        for place, (name, share) in enumerate(best[i]):
            bars.text(0.02, place, f"{_short(name, 24)}  {share:.0%}", va="center", fontsize=8)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6), xticks=[], yticks=[])
    return _image(figure)


def per_class(shares: Sequence[float | None], names: Sequence[str], of: str | None = None) -> Image.Image:
    """A bar a class, the best above; of more than MOST_CLASSES the best and the worst.

    Args:
        shares: of each class's images that were right, from 0 to 1; None where it has no image.
        of: which images and weights, such as "test, best.ckpt".
    """
    known = sorted(
        ((share, name) for share, name in zip(shares, names, strict=True) if share is not None), reverse=True
    )
    half = MOST_CLASSES // 2
    many = len(known) > MOST_CLASSES
    parts = [known[:half], known[-half:]] if many else [known]
    figure = _figure(6.5, 1.1 + 0.22 * sum(len(part) for part in parts) + (0.5 if many else 0))
    all_axes = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    mean = float(np.mean([share for share, _ in known]))
    for axes, part, words in zip(all_axes, parts, ("best", "worst"), strict=False):
        places = range(len(part))
        axes.barh(places, [share for share, _ in part], color=OTHER, height=0.72)
        axes.set_yticks(places, [_short(name, 32) for _, name in part], fontsize=8)
        axes.set(xlim=(0, 1.09), ylim=(len(part) - 0.4, -0.6))
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.tick_params(axis="x", labelsize=8)
        axes.axvline(mean, color=RIGHT, linewidth=1)
        for place, (share, _) in zip(places, part, strict=True):
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # over the line of the mean
            axes.text(share + 0.012, place, f"{share:.1%}", va="center", fontsize=7, bbox=white)
        axes.spines[["top", "right"]].set_visible(False)
        title = f"acc1 by class{f' ({of})' if of else ''}, mean of classes {mean:.1%}"
        axes.set_title(f"{title}: the {half} {words} of {len(known)}" if many else title, fontsize=10)
    figure.tight_layout()
    return _image(figure)


def curves(metrics_csv: Path, monitor: str | None = None, epoch_steps: int | None = None) -> Image.Image | None:
    """Loss, accuracy and learning rate over the epochs; None where nothing was measured.

    Args:
        metrics_csv: of a run.
        monitor: the metric whose best epoch is marked, such as "val/acc1".
        epoch_steps: optimizer steps of an epoch; None takes the first validation for the end of one.
    """
    read = Curves(metrics_csv, epoch_steps)
    wanted = {
        "loss": [("train/loss", OTHER), ("val/loss", RIGHT)],
        "accuracy": [("train/acc1", OTHER), ("val/acc1", RIGHT), ("val/acc5", SECOND)],
        "learning rate": [(key, OTHER) for key in sorted(read.keys) if key.startswith("lr")][:1],
    }
    if (read.line("val/acc5")[1] == 1).all():  # with up to five classes
        wanted["accuracy"].pop()
    panels = {title: [(k, c) for k, c in lines if len(read.line(k)[0])] for title, lines in wanted.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    figure = _figure(4.4 * len(panels), 3.5)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, colour in lines:
            x, y = read.line(key)
            label = "learning rate" if key.startswith("lr") else key
            axes.plot(x, y, color=colour, label=label, linewidth=1.5, marker="o" if len(x) < 3 else None, markersize=4)
        if all(len(read.line(key)[0]) == 1 for key, _ in lines):  # else the axis would be of hundredths of an epoch
            axes.set_xlim(0, 2 * read.line(lines[0][0])[0][0])
        _mark_best(axes, read, monitor, [key for key, _ in lines])
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
    figure.tight_layout()
    return _image(figure)


def _mark_best(axes: Axes, read: "Curves", monitor: str | None, shown: list[str]) -> None:
    if monitor not in shown or monitor is None:
        return
    x, y = read.line(monitor)
    if np.isnan(y).all():
        return
    at = int(np.nanargmin(y) if monitor.endswith("loss") else np.nanargmax(y))
    axes.plot(x[at], y[at], "*", color="black", markersize=9, label=f"best {y[at]:.4f}")


class Curves:
    """The columns of a metrics.csv over whole epochs, or over steps where no epoch was finished.

    Attributes:
        unit: "epoch" or "step".
    """

    def __init__(self, path: Path, epoch_steps: int | None = None) -> None:
        self.rows = rows_of(path)
        self.keys = {key for row in self.rows for key in row}
        ends = [(int(row["step"]) + 1, int(row["epoch"]) + 1) for row in self.rows if {"val/loss", "epoch"} <= set(row)]
        if not isinstance(epoch_steps, int) or epoch_steps < 1:
            epoch_steps = None
        if epoch_steps is None and ends:
            epoch_steps = ends[0][0] // ends[0][1]  # the last one may end within an epoch
        whole = epoch_steps is not None and any(step >= epoch_steps for step, _ in ends)
        self.steps, self.unit = (epoch_steps or 1, "epoch") if whole else (1, "step")

    def line(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) float64 (N,): where `key` was measured, and what."""
        found = [((int(row["step"]) + 1) / self.steps, row[key]) for row in self.rows if key in row]
        return np.array([x for x, _ in found]), np.array([y for _, y in found])


def rows_of(path: Path) -> list[dict[str, float]]:
    """The numbers of a metrics.csv, row by row; rows without a step are left out.

    Raises:
        UserError: it is larger than any run's, or no table.
    """
    rows: list[dict[str, float]] = []
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has more than {LARGEST} bytes, and is not a run's.")
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.reader(file)
            keys = next(reader, [])
            for cells in reader:
                row: dict[str, float] = {}
                for key, cell in zip(keys, cells, strict=False):
                    with contextlib.suppress(ValueError):  # empty, or no number
                        row[key] = float(cell)
                if 0 <= row.get("step", -1) < 2**63 and 0 <= row.get("epoch", 0) < 2**63:
                    rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path} is not a run's ({error}).") from None
    return rows


def _figure(width: float, height: float) -> Figure:
    """Of `width` x `height` inches, without pyplot, which would look for a display."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _image(figure: Figure) -> Image.Image:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _short(name: str, most: int) -> str:
    # a dollar sign would start Matplotlib's formulas
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 1]}…"
