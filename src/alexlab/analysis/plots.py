"""Figures of Matplotlib, as wide as a page: top-5 bars, accuracy per class, confusion matrix, curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from alexlab.analysis.drawing import PAGE, fonts_for
from alexlab.analysis.runs import Row
from alexlab.engine.metrics import is_always_one, lower_is_better

RIGHT, OTHER, SECOND = "#c8553d", "#5b8db8", "#e0a030"
TRUE = "#4c9a5f"
MAX_LINES = 10  # curves with a name
MAX_BARS = 40  # classes in the figure of accuracies
MAX_NUMBERS = 20  # classes of a confusion matrix with numbers in the cells


def top5(
    images: Sequence[np.ndarray], truths: Sequence[str], best: Sequence[Sequence[tuple[str, float]]], of: str
) -> Figure:
    """Draw images above bars of their most probable classes, the true class in green, as in AlexNet's paper.

    Args:
        images: each uint8 (H, W, 3).
        truths: the name of each image's true class.
        best: for each image (class name, probability from 0 to 1), the most probable first.
        of: the images and weights, for the title, such as "val, best.ckpt".
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure((PAGE / 4 * columns, 2.5 * rows), layout="tight")
    panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.2, 1.05] * rows)
    for i, image in enumerate(images):
        picture, bars = panels[2 * (i // columns) :, i % columns][:2]
        picture.imshow(image)
        picture.set_title(_short(truths[i], 24), fontsize=8, fontweight="bold")
        for place, (name, probability) in enumerate(best[i]):
            bars.barh(place, probability, color=TRUE if name == truths[i] else OTHER, alpha=0.65)
            bars.text(0.02, place, f"{_short(name, 20)}  {probability:.0%}", va="center", fontsize=7)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6))
    for axes in panels.flat:
        axes.set_axis_off()
    figure.suptitle(f"{of}: the most probable classes, the true one in green", fontsize=9)
    return _with_fonts(figure)


def per_class(accuracies: Sequence[float | None], names: Sequence[str], of: str) -> Figure:
    """Draw a bar per class, the best at the top; of more than MAX_BARS classes the worst.

    Accuracies are from 0 to 1, or None for a class without images. `of` is that of `top5`.
    """
    known = sorted(((acc, name) for acc, name in zip(accuracies, names, strict=True) if acc is not None), reverse=True)
    mean, worst = float(np.mean([acc for acc, _ in known])), known[-MAX_BARS:]
    figure = Figure((6.5, 1.1 + 0.2 * len(worst)), layout="tight")
    axes = figure.add_subplot(xlim=(0, 1.09), ylim=(len(worst) - 0.4, -0.6))
    bars = axes.barh(range(len(worst)), [acc for acc, _ in worst], color=OTHER, height=0.72)
    axes.bar_label(bars, fmt="{:.1%}", padding=3, fontsize=7)
    axes.set_yticks(range(len(worst)), [_short(name, 32) for _, name in worst], fontsize=8)
    axes.axvline(mean, color=RIGHT, linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=7)
    which = f": the {MAX_BARS} worst of {len(known)}" if len(known) > MAX_BARS else ""
    axes.set_title(f"acc1 by class ({of}), mean of classes {mean:.1%}{which}", fontsize=9)
    return _with_fonts(figure)


def confusion(counts: np.ndarray, names: Sequence[str], totals: np.ndarray, classes: int, of: str) -> Figure:
    """Draw a confusion matrix. A darker cell contains a larger fraction of the images of the row's class.

    Args:
        counts: int (C, C), how many images of the row's class were predicted as the column's class.
        totals: int (C,), images per class; more than in the row if the matrix is a part of a larger one.
        classes: the number of classes of that larger matrix.
    """
    fraction = counts / np.maximum(totals, 1)[:, None]
    side, size = min(PAGE, 2.5 + 0.38 * len(names)), 8 if len(names) <= 16 else 6 if len(names) <= 36 else 4.5
    figure = Figure((side, side), layout="tight")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    labels = [_short(name, 24) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), labels, fontsize=size)
    for row, column in np.argwhere(counts) if len(names) <= MAX_NUMBERS else ():
        ink = "white" if fraction[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), color=ink, ha="center", va="center", fontsize=size)
    part = f"\n{len(names)} of {classes:,} classes, those confused most" if classes > len(names) else ""
    axes.set_title(of + part, fontsize=9)
    return _with_fonts(figure)


