"""A run that was stopped anywhere resumes bit for bit: weights, states, metrics, summary.

All in this process; test_faults.py really kills processes.
"""

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm.scheduler
import torch
from resuming import Harness, Killed, at_batch, difference, own_schedule, rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler

from alexlab.callbacks.checkpointing import Checkpointing
from alexlab.data.datamodule import ImageFolders
from alexlab.data.folder import scan
from alexlab.engine import config, files, resume
from alexlab.engine.errors import UserError
from alexlab.tasks.classification import ImageClassifier

BATCHES = 10  # of two epochs
ALL_PLACES = int(os.environ.get("ALEXLAB_FAULTS", "1")) > 1  # `make faults`

SETTINGS = [
    [],
    ["trainer.accumulate_grad_batches=2", "data.batch_size=4"],
    ["trainer.accumulate_grad_batches=3", "data.batch_size=4", "+trainer.val_check_interval=0.5"],
    ["+trainer.val_check_interval=0.6", "scheduler=plateau"],  # a checkpoint between validation and end of epoch
    ["ema.decay=0.9", "+trainer.val_check_interval=0.5", "callbacks.early_stopping=9"],
    ["optimizer=adamw", "trainer.check_val_every_n_epoch=2", "finetune.freeze_epochs=1"],
    ["data.sampler=balanced", "data.folds=2", "data.fold=1", "data.batch_size=6"],
    ["trainer.max_steps=10", "trainer.max_epochs=null", "scheduler=constant", "finetune.freeze_epochs=1"],
    [*own_schedule("torch.optim.lr_scheduler.OneCycleLR", "interval=step"), "optimizer.layer_decay=0.5"],
]


@pytest.mark.parametrize("words", SETTINGS, ids=lambda words: " ".join(words) or "plain")
def test_resume_from_every_step(words: list[str], harness: Harness) -> None:
    """One run that is stopped and resumed at each batch, before or after its validation and checkpoint in turn.

    `make faults` stops at both, each time a run that was not stopped before.
    """
    straight = harness.train("straight", *words)
    last = torch.load(straight / "checkpoints/last.ckpt", weights_only=True)
    batches = last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    assert batches >= BATCHES
    in_turn = [(count, ("before", "after")[count % 2]) for count in range(1, batches + 1)]
    alone = [[(count, place)] for count in range(1, batches + 1) for place in ("before", "after")]
    for stops in alone if ALL_PLACES else [in_turn]:
        resumed = harness.train_with_stops("stopped", stops, *words)
        assert difference(straight, resumed) is None, f"stopped at {stops}"


TORCHS, TIMMS = "torch.optim.lr_scheduler", "timm.scheduler"
RATES = [
    ("OneCycleLR", ["interval=step"], lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=15)),
    ("CosineLRScheduler", ["warmup_t=1"], lambda o: timm.scheduler.CosineLRScheduler(o, 3, warmup_t=1)),
]


