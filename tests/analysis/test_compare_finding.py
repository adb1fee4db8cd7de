"""Where compare.py looks for runs, and what it says of what it cannot look into."""

import fcntl
import json
import os
import tempfile
from pathlib import Path

import pytest
from conftest import command
from test_bad_inputs import as_nobody
from test_compare import make_run

from alexlab.analysis import runs as reading
from alexlab.analysis import standing
from alexlab.analysis.finding import find
from alexlab.analysis.runs import read
from alexlab.analysis.where import chosen


def test_names_that_nothing_has(tmp_path: Path) -> None:
    make_run(tmp_path / "train/runs/2026-11-25_02-54-50_274", 0.1, 0.5)
    make_run(tmp_path / "train/multiruns/2026-11-25_03-00-00_100/0", 0.1, 0.5)

    def told(*words: str) -> str:
        done = command("compare.py", f"paths.logs={tmp_path}", *words)
        assert done.returncode == 2, done.stdout
        return done.stderr

    near = "runs=2026-11-25_02-54-50: 2026-11-25_02-54-50 (no run is there: did you mean 2026-11-25_02-54-50_274"
    assert near in told("runs=2026-11-25_02-54-50")
    assert f"names are looked for in {tmp_path}/train." in told("runs=nowhere")
    assert "runs=[nowhere,x]: nowhere (no run is there); x (no run is there)." in told("runs=[nowhere,x]")
    assert "runs=: give a folder of runs, a glob, a run's name, latest, or a list" in told("runs=")
    for out in (tmp_path / "train/runs/2026-11-25_02-54-50_274/config.yaml/x", "/dev/null/a/b"):
        for form in ("csv", "html"):
            assert "is a file, and no folder: give another place" in told(f"format={form}", f"out={out}")


def test_latest_and_names_like_numbers(tmp_path: Path) -> None:
    for number, name in enumerate(("2026_11", "1e5", "1.50", "12", "1E-5")):
        run = make_run(tmp_path / "train/runs" / name, 0.1 * (number + 1), 0.5)
        os.utime(run / "config.yaml", (1000 - number, 1000 - number))
    logs = f"paths.logs={tmp_path}"
    assert "2026_11" in command("compare.py", logs, "runs=latest").stdout
    for words in ("runs=2026_11", "runs=[1e5,2026_11, 12]", "runs=1.50", "runs=1E-5", "runs=12"):
        done = command("compare.py", logs, words)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 2 + words.count(",") + 1
    done = command("eval.py", logs, "run=2026_11")
    assert f"{tmp_path}/train/runs/2026_11" in done.stderr, "and not 202611"
    for key in ("from_run", "resume", "init_from"):
        done = command("train.py", logs, f"{key}=2026_11", "data=demo", "dry_run=true")
        assert "202611" not in done.stderr, key
        assert "2026_11" in done.stderr, key
    table = command("compare.py", logs).stdout
    assert "\n12  " in table, "and not runs/12"


def test_what_cannot_be_looked_into_is_told_and_the_rest_is_shown() -> None:
    with tempfile.TemporaryDirectory() as name:  # of which another user may see what is in it
        folder = Path(name).resolve()
        folder.chmod(0o755)
        make_run(folder / "a", 0.1, 0.5)
        make_run(folder / ".hidden", 0.1, 0.5)
        (folder / "loop").symlink_to("loop")
        make_run(folder / "closed/b", 0.1, 0.5)
        (folder / "closed").chmod(0)
        with as_nobody():
            found = find([str(folder)], folder)
        (folder / "closed").chmod(0o755)
    told = [f"{folder}/loop (Too many levels of symbolic links)", f"{folder}/closed (Permission denied)"]
    assert found == ([folder / "a"], told)


def test_files_beside_runs_are_no_runs(tmp_path: Path) -> None:
    """As the multirun.yaml of a sweep, which a glob takes along."""
    for name in "01":
        run = make_run(tmp_path / "sw" / name, 0.1, 0.5)
        (run / "metrics.csv").write_text("step,train/loss_step\n1,0.5\n")
    (tmp_path / "sw/multirun.yaml").touch()
    assert find([f"{tmp_path}/sw/*"], tmp_path) == ([tmp_path / "sw/0", tmp_path / "sw/1"], [])
    done = command("compare.py", f"runs={tmp_path}/sw/*", "equal=true")
    assert done.stdout == "sw/0 and sw/1 are equal in all 1 numbers of 1 steps.\n", done.stderr
    _, told = find([f"{tmp_path}/sw/0/config.yaml"], tmp_path)
    assert told == [f"{tmp_path}/sw/0/config.yaml (no run is there)"]


