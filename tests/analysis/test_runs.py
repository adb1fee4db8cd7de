"""Run directories are found, and read whatever their age and state."""

import fcntl
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import command
from test_bad_inputs import as_nobody

import alexlab
from alexlab.analysis import runs as reading
from alexlab.analysis.runs import Run, curves, find, read
from alexlab.engine.errors import UserError
from alexlab.engine.files import lock as locked
from alexlab.engine.metrics import is_always_one, lower_is_better
from alexlab.engine.settings import canonical, is_own_checkpoint


def make_run(folder: Path, lr: float, acc1: float | None, **more: object) -> Path:
    """Write a run directory; `more` are other settings. Without `acc1` the run has no summary."""
    folder.mkdir(parents=True)
    config = {"model": {"name": "alexnet"}, "optimizer": {"lr": lr}, "run_dir": str(folder), **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if acc1 is not None:
        write_summary(
            folder, status="finished", best={"val/acc1": acc1, "val/loss": 1.5}, last={"val/acc1": acc1 / 2},
            test={"test/acc1": 0.25}, images_per_second=123.4, seconds=5.5,
        )  # fmt: skip
    return folder


def write_summary(folder: Path, **values: Any) -> None:
    """Write summary.json, or change these values of it."""
    path = folder / "summary.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


def read_all(folder: Path) -> list[Run]:
    runs, problems = read(find([str(folder)], folder)[0])
    assert problems == []
    return runs


# -- finding


def test_runs_are_found_by_folder_glob_name_and_link(tmp_path: Path) -> None:
    logs = tmp_path / "train"
    jobs = [make_run(logs / f"multiruns/sweep/{job}", 0.1, 0.5) for job in (0, 1)]
    (logs / "multiruns/sweep/multirun.yaml").touch()  # a glob includes it
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link").symlink_to(jobs[1])
    for names, expected in {
        (str(tmp_path),): jobs[::-1],  # in the order of the folders other/ and train/
        (f"{tmp_path}/train/multiruns/*/0", "sweep/0", str(jobs[0])): jobs[:1],
        ("sweep",): jobs,
        (str(tmp_path / "other"),): jobs[1:],
        (f"{logs}/multiruns/sweep/*",): jobs,
    }.items():
        assert find(list(names), logs) == (expected, [])
    assert [run.name for run in read_all(logs)] == ["sweep/0", "sweep/1"]
    assert find([f"{jobs[0]}/config.yaml"], logs)[1] == [f"{jobs[0]}/config.yaml: no run found."]


def test_a_name_may_contain_brackets(tmp_path: Path) -> None:
    run = make_run(tmp_path / "exp[1]/a", 0.1, 0.5)
    missing = f"{tmp_path}/nope*: no run found."
    assert find([str(run), f"{tmp_path}/nope*"], tmp_path) == ([run], [missing])


def test_an_empty_folder_in_the_working_directory_hides_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "train/runs/A", 0.1, 0.5)
    (tmp_path / "here/A").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find(["A"], tmp_path / "train") == ([run], [])


