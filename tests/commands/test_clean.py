"""What a finished run keeps, and `alexlab clean`."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import command, summary_of, tiny_train


def files_of(run_dir: Path) -> set[str]:
    folder = run_dir / "checkpoints"
    listed = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    return {path.name for path in folder.glob("*.ckpt")}


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all checkpoints."""
    folder = tmp_path_factory.mktemp("clean") / "train/runs/whole"
    done = tiny_train(shapes, folder, "trainer.max_epochs=2", "checkpoint.keep=all")
    assert done.returncode == 0, done.stderr
    assert files_of(folder) == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    return folder


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], {"best.ckpt", "last.ckpt"}),
        (["checkpoint.keep=best"], {"best.ckpt"}),
        (["checkpoint.keep=best", "trainer.limit_val_batches=0", "test=false", "monitor=val/loss"], {"last.ckpt"}),
    ],
)
def test_a_finished_run_keeps_what_it_is_asked_to(
    words: list[str], kept: set[str], shapes: Path, tmp_path: Path
) -> None:
    done = tiny_train(shapes, tmp_path / "run", "trainer.max_epochs=2", *words)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "run") == kept


def test_clean_says_what_it_would_delete_and_then_deletes(whole: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for name in ("a", "b", "killed"):
        shutil.copytree(whole, logs / "train/runs" / name)
    (logs / "train/runs/killed/summary.json").unlink()
    size = (whole / "checkpoints/previous.ckpt").stat().st_size
    dry = command("clean", f"paths.logs={logs}")
    assert dry.returncode == 0, dry.stderr
    assert f"a/checkpoints: previous.ckpt ({size / 1e6:,.0f} MB)" in dry.stdout
    assert "skipped: 1 run that did not finish, or that still train" in dry.stdout
    assert dry.stdout.endswith(f"{2 * size / 1e9:,.2f} GB of 2 runs would be deleted; to delete it: dry_run=false\n")
    assert all("previous.ckpt" in files_of(path) for path in (logs / "train/runs").iterdir())

    one = command("clean", f"paths.logs={logs}", "runs=a", "keep=best", "dry_run=false")
    assert one.stdout.endswith("GB of 1 run deleted\n"), one.stderr
    assert files_of(logs / "train/runs/a") == {"best.ckpt"}
    rest = command("clean", f"paths.logs={logs}", "dry_run=false")
    assert rest.returncode == 0, rest.stderr
    assert files_of(logs / "train/runs/b") == {"best.ckpt", "last.ckpt"}
    assert "previous.ckpt" in files_of(logs / "train/runs/killed"), "it may be resumed"
    wrong = command("clean", f"paths.logs={logs}", "runs=none")
    assert (wrong.returncode, "none: no run found." in wrong.stderr) == (2, True)


def test_nothing_is_deleted_while_what_stays_is_damaged_or_a_link(whole: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    damaged, linked, foreign = (
        Path(shutil.copytree(whole, logs / "train/runs" / name)) / "checkpoints" for name in ("a", "b", "c")
    )
    (damaged / "best.ckpt").write_bytes(b"damaged")
    (linked / "best.ckpt").unlink()
    (linked / "best.ckpt").symlink_to("last.ckpt")
    foreign.rename(tmp_path / "elsewhere")
    foreign.symlink_to(tmp_path / "elsewhere")
    done = command("clean", f"paths.logs={logs}", "keep=best", "dry_run=false")
    assert done.returncode == 0, done.stderr
    assert "a/checkpoints, because best.ckpt is damaged (the SHA-256 is not the one in SHA256SUMS)" in done.stdout
    assert done.stdout.count("because it has links") == 2
    for folder in (damaged, linked, foreign):
        assert {path.name for path in folder.glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_a_run_without_last_ckpt_is_not_started_again(whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "train/runs/one"))
    assert command("clean", f"paths.logs={tmp_path}", "keep=best", "dry_run=false").returncode == 0
    before = (run_dir / "metrics.csv").read_bytes()
    again = command("train.py", "resume=auto", f"hydra.run.dir={run_dir}")
    assert again.returncode == 0, again.stderr
    assert "is finished." in again.stdout
    for words in (["resume=auto", f"hydra.run.dir={run_dir}"], [f"resume={run_dir}"]):
        longer = command("train.py", *words, "trainer.max_epochs=3")
        assert longer.returncode == 2
        assert "is finished, and last.ckpt was deleted (checkpoint.keep=best, or alexlab clean)" in longer.stderr
        assert "Start a new run with the weights: init_from=" in longer.stderr
    other = command("train.py", f"ckpt_path={run_dir}", "dry_run=true")
    assert other.returncode == 2
    assert "the run has no last.ckpt any more (checkpoint.keep=best, or alexlab clean): start from" in other.stderr
    assert (run_dir / "metrics.csv").read_bytes() == before
    assert summary_of(run_dir)["status"] == "finished"
    assert command("eval.py", f"run={run_dir}", "report=false").returncode == 0
