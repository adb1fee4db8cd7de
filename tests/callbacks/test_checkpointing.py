"""What each rank alone knows, in last.ckpt: restored on as many ranks or others, from this version or an older one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassF1Score

from alexlab.callbacks.checkpointing import Checkpointing
from alexlab.callbacks.nan_guard import NanGuard
from alexlab.callbacks.preemption import Preemption
from alexlab.engine.checkpoint_io import position_of
from alexlab.engine.errors import UserError
from alexlab.engine.signals import SignalRecorder
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import RunInfo
from alexlab.tasks.classification import ImageClassifier


class LastValue(CatMetric):
    """Cannot be merged: torchmetrics knows no way to add its states."""

    full_state_update = True


def callback_of(folder: Path) -> Checkpointing:
    return Checkpointing(folder, Preemption(SignalRecorder()), NanGuard("stop", folder / "last.ckpt", ""))


def task_of(metrics: MetricCollection | None = None) -> ImageClassifier:
    augment = BatchAugment([0.5] * 3, [0.5] * 3, 4)
    return ImageClassifier(nn.BatchNorm2d(2), augment, metrics=metrics, run=RunInfo(list("abcd")))


def restored(checkpoint: dict[str, Any], metrics: MetricCollection | None = None, **ranks: int) -> ImageClassifier:
    """The task of one rank after a resume."""
    callback, task = callback_of(Path()), task_of(metrics)
    trainer: Any = SimpleNamespace(**ranks, state=SimpleNamespace(fn="fit"), lightning_module=task)
    callback.trainer = trainer
    callback.on_load_checkpoint(trainer, task, checkpoint)
    callback._restore_ranks()
    return task


def saved(*ranks: dict[str, Any]) -> dict[str, Any]:
    return {"alexlab": {}, "state_dict": {}, "callbacks": {"Checkpointing": {**PLACE, "ranks": list(ranks)}}}


# sums (ranks, 8): loss, top-1, top-5 and images of the epoch until the last row of metrics, and since then
SUMS = torch.tensor([[8.0, 2, 4, 8, 4, 1, 2, 4], [16, 3, 5, 8, 2, 0, 1, 4]], dtype=torch.float64)
MEANS = {"running_mean": torch.tensor([[1.0, 2.0], [3.0, 6.0]])}
PLACE = {"of": "step", "validated_at": 3, "metrics": {"val/loss": 0.5}, "skipped": {"a.jpg": "empty"}}
OLDER = {"alexlab": {"place": {**PLACE, "sums": SUMS, "buffers": MEANS}}, "state_dict": {}, "callbacks": {}}


def means_of(task: ImageClassifier) -> tuple[dict[str, float], dict[str, float]]:
    metric = task.sums["train"]
    return metric.window_means(), metric.compute()


def test_an_older_checkpoint_is_restored_on_as_many_ranks() -> None:
    for rank, window, loss, mean in ((0, 4 / 4, 12 / 12, [1.0, 2.0]), (1, 2 / 4, 18 / 12, [3.0, 6.0])):
        task = restored(OLDER, world_size=2, global_rank=rank)
        since, epoch = means_of(task)
        assert (since["loss"], epoch["loss"]) == (window, loss)
        assert task.net.running_mean.tolist() == mean  # type: ignore[union-attr, operator]
        assert task.skipped == {"a.jpg": "empty"}


def test_an_older_checkpoint_is_restored_on_other_ranks() -> None:
    """The first has the sums of all, and each the mean statistics."""
    first, second, third = (restored(OLDER, world_size=3, global_rank=rank) for rank in range(3))
    since, epoch = means_of(first)
    assert since == {"loss": 6 / 8, "acc1": 1 / 8}
    assert epoch == {"loss": 30 / 24, "acc1": 6 / 24, "acc5": 12 / 24}
    assert means_of(second)[1] == means_of(third)[1] == {}
    for task in (first, second, third):
        assert task.net.running_mean.tolist() == [2.0, 4.0]  # type: ignore[union-attr, operator]


def states_of(task: ImageClassifier) -> dict[str, Any]:
    callback = callback_of(Path())
    callback.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    return callback._gather_ranks(task)[0]


def updated(metrics: MetricCollection, logits: Tensor, labels: Tensor) -> ImageClassifier:
    task = task_of(metrics)
    task.update_metrics("train", logits, labels, nn.functional.cross_entropy(logits, labels))
    return task


def test_a_users_metric_is_restored_on_any_number_of_ranks() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 4), torch.randint(0, 4, (20,))
    metrics = MetricCollection({"f1": MulticlassF1Score(4), "f1_of_classes": MulticlassF1Score(4, average="none")})
    ranks = [updated(metrics, logits[part], labels[part]) for part in (slice(0, 8), slice(8, 20))]
    checkpoint = saved(*map(states_of, ranks))
    for rank, before in enumerate(ranks):
        task = restored(checkpoint, metrics, world_size=2, global_rank=rank)
        assert task.metrics["train"]["f1"].compute() == before.metrics["train"]["f1"].compute()
        assert means_of(task) == means_of(before)
    alone = restored(checkpoint, metrics, world_size=1, global_rank=0)
    whole = updated(metrics, logits, labels)
    assert alone.metrics["train"]["f1"].compute() == whole.metrics["train"]["f1"].compute()
    assert means_of(alone)[1] == pytest.approx(means_of(whole)[1])


def test_a_metric_that_cannot_be_merged_needs_as_many_ranks() -> None:
    metrics = MetricCollection({"last": LastValue()})
    checkpoint = saved(states_of(task_of(metrics)), states_of(task_of(metrics)))
    restored(checkpoint, metrics, world_size=2, global_rank=0)
    with pytest.raises(UserError, match=r"The metric last cannot be resumed on 1 ranks instead of 2 \(.*: resume on 2"):
        restored(checkpoint, metrics, world_size=1, global_rank=0)


def test_statistics_of_averaged_weights_are_restored_where_lightning_reads_them() -> None:
    averages = [{"running_mean": torch.tensor([float(rank), 1.0])} for rank in (0, 1)]
    ranks = [{"metrics": {}, "buffers": {}, "average": average} for average in averages]
    for world_size, rank, expected in ((2, 1, [1.0, 1.0]), (1, 0, [0.5, 1.0])):
        checkpoint = saved(*ranks)
        restored(checkpoint, world_size=world_size, global_rank=rank)
        assert checkpoint["state_dict"]["net.running_mean"].tolist() == expected


def test_weights_alone_have_no_position() -> None:
    assert position_of({"alexlab": {"best": {}}}) is None
    assert position_of(OLDER) is OLDER["alexlab"]["place"]


def test_another_version_of_lightnings_loops_is_refused() -> None:
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()))
    with pytest.raises(AttributeError, match=r"^Lightning \S+ has no SimpleNamespace._iteration_based_training: use 2"):
        callback_of(Path()).install(trainer)