def curves(
    rows: Sequence[Row], monitor: str | None, epoch_steps: float | None, mode: str | None = None
) -> Figure | None:
    """Draw loss, accuracy and learning rate over the epochs, or over the steps; None if nothing was measured.

    Args:
        rows: of metrics.csv.
        monitor: the metric whose best epoch is marked, such as "val/acc1".
        epoch_steps: optimizer steps per epoch, None if unknown.
        mode: whether the smallest ("min") or the largest ("max") of `monitor` is the best; None: the name decides.
    """
    rates = sorted({key for row in rows for key in row if key.startswith("lr")})
    lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # key -> x, y
    usual = ("train/loss", "val/loss", "train/acc1", "val/acc1", "val/acc5", *rates[:1])
    for key in dict.fromkeys((*usual, *([monitor] if monitor else ()))):
        points = [((row["step"] + 1) / (epoch_steps or 1), row[key]) for row in rows if key in row]
        if points and not is_always_one(key, [y for _, y in points]):
            lines[key] = np.array([x for x, _ in points]), np.array([y for _, y in points])
    groups = {"loss": "/loss", "accuracy": "/acc", "learning rate": "lr"}
    groups |= {monitor.partition("/")[2]: monitor} if monitor and monitor not in usual else {}
    panels = {title: keys for title, part in groups.items() if (keys := [key for key in lines if part in key])}
    if not panels:
        return None
    figure = Figure((PAGE / max(3, len(panels)) * len(panels), 2.2), layout="tight")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key in keys:
            x, y = lines[key]
            colour = SECOND if key == "val/acc5" else RIGHT if key.startswith("val/") else OTHER
            axes.plot(x, y, color=colour, label=key, linewidth=1.2, marker="o" if len(x) < 3 else None, markersize=3)
            if key == monitor and not np.isnan(y).all():
                is_lower_better = mode == "min" if mode else lower_is_better(key)
                at = int(np.nanargmin(y) if is_lower_better else np.nanargmax(y))
                axes.plot(x[at], y[at], "*", color="black", markersize=7, label=f"best {y[at]:.4f}")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch" if epoch_steps else "step", fontsize=8)
        axes.tick_params(labelsize=7)
        values = np.concatenate([lines[key][1] for key in keys])
        values = values[np.isfinite(values)]
        most = np.quantile(values, 0.9, method="lower") if len(values) else 0
        if most and values.min() > 0 and values.max() > 20 * most:  # the run has diverged
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    return _with_fonts(figure)


def lines_of_classes(
    lines: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str], axes_names: tuple[str, str], of: str
) -> Figure:
    """Draw a curve for each class, and the mean of all; of more than MAX_LINES classes the mean alone has a name.

    Args:
        lines: x and y of each class, from 0 to 1; x does not fall.
        axes_names: of x and y.
        of: the images and weights, for the title, such as "test, best.ckpt".
    """
    figure = Figure((PAGE * 0.7, PAGE * 0.6), layout="tight")
    axes = figure.add_subplot(xlabel=axes_names[0], ylabel=axes_names[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    are_few = len(lines) <= MAX_LINES
    for (x, y), name in zip(lines, names, strict=True):
        label = f" {_short(name, 24)}"  # without the space Matplotlib would hide a name that begins with _
        style: Any = {"label": label, "linewidth": 1.1} if are_few else {"color": OTHER, "alpha": 0.15}
        axes.plot(x, y, **style)
    grid = np.linspace(0, 1, 501)
    mean = np.mean([np.interp(grid, x, y) for x, y in lines], 0)
    axes.plot(grid, mean, color="black", linewidth=1.6, label=f"mean of {len(lines):,} classes")
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=7)
    axes.set_title(of, fontsize=9)
    return _with_fonts(figure)


def reliability(panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], of: str) -> Figure:
    """Draw accuracy over confidence for ranges of confidence; a darker bar has more images.

    Args:
        panels: by title: mean confidence, accuracy and number of images of each of the equal ranges.
        of: the images and weights, for the title, such as "test, best.ckpt".
    """
    figure = Figure((PAGE / 2 * len(panels), PAGE / 2), layout="tight")
    for axes, (title, (_, accuracy, counts)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        edges = np.arange(len(counts)) / len(counts)
        shade = 0.25 + 0.75 * np.sqrt(counts / counts.max())
        bars = axes.bar(edges, np.nan_to_num(accuracy), 1 / len(counts), align="edge", color=OTHER, edgecolor="white")
        for bar, alpha in zip(bars, shade, strict=True):
            bar.set_alpha(float(alpha))
        axes.plot([0, 1], [0, 1], color=RIGHT, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.tick_params(labelsize=7)
        axes.set_title(title, fontsize=8)
    figure.suptitle(of, fontsize=9)
    return _with_fonts(figure)


def _with_fonts(figure: Figure) -> Figure:
    """Give the texts of a figure fonts that have their letters."""
    texts: list[Any] = figure.findobj(Text)
    families = [family for family, _ in fonts_for("".join({letter for text in texts for letter in text.get_text()}))[0]]
    for text in texts:
        text.set_fontfamily(families)
    return figure


def _short(name: str, most: int) -> str:
    # Matplotlib would read a dollar sign as the start of a formula
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 1]}…"
