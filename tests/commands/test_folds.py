"""Cross-validation and samplers from the command line: the sweep, its row, and the same split in every command."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import SMALL_NET, TINY, command, summary_of, tiny_train
from test_ddp import EXACT, TWO, weights
from test_mistakes import assert_no_run, assert_refused

from alexlab.analysis.compare import standing

FOLDS = 3


@pytest.fixture(scope="module")
def images(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten class folders of four images each."""
    return Path(shutil.copytree(shapes / "train", tmp_path_factory.mktemp("folds") / "images"))


@pytest.fixture(scope="module")
def sweep(images: Path) -> tuple[Path, str]:
    """Return the folder of the jobs, and what the sweep printed."""
    folder = images.parent / "train/multiruns/sweep"
    done = command(
        "train.py", "-m", "sweep=folds", *TINY, "data=folder", f"data.root={images}", f"data.folds={FOLDS}",
        "data.batch_size=8", "trainer.max_epochs=2", f"hydra.sweep.dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def eval_of(run: Path, *words: str) -> dict:
    done = command("eval.py", f"run={run}", f"paths.logs={run.parents[3]}", *words)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "eval.json").read_text())


def test_a_sweep_trains_each_fold_and_prints_mean_and_deviation(sweep: tuple[Path, str]) -> None:
    folder, printed = sweep
    jobs = [summary_of(folder / str(fold)) for fold in range(FOLDS)]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1", "2"]
    assert [job["dataset"]["images"] for job in jobs] == [
        {"train": 26, "val": 14}, {"train": 27, "val": 13}, {"train": 27, "val": 13}
    ]  # fmt: skip
    assert len({job["dataset"]["fingerprint"]["val"] for job in jobs}) == FOLDS
    losses = [job["best"]["val/loss"] for job in jobs]
    row = f"{statistics.fmean(losses):.4f}±{statistics.stdev(losses):.4f}"
    compared = command("compare", f"runs={folder}", "sort=val/loss").stdout
    for text in (printed, compared):
        (found,) = re.findall(r"(.*)\n +sweep/0 \+2  (.*)", text)
        assert row in found[0]
        assert "data.fold=0,1,2" in found[1]
    assert "  sweep/1" not in printed
    assert "compare its jobs: alexlab compare runs=" in printed
    each = command("compare", f"runs={folder}", "seeds=each").stdout
    assert sorted(re.findall(r"data.fold=\d", each)) == ["data.fold=0", "data.fold=1", "data.fold=2"]


def test_folds_are_not_ranked_among_each_other(sweep: tuple[Path, str]) -> None:
    """They were validated on different images."""
    folder = sweep[0]
    assert standing(folder / "0", folder.parents[2], "val/acc1") is None


