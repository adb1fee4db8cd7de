"""What a run will do, calculated before it starts."""

from pathlib import Path

import pytest
from conftest import ROOT, tiny_train
from conftest import config_of as compose
from resuming import Harness, rows_of

from alexlab.commands import plan
from alexlab.data.demo import IMAGES_PER_CLASS
from alexlab.engine.errors import UserError

DEMO = {split: 10 * count for split, count in IMAGES_PER_CLASS.items()}


def test_counts_of_a_run() -> None:
    """A last step of fewer batches is dropped."""
    overrides = ["data.batch_size=48", "trainer.accumulate_grad_batches=5", "optimizer.lr_reference_batch=480"]
    counts = plan.make_plan(compose(*overrides), 4, {"train": 1000, "val": 7})
    # 20 whole batches of 48 in 1000, 5 of them per step
    assert (counts.batches, counts.steps_per_epoch, counts.steps) == (20, 4, 40)
    assert (counts.device_batch, counts.step_images) == (12, 240)
    assert counts.lr == pytest.approx(0.005 / 2)
    overrides = ["data.batch_size=10", "trainer.accumulate_grad_batches=3"]
    counts = plan.make_plan(compose(*overrides), 1, {"train": 85, "val": 7})
    assert (counts.batches, counts.steps_per_epoch) == (6, 2)


def test_lightning_takes_as_many_steps_as_were_planned(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    """A last step of fewer batches is not taken: the linear schedule ends with the step before."""
    words = ["trainer.overfit_batches=3", "trainer.accumulate_grad_batches=2", "test=false", "scheduler=linear"]
    run_dir = harness.train("run", *words, "scheduler.warmup=0")
    rates = {float(row["lr/decay"]) for row in rows_of(run_dir) if "lr/decay" in row}
    assert sorted(rates) == pytest.approx([0.0025, 0.005])
    assert "as long as the run" not in capsys.readouterr().out
    harness.train("warm", *words, "scheduler.warmup=2")
    printed = capsys.readouterr().out
    assert "The warm-up of 2 steps is as long as the run, so the learning rate never reaches 0.005" in printed


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ("trainer.max_steps=15", "steps", 15),
        ("trainer.max_steps=1500", "steps", 100),
        ("trainer.max_steps=1500 trainer.max_epochs=null", "steps", 1500),
        ("trainer.limit_train_batches=0.55", "batches", 5),
        ("trainer.limit_train_batches=3", "batches", 3),
        ("trainer.overfit_batches=2", "batches", 2),
    ],
)
def test_steps_and_batches_are_limited(overrides: str, key: str, value: int) -> None:
    images = {"train": 640, "val": 64, "test": 10}  # 10 steps per epoch
    assert getattr(plan.make_plan(compose(*overrides.split()), 1, images), key) == value


@pytest.mark.parametrize("path", sorted((ROOT / "conf/debug").glob("*.yaml")), ids=lambda path: path.stem)
def test_debug_settings_fit_the_demo(path: Path) -> None:
    assert plan.make_plan(compose(f"debug={path.stem}"), 1, DEMO).steps > 0


@pytest.mark.parametrize(
    ("override", "devices", "train", "message"),
    [
        ("data.batch_size=3", 4, 640, r"data.batch_size=3` is the global batch, and there are 4 devices: choose .*=4"),
        ("seed=0", 2, 51, r"data.batch_size=64` is larger than the 51 training images: choose .*=51 or"),
        ("seed=0", 2, 1, r"is larger than the 1 training image: choose"),
        ("+trainer.val_check_interval=9", 1, 512, r"val_check_interval=9` is more than the 8 batches of an epoch"),
        ("+trainer.val_check_interval=2", 1, 64, r"=2` is more than the 1 batch of an epoch: choose 1"),
        ("trainer.accumulate_grad_batches=9", 1, 512, r"=9` is more than the 8 batches of an epoch: choose 8"),
        ("trainer.limit_val_batches=0.5", 1, 640,
         r"trainer.limit_val_batches=0.5` of 1 batch is less than one: .*limit_val_batches=1\)"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(override: str, devices: int, train: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.make_plan(compose(override), devices, {"train": train, "val": 64})


def test_a_batch_of_another_loader_must_divide() -> None:
    message = r"`data.batch_size=9` .* does not divide by 2 devices, which loaders of your own need: choose .*=8 or 10"
    with pytest.raises(UserError, match=message):
        plan.make_plan(compose("data.batch_size=9"), 2, {"train": 90}, train_batches=10)
    assert plan.make_plan(compose("data.batch_size=9"), 2, {"train": 90}).steps_per_epoch == 10


def test_dry_run_says_what_would_run_and_stops(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(
        shapes, tmp_path / "dry", "dry_run=true", "trainer=ddp_cpu", "trainer.accumulate_grad_batches=2",
        "optimizer=adamw", "optimizer.lr_reference_batch=32", "trainer.limit_train_batches=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for part in ("8 (4 per device)", "2 x cpu", "0.00015 (optimizer.lr=0.0003", "images per optimizer step 16",
                 "2 per epoch, 2 in total", "352,042 parameters", "10: arrow, bar"):  # fmt: skip
        assert part in shown
    assert not (tmp_path / "dry").exists()
