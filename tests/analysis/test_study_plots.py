"""Plots of a study: what explains its values, and pictures that can be drawn of any."""

import numpy as np
import pytest

from alexlab.analysis.study_plots import (
    Parameter,
    Point,
    _round_values,
    explained,
    history,
    importances,
    parallel,
    slices,
)

RATE, DECAY = Parameter("optimizer.lr", log=True), Parameter("optimizer.weight_decay")
MODEL = Parameter("model", options=("alexnet", "vgg"))


def study(count: int = 40) -> list[Point]:
    """The value is a parabola in the rate's logarithm; the decay is noise, and the model nearly so."""
    draws = np.random.default_rng(0)
    points = []
    for number in range(count):
        rate, decay = 10 ** draws.uniform(-3, -1), draws.uniform(0, 0.01)
        value = 0.8 - 0.4 * (np.log10(rate) + 2) ** 2
        params = {"optimizer.lr": rate, "optimizer.weight_decay": decay, "model": ("alexnet", "vgg")[number % 2]}
        points.append(Point(number, value, params, pruned=number % 7 == 6))
    return points


def test_what_explains_a_study_is_seen() -> None:
    points = study()
    assert explained(points, RATE) == pytest.approx(1)
    assert explained(points, DECAY) < 0.2
    assert explained(points, MODEL) < 0.2
    by_model = [Point(p.number, float(p.params["model"] == "vgg"), p.params) for p in points]
    assert explained(by_model, MODEL) == pytest.approx(1)
    assert explained([Point(p.number, 0.5, p.params) for p in points], RATE) == 0, "nothing varies"
    assert explained(points[:3], RATE) == 0, "a parabola goes through any three"


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("parameters", [[RATE], [RATE, DECAY, MODEL]])
def test_any_study_can_be_drawn(count: int, parameters: list[Parameter]) -> None:
    points = study(count)
    drawn = [history(points, "val/acc1", True), parallel(points, parameters, "val/acc1", True),
             slices(points, parameters, "val/acc1")]  # fmt: skip
    told = importances(points, parameters, "val/acc1")
    assert (told is None) == (count < 5)
    for image in (*drawn, *([told] if told else [])):
        assert len(image.convert("L").getcolors(256) or []) > 20, "more than an empty frame"


def test_a_study_without_a_whole_trial_can_be_drawn() -> None:
    """A parameter was taken for another; trials share one, or none."""
    points = [Point(0, 0.2, {"optimizer.lr": 0.1, "model": "vgg"}), Point(1, 0.3, {"optimizer.lr": 0.2, "decay": 0.1})]
    parameters = [RATE, MODEL, Parameter("decay")]
    drawn = parallel(points, parameters, "val/acc1", True)
    shared = parallel(points, [RATE], "val/acc1", True)
    assert drawn is not None
    assert np.array_equal(np.asarray(drawn), np.asarray(shared)), "the rate, which all trials have"
    assert parallel(points, parameters[1:], "val/acc1", True) is None
    assert slices(points, parameters, "val/acc1").size[0] > slices(points, [RATE], "val/acc1").size[0]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0011, 0.09], [0.002, 0.005, 0.01, 0.02, 0.05]),
        ([0.00001, 0.0002, 0.01], [1e-5, 1e-4, 1e-3, 1e-2]),
        ([1e-9, 1], [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
        ([0.03, 0.031], [0.03, 0.031]),
        ([0.03, 0.12], [0.05, 0.1]),
        ([3], [3]),
        ([16, 128], [20, 50, 100]),
    ],
)
def test_a_logarithms_axis_has_round_values(values: list[float], ticks: list[float]) -> None:
    assert _round_values(values) == pytest.approx(ticks)


def test_a_best_line_follows_the_finished_trials() -> None:
    """One that was pruned may have been better for a while, and is not the best."""
    points = [Point(0, 0.2, {}), Point(1, 0.9, {}, pruned=True), Point(2, 0.3, {})]
    without = [point for point in points if not point.pruned]
    assert np.any(np.asarray(history(points, "m", True)) != np.asarray(history(without, "m", True)))
    assert np.any(np.asarray(history(without, "m", True)) != np.asarray(history(without, "m", False)))


def test_an_option_that_was_pruned_alone_is_no_share() -> None:
    """A parameter that no finished trial has explains nothing of them, and the others are drawn."""
    points = [p for p in study(12) if not p.pruned]
    lone = Point(99, 0.1, {"decay": 0.1}, pruned=True)
    drawn, without = (importances(each, parameters, "val/acc1") for each, parameters in
                      (([*points, lone], [RATE, MODEL, Parameter("decay")]), (points, [RATE, MODEL])))  # fmt: skip
    assert drawn is not None
    assert without is not None
    assert np.array_equal(np.asarray(drawn), np.asarray(without))
    assert importances([*points, lone], [Parameter("decay")], "val/acc1") is None
