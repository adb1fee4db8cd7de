"""Options of training that change what a run does, end to end."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, clean_env, command, summary_of, tiny_train

import alexlab


def trained(shapes: Path, run_dir: Path, *words: str) -> str:
    """Train a small job; return what it printed."""
    done = tiny_train(shapes, run_dir, *words)
    assert done.returncode == 0, done.stderr
    assert summary_of(run_dir)["status"] == "finished"
    return done.stdout


def evaluated(run_dir: Path, *words: str) -> dict[str, Any]:
    done = command("eval.py", f"run={run_dir}", f"paths.logs={run_dir.parent}", *words)
    assert done.returncode == 0, done.stderr
    return json.loads((run_dir / "eval.json").read_text())


def rows_with(key: str, run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row[key]]


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


def test_the_moving_average_of_the_weights_is_saved_and_evaluated(shapes: Path, tmp_path: Path) -> None:
    """Also: label smoothing, gradient clipping, a scaled learning rate, and a progress bar."""
    run_dir = tmp_path / "ema"
    printed = trained(
        shapes, run_dir, "ema.decay=0.5", "label_smoothing=0.1", "trainer.gradient_clip_val=1",
        "optimizer.lr_reference_batch=16", "callbacks.progress=rich", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert "images/s" in printed
    summary = summary_of(run_dir)
    assert summary["effective_lr"] == 0.01, "alexnet_bn's 0.02 for 16 images, and a batch of 8"
    held = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = held["state_dict"], held["current_model_state"]
    assert not torch.equal(averaged["net.fc.weight"], current["net.fc.weight"])
    assert evaluated(run_dir, "ckpt=last")["acc1"] == pytest.approx(summary["test"]["test/acc1"])


def test_compiled_and_plain_models_share_checkpoints(shapes: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    net = ["model=alexnet", "model.net.norm=none", "model.name=alexnet", "+model.net.hidden=[64,48]"]

    def last(name: str, epochs: int, *words: str) -> Path:
        short = ["trainer.limit_train_batches=1", f"trainer.max_epochs={epochs}", "test=false"]
        trained(shapes, tmp_path / name, *net, *short, *words)
        return tmp_path / name / "checkpoints/last.ckpt"

    plain = last("plain", 1)
    compiled = last("compiled", 2, "compile=true", f"ckpt_path={plain}", "test=true")
    loss = evaluated(tmp_path / "compiled")["loss"]
    assert loss == summary_of(tmp_path / "compiled")["test"]["test/loss"], "compiled as in training, bit for bit"
    assert not any("_orig_mod" in key for key in torch.load(compiled, weights_only=True)["state_dict"])
    last("plain2", 3, f"ckpt_path={compiled}")


def test_three_batches_can_be_overfitted(shapes: Path, tmp_path: Path) -> None:
    trained(
        shapes, tmp_path / "o", "model=alexnet", "model.name=alexnet", "+model.net.hidden=[256,256]", "debug=overfit",
        "trainer.max_epochs=12", "test=false", "trainer.limit_train_batches=1.0", "data.batch_size=4",
        "model.net.dropout=0", "trainer.check_val_every_n_epoch=12",
    )  # fmt: skip
    losses = [float(row["train/loss"]) for row in rows_with("train/loss", tmp_path / "o")]
    assert losses[-1] < 0.5 * losses[0]


def test_class_names_are_saved_and_broken_images_are_skipped(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    broken = root / "train/ring/0000.jpg"
    broken.write_bytes(b"broken")
    (tmp_path / "names.tsv").write_text("ring\tgolden ring\n")
    trained(
        root, tmp_path / "run", "data.on_error=skip", f"data.class_names={tmp_path}/names.tsv",
        "trainer.limit_train_batches=1.0", "data.num_workers=2",
    )  # fmt: skip
    assert summary_of(tmp_path / "run")["skipped_images"] == [str(broken)]
    (tmp_path / "names.tsv").unlink()  # the checkpoint holds the names
    names = evaluated(tmp_path / "run")["per_class_acc1"]
    assert "golden ring" in alexlab.load(tmp_path / "run").classes
    assert "golden ring" in names
    assert "ring" not in names


@pytest.fixture(scope="module")
def without_test(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("no-test")
    for split in ("train", "val"):
        shutil.copytree(shapes / split, root / split)
    return root


@pytest.mark.parametrize("devices", [1, 2])
def test_best_ckpt_holds_the_averaged_weights_that_were_validated(
    devices: int, without_test: Path, tmp_path: Path
) -> None:
    """Testing them on val gives the numbers of validation."""
    printed = trained(
        without_test, tmp_path / "ema", "ema.decay=0.9", "optimizer.lr=0.05", "trainer.max_epochs=2",
        "trainer.precision=32-true", f"trainer.devices={devices}", "monitor=val/loss",
    )  # fmt: skip
    summary = summary_of(tmp_path / "ema")
    assert summary["test"]["test/loss"] == pytest.approx(summary["best"]["val/loss"], rel=1e-6)
    best = torch.load(tmp_path / "ema/checkpoints/best.ckpt", weights_only=True)
    assert "current_model_state" not in best
    assert "val, best.ckpt" in printed


def test_a_nan_loss_fails_the_run(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "nan", "optimizer.lr=1e8", "trainer.max_epochs=3")
    assert done.returncode == 2
    assert "lower optimizer.lr, clip with trainer.gradient_clip_val=1" in done.stderr
    assert summary_of(tmp_path / "nan")["status"] == "failed"
    assert "NaN" not in (tmp_path / "nan/summary.json").read_text()
    assert "lower optimizer.lr" in (tmp_path / "nan/train.log").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_epochs=null", "trainer.max_steps=1"],
        ["trainer.max_epochs=2", "trainer.max_steps=3"],
        ["trainer.check_val_every_n_epoch=2"],
    ],
)
def test_the_last_weights_are_validated(words: list[str], without_test: Path, tmp_path: Path) -> None:
    trained(without_test, tmp_path / "end", *words, "trainer.precision=32-true")
    summary = summary_of(tmp_path / "end")
    assert summary["checkpoints"] == {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt"}
    assert {"train/loss", "val/loss"} <= set(summary["last"])
    assert summary["test"]["test/acc1"] == pytest.approx(summary["best"]["val/acc1"])


def test_weights_have_the_precision_of_the_trainer(shapes: Path, tmp_path: Path) -> None:
    for precision, dtype in (("bf16-true", torch.bfloat16), ("64-true", torch.float64)):
        trained(shapes, tmp_path / precision, f"trainer.precision={precision}", "augment=strong")
        state = last_checkpoint(tmp_path / precision)["state_dict"]
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {dtype}


def test_plateau_sees_each_validation_and_the_last_weights_are_validated(shapes: Path, tmp_path: Path) -> None:
    words = ["scheduler=plateau", "scheduler.warmup=1", "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"]
    trained(shapes, tmp_path / "run", *words)
    assert [row["epoch"] for row in rows_with("val/acc1", tmp_path / "run")] == ["1", "3"]
    plateau, _ = last_checkpoint(tmp_path / "run")["lr_schedulers"]
    assert plateau["best"] == pytest.approx(summary_of(tmp_path / "run")["best"]["val/acc1"])


def test_adamw_trains_without_a_test(shapes: Path, tmp_path: Path) -> None:
    words = ["optimizer=adamw", "trainer.gradient_clip_val=0.1", "augment=paper", "logger=none", "test=false"]
    trained(shapes, tmp_path / "run", *words)
    (optimizer,) = last_checkpoint(tmp_path / "run")["optimizer_states"]
    assert all({"exp_avg", "exp_avg_sq"} <= set(state) for state in optimizer["state"].values())
    assert summary_of(tmp_path / "run")["test"] == {}


def test_a_callback_of_lightning_gets_a_value_of_hydras_environment(shapes: Path, tmp_path: Path) -> None:
    timer = "+callbacks.timer={_target_: pytorch_lightning.callbacks.Timer, duration: '${oc.env:DURATION}'}"
    words = [timer, "+hydra.job.env_set.DURATION='00:01:00:00'", "trainer.limit_test_batches=0"]
    trained(shapes, tmp_path / "run", *words)
    seconds = last_checkpoint(tmp_path / "run")["callbacks"]["Timer"]["time_elapsed"]["train"]
    assert 0 < seconds < 3600, "the callback was built, and has timed the training"
    assert summary_of(tmp_path / "run")["test"] == {}


def test_the_best_metrics_are_of_one_epoch_and_early_stopping_is_reported(shapes: Path, tmp_path: Path) -> None:
    """Those of best.ckpt: not the best loss of one epoch with the best accuracy of another."""
    printed = trained(
        shapes, tmp_path / "run", "trainer.max_epochs=9", "callbacks.early_stopping=1", "optimizer.lr=0.2",
        "trainer.precision=32-true", "data.batch_size=4",
    )  # fmt: skip
    summary, rows = summary_of(tmp_path / "run"), rows_with("val/acc1", tmp_path / "run")
    accuracies = [float(row["val/acc1"]) for row in rows]
    best = accuracies.index(max(accuracies))
    assert summary["best_epoch"] == best + 1
    for key in ("val/loss", "val/acc1", "val/acc5"):
        assert summary["best"][key] == pytest.approx(float(rows[best][key]))
    assert f"best (epoch {best + 1})" in printed
    reason = f"val/acc1 did not improve in 1 validations; the last one was in epoch {len(rows)}."
    assert f"Early stopping: {reason}" in printed
    scored = evaluated(tmp_path / "run", f"data.root={shapes / 'val'}")
    assert scored["loss"] == pytest.approx(summary["best"]["val/loss"], rel=1e-5)


def test_a_profile_and_a_summary_of_layers_are_written(shapes: Path, tmp_path: Path) -> None:
    """Also: statistics of the device, and early stopping."""
    words = ["debug=profiler", "callbacks.model_summary=1", "callbacks.device_stats=true", "callbacks.early_stopping=1"]
    printed = trained(shapes, tmp_path / "run", *words)
    assert "run_training_epoch" in (tmp_path / "run/fit-profile.txt").read_text()
    assert re.search(r"net .*ShuffleNet", printed)


def test_an_optimizer_of_the_users_own(shapes: Path, tmp_path: Path) -> None:
    """Takes one file in optimizers/ and one yaml with its settings."""
    for part in ("conf", "src"):
        shutil.copytree(ROOT / part, tmp_path / "project" / part)
    shutil.copy(ROOT / "train.py", tmp_path / "project")
    package = tmp_path / "project/src/alexlab"
    (package / "optimizers").mkdir()
    (package / "optimizers/mine.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    settings = "# Mine.\n_target_: alexlab.optimizers.mine.Mine\nlr: 0.1\n"
    (tmp_path / "project/conf/optimizer/mine.yaml").write_text(settings)
    done = subprocess.run(
        [sys.executable, "train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "debug=fast",
         "optimizer=mine", "dry_run=true"],
        cwd=tmp_path / "project", env=clean_env({"PYTHONPATH": str(package.parent)}), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Mine, cosine" in done.stdout
