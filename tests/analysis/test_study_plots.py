"""Optuna draws any study: also one with failed and pruned trials, and with parameters that some trials lack."""

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from alexlab.analysis.study_plots import draw

KINDS = {
    "optimizer.lr": FloatDistribution(0.001, 0.1, log=True), "model": CategoricalDistribution(["alexnet", "vgg"]),
    "ema.decay": CategoricalDistribution([None, 0.9]), "augment.policy_ops": IntDistribution(1, 4),
}  # fmt: skip


@pytest.mark.parametrize(("count", "direction"), [(1, "minimize"), (8, "maximize")])
def test_any_study_can_be_drawn(count: int, direction: str, tmp_path: Path) -> None:
    study = optuna.create_study(direction=direction)
    for number in range(count):
        model, decay = (("vgg", None), ("alexnet", 0.9))[number % 2]
        params = {"optimizer.lr": 0.001 * 1.9**number, "model": model, "ema.decay": decay, "augment.policy_ops": 2}
        if number == 3:
            del params["model"]
        state = {5: TrialState.FAIL, 6: TrialState.PRUNED}.get(number, TrialState.COMPLETE)
        value = None if state == TrialState.FAIL else 1.0 / (1 + number)
        having = {name: KINDS[name] for name in params}
        study.add_trial(create_trial(params=params, value=value, state=state, distributions=having))
    paths = draw(study, "val/loss", tmp_path / "figures")
    assert [path.stem for path in paths] == ["history", "slices", *(["importances"] if count > 5 else [])]
    for path in paths:
        assert len(Image.open(path).convert("L").getcolors(256) or []) > 20, "more than an empty frame"
