"""Plots of an Optuna study, as Optuna draws them: the best value so far, values by parameter, and importances."""

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from optuna import Study
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances, plot_slice

FEWEST = 5  # complete trials from which importances can be estimated


def draw(study: Study, metric: str, folder: Path) -> list[Path]:
    """Save history.png, slices.png and, with enough trials, importances.png to `folder`; return their paths.

    At least one trial must be complete.
    """
    matplotlib.use("Agg")  # draws without a display
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these functions are experimental, and warn of few trials
        drawn: dict[str, Any] = {
            "history": plot_optimization_history(study, target_name=metric),
            "slices": plot_slice(study, target_name=metric),
        }
        if sum(trial.state.name == "COMPLETE" for trial in study.trials) >= FEWEST:
            drawn["importances"] = plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    for name, axes in drawn.items():
        paths.append(folder / f"{name}.png")
        np.ravel(axes)[0].figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths
