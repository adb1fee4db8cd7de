"""A run that was ended anywhere goes on bit for bit: weights, states, metrics, scores.

In this process; see test_faults.py for processes that are really killed.
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
import torch
from resuming import Harness, Killed, at_batch, difference, rows_of

from alexlab.callbacks.checkpointing import Snapshots
from alexlab.data.datamodule import ImageFolders
from alexlab.data.folder import scan
from alexlab.engine import config, files, resume
from alexlab.engine.errors import UserError
from alexlab.tasks.classification import ImageClassifier

BATCHES = 10  # of two epochs


SETTINGS = [
    [],
    ["trainer.accumulate_grad_batches=2", "data.batch_size=4"],
    ["trainer.accumulate_grad_batches=3", "data.batch_size=4", "+trainer.val_check_interval=0.5"],
    ["+trainer.val_check_interval=0.6", "scheduler=plateau"],  # a checkpoint lies between that and the epoch's end
    ["ema.decay=0.9", "+trainer.val_check_interval=0.5", "callbacks.early_stopping=9"],
    ["optimizer=adamw", "trainer.check_val_every_n_epoch=2", "finetune.freeze_epochs=1"],
    ["trainer.max_steps=10", "trainer.max_epochs=null", "scheduler=constant", "finetune.freeze_epochs=1"],
]


@pytest.mark.parametrize("words", SETTINGS, ids=lambda words: " ".join(words) or "plain")
@pytest.mark.parametrize("place", ["before", "after"])
def test_from_every_step(words: list[str], place: str, harness: Harness) -> None:
    """Ended before and after each batch's validation and checkpoint."""
    straight = harness.train("straight", *words)
    ended = torch.load(straight / "checkpoints/last.ckpt", weights_only=True)
    batches = ended["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    assert batches >= BATCHES
    for count in range(1, batches + 1):
        shutil.rmtree(harness.folder / "ended", ignore_errors=True)
        harness.end(at_batch(count, place), "ended", *words)
        going_on = harness.train("ended", *words, "resume.run=auto", f"data.num_workers={count % 3}")
        assert difference(straight, going_on) is None, f"ended {place} the end of batch {count}"


def test_with_checkpoints_of_epochs_alone(harness: Harness) -> None:
    """And with none at all, when the run begins anew."""
    words = ["checkpoint.every_n_steps=null"]
    straight = harness.train("straight", *words)
    for count in (2, 5, 6, 9, 10):
        shutil.rmtree(harness.folder / "ended", ignore_errors=True)
        harness.end(at_batch(count, "after"), "ended", *words)
        assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


class SignalAt(pl.Callback):
    """Sends this process a signal within the hook of a batch."""

    def __init__(self, hook: str, count: int, number: int) -> None:
        def send(trainer: Any, *_: Any) -> None:
            if trainer.sanity_checking or trainer.fit_loop.epoch_loop.batch_progress.total.ready != count:
                return
            if not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        setattr(self, hook, send)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_validation_epoch_end"])
@pytest.mark.parametrize("words", [["+trainer.val_check_interval=0.5"], ["ema.decay=0.9"]], ids=" ".join)
def test_from_where_a_signal_ended_it(
    hook: str, words: list[str], harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is lost, and none is done twice: not those of an epoch whose validation was under way."""
    words = [*words, "checkpoint.every_n_steps=null", "checkpoint.every_minutes=null"]
    straight = harness.train("straight", *words)
    for count, number in ((2, signal.SIGTERM), (4, signal.SIGUSR1), (5, signal.SIGINT), (10, signal.SIGTERM)):
        every = 2 if "0.5" in words[0] else 5  # batches of an epoch between two validations
        if "validation" in hook and (count - 1) % 5 % every != every - 1:
            continue
        shutil.rmtree(harness.folder / "ended", ignore_errors=True)
        sender = SignalAt(hook, count, number)
        with monkeypatch.context() as patch:
            patch.setattr("alexlab.commands.train.build_callbacks", lambda _, sender=sender: [sender])
            with pytest.raises(SystemExit) as ended:
                harness.train("ended", *words)
        assert ended.value.code == 128 + number
        assert sender.sent
        saved = torch.load(harness.folder / "ended/checkpoints/last.ckpt", weights_only=True)
        heard = min(count + 1, 10) if hook == "on_validation_epoch_end" else count  # at the end of the next batch
        assert saved["global_step"] == heard
        assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


ACCUMULATING = ["trainer.accumulate_grad_batches=3", "data.batch_size=4", "checkpoint.every_n_steps=null"]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_from_a_signal_in_a_validation_within_an_accumulation(
    count: int, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine batches an epoch are validated after two, four, six and eight, and gradients are in no checkpoint."""
    words = [*ACCUMULATING, "+trainer.val_check_interval=2"]
    straight = harness.train("straight", *words)
    sender = SignalAt("on_validation_batch_start", count, signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("alexlab.commands.train.build_callbacks", lambda _: [sender])
        with pytest.raises(SystemExit):
            harness.train("ended", *words)
    saved = torch.load(harness.folder / "ended/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == -(-count // 3), "the step that it was within is done"
    assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


class TimeIsUpAt(pl.Callback):
    """What Lightning's Timer does, by a count of batches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready >= self.count:
            trainer.should_stop = True


@pytest.mark.parametrize("count", [11, 12, 13])
def test_from_where_the_time_was_up(count: int, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*ACCUMULATING, "trainer.max_epochs=3"]
    straight = harness.train("straight", *words)
    with monkeypatch.context() as patch:
        patch.setattr("alexlab.commands.train.build_callbacks", lambda _: [TimeIsUpAt(count)])
        ended = harness.train("ended", *words)
    saved = torch.load(ended / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == -(-count // 3), "the step that it was within is done"
    (ended / "summary.json").unlink()  # it counts as finished; a larger max_time would prolong it
    assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


def test_from_after_a_batch_that_was_broken_as_a_whole(harness: Harness, tmp_path: Path) -> None:
    """Its line holds no numbers of the batch before, and a longer window's its own."""
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
        for count in (2, 3, 4):
            harness.end(at_batch(count, "after"), f"ended{every}{count}", *words)
            assert difference(straight, harness.train(f"ended{every}{count}", *words, "resume.run=auto")) is None


def test_a_clock_asks_for_checkpoints(harness: Harness) -> None:
    words = ["checkpoint.every_n_steps=null", "checkpoint.every_minutes=1e-9"]
    harness.end(at_batch(3, "after"), "ended", *words)
    saved = torch.load(harness.folder / "ended/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] >= 2


def test_a_longer_run_is_one_that_was_longer_from_the_start(harness: Harness) -> None:
    words = ["scheduler=constant"]
    straight = harness.train("straight", *words, "trainer.max_epochs=3")
    harness.train("more", *words, "trainer.max_epochs=1")
    going_on = harness.train("more", *words, "resume.run=auto", "trainer.max_epochs=3")
    assert difference(straight, going_on) is None


def test_a_run_that_max_steps_ended_goes_on(harness: Harness) -> None:
    words = ["scheduler=constant", "trainer.max_epochs=null"]
    straight = harness.train("straight", *words, "trainer.max_steps=8")
    harness.train("more", *words, "trainer.max_steps=3")
    going_on = harness.train("more", *words, "resume.run=auto", "trainer.max_steps=8")
    assert difference(straight, going_on) is None


def test_a_new_directory_can_go_on_from_within_an_epoch(harness: Harness) -> None:
    straight = harness.train("straight")
    harness.end(at_batch(3, "after"), "ended")
    more = harness.train("more", f"ckpt_path={harness.folder / 'ended'}")
    a, b = (torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for path in (straight, more))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


# -- the tests are worth something: each of these mistakes in what is resumed is found


def _off_by_one(patch: pytest.MonkeyPatch) -> None:
    plain = ImageFolders.train_dataloader

    def loader(self: ImageFolders) -> Any:
        made = plain(self)
        epoch, batch = made.batch_sampler.begins_at  # type: ignore[union-attr]
        made.batch_sampler.begins_at = (epoch, max(0, batch - 1))  # type: ignore[union-attr]
        return made

    patch.setattr(ImageFolders, "train_dataloader", loader)


def _after_load(change: Callable[[ImageClassifier, dict[str, Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        plain = ImageClassifier.on_load_checkpoint

        def load(self: ImageClassifier, checkpoint: dict[str, Any]) -> None:
            plain(self, checkpoint)
            change(self, checkpoint)

        patch.setattr(ImageClassifier, "on_load_checkpoint", load)

    return mutate


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a batch twice": _off_by_one,
    "no batch left out": lambda patch: patch.setattr(
        "alexlab.data.sampler.TrainBatches.begins_at", property(lambda _: (0, 0), lambda *_: None), raising=False
    ),
    "the epoch's sums are forgotten": lambda patch: patch.setattr(
        ImageClassifier, "restore_sums", lambda self: self.on_train_epoch_start()
    ),
    "the validation that was owed is left out": lambda patch: patch.setattr(
        Snapshots, "_do_what_is_owed", lambda self, fetcher: None
    ),
    "the score is forgotten": _after_load(lambda self, _: setattr(self, "best", {})),
    "metrics are not cut back": lambda patch: patch.setattr(resume, "cut_csv", lambda path, rows: 0),
    "metrics are cut back too far": lambda patch: patch.setattr(
        resume, "cut_csv", lambda path, rows: files.cut_csv(path, rows - 1)
    ),
    "the optimizer's state is forgotten": _after_load(
        lambda _, checkpoint: checkpoint["optimizer_states"][0].update(state={})
    ),
    "the schedule begins anew": _after_load(
        lambda _, checkpoint: checkpoint["lr_schedulers"][0].update(last_epoch=0, _step_count=1)
    ),
    "random numbers go on from where they are": lambda patch: patch.setattr(
        "alexlab.tasks.classification.reseed", lambda seed, device: None
    ),
    "statistics of BatchNorm are forgotten": _after_load(
        lambda _, checkpoint: [v.zero_() for k, v in checkpoint["state_dict"].items() if k.endswith("running_mean")]
    ),
    "the step's number is one too low": _after_load(
        lambda _, checkpoint: checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"].update(_batches_that_stepped=2)
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_would_be_found(mutation: str, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["+trainer.val_check_interval=0.6", "trainer.log_every_n_steps=1", "optimizer.momentum=0.9"]
    straight = harness.train("straight", *words)
    found = []
    for count in (3, 4, 9, 0):  # the third batch owes a validation; 0 ends one step after its checkpoint
        shutil.rmtree(harness.folder / "ended", ignore_errors=True)
        if count:
            _end_at_snapshot(harness, count, words, monkeypatch)
        else:
            harness.end(at_batch(4, "after"), "ended", *words, "checkpoint.every_n_steps=3")
        with monkeypatch.context() as patch:
            MUTATIONS[mutation](patch)
            try:
                found.append(difference(straight, harness.train("ended", *words, "resume.run=auto")))
            except Exception as error:
                found.append(repr(error))
    assert any(found), "a run with this mistake looks like one without"


def _end_at_snapshot(harness: Harness, count: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """End a run right after the checkpoint of a step whose validation is still to come."""
    plain = Snapshots.save

    def save(self: Snapshots, place: str) -> None:
        plain(self, place)
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.completed == count:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "save", save)
        with pytest.raises(Killed):
            harness.train("ended", *words)


# -- what users say wrong


def test_what_resume_cannot_do_is_told(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    folder = harness.folder
    harness.end(at_batch(3, "after"), "ended")
    named = f"resume.run={folder / 'ended'}"
    for words, told in (
        (
            ["optimizer.lr=0.5"],
            r"was started with other settings: optimizer.lr=0.5 \(the run has 0.005\). Leave these overrides out. For",
        ),
        (
            ["label_smoothing=0.1"],
            r"label_smoothing=0.1 \(the run has 0.0\). Leave these overrides out, or add resume.allow_changes=true",
        ),
        (["model=alexnet_bn", "resume.allow_changes=true"], r"model=alexnet_bn: a resumed run keeps its options"),
        (
            ["init_from=x", "resume.allow_changes=true"],
            r"init_from=x: a resumed run continues from its own checkpoint: leave",
        ),
        (
            ["ckpt_path=x"],
            r"ckpt_path=x: a resumed run continues from its own checkpoint: leave it out",
        ),
    ):
        with pytest.raises(UserError, match=told):
            harness.train("x", named, *words)
    with pytest.raises(UserError, match=r"continues with its own settings, and these differ: optimizer.lr=0.5"):
        harness.train("x", named, "optimizer.lr=0.5", "resume.allow_changes=true")
    with pytest.raises(UserError, match=r"resume=.*nowhere is not a run's directory"):
        harness.train("x", f"resume.run={folder / 'nowhere'}")
    with files.lock(folder / "ended"), pytest.raises(UserError, match="is still training in another process: wait"):
        harness.train("x", named)
    assert not (folder / "x").exists()
    harness.train("x", named, "label_smoothing=0.1", "resume.allow_changes=true")
    with pytest.raises(UserError, match=r"is finished. Give a trainer.max_epochs above 2 to train it longer."):
        harness.train("x", named, "label_smoothing=0.1")
    with pytest.raises(
        UserError, match=r"has done 2 epochs, and trainer.max_epochs=1 would have stopped before: give 2 or"
    ):
        harness.train("x", named, "trainer.max_epochs=1")
    capsys.readouterr()
    harness.train("ended", "resume.run=auto")
    assert "resume=auto: " in capsys.readouterr().out
    (folder / "empty").mkdir()
    (folder / "ended/config.yaml").rename(folder / "empty/config.yaml")
    with pytest.raises(UserError, match=r"to resume from: start it again from scratch, or use resume=auto hydra"):
        harness.train("x", f"resume.run={folder / 'empty'}")


def test_the_latest_run_must_have_a_checkpoint(harness: Harness) -> None:
    """Else an older one, that may be finished, would go on instead."""
    logs = f"paths.logs={harness.folder}"
    harness.train("train/runs/old")
    harness.end(at_batch(1, "before"), "train/runs/new")
    os.utime(harness.folder / "train/runs/old/config.yaml", (0, 0))
    with pytest.raises(
        UserError, match=r"the latest run, .*new, has no checkpoint yet: start it again from scratch, or name the run"
    ):
        harness.train("x", "resume.run=latest", logs)


def test_the_same_command_line_goes_on(harness: Harness) -> None:
    """Also with words that config.yaml shows in another form, or not at all."""
    first = harness.train("first")
    words = ["~optimizer.momentum", f"init_from={first}", "model.mean=auto"]
    straight = harness.train("straight", *words)
    harness.end(at_batch(4, "after"), "ended", *words)
    assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


def test_a_folder_of_runs_may_be_a_link(harness: Harness) -> None:
    """As logs/ often leads to a larger disk: the run's checkpoint is its own, and its curves and its best go on."""
    straight = harness.train("straight")
    harness.end(at_batch(8, "after"), "ended")
    (harness.folder / "link").symlink_to(harness.folder)
    harness.train("x", f"resume.run={harness.folder / 'link/ended'}")
    assert difference(straight, harness.folder / "ended") is None
    assert config.load(harness.folder / "ended/config.yaml").run_dir == str((harness.folder / "ended").resolve())
    harness.end(at_batch(8, "after"), "auto")
    last = harness.folder / "auto/checkpoints/last.ckpt"
    last.rename(harness.folder / "elsewhere.ckpt")
    last.symlink_to(harness.folder / "elsewhere.ckpt")
    assert difference(straight, harness.train("link/auto", "resume.run=auto")) is None


def test_a_word_of_an_earlier_command_line_counts_again(harness: Harness) -> None:
    """Also where one in between had said something else."""
    going_on = ["resume.run=auto", "checkpoint.every_n_steps=1"]
    harness.end(at_batch(3, "after"), "run", "on_nan=skip", "trainer.max_epochs=3", "scheduler=constant")
    harness.train("run", *going_on, "on_nan=rollback", "trainer.max_epochs=2", "data.max_bad=3")
    harness.train("run", *going_on, "on_nan=skip", "trainer.max_epochs=3")
    found = config.load(harness.folder / "run/config.yaml")
    assert (found.on_nan, found.trainer.max_epochs, found.data.max_bad) == ("skip", 3, 3)
    keys = [word.partition("=")[0] for word in found.overrides]
    assert len(keys) == len(set(keys)), "one word of each"
    saved = torch.load(harness.folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["alexlab"]["place"]["epochs"] == 3
    with pytest.raises(UserError, match=r"is finished. Give a trainer.max_epochs above 3 to train it longer."):
        harness.train("x", f"resume.run={harness.folder / 'run'}", "trainer.max_epochs=3")


def test_a_run_that_began_with_a_checkpoint_begins_with_it_again(harness: Harness) -> None:
    first = harness.train("first", "scheduler=constant")
    words = [f"ckpt_path={first / 'checkpoints/last.ckpt'}", "trainer.max_epochs=3", "scheduler=constant"]
    straight = harness.train("straight", *words)
    harness.end(at_batch(11, "before"), "ended", *words, "resume.run=auto")
    assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


def test_a_run_that_early_stopping_ended_stays_ended(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed in its test, that is."""
    words = ["callbacks.early_stopping=1", "trainer.max_epochs=8", "monitor=val/loss", "optimizer.lr=1"]
    straight = harness.train("straight", *words)
    epochs = torch.load(straight / "checkpoints/last.ckpt", weights_only=True)["alexlab"]["place"]["epochs"]
    assert epochs < 8, "it was stopped"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("alexlab.commands.train.score_best", killed)
        with pytest.raises(Killed):
            harness.train("ended", *words)
    assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


def test_rows_stay_where_none_was_added(harness: Harness) -> None:
    """Two resumes, and between them a checkpoint without a line of numbers."""
    words = ["trainer.log_every_n_steps=4", "callbacks.lr_monitor=false"]
    straight = harness.train("straight", *words)
    harness.end(at_batch(7, "after"), "ended", *words)
    harness.end(at_batch(8, "before"), "ended", *words, "resume.run=auto")
    _end_at_snapshot(harness, 8, [*words, "resume.run=auto"], harness.monkeypatch)
    assert difference(straight, harness.train("ended", *words, "resume.run=auto")) is None


def test_a_best_of_steps_that_are_not_done_again_is_removed(
    harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint.every_n_steps=null", "trainer.max_epochs=3", "monitor=val/loss", "optimizer.lr=0.05"]
    harness.end(at_batch(10, "after"), "ended", *words)
    folder = harness.folder / "ended/checkpoints"
    best, last = (
        torch.load(folder / f"{name}.ckpt", weights_only=True)["alexlab"]["best"] for name in ("best", "last")
    )
    assert best != last, "the second validation was better, and its epoch's file was not written"
    harness.train("ended", *words, "resume.run=auto", "trainer.max_epochs=1")
    assert "best.ckpt: it was of later steps than the checkpoint" in capsys.readouterr().out
    assert not (folder / "best.ckpt").exists()


def test_auto_begins_where_there_is_nothing(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    straight = harness.train("straight")
    new = harness.train("new", "resume.run=auto")
    assert "holds no run yet: a new one starts." in capsys.readouterr().out
    assert difference(straight, new) is None
    harness.end(at_batch(1, "before"), "early")
    early = harness.train("early", "resume.run=auto")
    assert "has no checkpoint yet: it starts again from scratch." in capsys.readouterr().out
    assert difference(straight, early) is None


def test_damaged_checkpoints_are_passed_over(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    straight = harness.train("straight")
    harness.end(at_batch(4, "after"), "ended")
    folder = harness.folder / "ended/checkpoints"
    with (folder / "last.ckpt").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    (folder / ".last.ckpt.123.tmp").write_bytes(b"left by a kill")
    kept = shutil.copytree(harness.folder / "ended", harness.folder / "both")
    going_on = harness.train("ended", "resume.run=auto")
    told = capsys.readouterr().out
    assert "last.ckpt, which is damaged (its SHA-256 is not the one in SHA256SUMS); resuming from previous.ckpt" in told
    assert not (folder / ".last.ckpt.123.tmp").exists()
    assert difference(straight, going_on) is None
    os.truncate(kept / "checkpoints/previous.ckpt", 4000)
    with pytest.raises(UserError, match=r"no undamaged checkpoint is left: .*last.ckpt, which is damaged .*previous"):
        harness.train("both", "resume.run=auto")
