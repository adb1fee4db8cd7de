"""What is shown while a run trains."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alexlab.callbacks import progress


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the project's logger is given."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("alexlab")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


def trainer_at(epoch: int, **metrics: float) -> Any:
    values = {key: torch.tensor(value) for key, value in metrics.items()}
    return SimpleNamespace(
        current_epoch=epoch, max_epochs=3, is_global_zero=True, num_training_batches=40, callback_metrics=values,
        progress_bar_metrics=values,
    )  # fmt: skip


def test_an_epoch_is_told_once_all_its_metrics_are_there(told: list[str]) -> None:
    plain = progress.PlainProgress()
    plain.on_train_epoch_start(trainer_at(0), None)  # type: ignore[arg-type]
    assert told == []
    plain.on_train_epoch_start(trainer_at(1, **{"train/loss": 2.5, "val/acc1": 0.25}), None)  # type: ignore[arg-type]
    (shown,) = told
    assert shown.startswith("epoch 1/3 | ")
    assert shown.endswith(" s | train/loss 2.5000 | val/acc1 0.2500")


def test_a_long_epoch_says_how_far_it_is(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    plain, trainer = progress.PlainProgress(), trainer_at(1, **{"train/loss_step": 2.25})
    plain.on_train_epoch_start(trainer, None)  # type: ignore[arg-type]
    for batch in range(4):
        clock[0] += 25
        plain.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert told == ["epoch 2/3, batch 3/40 | loss 2.250"]


def test_the_bar_counts_from_1_and_writes_short_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = progress.Bar()
    bar._trainer = trainer_at(0)
    assert bar._get_train_description(0) == "epoch 1/3"
    found = {"v_num": 1, "train/loss_step": 2.34567, "perf/images_per_second_step": 251.7, "val/acc1": 0.5}
    monkeypatch.setattr(progress.RichProgressBar, "get_metrics", lambda *words: found)
    assert bar.get_metrics(bar._trainer, None) == {"loss": "2.346", "images/s": "252", "val": "0.500"}  # type: ignore[arg-type]
