"""The rank of a run and the table of a sweep, which are printed when a training ends."""

import os
from pathlib import Path

import pytest
from conftest import TINY, command
from test_compare import fold
from test_runs import make_run, write_summary

from alexlab.analysis import compare
from alexlab.analysis.compare import standing, sweep_table


def finished(folder: Path, lr: float, acc1: float, images: str = "x", **more: object) -> Path:
    run = make_run(folder, lr, acc1, **more)
    write_summary(run, dataset={"fingerprint": images})
    return run


def test_a_run_is_ranked_among_the_finished_runs_on_the_same_images(tmp_path: Path) -> None:
    a = finished(tmp_path / "train/runs/a", 0.1, 0.5)
    assert standing(a, tmp_path, "val/acc1") is None, "alone"
    b = finished(tmp_path / "train/runs/b", 0.2, 0.75)
    finished(tmp_path / "train/runs/other-images", 0.2, 0.9, images="y")
    make_run(tmp_path / "train/runs/open", 0.2, None)
    c = finished(tmp_path / "train/multiruns/s/0", 0.1, 0.625, seed=1, note="x")
    assert standing(a, tmp_path, "val/acc1") == (
        "3 of 3 by val/acc1: 0.5000; the best other run b has 0.7500 with optimizer.lr=0.2 (this run: optimizer.lr=0.1)"
    )
    assert standing(b, tmp_path, "val/acc1") == (
        "1 of 3 by val/acc1: 0.7500; the best other run s/0 has 0.6250 "
        "with note=x optimizer.lr=0.1 seed=1 (this run: optimizer.lr=0.2)"
    )
    assert str(standing(c, tmp_path, "val/acc1")).startswith("2 of 3 by val/acc1: 0.6250; the best other run b has 0.7")
    assert standing(a, tmp_path, "val/f1") is None
    write_summary(a, best={"val/loss": 1.75})
    assert str(standing(a, tmp_path, "val/loss")).startswith("3 of 3 by val/loss: 1.7500; "), "a lower loss is better"
    assert str(standing(b, tmp_path, "val/loss")).startswith(
        "1 of 3 by val/loss: 1.5000; the best other run s/0 has 1.5"
    )


def test_a_fold_is_ranked_among_runs_that_were_validated_on_the_same_images(tmp_path: Path) -> None:
    a = fold(tmp_path / "train/runs/a", 0, 0.5)
    fold(tmp_path / "train/runs/other-fold", 1, 0.9)
    fold(tmp_path / "train/runs/other-seed", 0, 0.9, seed=1)
    assert standing(a, tmp_path, "val/acc1") is None
    fold(tmp_path / "train/runs/b", 0, 0.75, lr=0.2)
    assert str(standing(a, tmp_path, "val/acc1")).startswith(
        "2 of 2 by val/acc1: 0.5000; the best other run b has 0.75"
    )


def test_runs_that_cannot_be_ranked_are_not(tmp_path: Path) -> None:
    a = finished(tmp_path / "train/runs/a", 0.1, 0.60001, note=1)
    finished(tmp_path / "train/runs/nan", 0.1, float("nan"))
    assert standing(a, tmp_path, "val/acc1") is None, "NaN is no rank"
    b = finished(tmp_path / "train/runs/b", 0.1, 0.7)
    assert str(standing(a, tmp_path, "val/acc1")).endswith(
        "other run b has 0.7000 with the same settings (this run: note=1)"
    )
    assert str(standing(b, tmp_path, "val/acc1")).endswith("the best other run a has 0.6000 with note=1")
    fewer = finished(tmp_path / "train/runs/fewer", 0.1, 1.0, trainer={"limit_val_batches": 1})
    assert standing(fewer, tmp_path, "val/acc1") is None, "it was validated on fewer images"
    other = make_run(tmp_path / "train/runs/unknown-images", 0.1, 0.9)
    assert standing(other, tmp_path, "val/acc1") is None


def test_of_many_runs_the_newest_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_SIBLINGS", 3)
    runs = [finished(tmp_path / f"train/runs/{n}-x", 0.1, n / 10) for n in range(6)]
    for age, run in enumerate(reversed(runs)):
        os.utime(run / "config.yaml", (1e9 - age, 1e9 - age))
    broken = tmp_path / "train/runs/broken"
    broken.mkdir()
    (broken / "summary.json").write_text('{"status": "finished", "best": [1]}')
    assert str(standing(runs[5], tmp_path, "val/acc1")).startswith("1 of 3 by val/acc1: 0.5000; ")


def test_the_table_of_a_sweep_has_the_best_jobs_first(tmp_path: Path) -> None:
    assert sweep_table(tmp_path, "val/acc1", 100) == []
    for number in range(12):
        finished(tmp_path / str(number), 0.1 + number, number / 20)
    lines = sweep_table(tmp_path, "val/acc1", 100)
    assert lines[0].startswith("12 runs")
    assert f"{tmp_path.name}/11  finished" in lines[1]
    assert lines[-1] == "... and 2 more"
    assert max(map(len, lines)) <= 100


def test_rank_and_table_import_no_pandas(tmp_path: Path) -> None:
    for number in range(2):
        finished(tmp_path / f"train/multiruns/s/{number}", 0.1 + number, number / 20)
    code = (
        "import sys; from pathlib import Path; from alexlab.analysis.compare import standing, sweep_table\n"
        f"logs = Path({str(tmp_path)!r}); sweep = logs / 'train/multiruns/s'\n"
        "rank, lines = standing(sweep / '0', logs, 'val/acc1'), sweep_table(sweep, 'val/acc1', 80)\n"
        "print(rank[:8], len(lines), 'pandas' in sys.modules)"
    )
    assert command("-c", code).stdout == "2 of 2 b 5 False\n"


def test_rank_and_table_are_printed_at_the_end_of_runs_and_sweeps(shapes: Path, tmp_path: Path) -> None:
    words = [f"data.root={shapes}", "data.batch_size=8", "debug=fast", f"paths.logs={tmp_path}", "test=false"]
    sweep = command("train.py", *TINY, "data=folder", *words, "-m", "optimizer.lr=0.001,0.5")
    assert sweep.returncode == 0, sweep.stderr
    assert "rank: " not in sweep.stdout, "the table follows"
    table = sweep.stdout[sweep.stdout.index("2 runs") :]
    assert "optimizer.lr=0.001" in table
    assert "optimizer.lr=0.5" in table
    alone = command("train.py", *TINY, "data=folder", *words)
    assert " of 3 by val/acc1: " in alone.stdout
    assert f"compare:     alexlab compare paths.logs={tmp_path}\n" in alone.stdout, "not the default"
