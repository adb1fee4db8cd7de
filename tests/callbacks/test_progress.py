"""What is printed while a run trains."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alexlab.callbacks import progress


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The messages of the project's logger."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("alexlab")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


def trainer_at(epoch: int, metrics: dict[str, float] | None = None) -> Any:
    values = {key: torch.tensor(value) for key, value in (metrics or {}).items()}
    trainer = SimpleNamespace(current_epoch=epoch, max_epochs=3, is_global_zero=True, num_training_batches=40)
    trainer.callback_metrics = trainer.progress_bar_metrics = values
    return trainer


def test_an_epoch_is_reported_with_all_its_metrics_once_they_are_complete(lines: list[str]) -> None:
    """A user's metrics are among them; the best values, those of a step, and a few that nobody reads are not."""
    reporter: Any = progress.ProgressReporter()
    reporter.on_train_epoch_start(trainer_at(0), None)
    assert lines == []
    metrics = {"train/loss_step": 9.0, "val/acc1": 0.25, "val/acc5": 0.5, "val/f1": 0.125, "val/acc1_best": 0.3}
    metrics |= {"train/loss": 2.5, "train/my_metric": 7.0, "lr": 0.1, "perf/data_wait": 0.351}
    reporter.on_train_epoch_start(trainer_at(1, metrics), None)
    (line,) = lines
    shown = "train/loss 2.5000 | train/my_metric 7.0000 | val/acc1 0.2500 | val/f1 0.1250 | data wait 35%"
    assert line.startswith("epoch 1/3 | ")
    assert line.partition(" s | ")[2] == shown


def test_a_long_epoch_reports_its_progress(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    reporter: Any = progress.ProgressReporter()
    trainer = trainer_at(1, {"train/loss_step": 2.25})
    reporter.on_train_epoch_start(trainer, None)
    for batch in range(4):
        clock[0] += 25
        reporter.on_train_batch_end(trainer, None, None, None, batch)
    assert lines == ["epoch 2/3, batch 3/40 | loss 2.250"]


def test_the_bar_shows_short_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    bar: Any = progress.ProgressBar()
    metrics = {"v_num": 1, "train/loss_step": 2.34567, "perf/images_per_second_step": 251.7, "val/loss": 1.0}
    metrics |= {"val/acc1": 0.5, "val/f1": 0.25}
    monkeypatch.setattr(progress.RichProgressBar, "get_metrics", lambda *_: metrics)
    shown = {"loss": "2.346", "images/s": "252", "val": "0.500", "val/f1": "0.2500"}
    assert bar.get_metrics(trainer_at(0), None) == shown
