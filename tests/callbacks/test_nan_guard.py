"""A loss that is no number: the run stops, leaves the step out, or goes back to its checkpoint."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, SMALL_NET, command, summary_of
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.plugins.precision import Precision
from resuming import Harness, at_batch, difference, rows_of

from alexlab.callbacks.checkpointing import Snapshots
from alexlab.callbacks.nan_guard import OnNan
from alexlab.commands import train as run
from alexlab.data.folder import scan
from alexlab.engine.errors import UserError
from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.metrics import Sums


def poison(monkeypatch: pytest.MonkeyPatch, batches: set[tuple[int, int]]) -> None:
    """What the net sees of these (epoch, batch), from 0, is nan, and with it all that BatchNorm counts."""
    plain = ImageClassifier.augmented

    def augmented(self: ImageClassifier, images: Any, targets: Any, batch_idx: int) -> Any:
        images, targets = plain(self, images, targets, batch_idx)
        return (images * math.nan if (self.current_epoch, batch_idx) in batches else images), targets

    monkeypatch.setattr(ImageClassifier, "augmented", augmented)


class Watch(pl.Callback):
    """All that a step may change, after each batch of the run."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
        for n, parameter in enumerate(pl_module.parameters()):
            momentum = trainer.optimizers[0].state[parameter].get("momentum_buffer")
            if momentum is not None:
                state[f"momentum {n}"] = momentum.clone()
        self.states.append(state)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def watched(harness: Harness, monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> Watch:
    watch = Watch()
    with monkeypatch.context() as patch:
        patch.setattr("alexlab.commands.train.build_callbacks", lambda _: [watch])
        harness.train(name, *words)
    return watch


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def images_of(root: Path, epoch: int, batch: int, size: int = 8, seed: int = 0) -> list[str]:
    """By the formula that docs/data.md promises: a permutation of (seed, epoch)."""
    index = scan(root / "train")
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(index))
    return [index.path(int(i)) for i in order[batch * size : (batch + 1) * size]]


def warnings_of(run_dir: Path, start: str) -> list[str]:
    lines = (run_dir / "train.log").read_text().splitlines()
    return [line[line.index(start) :] for line in lines if start in line]


# -- stop


