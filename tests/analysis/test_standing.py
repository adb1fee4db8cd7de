"""The rank of a run and the table of a sweep, which are printed when a training ends."""

import os
from pathlib import Path

import pytest
from conftest import TINY, command
from test_compare import fold
from test_runs import make_run, write_summary

from alexlab.analysis import compare
from alexlab.analysis.compare import ordinal, standing, sweep_table


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
        "3rd of 3 by val/acc1: 0.5000, 0.2500 below the best run b, which has optimizer.lr=0.2 (this run: 0.1)"
    )
    assert standing(b, tmp_path, "val/acc1") == (
        "1st of 3 by val/acc1: 0.7500, 0.1250 above the next run s/0, "
        "which has note=x optimizer.lr=0.1 (this run: 0.2) seed=1"
    )
    assert standing(c, tmp_path, "val/acc1") == (
        "2nd of 3 by val/acc1: 0.6250, 0.1250 below the best run b, which has optimizer.lr=0.2 (this run: 0.1)"
    )
    assert standing(a, tmp_path, "val/f1") is None
    write_summary(a, best={"val/loss": 1.75})
    assert str(standing(a, tmp_path, "val/loss")).startswith(
        "3rd of 3 by val/loss: 1.7500, 0.2500 above the best run "
    ), "a lower loss is better"
    assert str(standing(b, tmp_path, "val/loss")).startswith("1st of 3 by val/loss: 1.5000, equal to the next run s/0,")


def test_a_fold_is_ranked_among_runs_that_were_validated_on_the_same_images(tmp_path: Path) -> None:
    a = fold(tmp_path / "train/runs/a", 0, 0.5)
    fold(tmp_path / "train/runs/other-fold", 1, 0.9)
    fold(tmp_path / "train/runs/other-seed", 0, 0.9, seed=1)
    assert standing(a, tmp_path, "val/acc1") is None
    fold(tmp_path / "train/runs/b", 0, 0.75, lr=0.2)
    assert str(standing(a, tmp_path, "val/acc1")).startswith(
        "2nd of 2 by val/acc1: 0.5000, 0.2500 below the best run b,"
    )


def test_runs_that_cannot_be_ranked_are_not(tmp_path: Path) -> None:
    a = finished(tmp_path / "train/runs/a", 0.1, 0.60001, note=1)
    finished(tmp_path / "train/runs/nan", 0.1, float("nan"))
    assert standing(a, tmp_path, "val/acc1") is None, "NaN is no rank"
    b = finished(tmp_path / "train/runs/b", 0.1, 0.60002)
    assert str(standing(a, tmp_path, "val/acc1")).endswith("less than 0.0001 below the best run b, which has no note")
    assert str(standing(b, tmp_path, "val/acc1")).endswith("less than 0.0001 above the next run a, which has note=1")
    fewer = finished(tmp_path / "train/runs/fewer", 0.1, 1.0, trainer={"limit_val_batches": 1})
    assert standing(fewer, tmp_path, "val/acc1") is None, "it was validated on fewer images"
    other = make_run(tmp_path / "train/runs/unknown-images", 0.1, 0.9)
    assert standing(other, tmp_path, "val/acc1") is None
    twin = finished(tmp_path / "train/runs/twin", 0.1, 0.60002)
    write_summary(twin, precision="bf16-mixed")
    assert str(standing(b, tmp_path, "val/acc1")).endswith(
        "equal to the next run twin, which has the same settings and precision=bf16-mixed"
    )


def test_of_many_runs_the_newest_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_SIBLINGS", 3)
    runs = [finished(tmp_path / f"train/runs/{n}-x", 0.1, n / 10) for n in range(6)]
    for age, run in enumerate(reversed(runs)):
        os.utime(run / "config.yaml", (1e9 - age, 1e9 - age))
    broken = tmp_path / "train/runs/broken"
    broken.mkdir()
    (broken / "summary.json").write_text('{"status": "finished", "best": [1]}')
    assert str(standing(runs[5], tmp_path, "val/acc1")).startswith("1st of 3 by val/acc1: 0.5000, 0.1000 above")


def test_the_table_of_a_sweep_has_the_best_jobs_first(tmp_path: Path) -> None:
    assert sweep_table(tmp_path, "val/acc1", 100) == []
    for number in range(12):
        finished(tmp_path / str(number), 0.1 + number, number / 20)
    lines = sweep_table(tmp_path, "val/acc1", 100)
    assert lines[1].startswith("12 runs")
    assert f"{tmp_path.name}/11  finished" in lines[2]
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
    assert command("-c", code).stdout == "2nd of 2 6 False\n"


@pytest.mark.parametrize(
    ("number", "word"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (13, "13th"), (22, "22nd"), (112, "112th")],
)
def test_a_rank_is_written_as_an_ordinal(number: int, word: str) -> None:
    assert ordinal(number) == word


def test_rank_and_table_are_printed_at_the_end_of_runs_and_sweeps(shapes: Path, tmp_path: Path) -> None:
    words = [f"data.root={shapes}", "data.batch_size=8", "debug=fast", f"paths.logs={tmp_path}", "test=false"]
    sweep = command("train.py", *TINY, "data=folder", *words, "-m", "optimizer.lr=0.001,0.5")
    assert sweep.returncode == 0, sweep.stderr
    assert " of 1 by " not in sweep.stdout
    assert sweep.stdout.count(" of 2 by val/acc1: ") == 1
    table = sweep.stdout[sweep.stdout.index("2 runs") :]
    assert "optimizer.lr=0.001" in table
    assert "optimizer.lr=0.5" in table