def test_the_latest_run_is_the_one_whose_config_is_newest(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        os.utime(make_run(tmp_path / "runs" / name, 0.1, 0.5) / "config.yaml", (1000 - age, 1000 - age))
    assert find(["latest"], tmp_path) == ([tmp_path / "runs/new"], [])


def test_a_name_that_no_run_has_is_answered_with_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/2026-11-25_02-54-50_274", 0.1, 0.5)
    near = "2026-11-25_02-54-50: no run found. Did you mean 2026-11-25_02-54-50_274?"
    assert find(["2026-11-25_02-54-50", "nowhere"], tmp_path) == ([], [near, "nowhere: no run found."])


def test_a_folder_that_contains_itself_through_a_link_is_searched_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a/run", 0.1, 0.5)
    (tmp_path / "a/again").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert find([str(tmp_path)], tmp_path) == ([tmp_path / "a/run"], [])


def test_folders_that_cannot_be_opened_are_named_and_the_rest_is_found() -> None:
    with tempfile.TemporaryDirectory() as name:  # which another user may open, unlike pytest's
        folder = Path(name).resolve()
        folder.chmod(0o755)
        make_run(folder / "a", 0.1, 0.5)
        make_run(folder / ".hidden", 0.1, 0.5)
        make_run(folder / "closed/b", 0.1, 0.5)
        (folder / "closed").chmod(0)
        with as_nobody():
            found = find([str(folder)], folder)
        (folder / "closed").chmod(0o755)
    assert found == ([folder / "a"], [f"{folder}/closed: Permission denied."])


# -- reading


def test_the_best_so_far_of_a_run_follows_its_config_and_its_summary(tmp_path: Path) -> None:
    rows = "step,val/brier\n9,0.5\n19,0.75\n"
    for name, more in (("by_name", {}), ("by_config", {"monitor_mode": "min"}), ("by_summary", {})):
        make_run(tmp_path / name, 0.1, None, monitor="val/brier", **more)
        (tmp_path / name / "metrics.csv").write_text(rows)
    write_summary(tmp_path / "by_summary", modes={"brier": "min"})
    best = {run.name: run.metrics["val/brier"] for run in read_all(tmp_path)}
    assert best == {"by_name": 0.75, "by_config": 0.5, "by_summary": 0.5}


def test_a_running_run_is_distinguished_from_a_killed_one(tmp_path: Path) -> None:
    for name in ("running", "killed"):
        folder = make_run(tmp_path / name, 0.1, None)
        (folder / ".lock.rank").touch()
        (folder / "metrics.csv").write_text(
            "step,val/acc1,val/loss,train/loss_step,perf/images,perf/seconds\n9,,,1.5,,\n9,0.5,1.25,,,\n"
            "19,0.75,1.5,,300,20\n24,nan,nan,,,\n29,0.7"
        )
    with locked(tmp_path / "running", ".lock.rank"):
        runs, _ = read([tmp_path / "running", tmp_path / "killed"])
    assert [run.status for run in runs] == ["running", "unfinished"]
    best = {"val/acc1": 0.75, "val/loss": 1.5}  # of the best epoch, as in best.ckpt; the row at step 29 is torn
    assert all(run.metrics == {**best, "images_per_second": 15.0, "seconds": 20.0} for run in runs)


def test_a_resumed_run_has_the_numbers_of_its_curves_and_the_facts_of_its_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.9)
    write_summary(run, status="preempted", dataset={"fingerprint": "x"}, parameters=7)
    (run / "metrics.csv").write_text("step,val/acc1\n9,0.5\n")
    (run / ".lock.rank").touch()
    with locked(run, ".lock.rank"):
        (found,), _ = read([run])
    assert (found.status, found.fingerprint) == ("running", "x")
    assert found.metrics == {"val/acc1": 0.5, "last/val/acc1": 0.5, "parameters": 7}


@pytest.mark.parametrize("lists_locks", [True, False])
def test_a_lock_of_the_same_inode_on_another_file_system_is_ignored(
    lists_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5)
    lock = run / ".lock.rank"
    lock.touch()
    monkeypatch.setattr(reading, "locked_inodes", lambda: {lock.stat().st_ino} if lists_locks else None)  # as on macOS
    assert read([run])[0][0].status == "finished"
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read([run])[0][0].status == "running"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("summary.json", "{", "summary.json cannot be read: Expecting property name enclosed in double quotes: line 1"),
        ("summary.json", "[]", "summary.json is not the summary of a run."),
        ("summary.json", '{"best": 3}', "summary.json is not the summary of a run."),
        ("summary.json", '{"best": {"val/acc1": "x"}}', "summary.json is not the summary of a run."),
        ("summary.json", "[" * 100_000, "maximum recursion depth exceeded"),
        ("config.yaml", "model: {broken", "config.yaml"),
        ("config.yaml", "- model\n", "config.yaml is not the config of a run."),
        ("config.yaml", "model: {name: a}\n---\nmodel: {name: b}\n", "config.yaml"),
    ],
    ids=lambda value: value[:20],
)
def test_a_folder_that_is_not_a_run_is_skipped_with_the_reason(name: str, text: str, why: str, tmp_path: Path) -> None:
    good, bad = (make_run(tmp_path / each, 0.1, 0.5) for each in "ab")
    (bad / name).write_text(text)
    runs, (problem,) = read([good, bad])
    assert [run.path for run in runs] == [good]
    assert problem.startswith(f"{bad}: ")
    assert why in problem


