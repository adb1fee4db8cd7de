"""The search for a learning rate and for the largest batch, before a run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command
from conftest import config_of as compose
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
    assert printed.index("learning rate   loss (running mean)") < printed.index("This run uses 0.005.")
    assert difference(harness.folder / "plain", harness.folder / "found") is None


def test_a_resumed_run_does_not_search_again(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    harness.train("run", "trainer.lr_find=true", "trainer.max_epochs=1")
    assert "learning rate   loss" in capsys.readouterr().out
    assert "learning rate   loss" in (harness.folder / "run/train.log").read_text()
    harness.train("run", "resume.run=auto", "trainer.lr_find=true", "trainer.max_epochs=2")
    printed = capsys.readouterr().out
    assert "learning rate   loss" not in printed
    assert "note: trainer.lr_find=true is ignored, because a resumed run keeps the values that it has." in printed


def curve(loss: Callable[[float], float], noise: float = 0.0) -> tuple[list[float], list[float]]:
    """Return 100 rates from 1e-6 to 1, and the losses of a function of log10(rate), with normal noise."""
    steps = np.linspace(-6, 0, 100)
    losses = [loss(x) + noise * e for x, e in zip(steps, np.random.default_rng(0).normal(size=100), strict=True)]
    return (10**steps).tolist(), losses


def falls(x: float) -> float:
    """2.3 until 1e-4, then on a straight line to 1.3 at 1e-2, where it rises steeply."""
    return 2.3 - max(0, x + 4) / 2 if x < -2 else 1.3 + 2 * (x + 2)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_rate_is_where_the_loss_has_fallen_by_four_fifths(noise: float) -> None:
    """Which is at 10 ** -2.4; the running mean is ten steps behind, which are a factor of four."""
    rate = find.fallen(*curve(falls, noise))
    assert rate is not None
    assert 3e-3 < rate < 2e-2


def test_a_fall_after_a_divergence_does_not_count() -> None:
    rate = find.fallen(*curve(lambda x: falls(x) if x < -1.5 else 2.3 - 2 * (x + 1.5)))
    assert rate is not None
    assert rate < 3e-2, "and not the end of the curve, at 1, where the loss is -0.7"


def test_no_rate_is_found_if_the_loss_falls_by_less_than_its_noise() -> None:
    for loss in (lambda x: 2.3, lambda x: 2.3 + max(0, x + 3), lambda x: 2.3 - 0.01 * (x + 6)):
        assert find.fallen(*curve(loss, 0.1)) is None
    assert find.fallen([], []) is None
    lines = find.report_rates(*curve(lambda x: 2.3, 0.1), 0.1, compose())
    assert lines[-1] == "No rate is clearly good: the loss falls by less than the noise. This run uses 0.1."


@pytest.mark.parametrize("scheduler", ["plateau", "onecycle", "cosine"])
def test_the_search_finds_a_rate_with_which_the_network_learns(
    scheduler: str, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same one for each schedule and each call."""
    words = ["trainer.lr_find=true", f"scheduler={scheduler}", "augment=none", "data.batch_size=40"]
    for dry_run in ("true", "false"):
        harness.train(f"{scheduler}{dry_run}", *words, f"dry_run={dry_run}")
    first, second = re.findall(
        r"At (\S+), 80% of the fall is reached: try optimizer.lr=(\S+)\.", capsys.readouterr().out
    )
    assert first == second
    assert 1e-3 < float(first[0]) < 1


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
    with pytest.raises(UserError, match=r"^`trainer.batch_size_find=true`: not even one image fits: lower data.image"):
        find.report_batch(0, None)  # type: ignore[arg-type]
    one = Devices("cpu", local=1, nodes=1)
    with pytest.raises(
        UserError,
        match=r"^`trainer.lr_find=true` needs a task that takes `optimizer`, and Module builds its own optimizer: ",
    ):
        find.find(compose("trainer.lr_find=true"), one, None, None, torch.nn.Module())  # type: ignore[arg-type]
