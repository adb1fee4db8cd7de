"""A NaN or infinite loss: the run stops, or skips the step."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import summary_of, tiny_train
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.plugins.precision import Precision
from resuming import Harness, at_batch, difference, rows_of

from alexlab.commands import build
from alexlab.data.folder import scan
from alexlab.engine.errors import UserError
from alexlab.tasks.classification import ImageClassifier


def poison(harness: Harness, batches: set[tuple[int, int]]) -> None:
    """Make the network's input NaN in these (epoch, batch), counted from 0, and with it BatchNorm's statistics."""
    plain = ImageClassifier.augmented

    def augmented(self: ImageClassifier, images: Any, targets: Any, batch_idx: int) -> Any:
        images, targets = plain(self, images, targets, batch_idx)
        return (images * math.nan if (self.current_epoch, batch_idx) in batches else images), targets

    harness.monkeypatch.setattr(ImageClassifier, "augmented", augmented)


class Watch(pl.Callback):
    """Records all that a step may change, after each batch of the run."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.learning_rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
        for n, parameter in enumerate(pl_module.parameters()):
            momentum = trainer.optimizers[0].state[parameter].get("momentum_buffer")
            if momentum is not None:
                state[f"momentum {n}"] = momentum.clone()
        self.states.append(state)
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def watched(harness: Harness, name: str, *words: str) -> Watch:
    watch = Watch()
    with harness.own_callbacks(watch):
        harness.train(name, *words)
    return watch


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def images_of(root: Path, epoch: int, batch: int, size: int = 8, seed: int = 0) -> list[str]:
    """Compute the images of a batch by the formula of docs/data.md: a permutation by (seed, epoch)."""
    index = scan(root / "train")
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(index))
    return [index.path(int(i)) for i in order[batch * size : (batch + 1) * size]]


def warnings_of(run_dir: Path) -> list[str]:
    return re.findall("on_nan=skip: .*", (run_dir / "train.log").read_text())


