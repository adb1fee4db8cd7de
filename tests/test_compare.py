"""The table of runs."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import command
from omegaconf import OmegaConf

from alexlab import compare
from alexlab.errors import UserError


def make_run(folder: Path, lr: float, acc1: float | None, **more: object) -> None:
    folder.mkdir(parents=True)
    config = {"model": {"name": "alexnet"}, "optimizer": {"lr": lr}, "run_dir": str(folder), **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if acc1 is not None:
        summary = {"status": "finished", "best": {"val/acc1": acc1, "val/loss": 1.5}, "last": {"val/acc1": acc1 / 2},
                   "test": {"test/acc1": 0.25}, "images_per_second": 123.4, "seconds": 5.5}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))


def test_best_first_with_the_keys_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", 0.1, 0.5)
    make_run(tmp_path / "runs/b", 0.2, 0.75)
    make_run(tmp_path / "runs/c", 0.2, None)
    (tmp_path / "runs/d").mkdir()
    (tmp_path / "runs/d/config.yaml").write_text("{broken")
    done = command("compare.py", f"runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    head, below, *rows = done.stdout.splitlines()
    assert head.split() == ["best", "last", "best"]
    assert below.split() == ["3", "runs", "val/acc1", "val/acc1", "val/loss", "test/acc1", "images/s", "seconds"]
    assert [row.split()[0] for row in rows[:3]] == ["b", "a", "c"]
    assert "0.7500" in rows[0]
    assert "0.3750" in rows[0]
    assert "running or killed" in rows[2]
    assert "optimizer.lr=0.2" in rows[0]
    assert "optimizer.lr=0.1" in rows[1]
    assert "model.name" not in done.stdout
    assert f"left out: {tmp_path}/runs/d (" in done.stdout


def test_one_run_globs_and_lists(tmp_path: Path) -> None:
    make_run(tmp_path / "multiruns/x/0", 0.1, 0.5)
    make_run(tmp_path / "multiruns/x/1", 0.1, 0.5, seed=1)
    found = compare.find([str(tmp_path / "multiruns/*/0"), str(tmp_path / "multiruns/x/0"), "x/0"], tmp_path)
    assert found == [tmp_path / "multiruns/x/0"]
    runs, left_out = compare.read(compare.find([str(tmp_path)], tmp_path))
    assert ([run["name"] for run in runs], left_out) == (["x/0", "x/1"], [])
    assert compare.differing(runs) == [{}, {"seed": 1}]


def test_a_groups_choice_tells_what_comes_with_it() -> None:
    base = {"data.name": "demo", "data.root": "a", "optimizer.lr": 0.1}
    runs: list[dict] = [
        {"given": set(), "config": base},
        {"given": set(), "config": {**base, "data.name": "folder", "data.root": "b"}},
        {"given": set(), "config": {**base, "data.name": "folder", "data.root": "c"}},
    ]
    assert compare.differing(runs) == [
        {"data.name": "demo"},
        {"data.name": "folder", "data.root": "b"},
        {"data.name": "folder", "data.root": "c"},
    ]


def test_an_option_tells_what_comes_with_it() -> None:
    """augment=strong is one setting, and not its erasing, mixup and cutmix as well; what was changed by hand is."""
    base = {"choices.augment": "basic", "augment.erase": 0.0, "augment.mixup": 0.0, "seed": 0}
    strong = {**base, "choices.augment": "strong", "augment.erase": 0.25, "augment.mixup": 0.2}
    runs: list[dict] = [{"config": base}, {"config": strong}, {"config": {**strong, "augment.mixup": 0.4}}]
    for run in runs:
        run["given"] = set()
    assert compare.differing(runs) == [
        {"augment": "basic"},
        {"augment": "strong", "augment.mixup": 0.2},
        {"augment": "strong", "augment.mixup": 0.4},
    ]


def test_what_a_command_line_gave_is_told_beside_another_option() -> None:
    runs = [
        {"given": set(), "config": {"choices.trainer": "auto", "trainer.max_epochs": 10, "trainer.devices": 1}},
        {"given": {"trainer.max_epochs"},
         "config": {"choices.trainer": "ddp", "trainer.max_epochs": 50, "trainer.devices": 2}},
    ]  # fmt: skip
    assert compare.differing(runs) == [
        {"trainer": "auto", "trainer.max_epochs": 10},
        {"trainer": "ddp", "trainer.max_epochs": 50},
    ]


def test_runs_from_before_options_were_kept_are_compared_by_their_keys() -> None:
    old = {"given": set(), "config": {"optimizer.lr": 0.1}}
    new = {"given": set(), "config": {"optimizer.lr": 0.2, "choices.optimizer": "sgd"}}
    assert compare.differing([old, new]) == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_it_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    """Whole names, which can be given again; no line is cut or wider than the terminal."""
    names = ["2026-11-25_02-54-50_274", "2026-11-25_03-22-46_497"]
    for number, name in enumerate(names):
        make_run(tmp_path / "train/runs" / name, 0.1 * (number + 1), 0.5, seed=number, label_smoothing=number / 10)
    done = command("compare.py", f"paths.logs={tmp_path}", env={"COLUMNS": str(columns)})
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= columns
    for name in names:
        assert f"{name}  finished" in done.stdout
    assert "0.5000" in done.stdout
    assert "label_smoothing=0.1 optimizer.lr=0.2 seed=1" in " ".join(done.stdout.split())
    done = command("compare.py", f"paths.logs={tmp_path}", f"runs=[{','.join(names)}]")
    assert "2 runs" in done.stdout, "by the names that it shows"


def test_no_runs_and_no_such_metric(tmp_path: Path) -> None:
    ask = OmegaConf.create({"runs": str(tmp_path), "paths": {"logs": str(tmp_path)}, "sort": "val/acc1", "most": 5})
    with pytest.raises(UserError, match="no run is there"):
        compare.compare(ask)
    make_run(tmp_path / "runs/a", 0.1, 0.5)
    with pytest.raises(UserError, match="sort=val/f1: must be one of test/acc1, val/acc1, val/loss"):
        compare.compare(OmegaConf.merge(ask, {"sort": "val/f1"}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[]"),
        ("summary.json", '{"best": 3}'),
        ("summary.json", '{"best": {"val/acc1": "x"}}'),
        ("summary.json", '{"status": "\\u001b[2J"}'),
        ("summary.json", "[" * 100_000),
        ("config.yaml", "a: &a [x]\nmodel: *a\n"),
        ("config.yaml", "x" * (2**20 + 1)),
        ("config.yaml", "[" * 50_000),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_run_is_left_out_and_the_others_are_shown(name: str, text: str, tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", 0.1, 0.5)
    make_run(tmp_path / "runs/b", 0.2, 0.75)
    (tmp_path / "runs/b" / name).write_text(text)
    done = command("compare.py", f"runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"left out: {tmp_path}/runs/b" in done.stdout
    assert "0.5000" in done.stdout
    assert "\x1b[2J" not in done.stdout