def test_an_empty_folder_here_hides_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "train/runs/A", 0.1, 0.5)
    (tmp_path / "here/A").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find(["A"], tmp_path / "train") == ([run], [])


def test_pipes_keep_nobody_waiting(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5)
    (run / "figures").mkdir()
    for name in ("code.json", "metrics.csv", "figures/x.png"):
        os.mkfifo(run / name)
    done = command("compare.py", f"runs={tmp_path}", "format=html", f"out={tmp_path}/page.html", timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"left out: which code {run} was trained with (its code.json cannot be read)" in done.stdout
    whole = json.loads(command("compare.py", f"runs={tmp_path}", "format=json").stdout)
    assert any("code.json cannot be read" in line for line in whole["left_out"])


def test_a_code_that_cannot_be_read_is_no_other_code(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        run = make_run(tmp_path / name, 0.1, 0.5, seed=seed)
        summary = json.loads((run / "summary.json").read_text())
        told = {**summary, "git": {"commit": "c" * 40, "dirty": True}}
        (run / "summary.json").write_text(json.dumps(told))
        (run / "code.json").write_text(json.dumps({"commit": "c" * 40, "dirty": False}) if name == "a" else "{")
    (a, b), _ = read([tmp_path / "a", tmp_path / "b"])
    assert (a.facts["commit"], b.facts["commit"]) == ("ccccccc", None)
    assert (a.problems, len(b.problems)) == ([], 1)


def test_a_lock_of_the_same_number_elsewhere_is_none_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inode's number counts on its own file system alone."""
    run = make_run(tmp_path / "a", 0.1, 0.5)
    lock = run / ".lock.rank"
    lock.touch()
    monkeypatch.setattr(reading, "locked_files", lambda: {lock.stat().st_ino})
    assert read([run])[0][0].status == "finished"
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read([run])[0][0].status == "running"


def test_standing_looks_at_a_thousand_whatever_else_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "MOST", 2)
    for name in ("a", "b", "c"):
        run = make_run(tmp_path / "train/runs" / name, 0.1, 0.5)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "dataset": {"fingerprint": "x"}}))
    (tmp_path / "train/runs/half").mkdir()
    (tmp_path / "train/runs/half/summary.json").write_text('{"status": "finished", "others": [1]}')
    told = standing.stands(tmp_path / "train/runs/a", tmp_path, "val/acc1")
    assert told is not None
    assert told.startswith("1st of ")


def test_a_long_summary_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "skipped_images": ["x" * 40] * 40_000}))
    runs, left_out = read([run])
    assert (runs[0].numbers["val/acc1"], left_out) == (0.5, [])


@pytest.mark.parametrize(
    ("text", "names"),
    [("name~0003", ["r_0003"]), ("name~26_20", ["r_26_20"]), ("name=26_20", []), ("optimizer.lr>=1e-1", ["r_0003"])],
)
def test_names_that_look_like_numbers(text: str, names: list[str]) -> None:
    runs = [reading.Run(Path(name), name, "finished", {"optimizer.lr": lr})
            for name, lr in (("r_0003", 0.1), ("r_0031", 0.01), ("r_26_20", 0.01), ("r_2620", 0.01))]  # fmt: skip
    assert [run.name for run in chosen(runs, text)] == names


@pytest.mark.parametrize(
    ("key", "low"),
    [
        ("loss/val", True), ("val/loss", True), ("test_error", True), ("last/val/perplexity", True), ("top5_err", True),
        ("rmse", True), ("seconds", True), ("val/glossiness", False),
        ("losses/val", True), ("lossTotal", True), ("val/acc1", False), ("images_per_second", False),
        ("verrucae", False), ("terms", False), ("mAP", False),
    ],
)  # fmt: skip
def test_what_is_better_low(key: str, low: bool) -> None:
    assert reading.low_is_good(key) == low
