"""Options of training that change what a run does, end to end."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, clean_env, command, summary_of, tiny_train

import alexlab


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_the_moving_average_of_the_weights_is_saved_and_evaluated(shapes: Path, tmp_path: Path) -> None:
    """Also: label smoothing, gradient clipping, a scaled learning rate, and a progress bar."""
    done = tiny_train(
        shapes, tmp_path / "ema", "ema.decay=0.5", "label_smoothing=0.1", "trainer.gradient_clip_val=1",
        "optimizer.lr_reference_batch=16", "callbacks.progress=rich", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    assert "effective learning rate 0.0025" in done.stdout
    summary = summary_of(tmp_path / "ema")
    assert summary["effective_lr"] == 0.0025
    held = torch.load(tmp_path / "ema/checkpoints/last.ckpt", weights_only=True)
    averaged, current = held["state_dict"], held["current_model_state"]
    assert not torch.equal(averaged["net.fc.weight"], current["net.fc.weight"])
    assert command("eval.py", f"run={tmp_path / 'ema'}", "ckpt=last", f"paths.logs={tmp_path}").returncode == 0
    found = json.loads((tmp_path / "ema/eval.json").read_text())
    assert found["acc1"] == pytest.approx(summary["test"]["test/acc1"])


def test_compiled_and_plain_models_share_checkpoints(shapes: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    words = [
        "model=alexnet",
        "model.net.norm=none",
        "model.name=alexnet",
        "+model.net.hidden=[64,48]",
        "trainer.limit_train_batches=1",
        "test=false",
    ]
    done = tiny_train(shapes, tmp_path / "c", "compile=true", *words, "test=true")
    assert done.returncode == 0, done.stderr
    assert command("eval.py", f"run={tmp_path / 'c'}", f"paths.logs={tmp_path}").returncode == 0
    found = json.loads((tmp_path / "c/eval.json").read_text())
    assert found["loss"] == summary_of(tmp_path / "c")["test"]["test/loss"], "compiled as in training, bit for bit"
    assert not any("_orig_mod" in key for key in weights(tmp_path / "c"))
    last = tmp_path / "c/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "p", f"ckpt_path={last}", "trainer.max_epochs=2", *words)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "p/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "c2", "compile=true", f"ckpt_path={last}", "trainer.max_epochs=3", *words)
    assert done.returncode == 0, done.stderr


def test_three_batches_can_be_overfitted(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(
        shapes, tmp_path / "o", "model=alexnet", "model.name=alexnet", "debug=overfit", "trainer.max_epochs=12",
        "test=false", "trainer.limit_train_batches=1.0", "data.batch_size=4", "model.net.dropout=0",
        "trainer.check_val_every_n_epoch=12",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [
        float(row["train/loss"]) for row in csv.DictReader((tmp_path / "o/metrics.csv").open()) if row["train/loss"]
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_class_names_are_saved_and_broken_images_are_skipped(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    broken = root / "train/ring/0000.jpg"
    broken.write_bytes(b"broken")
    (tmp_path / "names.tsv").write_text("ring\tgolden ring\n")
    done = tiny_train(
        root, tmp_path / "run", "data.on_error=skip", f"data.class_names={tmp_path}/names.tsv",
        "trainer.limit_train_batches=1.0", "data.num_workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["skipped_images"] == [str(broken)]
    (tmp_path / "names.tsv").unlink()  # the checkpoint holds the names
    assert command("eval.py", f"run={tmp_path / 'run'}", f"paths.logs={tmp_path}").returncode == 0
    assert "golden ring" in alexlab.load(tmp_path / "run").classes
    names = json.loads((tmp_path / "run/eval.json").read_text())["per_class_acc1"]
    assert "golden ring" in names
    assert "ring" not in names


def without_test(shapes: Path, tmp_path: Path) -> Path:
    root = tmp_path / "no-test"
    for split in ("train", "val"):
        shutil.copytree(shapes / split, root / split)
    return root


@pytest.mark.parametrize("devices", [1, 2])
def test_best_ckpt_holds_the_averaged_weights_that_were_validated(devices: int, shapes: Path, tmp_path: Path) -> None:
    """Testing them on val gives the numbers of validation."""
    done = tiny_train(
        without_test(shapes, tmp_path), tmp_path / "ema", "ema.decay=0.9", "optimizer.lr=0.05", "trainer.max_epochs=2",
        "trainer.precision=32-true", f"trainer.devices={devices}", "monitor=val/loss",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "ema")
    assert summary["test"]["test/loss"] == pytest.approx(summary["best"]["val/loss"], rel=1e-6)
    best = torch.load(tmp_path / "ema/checkpoints/best.ckpt", weights_only=True)
    assert "current_model_state" not in best
    assert "val, best.ckpt" in done.stdout


def test_a_nan_loss_fails_the_run(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "nan", "optimizer.lr=1e8", "trainer.max_epochs=3")
    assert done.returncode == 2
    assert "lower optimizer.lr, clip with trainer.gradient_clip_val=1" in done.stderr
    summary = summary_of(tmp_path / "nan")
    assert summary["status"] == "failed"
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
def test_the_last_weights_are_validated(words: list[str], shapes: Path, tmp_path: Path) -> None:
    root = without_test(shapes, tmp_path)
    done = tiny_train(root, tmp_path / "end", *words, "trainer.precision=32-true")
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "end")
    assert summary["checkpoints"] == {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt"}
    assert {"train/loss", "val/loss"} <= set(summary["last"])
    assert summary["test"]["test/acc1"] == pytest.approx(summary["best"]["val/acc1"])


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.precision=bf16-true"],
        ["trainer.precision=64-true", "augment=strong"],
        ["trainer.limit_test_batches=0"],
        ["scheduler=plateau", "scheduler.warmup=1", "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"],
        ["optimizer=adamw", "trainer.gradient_clip_val=0.1", "augment=paper", "logger=none", "test=false"],
        ["callbacks.early_stopping=1", "callbacks.device_stats=true", "callbacks.model_summary=1"],
        ["+callbacks.timer={_target_: pytorch_lightning.callbacks.Timer, duration: '00:01:00:00'}"],
    ],
    ids=lambda words: words[0].split("=")[0] + "=" + words[0].split("=")[1][:12],
)
def test_rare_combinations_of_options_train(words: list[str], shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["status"] == "finished"


def test_the_best_metrics_are_of_one_epoch_and_early_stopping_is_reported(shapes: Path, tmp_path: Path) -> None:
    """Those of best.ckpt: not the best loss of one epoch with the best accuracy of another."""
    done = tiny_train(
        shapes, tmp_path / "run", "trainer.max_epochs=9", "callbacks.early_stopping=1", "optimizer.lr=0.2",
        "trainer.precision=32-true", "data.batch_size=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "run")
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc1"]]
    accuracies = [float(row["val/acc1"]) for row in rows]
    best = accuracies.index(max(accuracies))
    assert summary["best_epoch"] == best + 1
    for key in ("val/loss", "val/acc1", "val/acc5"):
        assert summary["best"][key] == pytest.approx(float(rows[best][key]))
    assert f"best (epoch {best + 1})" in done.stdout
    assert (
        f"Early stopping: val/acc1 did not improve in 1 validations; the last one was in epoch {len(rows)}."
        in done.stdout
    )
    command("eval.py", f"run={tmp_path / 'run'}", f"data.root={shapes / 'val'}", f"paths.logs={tmp_path}")
    scored = json.loads((tmp_path / "run/eval.json").read_text())
    assert scored["loss"] == pytest.approx(summary["best"]["val/loss"], rel=1e-5)


def test_a_profile_and_a_summary_of_layers_are_written(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", "debug=profiler", "callbacks.model_summary=1", "test=false")
    assert done.returncode == 0, done.stderr
    assert "run_training_epoch" in (tmp_path / "run/fit-profile.txt").read_text()
    assert re.search(r"net .*ShuffleNet", done.stdout)


OWN_OPTIMIZER = """
import torch


class Mine(torch.optim.SGD):
    pass
"""


def test_an_optimizer_of_the_users_own(shapes: Path, tmp_path: Path) -> None:
    """Takes one file in optimizers/ and one yaml with its settings."""
    for part in ("conf", "src"):
        shutil.copytree(ROOT / part, tmp_path / "project" / part)
    shutil.copy(ROOT / "train.py", tmp_path / "project")
    package = tmp_path / "project/src/alexlab"
    (package / "optimizers").mkdir()
    (package / "optimizers/mine.py").write_text(OWN_OPTIMIZER)
    (tmp_path / "project/conf/optimizer/mine.yaml").write_text(
        "# Mine.\n_target_: alexlab.optimizers.mine.Mine\nlr: 0.1\n"
    )
    done = subprocess.run(
        [sys.executable, "train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "debug=fast",
         "optimizer=mine", "dry_run=true"],
        cwd=tmp_path / "project", env=clean_env({"PYTHONPATH": str(package.parent)}), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Mine, cosine" in done.stdout