def test_missing_configs_and_pipes_are_skipped_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/summary.json").write_text("{}")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/config.yaml")
    problems = [f"{tmp_path}/lost: config.yaml is missing.", f"{tmp_path}/pipe: config.yaml is not a file."]
    assert read([tmp_path / "lost", tmp_path / "pipe"]) == ([], problems)
    run = make_run(tmp_path / "a", 0.1, None)
    for name in ("code.json", "metrics.csv"):
        os.mkfifo(run / name)
    (found,), _ = read([run])
    assert (found.rows, found.code) == ([], {})


def test_odd_values_of_one_run_do_not_hide_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.1, 0.75, overrides=5, optimizer=["x"], model={"name": ["x"]}, note={"x": {1: [2]}})
    odd = make_run(tmp_path / "b", 0.1, 0.5)
    write_summary(odd, best={"val/acc1": 10**400, "val/loss": 2}, images_per_second="x", dataset=[], seconds=None)
    write_summary(odd, status="\x1b[2J", test=None)
    a, b = read_all(tmp_path)
    assert a.metrics["val/acc1"] == 0.75
    assert (b.status, b.metrics) == (r"\x1b[2J", {"last/val/acc1": 0.25, "val/loss": 2})


def test_a_test_on_the_validation_images_is_not_a_test(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 0.1, 0.5)
    for images, known in (({"train": 5, "val": 2}, False), ({"train": 5, "test": 2}, True)):
        write_summary(folder, dataset={"images": images})
        assert ("test/acc1" in read([folder])[0][0].metrics) == known


def test_code_is_known_by_its_commit_and_patch_or_not_at_all(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5)
    write_summary(run, git={"commit": "c" * 40, "dirty": True})
    for code, commit in (
        (None, "ccccccc+changes"),
        ({"commit": "c" * 40, "dirty": False}, "ccccccc"),  # only files that are not code differ
        ({"commit": "c" * 40, "dirty": True, "patch_sha256": "1" * 64}, "ccccccc+111111"),
        ({"commit": "c" * 40, "dirty": None, "left_out": "git could not tell it"}, "ccccccc+?"),
    ):
        if code is not None:
            (run / "code.json").write_text(json.dumps(code))
        assert read([run])[0][0].facts["commit"] == commit
    (run / "code.json").write_text("{")
    assert read([run])[0][0].facts["commit"] is None


def test_configs_are_read_by_their_blocks_as_yaml_reads_them(tmp_path: Path) -> None:
    texts = [
        "a: 1\nb:\n  c: [1, 2]\n  d: |\n    x: 1\n\n    y\nlist:\n- a\n- b: 2\n",
        "# note\na: 'it''s'\n\nb: \"x\\n\"\n# more\nc: >-\n  folded\n  text\n'quoted key': 1\n? odd\n: 2\n",
        "a: 1\na: 2\n",
        "'a': {b: 1,\n  c: 2}\nd: null\ne: 1e-3\nf: 2026-01-01\n",
    ]
    blocks: dict = {}
    for number, text in enumerate(texts * 2):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert reading._read_config(path, blocks) == yaml.safe_load(text)
    assert b"a: 1\n" in blocks


def test_a_long_summary_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5)
    write_summary(run, skipped_images=["x" * 40] * 40_000)
    assert read_all(tmp_path)[0].metrics["val/acc1"] == 0.5


def test_curves_that_cannot_be_read_are_a_problem_of_their_run_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "b", 0.1, None)
    (run / "metrics.csv").write_text(f"step,note\n1,{'x' * 200_000}\n")
    (found,), _ = read([run])
    assert found.metrics == {}
    assert found.problems == [
        f"the curves of {run}: {run}/metrics.csv is not a run's: field larger than field limit (131072)."
    ]
    with pytest.raises(UserError, match=r"metrics.csv is not a run's: field larger than"):
        curves(run)


def test_an_old_module_name_is_no_other_setting(tmp_path: Path) -> None:
    """Runs made before modules moved are compared with new ones."""
    for name, module in (("old", "alexlab.models.zoo"), ("new", "alexlab.models.pretrained")):
        make_run(tmp_path / name, 0.1, 0.5, model={"name": "x", "net": {"_target_": f"{module}.torchvision"}})
    new, old = read_all(tmp_path)
    assert old.settings == new.settings


# -- DataFrames


