"""Whether the confidence of a classifier matches the accuracy, and the temperature with which it does."""

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

BINS = 15  # of the reliability diagram and the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)
COLDEST, HOTTEST = 0.02, 50.0  # range of the temperature


class Outputs(NamedTuple):
    """What a network gives for the images of a split."""

    logits: Tensor  # float32 (N, C), on the CPU
    targets: Tensor  # int64 (N,)


class Calibration(NamedTuple):
    """A temperature, by which logits are divided so that confidence matches accuracy."""

    temperature: float  # above 1 for a network that is too confident
    error: float  # expected calibration error of the tested images, from 0 to 1, without the temperature
    error_calibrated: float  # with it
    optimistic: bool  # whether the tested images are those of the fit
    fitted_on: str = "val"

    @property
    def source(self) -> str:
        return f"fitted on {self.fitted_on}{', so optimistic' if self.optimistic else ''}"


def fit_temperature(outputs: Outputs) -> float:
    """Return the temperature of the least cross-entropy (Guo et al. 2017), within `COLDEST` and `HOTTEST`."""
    from scipy.optimize import minimize_scalar  # only this needs it, and it takes a while

    logits = outputs.logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), outputs.targets))

    bounds = float(np.log(COLDEST)), float(np.log(HOTTEST))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def reliability(outputs: Outputs, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean confidence, the accuracy and the number of images of `BINS` equal ranges of confidence.

    The first two are NaN for a range without images.
    """
    confidence, predicted = (outputs.logits.double() / temperature).softmax(1).max(1)
    right = (predicted == outputs.targets).double().numpy()
    bins = np.minimum((confidence.numpy() * BINS).astype(int), BINS - 1)
    counts, sums, hits = (np.bincount(bins, each, BINS) for each in (None, confidence.numpy(), right))
    with np.errstate(invalid="ignore"):
        return sums / counts, hits / counts, counts


def calibration_error(outputs: Outputs, temperature: float = 1.0) -> float:
    """Return the expected calibration error: the mean distance of accuracy and confidence, from 0 to 1."""
    confidence, accuracy, counts = reliability(outputs, temperature)
    return float(np.nansum(np.abs(confidence - accuracy) * counts) / counts.sum())


def measure_calibration(outputs: Outputs, temperature: float, optimistic: bool) -> Calibration:
    """Measure the calibration error without and with a temperature."""
    errors = calibration_error(outputs), calibration_error(outputs, temperature)
    return Calibration(temperature, *errors, optimistic)
