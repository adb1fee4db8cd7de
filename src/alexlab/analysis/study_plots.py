"""Plots of a study: its course, what its parameters matter, their values side by side, and each by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from PIL import Image

from alexlab.analysis.plots import OTHER, RIGHT, SECOND, _figure, _image, _short

COLOURS = "viridis"
LEAST = 5  # trials that say something about a parameter


@dataclass(frozen=True)
class Point:
    """A trial that has a value: of a pruned one the last that it reached."""

    number: int
    value: float
    params: dict[str, float | int | str | bool | None]
    pruned: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter's values on an axis: numbers as they are or by their logarithm, others as places 0, 1, ..."""

    name: str
    log: bool = False
    options: tuple[str, ...] = field(default=())

    def place(self, value: object) -> float:
        if self.options:
            return float(self.options.index(str(value)))
        return math.log10(float(value)) if self.log else float(value)  # type: ignore[arg-type]

    def label(self, place: float) -> str:
        if self.options:
            return _short(self.options[round(place)], 14)
        return f"{10**place if self.log else place:.3g}"


def history(points: Sequence[Point], metric: str, maximize: bool) -> Image.Image:
    """Each trial's value, and the best of the finished ones so far."""
    figure = _figure(6.5, 3.6)
    axes = figure.add_subplot()
    whole = [point for point in points if not point.pruned]
    cut = [point for point in points if point.pruned]
    axes.plot([p.number for p in whole], [p.value for p in whole], "o", color=OTHER, label="finished", markersize=5)
    if cut:
        axes.plot([p.number for p in cut], [p.value for p in cut], "x", color=SECOND, label="pruned", markersize=6)
    best = np.maximum.accumulate if maximize else np.minimum.accumulate
    axes.step([p.number for p in whole], best([p.value for p in whole]), where="post", color=RIGHT, label="best so far")
    axes.set(xlabel="trial", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tidy(axes)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return _image(figure)


def importances(points: Sequence[Point], parameters: Sequence[Parameter], metric: str) -> Image.Image | None:
    """How much of the finished trials' variance each parameter explains, of those that one of them
    has; None without any, and of fewer than LEAST trials."""
    whole = [point for point in points if not point.pruned]
    parameters = [parameter for parameter in parameters if any(parameter.name in p.params for p in whole)]
    if len(whole) < LEAST or not parameters:
        return None
    shares = sorted((explained(whole, parameter), parameter.name) for parameter in parameters)
    figure = _figure(6.5, 1.4 + 0.35 * len(shares))
    axes = figure.add_subplot()
    axes.barh(range(len(shares)), [share for share, _ in shares], color=OTHER, height=0.6)
    axes.set_yticks(range(len(shares)), [_short(name, 32) for _, name in shares], fontsize=8)
    for place, (share, _) in enumerate(shares):
        axes.text(share + 0.012, place, f"{share:.0%}", va="center", fontsize=8)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_title(f"share of {metric}'s variance over {len(whole)} trials that each explains alone", fontsize=10)
    _tidy(axes)
    axes.grid(visible=False)
    figure.tight_layout()
    return _image(figure)


def explained(points: Sequence[Point], parameter: Parameter) -> float:
    """The adjusted R² of a parabola in a number, or of an option's means: 0 to 1. Of two parameters that matter only
    together it sees nothing."""
    held = [point for point in points if parameter.name in point.params]
    y = np.array([point.value for point in held])
    x = np.array([parameter.place(point.params[parameter.name]) for point in held])
    if parameter.options:
        columns = np.stack([x == option for option in np.unique(x)], axis=1).astype(float)
    else:
        columns = np.vander((x - x.mean()) / (x.std() or 1), 3)
    free = len(y) - columns.shape[1]
    if free < 1 or y.var() == 0:
        return 0.0
    fitted = columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(max(0.0, 1 - ((y - fitted) ** 2).sum() / free / (y.var() * len(y) / (len(y) - 1))))


def parallel(
    points: Sequence[Point], parameters: Sequence[Parameter], metric: str, maximize: bool
) -> Image.Image | None:
    """A line a trial over an axis for each parameter, in its value's colour; the better ones lie above. Trials without
    one of them are left out; where all would be, the parameters that some lack. None where no parameter stays."""
    if not any(all(parameter.name in p.params for parameter in parameters) for p in points):
        parameters = [parameter for parameter in parameters if all(parameter.name in p.params for p in points)]
    if not parameters:
        return None
    figure = _figure(max(5.0, 1.7 * (len(parameters) + 1) + 1.5), 4.0)
    axes = figure.add_subplot()
    norm = _norm(points)
    whole = [p for p in points if all(parameter.name in p.params for parameter in parameters)]
    columns = [[parameter.place(p.params[parameter.name]) for p in whole] for parameter in parameters]
    columns.append([p.value for p in whole])
    places = [_between(column) for column in columns]
    for i in sorted(range(len(whole)), key=lambda i: whole[i].value if maximize else -whole[i].value):
        colour = colormaps[COLOURS](norm(whole[i].value))
        line = [column[i] for column in places]
        axes.plot(line, color=colour, linewidth=1.4, linestyle=":" if whole[i].pruned else "-", clip_on=False)
    for at, column in enumerate(columns):
        axes.axvline(at, color="black", linewidth=0.8)
        label = parameters[at].label if at < len(parameters) else "{:.3g}".format
        for place in dict.fromkeys((min(column), max(column))):
            height = 1.0 if place == max(column) and min(column) < max(column) else 0.0
            height = 0.5 if min(column) == max(column) else height
            axes.annotate(label(place), (at, height), (0, 6 if height else -6), textcoords="offset points",
                          ha="center", va="bottom" if height else "top", fontsize=8)  # fmt: skip
    names = [_short(parameter.name, 24) for parameter in parameters]
    axes.set_xticks(range(len(columns)), [*names, metric], fontsize=8)
    axes.tick_params(axis="x", pad=18, length=0)
    axes.set(yticks=[], ylim=(0, 1), xlim=(-0.2, len(columns) - 0.8))
    axes.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, label=metric, pad=0.03)
    figure.tight_layout()
    return _image(figure)