def test_a_frame_has_a_row_per_run_with_metrics_facts_and_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5, seed=0, seconds=9, choices={"optimizer": "sgd"})
    make_run(tmp_path / "b", 0.2, 0.75)
    write_summary(run, best={"val/acc1": 0.5, "val/f1": 0.25}, hardware={"device": "x86"})
    rows = alexlab.runs(tmp_path).set_index("name")
    keys = ["path", "status", "optimizer", "optimizer.lr", "val/f1", "device", "seed"]
    assert rows.loc["a", keys].to_list() == [str(run), "finished", "sgd", 0.1, 0.25, "x86", 0]
    assert rows.loc["a", ["seconds", "config/seconds"]].to_list() == [5.5, 9], "a setting that is called like a metric"


def test_runs_gives_a_notebook_a_typed_frame_and_warns_of_what_it_skips(tmp_path: Path) -> None:
    for number, lr in enumerate((0.1, 0.2, 0.3)):
        make_run(tmp_path / f"{number}", lr, number / 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = alexlab.runs(tmp_path, where="optimizer.lr>0.15")
    assert found["val/acc1"].dtype == np.float64
    assert found.groupby("optimizer.lr")["val/acc1"].mean().to_dict() == {0.2: 0.1, 0.3: 0.2}
    (tmp_path / "0/config.yaml").write_text("- no\n")
    with pytest.warns(UserWarning, match=r"skipped: .*/0: config.yaml is not the config of a run."):
        assert len(alexlab.runs([tmp_path / "0", str(tmp_path / "1")])) == 1
    with pytest.warns(UserWarning, match="no run found"):
        assert len(alexlab.runs(tmp_path / "nothing")) == 0


def test_curves_have_a_row_per_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss_step,val/acc1\n9,1.5,\n9,,0.5\n19,1,x\n29,1\n39,1.0,0.7")
    found = curves(tmp_path)
    assert found.index.to_list() == [9, 19], "row 29 is torn, and row 39 may be 0.75 when it is complete"
    assert found["train/loss_step"].to_list() == [1.5, 1.0]
    assert found["val/acc1"].dropna().to_dict() == {9: 0.5}


def test_reading_runs_imports_no_pandas() -> None:
    code = "import sys, alexlab.analysis.compare, alexlab.commands.compare; print('pandas' in sys.modules)"
    assert command("-c", code).stdout == "False\n"


# -- metrics and settings


def test_a_top5_accuracy_that_is_always_one_says_nothing() -> None:
    assert all(is_always_one(name, [1.0, None]) for name in ("val/acc5", "acc5", "train/acc5_step", "acc5_10crops"))
    assert not is_always_one("val/acc5", [1.0, 0.9])
    assert not is_always_one("val/acc5", [1.0], num_classes=10), "a network may be that good"
    assert is_always_one("val/acc5", [1.0], num_classes=5)
    assert not is_always_one("val/acc1", [1.0])


def test_whether_lower_is_better_follows_from_the_name() -> None:
    low = ["loss/val", "val/loss", "test_error", "last/val/perplexity", "top5_err", "rmse", "seconds", "losses/val"]
    low += ["lossTotal", "val/mae"]
    high = ["val/glossiness", "val/acc1", "images_per_second", "verrucae", "terms", "mAP", "val/f1"]
    assert [metric for metric in (*low, *high) if lower_is_better(metric)] == low


@pytest.mark.parametrize(
    ("one", "other", "key", "equal"),
    [
        (1, 1.0, "", True), (1, True, "", False), (1, "1", "", False), (None, "None", "", False),
        ([1, 0.5], (1.0, 0.5), "", True), ({"a": 1}, {"a": 1.0}, "", True), (0.1, 0.1000001, "", False),
        (1, 1.0, "trainer.limit_val_batches", False), (None, 1.0, "trainer.limit_val_batches", True),
        (None, 0, "trainer.overfit_batches", True),
    ],
)  # fmt: skip
def test_settings_are_equal_if_they_mean_the_same(one: object, other: object, key: str, equal: bool) -> None:
    assert (canonical(one, key) == canonical(other, key)) == equal


def test_a_checkpoint_of_the_run_itself_is_recognized_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real/run/checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    ckpt = str(tmp_path / "real/run/checkpoints/last.ckpt")
    assert is_own_checkpoint({"run_dir": str(tmp_path / "link/run"), "ckpt_path": ckpt})
    assert not is_own_checkpoint({"run_dir": str(tmp_path / "link/other"), "ckpt_path": ckpt})
