"""What a run will do, calculated before it starts."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_train
from conftest import config_of as compose
from torch import nn

from alexlab.commands import plan
from alexlab.data.demo import IMAGES_PER_CLASS
from alexlab.engine.errors import UserError

DEMO = {split: 10 * count for split, count in IMAGES_PER_CLASS.items()}


def test_counts_of_a_run() -> None:
    """A last step of fewer batches is dropped."""
    overrides = ["data.batch_size=48", "trainer.accumulate_grad_batches=5", "optimizer.lr_reference_batch=480"]
    counts = plan.make_plan(compose(*overrides), 4, {"train": 1000, "val": 7})
    # 20 whole batches of 48 in 1000, 5 of them per step
    assert (counts.batches, counts.steps_per_epoch, counts.steps, counts.unseen) == (20, 4, 40, 40)
    assert (counts.device_batch, counts.step_images) == (12, 240)
    assert counts.lr == pytest.approx(0.005 / 2)
    overrides = ["data.batch_size=10", "trainer.accumulate_grad_batches=3"]
    counts = plan.make_plan(compose(*overrides), 1, {"train": 85, "val": 7})
    assert (counts.batches, counts.steps_per_epoch, counts.unseen) == (6, 2, 25)


def test_lightning_takes_as_many_steps_as_were_planned(shapes: Path, tmp_path: Path) -> None:
    """A last step of fewer batches is not taken: the linear schedule ends with the step before."""
    done = tiny_train(
        shapes, tmp_path / "run", "trainer.overfit_batches=3", "trainer.accumulate_grad_batches=2", "test=false",
        "trainer.max_epochs=2", "scheduler=linear", "scheduler.warmup=0",
        "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run/metrics.csv").open() as file:
        lrs = [float(row["lr/decay"]) for row in csv.DictReader(file) if row["lr/decay"]]
    assert sorted(set(lrs)) == pytest.approx([0.0025, 0.005])
    assert "as long as the run" not in done.stdout


def test_a_warm_up_as_long_as_the_run_is_reported(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", "scheduler.warmup=1", "test=false")
    assert "The warm-up of 2 steps is as long as the run, so the learning rate never reaches 0.005" in done.stdout


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
        ("data.batch_size=9", 2, 640, r"data.batch_size=9` .*does not divide by 2 devices: choose .*=8 or 10"),
        ("seed=0", 2, 51, r"data.batch_size=64` is larger than the 51 training images: choose .*=50 or"),
        ("trainer.accumulate_grad_batches=9", 1, 512, r"=9` is more than the 8 batches of an epoch: choose 8"),
        ("trainer.limit_val_batches=0.5", 1, 640,
         r"trainer.limit_val_batches=0.5` of 1 batches is less than one: .*limit_val_batches=1\)"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(override: str, devices: int, train: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.make_plan(compose(override), devices, {"train": train, "val": 64})


def test_the_estimated_size_of_checkpoints_is_the_real_size(tmp_path: Path) -> None:
    """Compared with torch's own files, with SGD's momentum and AdamW's two averages."""
    net = nn.Sequential(nn.Linear(500, 500), nn.BatchNorm1d(500))
    sgd, adamw = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), torch.optim.AdamW(net.parameters())
    for name, optimizer in (("sgd", sgd), ("adamw", adamw)):
        net(torch.randn(4, 500)).sum().backward()
        optimizer.step()
        torch.save({"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "last")
        torch.save({"state_dict": net.state_dict()}, tmp_path / "best")
        sizes = plan.checkpoint_bytes(net, compose(f"optimizer={name}"))
        assert sizes["last"] == pytest.approx((tmp_path / "last").stat().st_size, rel=0.01)
        assert sizes["best"] == pytest.approx((tmp_path / "best").stat().st_size, rel=0.01)


def test_dry_run_says_what_would_run_and_stops(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(
        shapes, tmp_path / "dry", "dry_run=true", "trainer=ddp_cpu", "trainer.accumulate_grad_batches=2",
        "optimizer=adamw", "optimizer.lr_reference_batch=32", "trainer.limit_train_batches=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.replace("│", " ").split())
    for part in ("8 (4 per device)", "2 x cpu", "0.00015 (optimizer.lr=0.0003", "images per optimizer step 16",
                 "2 per epoch, 2 in total", "352,042 parameters", "10: arrow, bar",
                 "about 4 MB (last, previous), 1 MB (best)"):  # fmt: skip
        assert part in shown
    assert not (tmp_path / "dry").exists()