@pytest.mark.parametrize(("name", "keys", "build"), RATES, ids=["onecycle by step", "timm by epoch"])
def test_the_learning_rates_of_a_resumed_schedule_are_those_of_the_library(
    name: str, keys: list[str], build: Callable[[Any], Any], harness: Harness
) -> None:
    """Three epochs of five steps, stopped within the first and the second, and at an epoch's end."""
    package = TORCHS if hasattr(lr_scheduler, name) else TIMMS
    words = ["trainer.max_epochs=3", "optimizer.momentum=0.9", *own_schedule(f"{package}.{name}", *keys)]
    scheduler = build(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.005, momentum=0.9))
    expected = []
    for step in range(15):
        expected.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        ends = step % 5 == 4
        if package == TORCHS:
            scheduler.step()
        elif package == TIMMS and ends:
            scheduler.step(step // 5 + 1)
    assert len(set(expected)) >= 3

    straight = harness.train("straight", *words)
    assert [float(row["lr/decay"]) for row in rows_of(straight) if "lr/decay" in row] == pytest.approx(expected)
    stops = [(2, "before"), (2, "after"), (5, "before"), (7, "after"), (10, "after")]
    assert difference(straight, harness.train_with_stops("stopped", stops, *words)) is None


def test_a_plateau_of_torch_equals_ours_and_resumes(harness: Harness) -> None:
    """The learning rate is far too high, so that the metric does not improve."""
    words = ["trainer.max_epochs=3", "optimizer.lr=3.0"]
    ours = harness.train("ours", *words, "scheduler=plateau", "scheduler.patience=0", "scheduler.factor=0.5")
    plateau = own_schedule(f"{TORCHS}.ReduceLROnPlateau", "patience=0", "factor=0.5", "monitor=val/acc1")
    straight = harness.train("straight", *words, *plateau)
    rates = [row["lr/decay"] for row in rows_of(straight) if "lr/decay" in row]
    assert len(set(rates)) > 1
    assert rows_of(straight) == rows_of(ours)
    stopped = harness.train_with_stops("stopped", [(5, "before"), (7, "after"), (10, "after")], *words, *plateau)
    assert difference(straight, stopped) is None


@pytest.mark.parametrize(
    ("target", "keys", "why"),
    [
        (
            f"{TORCHS}.CosineAnnealingLR",
            [],
            r"trained for 5 steps, .* follows: T_max=1 \(now 3\)\. Set max_epochs",
        ),
        (f"{TIMMS}.CosineLRScheduler", ["interval=step"], r"trained for 5 steps, .*: t_initial=5 \(now 15\)\. Set max"),
        (f"{TORCHS}.CosineAnnealingLR", ["T_max=3"], None),
        (f"{TORCHS}.StepLR", ["step_size=1"], None),
    ],
)
def test_a_schedule_that_follows_from_the_length_of_the_run_cannot_be_prolonged(
    target: str, keys: list[str], why: str | None, harness: Harness
) -> None:
    words = own_schedule(target, *keys)
    harness.train("run", *words, "trainer.max_epochs=1")
    longer = ["resume.run=auto", "trainer.max_epochs=3"]
    if why is not None:
        with pytest.raises(UserError, match=why):
            harness.train("run", *words, *longer)
        return
    straight = harness.train("straight", *words, "trainer.max_epochs=3")
    assert difference(straight, harness.train("run", *words, *longer)) is None


def test_resume_with_one_checkpoint_per_epoch(harness: Harness) -> None:
    """And without any yet, when the run starts from scratch."""
    words = ["checkpoint.every_n_steps=null"]
    straight = harness.train("straight", *words)
    resumed = harness.train_with_stops("stopped", [(count, "after") for count in (2, 5, 6, 9, 10)], *words)
    assert difference(straight, resumed) is None


class SignalAt(pl.Callback):
    """Sends this process a signal within a hook of batch `count`."""

    def __init__(self, hook: str, count: int, number: int) -> None:
        def send(trainer: Any, *_: Any) -> None:
            ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if ready == count and not self.sent and not trainer.sanity_checking:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        setattr(self, hook, send)


def stop_by_signals(harness: Harness, hook: str, signals: dict[int, int], *words: str) -> list[int]:
    """Stop a run in a hook of these batches by these signals, resuming it each time; return the steps done by then."""
    steps = []
    shutil.rmtree(harness.folder / "stopped", ignore_errors=True)
    for count, number in signals.items():
        sender = SignalAt(hook, count, number)
        with harness.own_callbacks(sender), pytest.raises(SystemExit) as stopped:
            harness.train("stopped", *words, "resume.run=auto")
        assert stopped.value.code == 128 + number
        assert sender.sent
        saved = torch.load(harness.folder / "stopped/checkpoints/last.ckpt", weights_only=True)
        steps.append(saved["global_step"])
    return steps


SIGNALS = {2: signal.SIGTERM, 4: signal.SIGUSR1, 5: signal.SIGINT, 10: signal.SIGTERM}


@pytest.mark.parametrize(
    ("word", "validated"), [("+trainer.val_check_interval=0.5", [2, 4]), ("ema.decay=0.9", [5, 10])], ids=str
)
def test_resume_from_signals(word: str, validated: list[int], harness: Harness) -> None:
    """No step is lost and none is done twice, not even if the signal came within a validation."""
    words = [word, "checkpoint.every_n_steps=null", "checkpoint.every_minutes=null"]
    straight = harness.train("straight", *words)
    for hook, counts, steps in (
        ("on_train_batch_start", [2, 4, 5, 10], [2, 4, 5, 10]),
        ("on_validation_batch_start", validated, validated),
        ("on_validation_epoch_end", validated, [min(count + 1, 10) for count in validated]),  # one batch later
    ):
        assert stop_by_signals(harness, hook, {count: SIGNALS[count] for count in counts}, *words) == steps
        assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


def test_resume_from_signals_in_the_same_validation_again(harness: Harness) -> None:
    """The resumed run repeats the validation, and is stopped in it like the run before."""
    words = ["ema.decay=0.9", "checkpoint.every_n_steps=null", "checkpoint.every_minutes=null"]
    straight = harness.train("straight", *words)
    for _ in range(3):
        sender = SignalAt("on_validation_batch_start", 5, signal.SIGTERM)
        with harness.own_callbacks(sender), pytest.raises(SystemExit):
            harness.train("stopped", *words, "resume.run=auto")
        assert sender.sent
    assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


ACCUMULATING = ["trainer.accumulate_grad_batches=3", "data.batch_size=4", "checkpoint.every_n_steps=null"]


def test_resume_from_signals_in_validations_within_an_accumulation(harness: Harness) -> None:
    """An epoch has nine batches and validations after two, four, six and eight. Gradients are in no checkpoint."""
    words = [*ACCUMULATING, "+trainer.val_check_interval=2"]
    straight = harness.train("straight", *words)
    signals = dict.fromkeys((2, 4, 8), signal.SIGTERM)
    steps = stop_by_signals(harness, "on_validation_batch_start", signals, *words)
    assert steps == [1, 2, 3], "the step under way is finished"
    assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


class TimeIsUpAt(pl.Callback):
    """Stops the run as Lightning's Timer does, at a batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready >= self.count:
            trainer.should_stop = True


def test_resume_after_the_time_was_up(harness: Harness) -> None:
    words = [*ACCUMULATING, "trainer.max_epochs=3"]
    straight = harness.train("straight", *words)
    for count in (11, 12, 13):
        with harness.own_callbacks(TimeIsUpAt(count)):
            stopped = harness.train(f"stopped{count}", *words)
        saved = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == -(-count // 3), "the step under way is finished"
        (stopped / "summary.json").unlink()  # which says finished; a larger trainer.max_time would prolong the run
        assert difference(straight, harness.train(stopped.name, *words, "resume.run=auto")) is None


def test_resume_after_a_batch_whose_images_are_all_broken(harness: Harness, tmp_path: Path) -> None:
    """Its row of metrics has NaN, not the values of the batch before; a longer window has its own means."""
    harness.root = Path(shutil.copytree(harness.root, tmp_path / "data"))
    index = scan(harness.root / "train")
    order = np.random.Generator(np.random.PCG64([0, 0])).permutation(len(index))  # docs/data.md
    for i in order[24:32]:
        Path(index.path(int(i))).write_bytes(b"none")
    for every, step in ((1, 3), (2, 3)):
        words = ["data.on_error=skip", f"trainer.log_every_n_steps={every}", "trainer.max_epochs=1"]
        straight = harness.train(f"straight{every}", *words)
        (row,) = [row for row in rows_of(straight) if row["step"] == str(step) and "train/loss_step" in row]
        assert math.isnan(float(row["train/loss_step"])) == (every == 1)
        resumed = harness.train_with_stops("stopped", [(count, "after") for count in (2, 3, 4)], *words)
        assert difference(straight, resumed) is None


def test_tensorboard_forgets_the_steps_after_the_checkpoint(harness: Harness) -> None:
    """Stopped before the checkpoint of the fifth step, the run logs the fifth step again."""
    stops = [(5, "before")]
    run_dir = harness.train_with_stops("run", stops, "logger=tensorboard", "checkpoint.every_n_steps=3")
    read = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("train/loss_step")] == [*range(10)]


def test_checkpoints_are_written_by_the_clock(harness: Harness) -> None:
    words = ["checkpoint.every_n_steps=null", "checkpoint.every_minutes=1e-9"]
    harness.stop(at_batch(3, "after"), "stopped", *words)
    saved = torch.load(harness.folder / "stopped/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] >= 2


@pytest.mark.parametrize(
    ("words", "short", "long"),
    [
        ([], "trainer.max_epochs=1", "trainer.max_epochs=3"),
        (["trainer.max_epochs=null"], "trainer.max_steps=3", "trainer.max_steps=8"),
    ],
)
def test_a_prolonged_run_equals_one_that_was_longer(words: list[str], short: str, long: str, harness: Harness) -> None:
    words = ["scheduler=constant", *words]
    straight = harness.train("straight", *words, long)
    harness.train("more", *words, short)
    assert difference(straight, harness.train("more", *words, "resume.run=auto", long)) is None


# -- these tests would notice each of the following mistakes in the code that resumes


def _off_by_one(patch: pytest.MonkeyPatch) -> None:
    plain = ImageFolders.train_dataloader

    def loader(self: ImageFolders) -> Any:
        made = plain(self)
        epoch, batch = made.batch_sampler.resume_at  # type: ignore[union-attr]
        made.batch_sampler.resume_at = (epoch, max(0, batch - 1))  # type: ignore[union-attr]
        return made

    patch.setattr(ImageFolders, "train_dataloader", loader)


def _after_load(change: Callable[[dict[str, Any]], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change the checkpoint before anything is restored from it."""

    def load(self: ImageClassifier, checkpoint: dict[str, Any]) -> None:
        change(checkpoint)

    return lambda patch: patch.setattr(ImageClassifier, "on_load_checkpoint", load)


def _always(owner: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Make an attribute of a class read-only."""
    return lambda patch: patch.setattr(owner, property(lambda _: value, lambda *_: None), raising=False)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a batch twice": _off_by_one,
    "no batch is skipped": _always("alexlab.data.sampler.TrainBatchSampler.resume_at", (0, 0)),
    "the epoch's sums are forgotten": lambda patch: patch.setattr(Checkpointing, "_restore_ranks", lambda self: None),
    "the validation of the last step is forgotten": _after_load(
        lambda checkpoint: checkpoint["callbacks"]["Checkpointing"].update(of="end")
    ),
    "the best metrics are forgotten": _always("alexlab.callbacks.checkpointing.Checkpointing.restores_best", False),
    "metrics.csv is not cut": lambda patch: patch.setattr(resume, "cut_csv", lambda path, rows: 0),
    "metrics.csv is cut too far": lambda patch: patch.setattr(
        resume, "cut_csv", lambda path, rows: files.cut_csv(path, rows - 1)
    ),
    "the optimizer's state is forgotten": _after_load(lambda ckpt: ckpt["optimizer_states"][0].update(state={})),
    "the schedule starts again": _after_load(lambda ckpt: ckpt["lr_schedulers"][0].update(last_epoch=0, _step_count=1)),
    "random numbers are not seeded by step": lambda patch: patch.setattr("alexlab.tasks.base.reseed", lambda *_: None),
    "BatchNorm's statistics are forgotten": _after_load(
        lambda checkpoint: [v.zero_() for k, v in checkpoint["state_dict"].items() if k.endswith("running_mean")]
    ),
    "the step's number is one too low": _after_load(
        lambda checkpoint: checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"].update(_batches_that_stepped=2)
    ),
}
MUTATED = ["+trainer.val_check_interval=0.6", "trainer.log_every_n_steps=1", "optimizer.momentum=0.9"]


@pytest.fixture(scope="module")
def stopped_runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped, and others that were, each at another point."""
    with pytest.MonkeyPatch.context() as patch:
        harness = Harness(shapes, tmp_path_factory.mktemp("stopped"), patch)
        harness.train("straight", *MUTATED)
        for count in (3, 4, 9):  # the third batch is validated after its checkpoint
            _stop_after_checkpoint(harness, count, f"stopped{count}", *MUTATED)
        harness.stop(at_batch(4, "after"), "stopped", *MUTATED, "checkpoint.every_n_steps=3")
        return harness.folder


@pytest.mark.parametrize("mutation", [None, *MUTATIONS], ids=str)
def test_a_mistake_would_be_noticed(mutation: str | None, stopped_runs: Path, harness: Harness) -> None:
    found = []
    for name in ("stopped3", "stopped4", "stopped9", "stopped"):
        shutil.copytree(stopped_runs / name, harness.folder / name)
        with harness.monkeypatch.context() as patch:
            if mutation is not None:
                MUTATIONS[mutation](patch)
            try:
                resumed = harness.train(name, *MUTATED, "resume.run=auto")
                found.append(difference(stopped_runs / "straight", resumed))
            except AttributeError:  # the mutation is of older code
                raise
            except Exception as error:
                found.append(repr(error))
        if any(found):
            break
    assert any(found) == (mutation is not None), "a run with this mistake equals one without"


def _stop_after_checkpoint(harness: Harness, count: int, name: str, *words: str) -> None:
    """Stop a run right after the checkpoint of a step, before its validation."""
    plain = Checkpointing.save

    def save(self: Checkpointing, place: str) -> None:
        plain(self, place)
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.completed == count:
            raise Killed

    with harness.monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "save", save)
        with pytest.raises(Killed):
            harness.train(name, *words)


# -- mistakes of users


def refused(message: str, harness: Harness, *words: str) -> None:
    with pytest.raises(UserError, match=message):
        harness.train("x", *words)


def test_resume_refuses_what_it_cannot_do(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    folder = harness.folder
    harness.stop(at_batch(3, "after"), "stopped")
    named, allowed = f"resume.run={folder / 'stopped'}", "resume.allow_changes=true"
    other = "last.ckpt was trained with different settings: optimizer.lr=0.5"
    refused(other, harness, named, "optimizer.lr=0.5", allowed)
    with files.lock(folder / "stopped", ".lock.rank"):
        refused("is still training in another process: wait", harness, named)
    assert not (folder / "x").exists()
    harness.train("x", named, "label_smoothing=0.1", allowed)
    less = r"has done 2 epochs \(10 steps\), and this run would end after 5 steps: set a trainer.max_epochs above 2"
    refused(less, harness, named, "trainer.max_epochs=1")
    capsys.readouterr()
    harness.train("stopped", "resume.run=auto")
    assert "resume=auto: " in capsys.readouterr().out


def test_the_same_command_line_resumes(harness: Harness) -> None:
    """Also with overrides that config.yaml shows in another form, or not at all."""
    first = harness.train("first")
    words = ["~optimizer.momentum", f"init_from={first}", "model.mean=auto"]
    straight = harness.train("straight", *words)
    harness.stop(at_batch(4, "after"), "stopped", *words)
    assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


def test_a_folder_of_runs_may_be_a_link(harness: Harness) -> None:
    """As logs/ often links to a larger disk: curves and best checkpoint continue."""
    straight = harness.train("straight")
    harness.stop(at_batch(8, "after"), "stopped")
    (harness.folder / "link").symlink_to(harness.folder)
    harness.train("x", f"resume.run={harness.folder / 'link/stopped'}")
    assert difference(straight, harness.folder / "stopped") is None
    assert config.load(harness.folder / "stopped/config.yaml")["run_dir"] == str((harness.folder / "stopped").resolve())
    harness.stop(at_batch(8, "after"), "auto")
    last = harness.folder / "auto/checkpoints/last.ckpt"
    last.rename(harness.folder / "elsewhere.ckpt")
    last.symlink_to(harness.folder / "elsewhere.ckpt")
    assert difference(straight, harness.train("link/auto", "resume.run=auto")) is None


def test_an_override_can_be_changed_back_by_a_later_resume(harness: Harness) -> None:
    resume = ["resume.run=auto", "checkpoint.every_n_steps=1"]
    harness.stop(at_batch(3, "after"), "run", "on_nan=skip", "trainer.max_epochs=3", "scheduler=constant")
    harness.train("run", *resume, "on_nan=stop", "trainer.max_epochs=2", "data.max_bad=3")
    harness.train("run", *resume, "on_nan=skip", "trainer.max_epochs=3")
    found = config.load(harness.folder / "run/config.yaml")
    assert (found["on_nan"], found["trainer"]["max_epochs"], found["data"]["max_bad"]) == ("skip", 3, 3)
    keys = [word.partition("=")[0] for word in found["overrides"]]
    assert len(keys) == len(set(keys)), "one override per key"
    saved = torch.load(harness.folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["Checkpointing"]["epochs"] == 3
    longer = "is finished. Give a trainer.max_epochs above 3 to train it longer"
    refused(longer, harness, f"resume.run={harness.folder / 'run'}", "trainer.max_epochs=3")


def test_a_run_that_started_from_a_checkpoint_starts_from_it_again(harness: Harness) -> None:
    first = harness.train("first", "scheduler=constant")
    words = [f"ckpt_path={first / 'checkpoints/last.ckpt'}", "trainer.max_epochs=3", "scheduler=constant"]
    straight = harness.train("straight", *words)
    harness.stop(at_batch(11, "before"), "stopped", *words, "resume.run=auto")
    assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


def test_early_stopping_survives_a_resume(harness: Harness) -> None:
    """Of a run that was killed within its test."""
    words = ["callbacks.early_stopping=1", "trainer.max_epochs=8", "monitor=val/loss", "optimizer.lr=1"]
    straight = harness.train("straight", *words)
    epochs = torch.load(straight / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Checkpointing"]["epochs"]
    assert epochs < 8, "early stopping worked"

    def killed(*_: Any) -> None:
        raise Killed

    with harness.monkeypatch.context() as patch:
        patch.setattr("alexlab.commands.train.test_best", killed)
        with pytest.raises(Killed):
            harness.train("stopped", *words)
    assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


def test_no_row_is_lost_if_none_was_added_since_the_last_resume(harness: Harness) -> None:
    """Two resumes, and between them a checkpoint without a new row of metrics."""
    words = ["trainer.log_every_n_steps=4", "callbacks.lr_monitor=false"]
    straight = harness.train("straight", *words)
    harness.stop(at_batch(7, "after"), "stopped", *words)
    harness.stop(at_batch(8, "before"), "stopped", *words, "resume.run=auto")
    _stop_after_checkpoint(harness, 8, "stopped", *words, "resume.run=auto")
    assert difference(straight, harness.train("stopped", *words, "resume.run=auto")) is None


def test_a_best_checkpoint_of_later_steps_is_removed(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint.every_n_steps=null", "trainer.max_epochs=3", "monitor=val/loss", "optimizer.lr=0.05"]
    harness.stop(at_batch(10, "after"), "stopped", *words)
    folder = harness.folder / "stopped/checkpoints"
    best, last = (
        torch.load(folder / name, weights_only=True)["alexlab"]["best"] for name in ("best.ckpt", "last.ckpt")
    )
    assert best != last, "the second validation was better, and its epoch's file was not written"
    harness.train("stopped", *words, "resume.run=auto", "trainer.max_epochs=1")
    printed = capsys.readouterr().out
    assert "best.ckpt: it was of later steps than the checkpoint, and these are trained again" in printed
    assert not (folder / "best.ckpt").exists()


def test_a_damaged_checkpoint_is_skipped(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    straight = harness.train("straight")
    harness.stop(at_batch(4, "after"), "stopped")
    folder = harness.folder / "stopped/checkpoints"
    damaged = bytearray((folder / "last.ckpt").read_bytes())
    damaged[5000] ^= 1
    (folder / "last.ckpt").unlink()  # previous.ckpt may be the same file
    (folder / "last.ckpt").write_bytes(damaged)
    (folder / ".last.ckpt.123.tmp").write_bytes(b"left by a kill")
    kept = shutil.copytree(harness.folder / "stopped", harness.folder / "both")
    resumed = harness.train("stopped", "resume.run=auto")
    printed = capsys.readouterr().out
    damage = "damaged (the SHA-256 is not the one in SHA256SUMS)"
    assert f"last.ckpt, which is {damage}; resuming from previous.ckpt" in printed
    assert not (folder / ".last.ckpt.123.tmp").exists()
    assert difference(straight, resumed) is None
    os.truncate(kept / "checkpoints/previous.ckpt", 4000)
    with pytest.raises(UserError, match=r"no undamaged checkpoint is left: .*last.ckpt, which is damaged .*previous.c"):
        harness.train("both", "resume.run=auto")
