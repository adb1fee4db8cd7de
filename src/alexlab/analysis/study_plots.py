"""Plots of an Optuna study: the best value so far, and the value against each parameter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

FEWEST = 5  # complete trials that say how much a parameter explains


def draw(study: Any, metric: str, folder: Path) -> list[Path]:
    """Save history.png and slices.png to `folder`, and return their paths.

    Args:
        study: an optuna.Study with at least one complete trial.
        metric: the name of the trials' values.
    """
    trials = [trial for trial in study.trials if trial.value is not None]
    folder.mkdir(parents=True, exist_ok=True)
    history = Figure((6.5, 3.6), dpi=110, layout="constrained")
    axes = history.add_subplot(xlabel="trial", ylabel=metric)
    complete = _scatter(axes, trials, [trial.number for trial in trials])
    best = np.maximum.accumulate if study.direction.name == "MAXIMIZE" else np.minimum.accumulate
    axes.step([t.number for t in complete], best([t.value for t in complete]), where="post", label="best", color="C3")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    history.savefig(folder / "history.png")

    distributions = {name: each for trial in trials for name, each in trial.distributions.items()}
    slices = Figure((3.2 * len(distributions) + 0.6, 3.6), dpi=110, layout="constrained")
    panels = slices.subplots(1, len(distributions), squeeze=False, sharey=True)[0]
    for axes, (name, distribution) in zip(panels, distributions.items(), strict=True):
        having = [trial for trial in trials if name in trial.params]
        options, log = hasattr(distribution, "choices"), getattr(distribution, "log", False)
        values = [str(trial.params[name]) if options else trial.params[name] for trial in having]
        complete = _scatter(axes, having, values)
        if log:
            axes.set_xscale("log")
            few_decades = max(values) < 100 * min(values)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
            axes.xaxis.set_major_formatter("{x:.3g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        if len(complete) >= FEWEST:
            x = [value for value, trial in zip(values, having, strict=True) if trial in complete]
            fraction = explained(list(np.log(x)) if log else x, [trial.value for trial in complete])
            axes.set_title(f"explains {fraction:.0%} of the variance", fontsize=9)
    panels[0].set_ylabel(metric)
    slices.savefig(folder / "slices.png")
    return [folder / "history.png", folder / "slices.png"]


def _scatter(axes: Any, trials: Sequence[Any], x: Sequence[Any]) -> list[Any]:
    """Draw complete and pruned trials, the later the darker, and return the complete ones."""
    shade = [trial.number for trial in trials]
    style = {"cmap": "Blues", "vmin": min(shade) - len(shade) / 2, "vmax": max(shade)}
    for state, marker in (("COMPLETE", "o"), ("PRUNED", "x")):
        at = [i for i, trial in enumerate(trials) if trial.state.name == state]
        places, values = [x[i] for i in at], [trials[i].value for i in at]
        axes.scatter(places, values, c=[shade[i] for i in at], marker=marker, label=state.lower(), **style)
    axes.grid(alpha=0.25)
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def explained(x: Sequence[Any], y: Sequence[float]) -> float:
    """Return the fraction of the variance of `y` that `x` explains alone, from 0 to 1.

    The fraction is the adjusted R² of a parabola if `x` has numbers, and of a mean per option if `x` has texts.
    Parameters that matter only together explain nothing alone.
    """
    values, target = np.array(x), np.array(y)
    if values.dtype.kind == "U":
        columns = (values[:, None] == np.unique(values)).astype(float)
    else:
        columns = np.vander((values - values.mean()) / (values.std() or 1), 3)
    degrees = len(target) - columns.shape[1]
    if degrees < 1 or target.var() == 0:
        return 0.0
    residual = target - columns @ np.linalg.lstsq(columns, target, rcond=None)[0]
    return float(max(0.0, 1 - (residual**2).sum() / degrees / target.var(ddof=1)))
