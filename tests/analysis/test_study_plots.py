"""Plots of a study: how much of the variance a parameter explains, and files for any study."""

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from alexlab.analysis.study_plots import draw, explained


def test_explained_variance_is_that_of_a_parabola_or_of_means() -> None:
    rng = np.random.default_rng(0)
    log_lr, noise = rng.uniform(-3, -1, 40), rng.uniform(0, 1, 40)
    model = ["alexnet", "vgg"] * 20
    scores = list(0.8 - 0.4 * (log_lr + 2) ** 2)
    assert explained(list(log_lr), scores) == pytest.approx(1)
    assert explained(list(noise), scores) < 0.2
    assert explained(model, scores) < 0.2
    assert explained(model, [float(name == "vgg") for name in model]) == pytest.approx(1)
    assert explained(model, [0.5] * 40) == 0, "nothing varies"
    assert explained([1, 2, 3], [0.1, 0.7, 0.3]) == 0, "some parabola fits any three points"


@pytest.mark.parametrize(("count", "direction"), [(1, "minimize"), (2, "maximize"), (8, "minimize")])
def test_any_study_can_be_drawn(count: int, direction: str, tmp_path: Path) -> None:
    """Also one with failed and pruned trials, and with parameters that some trials lack."""
    kinds = {
        "optimizer.lr": FloatDistribution(0.001, 0.1, log=True), "model": CategoricalDistribution(["alexnet", "vgg"]),
        "ema.decay": CategoricalDistribution([None, 0.9]), "augment.policy_ops": IntDistribution(1, 4),
    }  # fmt: skip
    study = optuna.create_study(direction=direction)
    for number in range(count):
        model, decay = (("vgg", None), ("alexnet", 0.9))[number % 2]
        params = {"optimizer.lr": 0.001 * 1.9**number, "model": model, "ema.decay": decay, "augment.policy_ops": 2}
        if number == 3:
            del params["model"]
        state = {5: TrialState.FAIL, 6: TrialState.PRUNED}.get(number, TrialState.COMPLETE)
        value = None if state == TrialState.FAIL else 1.0 / (1 + number)
        having = {name: kinds[name] for name in params}
        study.add_trial(create_trial(params=params, value=value, state=state, distributions=having))
    paths = draw(study, "val/loss", tmp_path / "figures")
    assert [path.name for path in paths] == ["history.png", "slices.png"]
    for path in paths:
        assert len(Image.open(path).convert("L").getcolors(256) or []) > 20, "more than an empty frame"


def test_the_best_value_is_that_of_complete_trials(tmp_path: Path) -> None:
    images = []
    for direction in ("minimize", "maximize"):
        study = optuna.create_study(direction=direction)
        for value in (0.2, 0.9, 0.3):
            study.add_trial(create_trial(params={"x": 1}, value=value, distributions={"x": IntDistribution(1, 2)}))
        images.append(np.asarray(Image.open(draw(study, "m", tmp_path / direction)[0])))
    assert images[0].shape == images[1].shape
    assert np.any(images[0] != images[1]), "the line falls, or rises"