def slices(points: Sequence[Point], parameters: Sequence[Parameter], metric: str) -> Image.Image:
    """The value over each parameter by itself; later trials are darker."""
    figure = _figure(3.4 * len(parameters) + 0.8, 3.4)
    figure.set_layout_engine("constrained")
    all_axes = figure.subplots(1, len(parameters), squeeze=False, sharey=True)[0]
    first, last = min(p.number for p in points), max(p.number for p in points)
    norm = Normalize(first, max(last, first + 1))
    for axes, parameter in zip(all_axes, parameters, strict=True):
        for pruned, marker in ((False, "o"), (True, "x")):
            held = [p for p in points if p.pruned == pruned and parameter.name in p.params]
            x = [parameter.place(p.params[parameter.name]) for p in held]
            axes.scatter(x, [p.value for p in held], c=[p.number for p in held], norm=norm, cmap="Blues", s=28,
                         marker=marker, **({} if pruned else {"edgecolors": "grey", "linewidths": 0.5}))  # fmt: skip
        if parameter.options:
            axes.set_xticks(range(len(parameter.options)), [_short(o, 12) for o in parameter.options])
        elif parameter.log:
            ticks = _round_values([float(p.params[parameter.name]) for p in points if parameter.name in p.params])  # type: ignore[arg-type]
            axes.set_xticks([math.log10(tick) for tick in ticks], [f"{tick:.3g}" for tick in ticks])
        axes.set_xlabel(_short(parameter.name, 32), fontsize=9)
        _tidy(axes)
    all_axes[0].set_ylabel(metric, fontsize=9)
    figure.colorbar(ScalarMappable(norm, "Blues"), ax=list(all_axes), label="trial", pad=0.03)
    return _image(figure)


def _round_values(values: Sequence[float]) -> list[float]:
    """Decades within the values' range, with 2 and 5 of each where those are few; or the ends of a range too small."""
    low, high = min(values), max(values)
    for steps in ((1,), (1, 2, 5)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [float(f"{step}e{decade}") for decade in decades for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3 or (len(found) == 2 and steps != (1,)):
            return found[:: math.ceil(len(found) / 6)]
    return sorted({low, high})


def _norm(points: Sequence[Point]) -> Normalize:
    values = [point.value for point in points]
    return Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1e-9)


def _between(column: Sequence[float]) -> list[float]:
    low, high = min(column), max(column)
    return [(value - low) / (high - low) if high > low else 0.5 for value in column]


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
