"""Metrics over the images of an epoch. Sums stay on the device, so that no training step waits for the device."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from alexlab.engine.errors import UserError
from alexlab.engine.targets import Trusted, build_part, locate

TOP_K = 5
MOST_BYTES = 1e9  # of scores that a metric such as AUROC may keep; above it, scores are counted in bins
BINS = 200


class MeanLoss(Metric):
    """Mean loss, exact over any split of the images into batches and ranks.

    `window_means` gives the means since the previous call, for the curves within an epoch. Each step calls `add`, which
    is `update` without torchmetrics' bookkeeping.
    """

    NAMES: tuple[str, ...] = ("loss",)
    WINDOW: tuple[str, ...] = ("loss",)  # the first of NAMES: what is logged within an epoch
    full_state_update = False
    past: Tensor  # the sums up to the last window_means: one for each of NAMES, and the number of images
    window: Tensor  # the same sums since then

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # `add` does not clear a cache
        for name in ("past", "window"):
            self.add_state(name, torch.zeros(len(self.NAMES) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def sums(self, logits: Tensor, labels: Tensor, loss: Tensor) -> list[Tensor]:
        """Return the sum over the images of a batch for each of NAMES."""
        return [loss * len(labels)]

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch: logits (B, num_classes), labels (B, ...), and the mean loss of the batch."""
        logits, loss = logits.detach(), loss.detach()
        sums = self.sums(logits, labels, loss)
        self.window.add_(torch.stack([*sums, loss.new_full((), len(labels))]))

    update = add

    def window_means(self) -> dict[str, float]:
        """Return the means of WINDOW on this rank since the previous call; NaN without an image."""
        *sums, images = self.window.tolist()
        self.past.add_(self.window)
        self.window.zero_()
        means = [total / images if images else math.nan for total in sums]
        return dict(zip(self.WINDOW, means, strict=False))

    def compute(self) -> dict[str, float]:
        """Return the means over the images of all ranks; empty without an image."""
        *sums, images = (self.past + self.window).tolist()
        return dict(zip(self.NAMES, (total / images for total in sums), strict=True)) if images else {}


class LossAndAccuracy(MeanLoss):
    """Mean loss, top-1 and top-5 accuracy (0 to 1) of images of one class each.

    With fewer than five classes, top-5 is top-`num_classes`, which is 1.
    """

    NAMES = ("loss", "acc1", "acc5")
    WINDOW = ("loss", "acc1")

    def sums(self, logits: Tensor, labels: Tensor, loss: Tensor) -> list[Tensor]:
        """Return the sums of loss, top-1 and top-5 hits. Labels are int64 (B,)."""
        # argmax, as in the confusion matrix: topk may put any of several equal logits first, and bf16 has many
        top1 = logits.argmax(1) == labels
        top_k = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
        top5 = top1 | (top_k == labels[:, None]).any(1)
        return [loss * len(labels), top1.sum(), top5.sum()]


# -- the metrics of conf/metrics


def build_metrics(
    settings: dict[str, Any], trusted: Trusted, known: dict[str, Any], images: int, note: Callable[[str], Any]
) -> MetricCollection:
    """Build the metrics of conf/metrics by name.

    Metrics that keep all scores, such as AUROC, get `thresholds` bins if the scores would take more than MOST_BYTES.

    Args:
        known: arguments that metrics get if they name them, such as num_classes.
        images: of the largest split.
        note: prints a line.

    Raises:
        UserError: an entry is not a metric, or a constructor refuses the settings.
    """
    metrics: dict[str, Metric] = {}
    size = 4 * images * int(known["num_classes"])
    for name, entry in settings.items():
        takes_bins = "thresholds" in inspect.signature(locate(str(entry["_target_"]), trusted)).parameters
        if takes_bins and size > MOST_BYTES and entry.get("thresholds") is None:
            entry = {**entry, "thresholds": BINS}
            note(
                f"metrics.{name}: the scores of {images:,} images would take {size / 1e9:.1f} GB, so they are counted "
                f"in {BINS} bins. metrics.{name}.thresholds=N sets another number."
            )
        words = "metric: give a class derived from torchmetrics.Metric"
        metrics[name] = build_part(f"metrics.{name}", entry, Metric, words, trusted, known)
    return MetricCollection(metrics)  # type: ignore[arg-type]


def try_metrics(metrics: MetricCollection, probabilities: Tensor, labels: Tensor) -> None:
    """Update and compute copies of the metrics with random predictions, to find a wrong metric before training.

    Raises:
        UserError: a metric refuses them.
    """
    for name, metric in metrics.items():
        try:
            copy = metric.clone()
            copy.update(probabilities, labels)
            copy.compute()
        except Exception as error:
            shapes = f"probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}"
            raise UserError(
                f"metrics.{name}: {type(metric).__name__} refuses {shapes} ({str(error).splitlines()[0]}): check its "
                "settings, or choose another metric."
            ) from error


def better(metric: Any) -> Literal["min", "max"] | None:
    """Return whether less or more of a metric is better, from `metric.higher_is_better`; None if unknown."""
    higher = getattr(metric, "higher_is_better", None)
    return None if higher is None else "max" if higher else "min"