# -- a loss that rises


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_loss_of_over_ten_times_the_first_warns_once_also_over_a_resume(mode: str, harness: Harness) -> None:
    plain, factors = ImageClassifier.training_step, {(0, 3): 4.0, (1, 1): 100.0, (2, 1): 1000.0}

    def training_step(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        loss = plain(self, batch, batch_idx)
        factor = factors.get((self.current_epoch, batch_idx), 1.0)
        return loss + (factor - 1) * loss.detach()  # the weights learn as ever

    harness.monkeypatch.setattr(ImageClassifier, "training_step", training_step)
    words = [f"on_nan={mode}", "trainer.log_every_n_steps=1", "trainer.max_epochs=3"]
    harness.stop(at_batch(8, "after"), "run", *words)
    harness.train("run", *words, "resume.run=auto")
    found = re.findall("train/loss rose .*", (harness.folder / "run/train.log").read_text())
    assert len(found) == 1
    first, later = re.search(
        r"rose from (\S+) to (\S+) in batch 2 of epoch 2, over 10 times the first one: lo", found[0]
    ).groups()
    assert 1 < float(first) < 4, "the loss of chance is ln 10"
    assert 50 < float(later) / float(first) < 200
    assert found[0].endswith("lengthen scheduler.warmup, or clip with trainer.gradient_clip_val=1.")


# -- stop


def test_stop_names_the_images_and_leaves_the_last_good_checkpoint(harness: Harness) -> None:
    """Although the loss is checked only some steps later."""
    poison(harness, {(1, 1)})
    words = ["trainer.log_every_n_steps=100", "checkpoint.every_n_steps=null"]
    with pytest.raises(UserError) as error:
        harness.train("run", *words)
    images = images_of(harness.root, 1, 1)
    assert str(error.value) == (
        f"train/loss became nan in batch 2 of epoch 2 (images: {', '.join(images[:5])} and 3 more, all in train.log). "
        "Lower optimizer.lr, clip with trainer.gradient_clip_val=1, or train with trainer.precision=32-true. last.ckpt "
        f"is from before that step: python train.py resume={harness.folder / 'run'} on_nan=skip skips such steps."
    )
    log = (harness.folder / "run/train.log").read_text()
    assert f"the images are {', '.join(images)}" in log
    saved = torch.load(harness.folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert finite(saved["state_dict"])
    assert summary_of(harness.folder / "run")["status"] == "failed"
    assert not [row for row in rows_of(harness.folder / "run") if "nan" in row.values()]
    harness.train("run", "resume.run=auto", "on_nan=skip", *words)  # needs no resume.allow_changes
    assert summary_of(harness.folder / "run")["status"] == "finished"


def all_are_finite(checkpoints: Path) -> bool:
    paths = [*checkpoints.glob("*.ckpt")]
    return bool(paths) and all(finite(torch.load(path, weights_only=True)["state_dict"]) for path in paths)


@pytest.mark.parametrize("words", [["checkpoint.every_n_steps=2"], ["+trainer.val_check_interval=2"], []], ids=str)
def test_no_spoiled_weights_are_written(words: list[str], harness: Harness) -> None:
    """Whether a checkpoint, a validation or the end of the epoch comes first."""
    poison(harness, {(1, 0)})
    with pytest.raises(UserError, match=r"became nan in batch 1 of epoch 2 .*last.ckpt is from before that step"):
        harness.train("run", "trainer.log_every_n_steps=100", "checkpoint.every_n_steps=null", *words)
    assert all_are_finite(harness.folder / "run/checkpoints")


class Spoil(pl.Callback):
    """Makes the gradient of batch `count` of the run infinite, although the loss is finite."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_after_backward(self, trainer: Any, model: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.count:
            next(model.parameters()).grad[0] = math.inf


@pytest.mark.parametrize(
    "words", [["checkpoint.every_n_steps=1"], ["checkpoint.every_n_steps=null", "trainer.limit_val_batches=0"]], ids=str
)
def test_an_infinite_gradient_spoils_no_checkpoint(words: list[str], harness: Harness) -> None:
    """No loss shows it before the next batch. Also in the last batch of an epoch, and within an accumulation."""
    for count, more in ((6, []), (10, []), (11, ["trainer.accumulate_grad_batches=2", "data.batch_size=4"])):
        run_dir = harness.folder / f"run{count}"
        with (
            harness.own_callbacks(Spoil(count)),
            pytest.raises(UserError, match=r" became nan .*last.ckpt is from bef"),
        ):
            harness.train(run_dir.name, *words, *more)
        assert all_are_finite(run_dir / "checkpoints")
        if more and "checkpoint.every_n_steps=1" in words:
            assert "in batches 1 to 2 of epoch 2" in (run_dir / "train.log").read_text(), "it may be either of them"


class Scaling(Precision):
    """16-mixed on a CPU: the scaler skips steps with infinite gradients."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def pre_backward(self, tensor: Any, module: Any) -> Any:
        return super().pre_backward(self.scaler.scale(tensor), module)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        closure()
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update()


def scale(harness: Harness) -> None:
    plain = build.build_trainer

    def build_trainer(*words: Any) -> pl.Trainer:
        trainer = plain(*words)
        trainer.strategy.precision_plugin = Scaling()
        return trainer

    harness.monkeypatch.setattr(build, "build_trainer", build_trainer)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_skip_works_with_a_gradient_scaler(fused: str, harness: Harness) -> None:
    """The scaler skips the step, and BatchNorm is restored. A gradient that only overflows is not reported."""
    watch = Watch()
    scale(harness)
    poison(harness, {(0, 3)})
    with harness.own_callbacks(Spoil(2), watch):
        harness.train("run", "on_nan=skip", "trainer.precision=32-true", f"optimizer.fused={fused}")
    weights = {name for name in watch.states[0] if "running" not in name and "tracked" not in name}
    steps = [all(torch.equal(watch.states[n][key], watch.states[n + 1][key]) for key in weights) for n in range(9)]
    assert [n for n, still in enumerate(steps) if still] == [0, 2], "the overflow, and the NaN loss"
    assert all(finite(state) for state in watch.states[4:])
    (warning,) = warnings_of(harness.folder / "run")
    assert "in batch 4 of epoch 1" in warning


def test_skip_stops_if_a_step_itself_spoils_the_weights(harness: Harness) -> None:
    """The learning rate is much too high: no gradient shows it."""
    message = r"^on_nan=skip: the weights became nan or inf in batch 1 of epoch 1 .*: no step to skip. Lower"
    with pytest.raises(UserError, match=message):
        harness.train("run", "on_nan=skip", "optimizer.lr=1e38", "scheduler.warmup=0", "scheduler=constant")
    assert not (harness.folder / "run/checkpoints/last.ckpt").exists()


def test_ten_in_a_row_are_in_a_row(harness: Harness) -> None:
    """Good steps between them start the count again."""
    poison(harness, {(epoch, batch) for epoch in range(9) for batch in (0, 2, 4)})
    words = ["on_nan=skip", "trainer.log_every_n_steps=100", "checkpoint.every_n_steps=null", "trainer.max_epochs=5"]
    harness.train("run", *words)
    assert len(warnings_of(harness.folder / "run")) == 15


# -- skip

# a validation comes after batch 5 of each epoch, between the two batches of the third step
VALIDATES_WITHIN_STEPS = ["on_nan=skip", "trainer.accumulate_grad_batches=2", "data.batch_size=4"]
VALIDATES_WITHIN_STEPS += ["+trainer.val_check_interval=5"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_changes_nothing_in_that_step(accumulate: int, harness: Harness) -> None:
    words = [f"trainer.accumulate_grad_batches={accumulate}", f"data.batch_size={8 // accumulate}", "on_nan=skip"]
    plain = watched(harness, "plain", *words)
    poison(harness, {(0, 2 * accumulate), (1, accumulate)})
    found = watched(harness, "run", *words)
    states = found.states[accumulate - 1 :: accumulate]  # after each step
    assert [same(states[n], states[n + 1]) for n in range(9)] == [n in (1, 5) for n in range(9)]
    assert all(finite(state) for state in states)
    assert same(states[1], plain.states[2 * accumulate - 1]), "until then both runs are the same"
    assert found.learning_rates == plain.learning_rates, "the schedule continues"
    warnings = warnings_of(harness.folder / "run")
    images = images_of(harness.root, 0, 2 * accumulate, 8 // accumulate)
    skipped = f"on_nan=skip: train/loss became nan in batch {2 * accumulate + 1} of epoch 1 (images: {images[0]}, "
    assert warnings[0].startswith(skipped)
    assert len(warnings) == 2
    row = next(row for row in rows_of(harness.folder / "run") if "train/loss" in row)
    assert math.isfinite(float(row["train/loss"]))


@pytest.mark.parametrize("scaled", [False, True])
def test_skip_with_a_validation_within_the_step(scaled: bool, harness: Harness) -> None:
    """The validation sees BatchNorm as it was before the step. The step is reported once, at its end."""
    if scaled:
        scale(harness)
    poison(harness, {(0, 4), (1, 5)})
    found = watched(harness, "run", *VALIDATES_WITHIN_STEPS, "trainer.precision=32-true")
    norms = ("running", "tracked") if scaled else ()  # the scaled step's are restored after `found` records them
    states = [{key: v for key, v in state.items() if not any(n in key for n in norms)} for state in found.states[1::2]]
    steps = [n for n in range(9) if same(states[n], states[n + 1])]
    assert steps == [1, 6], "the third of the first epoch and of the second"
    warnings = warnings_of(harness.folder / "run")
    which = re.findall(r"in batch \d of epoch \d", "\n".join(warnings))
    assert which == ["in batch 5 of epoch 1", "in batch 6 of epoch 2"]
    losses = [float(row["val/loss"]) for row in rows_of(harness.folder / "run") if "val/loss" in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


def test_validations_within_steps_do_not_count_them_twice(harness: Harness) -> None:
    poison(harness, {(epoch, batch) for epoch in range(9) for batch in range(0, 10, 2)})
    with pytest.raises(UserError, match=r"in batch 9 of epoch 2 .* in 10 steps in a row, so the images are not"):
        harness.train("run", *VALIDATES_WITHIN_STEPS, "trainer.max_epochs=9")
    warnings = warnings_of(harness.folder / "run")
    assert sum("this step is skipped" in line for line in warnings) == 9


def test_ten_in_a_row_are_counted_over_a_resume(harness: Harness) -> None:
    poison(harness, {(epoch, batch) for epoch in range(1, 9) for batch in range(9)})
    words = ["on_nan=skip", "trainer.max_epochs=4"]
    harness.stop(at_batch(11, "after"), "run", *words)
    with pytest.raises(
        UserError, match=r"^on_nan=skip: train/loss became nan in batch 5 of epoch 3 .* in 10 steps in a r"
    ):
        harness.train("run", *words, "resume.run=auto")


class WatchAverage(pl.Callback):
    """Records the average of the weights before each batch of the run."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        (averaging,) = [each for each in trainer.callbacks if isinstance(each, WeightAveraging)]
        state = averaging._average_model.module.state_dict()  # type: ignore[union-attr, operator]
        self.states.append({name: value.clone() for name, value in state.items()})


@pytest.mark.parametrize("scaled", [False, True])
def test_skip_does_not_change_the_averaged_weights(scaled: bool, harness: Harness) -> None:
    if scaled:
        scale(harness)
    watch = WatchAverage()
    poison(harness, {(0, 2)})
    with harness.own_callbacks(watch):
        harness.train("run", "on_nan=skip", "ema.decay=0.5", "trainer.precision=32-true", "trainer.max_epochs=1")
    assert [n for n in range(4) if same(watch.states[n], watch.states[n + 1])] == [2]


def test_skip_skips_an_infinite_gradient_too(harness: Harness) -> None:
    watch = Watch()
    with harness.own_callbacks(Spoil(3), watch):
        harness.train("run", "on_nan=skip")
    assert same(watch.states[1], watch.states[2])
    assert not same(watch.states[2], watch.states[3])
    (warning,) = warnings_of(harness.folder / "run")
    assert warning.startswith("on_nan=skip: a gradient became nan or inf in batch 3 of epoch 1 (images: ")


# -- both


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_run_with_skipped_steps_resumes_bit_for_bit(place: str, harness: Harness) -> None:
    """From each step: before, after and between the skipped ones."""
    poison(harness, {(0, 3), (1, 1)})
    words = ["on_nan=skip", "trainer.log_every_n_steps=2", "checkpoint.every_n_steps=2"]
    straight = harness.train("straight", *words)
    resumed = harness.train_with_stops("stopped", [(count, place) for count in range(1, 11)], *words)
    assert difference(straight, resumed) is None


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_ranks_agree_if_only_one_has_a_nan_loss(mode: str, shapes: Path, tmp_path: Path) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text("""
import math
from alexlab.tasks.classification import ImageClassifier
plain = ImageClassifier.augmented
def augmented(self, images, targets, batch_idx):
    images, targets = plain(self, images, targets, batch_idx)
    spoiled = (self.current_epoch, batch_idx, self.global_rank) == (1, 1, 1)
    return (images * math.nan if spoiled else images), targets
ImageClassifier.augmented = augmented
""")
    run_dir = tmp_path / "run"
    words = ["trainer=ddp_cpu", "trainer.devices=2", "trainer.max_epochs=2", "trainer.limit_train_batches=1.0"]
    words += ["trainer.precision=32-true", f"on_nan={mode}"]
    done = tiny_train(shapes, run_dir, *words, ranks=2, before=script)
    printed = done.stdout + done.stderr
    images = images_of(shapes, 1, 1)[4:]  # the second rank's half
    assert f"train/loss became nan in batch 2 of epoch 2 (images: {', '.join(images)})" in printed
    assert done.returncode == (0 if mode == "skip" else 2), printed
    saved = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert finite(saved["state_dict"])
    assert saved["global_step"] == (5 if mode == "stop" else 10)
    if mode == "skip":
        second = saved["callbacks"]["Checkpointing"]["ranks"][1]
        assert finite(second["buffers"])