def test_eval_and_figures_take_the_fold_of_the_run(sweep: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    run = sweep[0] / "1"
    summary = summary_of(run)
    assert {f"test/{key}": eval_of(run)[key] for key in ("loss", "acc1")}.items() <= summary["test"].items()
    moved = shutil.copytree(images, tmp_path / "moved")
    assert eval_of(run, f"data.root={moved}")["loss"] == summary["test"]["test/loss"]
    done = command("figures", f"run={run}", f"paths.logs={tmp_path}", "among=0")
    assert done.returncode == 0, done.stderr
    shutil.copy(moved / "ring/0000.jpg", moved / "ring/more.jpg")
    done = command("eval.py", f"run={run}", f"paths.logs={tmp_path}", f"data.root={moved}")
    assert "note: the run's images were split by data.folds, and" in done.stdout
    extra = Path(shutil.copy(images / "ring/0000.jpg", images / "ring/more.jpg"))
    try:
        done = command("eval.py", f"run={run}", f"paths.logs={tmp_path}")
    finally:
        extra.unlink()
    assert_refused(done, "so data.folds splits them differently and training images would be tested")


def test_a_run_is_repeated_and_resumed_with_its_fold(sweep: tuple[Path, str], tmp_path: Path) -> None:
    run = sweep[0] / "1"
    again = command("train.py", f"from_run={run}", f"hydra.run.dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert "the images differ" not in again.stdout
    assert summary_of(tmp_path / "again")["best"] == summary_of(run)["best"]
    other = command("train.py", f"from_run={run}", "data.fold=2", "dry_run=true")
    assert other.returncode == 0, other.stderr
    assert "with data.fold=2 (the run has 1)" in other.stdout
    assert_refused(command("train.py", f"from_run={run}", "data.fold=3"), "`data.fold=3` must be from 0 to 2, because")
    for word in ("data.fold=2", "data.folds=4", "data.sampler=balanced"):
        refused = command("train.py", f"resume={run}", "trainer.max_epochs=3", word, "resume.allow_changes=true")
        assert_refused(refused, f"different settings: {word}")
    longer = shutil.copytree(run, tmp_path / "longer")
    done = command("train.py", f"resume={longer}", "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    assert summary_of(longer)["dataset"]["fingerprint"] == summary_of(run)["dataset"]["fingerprint"]


def test_with_a_test_folder_more_training_images_do_not_refuse_the_test(shapes: Path, tmp_path: Path) -> None:
    root, run = Path(shutil.copytree(shapes, tmp_path / "images")), tmp_path / "train/runs/x/0"
    words = ["data.folds=2", "data.fold=1", "data.batch_size=8", "trainer.limit_train_batches=1"]
    done = tiny_train(root, run, *words)
    assert done.returncode == 0, done.stderr
    assert summary_of(run)["dataset"]["images"] == {"train": 31, "val": 30, "test": 10}
    shutil.copy(root / "train/ring/0000.jpg", root / "train/ring/more.jpg")
    done = command("eval.py", f"run={run}", f"paths.logs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "note: the files of train, val in" in done.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data.fold=1"], "`data.fold=1` needs the number of folds: add data.folds=5, for example."),
        (["data.folds=3"], "`data.folds=3` needs the fold to validate on: add data.fold=0, or -m sweep=folds for all"),
        (["data.folds=3", "data.fold=3"], "`data.fold=3` must be from 0 to 2, because data.folds=3."),
        (["data.folds=3", "data.fold=-1"], "`data.fold=-1` must be at least 0."),
        (["data.folds=1", "data.fold=0"], "`data.folds=1` must be at least 2."),
        (
            ["data.folds=3", "data.fold=0", "data.val_fraction=0.1"],
            "`data.folds=3` and `data.val_fraction=0.1` both choose the validation images: remove one of them.",
        ),
        (["data.folds=5", "data.fold=0"], "`data.folds=5` is more than the 4 images of arrow, the smallest class: ch"),
        (["data.sampler=fair"], "`data.sampler=fair` must be shuffle, balanced or weighted."),
        (["data.val_fraction=0.25", "data.sampler=weighted"], "`data.sampler=weighted` needs a weight for each trai"),
        (["-m", "sweep=folds"], "sweep=folds needs the number of folds, one for all jobs: add data.folds=5, for exa"),
        (["-m", "sweep=folds", "data.folds=2,3"], "sweep=folds needs the number of folds, one for all jobs: add"),
        (["-m", "sweep=folds", "data.folds=x"], "all jobs: `data.folds=x` must be a whole number."),
        (["-m", "data.folds=3", "data.fold=0,3"], "job 1: `data.fold=3` must be from 0 to 2, because data.folds=3."),
        (["sweep=folds", "data.folds=3"], "`data.folds=3` needs the fold to validate on: add data.fold=0, or -m swee"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_a_run_exists(words: list[str], part: str, images: Path, tmp_path: Path) -> None:
    done = command("train.py", *SMALL_NET, "data=folder", f"data.root={images}", f"paths.logs={tmp_path}", *words)
    assert_refused(done, part)
    assert_no_run(tmp_path)


def uneven(shapes: Path, root: Path) -> Path:
    """Copy the shapes, with ten times as many training images of one class as of another."""
    shutil.copytree(shapes, root)
    for i in range(4, 20):
        shutil.copy(root / "train/ring/0000.jpg", root / f"train/ring/{i:04d}.jpg")
    for i in range(2, 4):
        (root / f"train/star/{i:04d}.jpg").unlink()
    return root


def test_two_processes_draw_balanced_batches_as_one_does(shapes: Path, tmp_path: Path) -> None:
    root = uneven(shapes, tmp_path / "images")
    words = [*EXACT, "data.sampler=balanced", "augment=basic"]
    one, two = tiny_train(root, tmp_path / "one", *words), tiny_train(root, tmp_path / "two", *words, *TWO)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert "ring has 20 training images" not in one.stdout + one.stderr, "the batches are balanced"
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], value, rtol=0, atol=1e-5)


def test_a_class_with_ten_times_the_images_of_another_is_a_warning(shapes: Path, tmp_path: Path) -> None:
    root = uneven(shapes, tmp_path / "images")
    warning = (
        "ring has 20 training images, and star has 2: data.sampler=balanced draws the classes equally often, and "
        "loss.class_weights=auto weights them in the loss."
    )
    for name, more in (("plain", []), ("weighted", ["+loss.class_weights=auto"])):
        done = tiny_train(root, tmp_path / name, "test=false", *more)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count(warning) == (0 if more else 1)
