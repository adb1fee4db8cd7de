"""Runs of version 0.1 (commit 8017213), from before modules and settings were renamed, give that version's numbers.

`tests/fixtures/runs/` holds three of them, of networks with about 20,000 parameters, trained on the images of `shapes`:

    finished    AlexNet with BatchNorm, 2 epochs
    timm        timm's ResNet-18, AdamW, 2 epochs
    preempted   AlexNet on two ranks, with EMA, strong augmentation and a callback of the user's; stopped by SIGTERM
                after step 15 of 30, within epoch 2 of 3

`expected.json` holds the results of version 0.1: metrics of `eval`, the five most probable classes of `predict`, the
rows of metrics.csv and the summary after `resume`, and the groups of `compare`.
"""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import command, summary_of
from resuming import rows_of

from alexlab.tasks.load import load

RUNS = Path(__file__).parents[1] / "fixtures/runs"
EXPECTED = json.loads((RUNS / "expected.json").read_text())
ENV = {"OMP_NUM_THREADS": "1"}
each_run = pytest.mark.parametrize("name", ["finished", "timm", "preempted"])


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(RUNS / name, folder / name))


def test_the_images_are_those_of_the_old_runs(shapes: Path) -> None:
    paths = sorted(path.relative_to(shapes).as_posix() for path in shapes.rglob("*.jpg"))
    lines = [f"{hashlib.sha256((shapes / path).read_bytes()).hexdigest()}  {path}\n" for path in paths]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == EXPECTED["images"]


@pytest.mark.parametrize(
    ("name", "ckpt"), [("finished", "best"), ("timm", "best"), ("preempted", "best"), ("preempted", "last")]
)
def test_eval_gives_the_old_metrics(name: str, ckpt: str, shapes: Path, tmp_path: Path) -> None:
    run = copy_of(name, tmp_path)
    result = command("eval.py", f"run={run}", f"ckpt={ckpt}", f"data.root={shapes}", env=ENV)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((run / "eval.json").read_text())
    for key, value in EXPECTED[name]["eval"][ckpt].items():
        assert metrics[key.removeprefix("test/")] == pytest.approx(value, abs=1e-4), key


@each_run
def test_predict_gives_the_old_probabilities(name: str, shapes: Path, tmp_path: Path) -> None:
    run = copy_of(name, tmp_path)
    result = command("predict", f"run={run}", f"images={shapes / 'test'}", env=ENV)
    assert result.returncode == 0, result.stderr
    predicted: dict[str, dict[str, float]] = {}
    with (run / "predictions.csv").open() as file:
        for row in csv.DictReader(file):
            path = Path(row["path"]).relative_to(shapes).as_posix()
            predicted.setdefault(path, {})[row["class"]] = float(row["probability"])
    assert predicted == {path: pytest.approx(dict(best), abs=1e-4) for path, best in EXPECTED[name]["predict"].items()}


@each_run
def test_export_writes_a_network_that_agrees_with_the_old_run(name: str, shapes: Path, tmp_path: Path) -> None:
    run = copy_of(name, tmp_path)
    result = command("export", f"run={run}", "format=torch_export", f"images={shapes / 'test'}", env=ENV)
    assert result.returncode == 0, result.stderr
    assert "10 of 10 top-1 classes are the same" in result.stdout
    net, transform, classes = load(run)
    path, best = next(iter(EXPECTED[name]["predict"].items()))
    probabilities = net(transform(shapes / path)[None]).softmax(1)[0].tolist()
    assert {key: probabilities[classes.index(key)] for key, _ in best} == pytest.approx(dict(best), abs=1e-4)


def test_compare_lists_the_old_runs_with_their_metrics() -> None:
    result = command("compare", f"runs={RUNS}", "format=json")
    assert result.returncode == 0, result.stderr
    groups = {group["name"]: group for group in json.loads(result.stdout)["groups"]}
    assert groups.keys() == EXPECTED["compare"].keys()
    for name, expected in EXPECTED["compare"].items():
        metrics = {key: value["mean"] for key, value in groups[name]["metrics"].items()}
        assert metrics == expected["metrics"]
        assert groups[name]["status"] == expected["status"]
        assert groups[name]["settings"] == expected["settings"]


def test_a_preempted_run_of_two_ranks_resumes_with_the_old_rows(shapes: Path, tmp_path: Path) -> None:
    run, expected = copy_of("preempted", tmp_path), EXPECTED["preempted"]["resumed"]
    with (run / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == expected["rows_before"]
    before = len(rows_of(run))
    result = command("train.py", f"resume={run}", f"data.root={shapes}", "resume.allow_changes=true", env=ENV)
    assert result.returncode == 0, result.stderr
    rows = [{key: float(value) for key, value in row.items()} for row in rows_of(run)[before:]]
    assert len(rows) == len(expected["rows_after"])
    for row, expected_row in zip(rows, expected["rows_after"], strict=True):
        assert row == pytest.approx({key: float(value) for key, value in expected_row.items()}, abs=1e-4)
    summary = summary_of(run)
    for key in ("best", "last", "test"):
        assert summary[key] == pytest.approx(expected[key], abs=1e-4), key
    for key in ("status", "best_epoch", "epochs", "steps", "world_size"):
        assert summary[key] == expected[key], key


def test_from_run_repeats_an_old_run_bit_for_bit(shapes: Path, tmp_path: Path) -> None:
    run, again = copy_of("finished", tmp_path), tmp_path / "again"
    result = command("train.py", f"from_run={run}", f"data.root={shapes}", f"hydra.run.dir={again}", env=ENV)
    assert result.returncode == 0, result.stderr
    assert rows_of(again) == rows_of(run)