def test_stop_names_the_images_and_keeps_the_checkpoint_before(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the loss is looked at some steps later only."""
    poison(monkeypatch, {(1, 1)})
    words = ["trainer.log_every_n_steps=100", "checkpoint.every_n_steps=null"]
    with pytest.raises(UserError) as told:
        harness.train("run", *words)
    images = images_of(harness.root, 1, 1)
    assert str(told.value) == (
        f"train/loss became nan in batch 2 of epoch 2 (images: {', '.join(images[:5])} and 3 more, all in train.log). "
        "Lower optimizer.lr, clip with trainer.gradient_clip_val=1, or train with trainer.precision=32-true. last.ckpt "
        f"is from before it: python train.py resume={harness.folder / 'run'} on_nan=skip goes on there without such "
        "steps."
    )
    log = (harness.folder / "run/train.log").read_text()
    assert f"its images are {', '.join(images)}" in log
    saved = torch.load(harness.folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert finite(saved["state_dict"])
    assert summary_of(harness.folder / "run")["status"] == "failed"
    assert not [row for row in rows_of(harness.folder / "run") if "nan" in row.values()]
    harness.train("run", "resume.run=auto", "on_nan=skip", *words)  # without resume.allow_changes
    assert summary_of(harness.folder / "run")["status"] == "finished"


def test_no_spoiled_weights_are_written(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes first: a checkpoint, a validation, or the end of the epoch."""
    for words in (["checkpoint.every_n_steps=2"], ["+trainer.val_check_interval=2"], []):
        shutil.rmtree(harness.folder / "run", ignore_errors=True)
        with monkeypatch.context() as patch:
            poison(patch, {(1, 0)})
            with pytest.raises(UserError, match=r"became nan in batch 1 of epoch 2 .*last.ckpt is from before it"):
                harness.train("run", "trainer.log_every_n_steps=100", "checkpoint.every_n_steps=null", *words)
        for path in (harness.folder / "run/checkpoints").glob("*.ckpt"):
            assert finite(torch.load(path, weights_only=True)["state_dict"]), path.name


class Spoil(pl.Callback):
    """The gradient of batch `count` of the run is inf, and the loss a number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_after_backward(self, trainer: Any, model: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.count:
            next(model.parameters()).grad[0] = math.inf


@pytest.mark.parametrize("mode", ["stop", "rollback"])
@pytest.mark.parametrize(
    "words", [["checkpoint.every_n_steps=1"], ["checkpoint.every_n_steps=null", "trainer.limit_val_batches=0"]], ids=str
)
def test_a_gradient_that_is_no_number_spoils_no_checkpoint(
    mode: str, words: list[str], harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which no loss tells before the next batch; also in an epoch's last, and in a part of a step."""
    for count, more in ((6, []), (10, []), (11, ["trainer.accumulate_grad_batches=2", "data.batch_size=4"])):
        shutil.rmtree(harness.folder / "run", ignore_errors=True)
        monkeypatch.setattr("alexlab.commands.train.build_callbacks", lambda _, count=count: [Spoil(count)])
        if mode == "stop":
            with pytest.raises(UserError, match=r" became nan .*last.ckpt is from before it"):
                harness.train("run", f"on_nan={mode}", *words, *more)
        else:
            harness.train("run", f"on_nan={mode}", *words, *more)
        for path in (harness.folder / "run/checkpoints").glob("*.ckpt"):
            assert finite(torch.load(path, weights_only=True)["state_dict"]), path.name
        if more and "checkpoint.every_n_steps=1" in words:
            log = (harness.folder / "run/train.log").read_text()
            assert "in batches 1 to 2 of epoch 2" in log, "which of them it was nobody knows"


def test_going_back_within_an_accumulation(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a validation there: what is left of the spoiled gradient must not be used."""
    poison(monkeypatch, {(0, 4)})
    words = ["trainer.accumulate_grad_batches=2", "data.batch_size=4", "+trainer.val_check_interval=5"]
    harness.train("run", "on_nan=rollback", *words)
    for path in (harness.folder / "run/checkpoints").glob("*.ckpt"):
        assert finite(torch.load(path, weights_only=True)["state_dict"]), path.name
    assert len(warnings_of(harness.folder / "run", "on_nan=rollback: ")) == 1


class Scaling(Precision):
    """16-mixed on a CPU: the scaler leaves steps out whose gradients are no numbers."""

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


def scale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run.build_trainer

    def build_trainer(*words: Any) -> pl.Trainer:
        trainer = plain(*words)
        trainer.strategy.precision_plugin = Scaling()
        return trainer

    monkeypatch.setattr(run, "build_trainer", build_trainer)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_skip_beside_a_scaler(fused: str, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the step out, and BatchNorm is put back. A gradient that overflows alone is the scaler's own affair."""
    watch = Watch()
    monkeypatch.setattr("alexlab.commands.train.build_callbacks", lambda _: [Spoil(2), watch])
    scale(monkeypatch)
    poison(monkeypatch, {(0, 3)})
    harness.train("run", "on_nan=skip", "trainer.precision=32-true", f"optimizer.fused={fused}")
    weights = {name for name in watch.states[0] if "running" not in name and "tracked" not in name}
    steps = [all(torch.equal(watch.states[n][key], watch.states[n + 1][key]) for key in weights) for n in range(9)]
    assert [n for n, still in enumerate(steps) if still] == [0, 2], "the scaler's, and the one without a loss"
    assert all(finite(state) for state in watch.states[4:])
    (told,) = warnings_of(harness.folder / "run", "on_nan=skip: ")
    assert "in batch 4 of epoch 1" in told


def test_skip_ends_where_a_step_itself_spoils_the_weights(harness: Harness) -> None:
    """By a rate that is much too high: there is no gradient that could have been left out."""
    with pytest.raises(
        UserError, match=r"^on_nan=skip: the weights became nan or inf in batch 1 of epoch 1 .* cannot be"
    ):
        harness.train("run", "on_nan=skip", "optimizer.lr=1e38", "scheduler.warmup=0", "scheduler=constant")
    assert not (harness.folder / "run/checkpoints/last.ckpt").exists()


def test_ten_in_a_row_are_in_a_row(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where good steps between them were not looked at."""
    poison(monkeypatch, {(epoch, batch) for epoch in range(9) for batch in (0, 2, 4)})
    words = ["on_nan=skip", "trainer.log_every_n_steps=100", "checkpoint.every_n_steps=null", "trainer.max_epochs=5"]
    harness.train("run", *words)
    assert len(warnings_of(harness.folder / "run", "on_nan=skip: ")) == 15


def test_a_rate_that_is_too_high_is_told_from_the_command_line(shapes: Path, tmp_path: Path) -> None:
    done = command(
        "train.py", *SMALL_NET, "data=folder", f"data.root={shapes}", "data.image_size=64", "data.batch_size=8",
        "data.num_workers=0", "logger=csv", "trainer=cpu", "optimizer.lr=1e30", "scheduler.warmup=0",
        f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"train/loss became (nan|inf) in batch \d of epoch 1 \(images: .*jpg", done.stderr)
    assert "last.ckpt" not in done.stderr


# -- skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_changes_nothing_in_that_step(accumulate: int, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"trainer.accumulate_grad_batches={accumulate}", f"data.batch_size={8 // accumulate}", "on_nan=skip"]
    plain = watched(harness, monkeypatch, "plain", *words)
    poison(monkeypatch, {(0, 2 * accumulate), (1, accumulate)})
    found = watched(harness, monkeypatch, "run", *words)
    states = found.states[accumulate - 1 :: accumulate]  # after each step
    assert [same(states[n], states[n + 1]) for n in range(9)] == [n in (1, 5) for n in range(9)]
    assert all(finite(state) for state in states)
    assert same(states[1], plain.states[2 * accumulate - 1]), "until then it is the run without it"
    assert found.rates == plain.rates, "the schedule goes on"
    told = warnings_of(harness.folder / "run", "on_nan=skip: ")
    images = images_of(harness.root, 0, 2 * accumulate, 8 // accumulate)
    assert told[0].startswith(f"on_nan=skip: train/loss became nan in batch {2 * accumulate + 1} of epoch 1 (images: ")
    assert images[0] in told[0]
    assert len(told) == 2
    row = next(row for row in rows_of(harness.folder / "run") if "train/loss" in row)
    assert math.isfinite(float(row["train/loss"]))


@pytest.mark.parametrize("scaled", [False, True])
def test_skip_with_a_validation_within_the_step(
    scaled: bool, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees BatchNorm as it was before the step, which is counted once, when it is done."""
    if scaled:
        scale(monkeypatch)
    poison(monkeypatch, {(0, 4), (1, 5)})
    words = ["on_nan=skip", "trainer.accumulate_grad_batches=2", "data.batch_size=4", "+trainer.val_check_interval=5"]
    found = watched(harness, monkeypatch, "run", *words, "trainer.precision=32-true")
    norms = ("running", "tracked") if scaled else ()  # the scaled step's are put back after `found` looks at them
    states = [{key: v for key, v in state.items() if not any(n in key for n in norms)} for state in found.states[1::2]]
    steps = [n for n in range(9) if same(states[n], states[n + 1])]
    assert steps == [1, 6], "the third of the first epoch and of the second"
    told = warnings_of(harness.folder / "run", "on_nan=skip: ")
    assert [re.search(r"in batch \d of epoch \d", line)[0] for line in told] == [  # type: ignore[index]
        "in batch 5 of epoch 1", "in batch 6 of epoch 2",
    ]  # fmt: skip
    losses = [float(row["val/loss"]) for row in rows_of(harness.folder / "run") if "val/loss" in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


def test_validations_within_steps_do_not_count_them_twice(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {(epoch, batch) for epoch in range(9) for batch in range(0, 10, 2)})
    words = ["on_nan=skip", "trainer.accumulate_grad_batches=2", "data.batch_size=4", "+trainer.val_check_interval=5"]
    with pytest.raises(UserError, match=r"in batch 9 of epoch 2 .* in 10 steps in a row: it is not the images"):
        harness.train("run", *words, "trainer.max_epochs=9")
    told = warnings_of(harness.folder / "run", "on_nan=skip: ")
    assert sum("this step is left out" in line for line in told) == 9


def test_ten_in_a_row_are_counted_over_a_resume(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {(epoch, batch) for epoch in range(1, 9) for batch in range(9)})
    words = ["on_nan=skip", "trainer.max_epochs=4"]
    harness.end(at_batch(11, "after"), "run", *words)
    with pytest.raises(UserError, match=r"in batch 5 of epoch 3 .* in 10 steps in a row: it is not the images"):
        harness.train("run", *words, "resume.run=auto")


class WatchAverage(pl.Callback):
    """The average of the weights before each batch of the run."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        (averaging,) = [each for each in trainer.callbacks if isinstance(each, WeightAveraging)]
        state = averaging._average_model.module.state_dict()  # type: ignore[union-attr, operator]
        self.states.append({name: value.clone() for name, value in state.items()})


@pytest.mark.parametrize("scaled", [False, True])
def test_skip_leaves_the_average_as_it_is(scaled: bool, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    if scaled:
        scale(monkeypatch)
    watch = WatchAverage()
    monkeypatch.setattr("alexlab.commands.train.build_callbacks", lambda _: [watch])
    poison(monkeypatch, {(0, 2)})
    harness.train("run", "on_nan=skip", "ema.decay=0.5", "trainer.precision=32-true", "trainer.max_epochs=1")
    assert [n for n in range(4) if same(watch.states[n], watch.states[n + 1])] == [2]


def test_a_gradient_that_is_no_number_is_left_out_too(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    monkeypatch.setattr("alexlab.commands.train.build_callbacks", lambda _: [Spoil(3), watch])
    harness.train("run", "on_nan=skip")
    assert same(watch.states[1], watch.states[2])
    assert not same(watch.states[2], watch.states[3])
    told = warnings_of(harness.folder / "run", "on_nan=skip: ")
    assert len(told) == 1
    assert told[0].startswith("on_nan=skip: a gradient became nan or inf in batch 3 of epoch 1 (images: ")


def test_skip_ends_where_it_does_not_help(harness: Harness) -> None:
    with pytest.raises(UserError, match=r"^on_nan=skip: train/loss became .* in 10 steps in a row: it is not the imag"):
        harness.train("run", "on_nan=skip", "model.net.dropout=0", "augment=none", "trainer.max_epochs=3",
                      *_always_nan(harness))  # fmt: skip


def _always_nan(harness: Harness) -> list[str]:
    poison(harness.monkeypatch, {(epoch, batch) for epoch in range(9) for batch in range(9)})
    return []


# -- rollback


def test_rollback_takes_the_checkpoints_states_and_goes_on(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at in the end of the epoch: its last steps are those of the checkpoint at its second."""
    saved: list[dict[str, torch.Tensor]] = []
    plain = Snapshots.save

    def save(self: Snapshots, place: str) -> None:
        plain(self, place)
        state = torch.load(self.path, weights_only=True)
        momenta = {f"momentum {n}": v["momentum_buffer"] for n, v in state["optimizer_states"][0]["state"].items()}
        saved.append({name.removeprefix("net."): v for name, v in state["state_dict"].items()} | momenta)

    monkeypatch.setattr(Snapshots, "save", save)
    words = ["trainer.log_every_n_steps=100", "checkpoint.every_n_steps=2"]
    straight = watched(harness, monkeypatch, "straight", *words)
    saved.clear()
    poison(monkeypatch, {(0, 3)})
    found = watched(harness, monkeypatch, "run", *words, "on_nan=rollback")
    assert not finite(found.states[3])
    second, fourth = saved[:2]
    assert same(fourth, second), "it is looked at before a checkpoint is written"
    weights = {name: value for name, value in second.items() if "momentum" not in name}
    assert all(torch.equal(value, found.states[1][name]) for name, value in weights.items())
    assert not same(found.states[4], fourth), "it goes on"
    assert finite(found.states[4])
    assert found.rates == straight.rates
    told = warnings_of(harness.folder / "run", "on_nan=rollback: ")
    assert len(told) == 1
    assert told[0].endswith("weights and optimizer are those of step 2 again, and the next images follow.")
    assert images_of(harness.root, 0, 3)[0] in told[0]
    row = next(row for row in rows_of(harness.folder / "run") if "train/loss" in row)
    assert math.isfinite(float(row["train/loss"]))


def test_rollback_with_averages(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {(0, 3)})
    run_dir = harness.train("run", "on_nan=rollback", "ema.decay=0.5", "checkpoint.every_n_steps=2")
    for name in ("last", "best"):
        saved = torch.load(run_dir / f"checkpoints/{name}.ckpt", weights_only=True)
        assert finite(saved["state_dict"])
    assert summary_of(run_dir)["status"] == "finished"


def test_rollback_to_when_the_head_alone_learned(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer of then knew nothing of the other layers, which learn by now."""
    poison(monkeypatch, {(1, 1)})
    words = ["on_nan=rollback", "finetune.freeze_epochs=1", "optimizer.fused=true", "checkpoint.every_n_steps=null"]
    found = watched(harness, monkeypatch, "run", *words)
    (told,) = warnings_of(harness.folder / "run", "on_nan=rollback: ")
    assert "those of step 5 again" in told
    assert finite(found.states[-1])
    assert not torch.equal(found.states[4]["layers.0.weight"], found.states[-1]["layers.0.weight"])


def test_what_rollback_cannot_do_is_told(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, {(0, 0)})
        with pytest.raises(
            UserError, match=r"^on_nan=rollback: .* and there is no checkpoint to go back to yet. Lower"
        ):
            harness.train("none", "on_nan=rollback", "checkpoint.every_n_steps=null")
    again = r"^on_nan=rollback: .*, for the 4th time since the weights of step 5. Lower"
    for name, bad, words in (
        ("again", {(1, batch) for batch in range(9)}, ["checkpoint.every_n_steps=null"]),
        ("anew", {(1, batch) for batch in range(9)}, ["checkpoint.every_n_steps=1"]),  # under other numbers
        ("epochs", {(epoch, 4) for epoch in range(1, 9)}, ["checkpoint.every_n_steps=null", "trainer.max_epochs=9"]),
    ):
        with monkeypatch.context() as patch:
            poison(patch, bad)
            with pytest.raises(UserError, match=again):
                harness.train(name, "on_nan=rollback", *words)


def test_how_often_it_went_back_is_kept(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {(1, batch) for batch in range(9)})
    words = ["on_nan=rollback", "checkpoint.every_n_steps=1"]
    harness.end(at_batch(7, "after"), "run", *words)
    place = torch.load(harness.folder / "run/checkpoints/last.ckpt", weights_only=True)["alexlab"]["place"]
    assert (place["origin"], place["went_back"]) == (5, 2)
    with pytest.raises(UserError, match=r"in batch 4 of epoch 2 .*, for the 4th time since the weights of step 5"):
        harness.train("run", *words, "resume.run=auto")


def test_rollback_passes_a_damaged_checkpoint_over(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = OnNan._newest

    def newest(self: OnNan) -> Any:
        path = harness.folder / "run/checkpoints/last.ckpt"
        path.write_bytes(path.read_bytes()[:-9])
        return plain(self)

    monkeypatch.setattr(OnNan, "_newest", newest)
    poison(monkeypatch, {(0, 3)})
    harness.train("run", "on_nan=rollback")
    (told,) = warnings_of(harness.folder / "run", "on_nan=rollback: ")
    assert "those of step 2 again" in told, "previous.ckpt's; last.ckpt was of step 3"


def test_a_run_from_a_checkpoint_can_go_back_to_it(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.end(at_batch(3, "after"), "first")
    poison(monkeypatch, {(0, 3)})
    harness.train("run", "on_nan=rollback", f"ckpt_path={harness.folder / 'first'}", "checkpoint.every_n_steps=null")
    (told,) = warnings_of(harness.folder / "run", "on_nan=rollback: ")
    assert "those of step 3 again" in told


# -- all of them


@pytest.mark.parametrize("mode", ["skip", "rollback"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_run_with_such_steps_goes_on_bit_for_bit(
    mode: str, place: str, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from each step, before, after and between those that are left out."""
    poison(monkeypatch, {(0, 3), (1, 1)})
    words = [f"on_nan={mode}", "trainer.log_every_n_steps=2", "checkpoint.every_n_steps=2"]
    straight = harness.train("straight", *words)
    for count in range(1, 11):
        shutil.rmtree(harness.folder / "ended", ignore_errors=True)
        harness.end(at_batch(count, place), "ended", *words)
        going_on = harness.train("ended", *words, "resume.run=auto")
        assert difference(straight, going_on) is None, f"ended {place} the end of batch {count}"


@pytest.mark.parametrize("mode", ["stop", "skip", "rollback"])
def test_ranks_agree_where_one_alone_has_such_a_batch(mode: str, shapes: Path, tmp_path: Path) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(f"""
import math, runpy, sys
from alexlab.tasks.classification import ImageClassifier
plain = ImageClassifier.augmented
def augmented(self, images, targets, batch_idx):
    images, targets = plain(self, images, targets, batch_idx)
    spoiled = (self.current_epoch, batch_idx, self.global_rank) == (1, 1, 1)
    return (images * math.nan if spoiled else images), targets
ImageClassifier.augmented = augmented
sys.argv[0] = {str(ROOT / "train.py")!r}
sys.path[0] = {str(ROOT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    run_dir = tmp_path / "run"
    done = command(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *SMALL_NET, "data=folder",
        f"data.root={shapes}", "data.image_size=64", "data.batch_size=8", "data.num_workers=0", "logger=csv",
        "trainer=ddp_cpu", "trainer.devices=2", "trainer.max_epochs=2", "callbacks.figures=false",
        "trainer.precision=32-true", f"on_nan={mode}", f"hydra.run.dir={run_dir}",
    )  # fmt: skip
    told = done.stdout + done.stderr
    images = images_of(shapes, 1, 1)[4:]  # the second rank's half
    assert f"train/loss became nan in batch 2 of epoch 2 (images: {', '.join(images)})" in told
    assert (done.returncode == 0) == (mode != "stop"), told
    saved = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert finite(saved["state_dict"])
    assert saved["global_step"] == (5 if mode == "stop" else 10)
    if mode == "skip":
        assert all(value.isfinite().all() for value in saved["alexlab"]["place"]["buffers"].values())


def test_sums_without_what_is_no_number() -> None:
    sums, other = Sums(torch.device("cpu")), Sums(torch.device("cpu"))
    logits = torch.eye(6)[:4] * 9
    sums.add(torch.tensor(0.5), logits, torch.tensor([0, 1, 2, 0]), finite_only=True)
    sums.add(torch.tensor(math.nan), logits * math.nan, torch.tensor([0, 0, 0, 0]), finite_only=True)
    other.take(sums)
    assert other.merged(lambda values: values) == {"loss": 0.5, "acc1": 0.75, "acc5": 1.0}
    assert other.counted().tolist() == [4]
    nothing = Sums(torch.device("cpu"))
    nothing.add(torch.tensor(math.inf), logits, torch.tensor([0, 1, 2, 0]), finite_only=True)
    assert nothing.merged(lambda values: values) == {}
    whole = Sums(torch.device("cpu"))
    whole.add(torch.tensor(math.nan), logits, torch.tensor([0, 1, 2, 0]))
    assert math.isnan(whole.merged(lambda values: values)["loss"]), "a validation is not embellished"
