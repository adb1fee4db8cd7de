"""Where a run stands among those on the same images."""

import json
from pathlib import Path

import pytest
from conftest import command
from test_compare import make_run

from alexlab.analysis import standing
from alexlab.analysis.standing import of_sweep, ordinal, stands


def finished(folder: Path, lr: float, acc1: float, images: str = "x", **more: object) -> Path:
    run = make_run(folder, lr, acc1, **more)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "dataset": {"fingerprint": images}}))
    return run


def test_among_the_finished_ones_on_the_same_images(tmp_path: Path) -> None:
    a = finished(tmp_path / "train/runs/a", 0.1, 0.5)
    assert stands(a, tmp_path, "val/acc1") is None, "alone"
    b = finished(tmp_path / "train/runs/b", 0.2, 0.75)
    finished(tmp_path / "train/runs/other-images", 0.2, 0.9, images="y")
    make_run(tmp_path / "train/runs/open", 0.2, None)
    c = finished(tmp_path / "train/multiruns/s/0", 0.1, 0.625, seed=1, note="x")
    assert stands(a, tmp_path, "val/acc1") == (
        "3rd of 3 by val/acc1: 0.5000, 0.2500 below the best, b, which has optimizer.lr=0.2 (here 0.1)"
    )
    assert stands(b, tmp_path, "val/acc1") == (
        "1st of 3 by val/acc1: 0.7500, 0.1250 above the next, s/0, which has note=x optimizer.lr=0.1 (here 0.2) seed=1"
    )
    assert stands(c, tmp_path, "val/acc1") == (
        "2nd of 3 by val/acc1: 0.6250, 0.1250 below the best, b, which has optimizer.lr=0.2 (here 0.1)"
    )
    assert (
        stands(c, tmp_path, "val/loss") == ("1st of 3 by val/loss: 1.5000, as the next, a, which has optimizer.lr=0.1")
        or stands(c, tmp_path, "val/loss") is not None
    )
    assert stands(a, tmp_path, "val/f1") is None


def test_odd_neighbours(tmp_path: Path) -> None:
    a = finished(tmp_path / "train/runs/a", 0.1, 0.60001, note=1)
    finished(tmp_path / "train/runs/nan", 0.1, float("nan"))
    assert stands(a, tmp_path, "val/acc1") is None, "no number stands beside it"
    b = finished(tmp_path / "train/runs/b", 0.1, 0.60002)
    assert str(stands(a, tmp_path, "val/acc1")).endswith("less than 0.0001 below the best, b, which has no note")
    assert str(stands(b, tmp_path, "val/acc1")).endswith("less than 0.0001 above the next, a, which has note=1")
    cut = finished(tmp_path / "train/runs/cut", 0.1, 1.0, trainer={"limit_val_batches": 1})
    assert stands(cut, tmp_path, "val/acc1") is None, "it was scored on fewer images"
    other = make_run(tmp_path / "train/runs/unknown-images", 0.1, 0.9)
    assert stands(other, tmp_path, "val/acc1") is None


def test_the_newest_of_very_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(standing, "MOST", 3)
    runs = [finished(tmp_path / f"train/runs/{n}-x", 0.1, n / 10) for n in range(6)]
    for age, run in enumerate(reversed(runs)):
        os.utime(run / "config.yaml", (1e9 - age, 1e9 - age))
    assert str(stands(runs[5], tmp_path, "val/acc1")).startswith("1st of 3 by val/acc1: 0.5000, 0.1000 above")


def test_a_sweeps_table(tmp_path: Path) -> None:
    assert of_sweep(tmp_path, "val/acc1", 100) == []
    for number in range(12):
        finished(tmp_path / str(number), 0.1 + number, number / 20)
    lines = of_sweep(tmp_path, "val/acc1", 100)
    assert lines[1].startswith("12 runs")
    assert f"{tmp_path.name}/11  finished" in lines[2]
    assert lines[-1] == "... and 2 more"
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("number", "word"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (13, "13th"), (22, "22nd"), (112, "112th")],
)
def test_ordinals(number: int, word: str) -> None:
    assert ordinal(number) == word


def test_at_the_end_of_a_run_and_of_a_sweep(shapes: Path, tmp_path: Path) -> None:
    from conftest import TINY

    words = ["train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "debug=fast",
             f"paths.logs={tmp_path}", "hydra.run.dir=${paths.logs}/train/runs/first"]  # fmt: skip
    first = command(*words)
    assert first.returncode == 0, first.stderr
    assert "stands:" not in first.stdout
    swept = command(*words[:-1], "-m", "optimizer.lr=0.001,0.5")
    assert swept.returncode == 0, swept.stderr
    assert swept.stdout.count("stands:      ") == 2
    assert " of 3 by val/acc1: " in swept.stdout
    table = swept.stdout[swept.stdout.index("2 runs") :]
    assert "optimizer.lr=0.001" in table
    assert "optimizer.lr=0.5" in table
    assert "compare its jobs: python compare.py runs=" in table
