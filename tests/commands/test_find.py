"""The search for a learning rate and for the largest batch, before a run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command
from resuming import Harness, TinyNet, difference

from alexlab.commands import find, plan
from alexlab.engine.devices import Devices
from alexlab.engine.errors import UserError
from alexlab.engine.schema import TrainConfig


def test_the_run_is_the_same_with_and_without_a_search(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with accumulated batches, and with randomly augmented and mixed images."""
    words = ["trainer.accumulate_grad_batches=2", "augment.mixup=0.2"]
    harness.train("plain", *words)
    assert "learning rate   loss" not in capsys.readouterr().out
    harness.train("found", *words, "trainer.lr_find=true")
    printed = capsys.readouterr().out
    assert printed.index("learning rate   loss (running mean)") < printed.index("The loss falls fastest at ")
    assert "This run uses 0.005." in printed
    assert difference(harness.folder / "plain", harness.folder / "found") is None


def test_a_resumed_run_does_not_search_again(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    harness.train("run", "trainer.lr_find=true", "trainer.max_epochs=1")
    assert "The loss falls fastest" in capsys.readouterr().out
    harness.train("run", "resume.run=auto", "trainer.max_epochs=2")
    assert "The loss falls fastest" not in capsys.readouterr().out


def test_the_rate_is_found_where_the_loss_falls_fastest() -> None:
    """A loss that falls as a logistic curve around step 60, where its slope is largest."""
    rates = [10 ** (i / 20 - 6) for i in range(100)]
    losses = [2 - 1 / (1 + math.exp(-(i - 60) / 5)) for i in range(100)]
    assert find.steepest(rates, losses) == pytest.approx(1e-3)
    assert find.steepest(rates, [1.0 + i / 100 for i in range(100)]) is None, "a loss that only rises"
    early = [3.0, 1.0, *[1.0] * 98]
    assert find.steepest(rates, early) is None, "the first steps are noise"
    assert find.steepest([], []) is None


def test_the_running_mean_of_a_constant_is_that_constant() -> None:
    assert find.smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    # by hand: 0.1 * 1 / 0.1, then (0.9 * 0.1 + 0.1 * 2) / 0.19
    assert find.smooth([1.0, 2.0]) == pytest.approx([1.0, 0.29 / 0.19])


def test_steps_have_rising_rates_in_proportion_to_the_groups(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    plain = find.RangeTest.on_train_batch_start

    def start(self: find.RangeTest, trainer: Any, *more: Any) -> None:
        plain(self, trainer, *more)
        seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    monkeypatch.setattr(find.RangeTest, "on_train_batch_start", start)
    harness.train("run", "trainer.lr_find=true", "optimizer.bias_lr_factor=2", "trainer.max_epochs=1")
    ordered = [sorted(set(rates)) for rates in seen]
    assert ordered[0] == pytest.approx([1e-6, 2e-6])
    assert all(len(rates) == 2 and rates[1] == pytest.approx(2 * rates[0]) for rates in ordered)
    assert len(seen) == 100 or ordered[-1][0] < 1, "or it stopped, because the loss rose"
    assert [rates[0] for rates in ordered] == pytest.approx([1e-6 * 1e6 ** (i / 99) for i in range(len(seen))])


@pytest.mark.parametrize(("limit", "least"), [(1, 1), (7, 7), (100, 89), (1000, 889), (5000, 3000), (0, 0)])
def test_the_search_for_a_size_ends_an_eighth_below_the_limit_or_nearer(limit: int, least: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = find.search(fits, 64, 3000)
    assert least <= found <= min(limit, 3000)
    assert len(set(tried)) == len(tried) < 16
    assert max(tried) <= 3000, "more than the training images"


class Greedy(TinyNet):
    """Says, as torch does on a full GPU, that more than 21 images do not fit."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > 21:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(images)


def test_the_largest_batch_is_found_by_steps_of_the_task(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands for the GPU: the steps, the optimizer and torch's error are real."""
    found: list[str] = []

    def search(config: TrainConfig, devices: Devices, data: Any, planned: plan.Plan, task: Any) -> list[str]:
        task.net.__class__ = Greedy
        size = find.largest_batch(config, "cpu", data, task, planned)
        found.extend([str(size), *find.report_batch(size, planned)])
        task.net.__class__ = TinyNet
        return []

    monkeypatch.setattr("alexlab.commands.train.find", search)
    harness.train("run", "trainer.max_epochs=1")
    size = int(found[0])
    assert 19 <= size <= 21
    assert found[1] == (
        f"The largest batch per device is {size} images: try data.batch_size=16. This run uses 8. With another batch, "
        "another optimizer.lr is best."
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer=ddp_cpu", "trainer.lr_find=true"], "`trainer.lr_find=true` searches on one device, and there are 2"),
        (["trainer=cpu", "trainer.batch_size_find=true"], "`trainer.batch_size_find=true` needs a GPU: on a CPU, time"),
    ],
)
def test_what_cannot_be_searched_is_said_before_the_run(
    words: list[str], message: str, shapes: Path, tmp_path: Path
) -> None:
    more = ["data=folder", f"data.root={shapes}", "data.image_size=64", "data.batch_size=8", "model.net.hidden=[8,8]"]
    done = command("train.py", *words, *more, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_messages_of_a_search_without_result() -> None:
    with pytest.raises(UserError, match=r"^`trainer.lr_find=true`: the loss falls at no learning rate from 1e-06 to 1"):
        find.report_rates([1e-6, 1e-5], [1.0, 2.0], 0.1, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^`trainer.batch_size_find=true`: not even one image fits: lower data.image"):
        find.report_batch(0, None)  # type: ignore[arg-type]
