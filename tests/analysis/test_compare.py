"""Comparisons: the settings that differ, seeds, conditions, formats, equality, and what the command prints."""

import csv
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, composed
from scipy import stats
from test_runs import make_run, read_all, write_summary

from alexlab.analysis.compare import (
    Group,
    as_text,
    cell,
    columns_of,
    differing,
    equality,
    grouped,
    ranked,
    select,
    table,
)
from alexlab.analysis.runs import Run
from alexlab.commands.cli import COMMANDS, to_overrides
from alexlab.commands.compare import show
from alexlab.engine.errors import UserError
from alexlab.engine.schema import CompareConfig, PathsConfig

Compare = Callable[..., tuple[str, str]]


def names_of(runs: list[Run], where: str) -> list[str]:
    return [runs[number].name for number in select(runs, where)]


def run_of(settings: dict, overridden: tuple[str, ...] = (), status: str = "finished", **best: float) -> Run:
    """Return a run in memory; best values are given as val_acc1=0.5."""
    summary = {"best": {key.replace("_", "/"): value for key, value in best.items()}}
    return Run(Path("x"), "x", status, settings, set(overridden), summary)


def texts_of(runs: list[Run]) -> list[str]:
    return [as_text(settings) for settings in differing(runs)]


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Return what `alexlab compare` prints on standard output and standard error; runs=tmp_path if nothing is said."""
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it, and it makes the table narrow

    def printed(**settings: Any) -> tuple[str, str]:
        paths = PathsConfig(data="data", logs=str(tmp_path))
        show(CompareConfig.model_construct(**{"runs": str(tmp_path), "paths": paths, **settings}))
        return capsys.readouterr()

    return printed


# -- the table


def test_the_best_is_first_and_settings_that_differ_are_named(tmp_path: Path, compare: Compare) -> None:
    for name, lr, acc1 in (("a", 0.1, 0.5), ("b", 0.2, 0.75), ("c", 0.2, None)):
        make_run(tmp_path / name, lr, acc1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/config.yaml").write_text("{broken")
    head, *rows = compare()[0].splitlines()
    heads = ["val/acc1", "last/val/acc1", "val/loss", "test/acc1", "images_per_second", "seconds"]
    assert head.split() == ["3", "runs", *heads]
    b = ["b", "finished", "0.7500", "0.3750", "1.5000", "0.2500", "123", "6", "optimizer.lr=0.2"]
    assert [row.split() for row in rows[:3]] == [
        b, ["a", "finished", "0.5000", "0.2500", *b[4:8], "optimizer.lr=0.1"], ["c", "unfinished", "optimizer.lr=0.2"],
    ]  # fmt: skip
    assert rows[3].startswith(f"skipped: {tmp_path}/d: ")


def test_your_own_metrics_are_columns(tmp_path: Path, compare: Compare) -> None:
    for name, f1 in (("a", 0.5), ("b", 0.75)):
        write_summary(
            make_run(tmp_path / name, 0.1, 0.5), best={"val/acc1": 0.5, "val/loss": 1, "val/acc5": 1, "val/f1": f1},
            last={"val/f1": f1 / 2}, test={"test/f1": f1 / 3},
        )  # fmt: skip
    speed = ["images_per_second", "seconds"]
    assert compare()[0].splitlines()[0].split() == ["2", "runs", "val/acc1", "val/loss", "val/f1", *speed]
    heads_of_f1, first, *_ = compare(sort="val/f1")[0].splitlines()
    assert heads_of_f1.split()[2:] == ["val/f1", "last/val/f1", "val/loss", "val/acc1", "test/f1", *speed]
    assert first.split()[:7] == ["b", "finished", "0.7500", "0.3750", "1.0000", "0.5000", "0.2500"]
    assert "val/acc5" in compare(sort="val/acc5")[0]


def test_many_metrics_of_yours_leave_room_for_the_names() -> None:
    runs = [run_of({"a": n}, **{f"val_c{i:03}": 0.5 for i in range(100)}) for n in range(2)]
    columns = columns_of(grouped(runs), "val/c000")
    assert columns == [f"val/c{i:03}" for i in range(9)]
    assert columns_of(grouped(runs), "seconds")[:2] == ["seconds", "val/c000"], "the one asked for, measured or not"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    """Names are whole, so that commands take them; no line is wider than the terminal."""
    names = ["2026-11-25_02-54-50_274", "2026-11-25_03-22-46_497"]
    for number, name in enumerate(names):
        make_run(tmp_path / name, 0.1 * (number + 1), 0.5, seed=number, label_smoothing=number / 10)
    groups = ranked(grouped(read_all(tmp_path)), "val/acc1")
    lines = table(groups, 2, "val/acc1", columns)
    assert max(map(len, lines)) <= columns
    assert all(any(line.startswith(f"{name}  finished") for line in lines) for name in names)
    text = " ".join(" ".join(lines).split())
    assert "0.5000" in text
    assert "label_smoothing=0.1 optimizer.lr=0.2 seed=1" in text


def test_narrow_tables_drop_the_speed_first_and_the_sorted_column_never() -> None:
    run = run_of({"a": 1}, val_acc1=0.5, val_loss=1.0)
    run.summary |= {"seconds": 5, "images_per_second": 7, "last": {"val/acc1": 0.5}, "test": {"test/acc1": 0.5}}
    heads = {width: table([Group([run], {})], 1, "val/acc1", width)[0].split()[2:] for width in (95, 80, 65, 50, 40, 5)}
    best, last = "val/acc1", "last/val/acc1"
    assert heads == {
        95: [best, last, "val/loss", "test/acc1", "images_per_second", "seconds"],
        80: [best, last, "val/loss", "test/acc1", "images_per_second"],
        65: [best, last, "val/loss", "test/acc1"],
        50: [best, "val/loss", "test/acc1"],
        40: [best, "test/acc1"],
        5: [best],
    }


@pytest.mark.parametrize(
    ("key", "values", "text"),
    [
        ("val/acc1", (0.5,), "0.5000"), ("val/mae", (123456.7,), "1.235e+05"), ("val/mse", (0.0000125,), "1.25e-05"),
        ("val/acc1", (0.0,), "0.0000"), ("val/acc1", (0.5, 0.75), "0.6250±0.1768"), ("seconds", (5.4, 5.4), "5±0"),
        ("parameters", (61100840,), "61.1 M"), ("val/acc1", (0.5, math.nan, 0.75), "0.6250±0.1768 (2)"), ("x", (), ""),
    ],
)  # fmt: skip
def test_numbers_are_written_as_mean_and_deviation(key: str, values: tuple[float, ...], text: str) -> None:
    runs = [run_of({}) for _ in values or (0,)]
    for run, value in zip(runs, values, strict=False):
        run.summary["best"][key] = value
    assert cell(Group(runs, {}), key) == text


def test_losses_ascend_and_runs_without_the_metric_are_last() -> None:
    runs = [run_of({"a": n}, val_loss=loss) for n, loss in enumerate((2.0, 1.0, math.nan))] + [run_of({"a": 9})]
    assert [group.runs[0].settings["a"] for group in ranked(grouped(runs), "val/loss")] == [1, 0, 2, 9]


def test_the_table_is_sorted_by_a_metric_that_exists(tmp_path: Path, compare: Compare) -> None:
    run = make_run(tmp_path / "a", 0.1, 0.5, monitor="val/f1")
    assert "val/acc1" in compare()[0]
    write_summary(run, best={"val/loss": 1.0, "val/f1": 0.5}, last={})
    assert compare()[0].splitlines()[0].split()[2] == "val/f1", "what the runs monitor"
    with pytest.raises(UserError) as error:
        compare(sort="val/f2")
    assert str(error.value) == (
        "sort=val/f2: no run has this metric. Measured were: images_per_second, seconds, test/acc1, val/f1, val/loss."
    )


def test_rows_beyond_the_limit_are_counted(tmp_path: Path, compare: Compare) -> None:
    for number in range(32):
        make_run(tmp_path / f"{number:02}", 0.1 + number, 0.5)
    for most, rows in ((None, 30), (3, 3)):
        lines = compare(most=most)[0].splitlines()
        assert len(lines) == 1 + rows + 1
        assert lines[-1] == f"{32 - rows} more: most=32 shows all."


# -- the settings that differ


def test_an_option_stands_for_the_settings_that_come_with_it() -> None:
    """augment=strong is one setting, and not its erasing and mixup as well; what was changed by hand is."""
    base = {"choices.augment": "basic", "augment.erase": 0.0, "augment.mixup": 0.0, "seed": 0}
    strong = {**base, "choices.augment": "strong", "augment.erase": 0.25, "augment.mixup": 0.2}
    assert differing([run_of(base), run_of(strong), run_of({**strong, "augment.mixup": 0.4})]) == [
        {"augment": "basic"},
        {"augment": "strong", "augment.mixup": 0.2},
        {"augment": "strong", "augment.mixup": 0.4},
    ]
    base = {"data.name": "demo", "data.root": "a", "optimizer.lr": 0.1}
    runs = [run_of(base), *(run_of({**base, "data.name": "folder", "data.root": root}) for root in "bc")]
    assert texts_of(runs) == ["data.name=demo", "data.name=folder data.root=b", "data.name=folder data.root=c"]


def test_a_key_of_the_command_line_is_listed_for_all_runs_and_a_name_for_its_run_only() -> None:
    auto = {"choices.trainer": "auto", "trainer.max_epochs": 10, "trainer.devices": 1}
    ddp = {"choices.trainer": "ddp", "trainer.max_epochs": 50, "trainer.devices": 2}
    runs = [run_of(auto), run_of(ddp, ("trainer.max_epochs",))]
    assert texts_of(runs) == ["trainer=auto trainer.max_epochs=10", "trainer=ddp trainer.max_epochs=50"]
    ours = {"choices.model": "alexnet", "model.name": "alexnet", "choices.data": "demo", "data.root": "/demo"}
    theirs = {"choices.model": "torchvision", "model.name": "resnet18", "choices.data": "folder", "data.root": "/x"}
    listed = "model=torchvision model.name=resnet18 data=folder data.root=/x"
    assert texts_of([run_of(ours), run_of(theirs, ("model.name", "data.root"))]) == ["model=alexnet data=demo", listed]


def test_the_model_is_first_then_options_then_what_was_swept_and_last_what_one_run_changed() -> None:
    base = {"seed": 0, "data.batch_size": 8, "optimizer.lr": 0.1, "choices.augment": "basic", "model.name": "alexnet"}
    runs = [run_of({**base, "seed": seed, "optimizer.lr": lr}, ("optimizer.lr",)) for seed, lr in ((0, 1), (1, 2))]
    runs.append(run_of({**base, "model.name": "vgg", "data.batch_size": 16, "choices.augment": "strong"}))
    runs.append(run_of({**base, "model.name": "vgg", "choices.augment": "strong"}))
    listed = "model.name=vgg augment=strong optimizer.lr=0.1 seed=0"
    assert texts_of(runs)[2:] == [f"{listed} data.batch_size=16", f"{listed} data.batch_size=8"]
    ours = {"choices.model": "alexnet", "model.name": "alexnet", "choices.augment": "basic", "optimizer.lr": 0.1}
    theirs = {**ours, "choices.model": "torchvision", "model.name": "resnet18", "choices.augment": "strong"}
    others = [run_of({**ours, "optimizer.lr": lr}, ("optimizer.lr",)) for lr in (0.1, 0.2, 0.3)]
    *_, text = texts_of([*others, run_of(theirs, ("model.name",))])
    assert text == "model=torchvision model.name=resnet18 optimizer.lr=0.1 augment=strong", "the model is never last"


def test_a_run_that_recorded_no_options_is_compared_by_its_keys() -> None:
    old, new = run_of({"optimizer.lr": 0.1}), run_of({"optimizer.lr": 0.2, "choices.optimizer": "sgd"})
    assert differing([old, new]) == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}]


def test_a_setting_that_only_one_option_has_is_not_listed() -> None:
    sgd = {"choices.optimizer": "sgd", "optimizer.momentum": 0.9}
    adamw = {"choices.optimizer": "adamw", "optimizer.betas": [0.9, 0.99]}
    assert differing([run_of(sgd), run_of(adamw)]) == [{"optimizer": "sgd"}, {"optimizer": "adamw"}]


def test_settings_are_written_as_on_the_command_line() -> None:
    assert as_text({"a": 0.1234567, "b": True, "c": None, "d": "\x1b"}) == "a=0.123457 b=true c=null d=\\x1b"


# -- seeds and folds


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path, compare: Compare) -> None:
    scores = [0.5, 0.625, 0.75]
    for seed, score in enumerate(scores):
        make_run(tmp_path / f"s{seed}", 0.1, score, seed=seed)
    make_run(tmp_path / "other", 0.2, 0.7, seed=0)
    make_run(tmp_path / "open", 0.1, None, seed=3)
    rows = {line.split()[0]: line for line in compare()[0].splitlines()[1:]}
    assert list(rows) == ["other", "s0", "open"], "by the mean, 0.625"
    assert "s0 +2  finished" in rows["s0"]
    assert f"0.6250±{statistics.stdev(scores):.4f}" in rows["s0"]
    assert "seed=0,1,2" in rows["s0"]
    each, _ = compare(seeds="each")
    assert [line.split()[0] for line in each.splitlines()[1:]] == ["s2", "other", "s1", "s0", "open"]


def test_differences_to_the_best_row_are_tested_and_those_within_noise_marked(tmp_path: Path, compare: Compare) -> None:
    """p by SciPy's Welch test, times 2 for the smaller one, by Holm."""
    scores = {0.1: [0.80, 0.81, 0.82], 0.2: [0.79, 0.81, 0.80], 0.3: [0.60, 0.61, 0.60], 0.4: [0.5]}
    for lr, values in scores.items():
        for seed, score in enumerate(values):
            make_run(tmp_path / f"lr{lr}s{seed}", lr, score, seed=seed)
    near, far = (stats.ttest_ind(scores[0.1], scores[lr], equal_var=False).pvalue for lr in (0.2, 0.3))
    assert far < 0.001 < 0.1 < near
    lines = compare()[0].splitlines()
    assert re.search(r"val/acc1 +95 % interval +vs first +last/val/acc1", lines[0])
    rows = {line.split()[0]: line for line in lines[1:]}
    assert "0.8100±0.0100  0.7852..0.8348  " in rows["lr0.1s0"], "t of 97.5 % and two degrees of freedom is 4.303"
    assert "p=" not in rows["lr0.1s0"] + rows["lr0.4s0"], "one run has no deviation"
    assert f"noise, p={near:.2g} " in rows["lr0.2s0"]
    assert f"  p={2 * far:.2g} " in rows["lr0.3s0"]
    found = json.loads(compare(format="json")[0])["groups"]
    assert [group["p"]["val/acc1"] for group in found] == [None, pytest.approx(near), pytest.approx(2 * far), None]
    csv_rows = list(csv.DictReader(io.StringIO(compare(format="csv")[0])))
    assert [row["val/acc1_p"] == "" for row in csv_rows] == [True, False, False, True]
    assert float(csv_rows[2]["val/acc1_p"]) == pytest.approx(2 * far)
    compare(format="html", out=f"{tmp_path}/page.html")
    assert '"intervals":{"' in (tmp_path / "page.html").read_text().replace(" ", "")


def test_seeds_that_all_have_the_same_number_are_not_tested(tmp_path: Path, compare: Compare) -> None:
    """Two seeds with the same accuracy on 21 images say nothing of the third."""
    for lr, score in ((0.1, 0.5), (0.2, 0.25)):
        for seed in range(2):
            make_run(tmp_path / f"lr{lr}s{seed}", lr, score, seed=seed)
    assert "p=" not in compare()[0]
    assert [group["p"] for group in json.loads(compare(format="json")[0])["groups"]] == [{"val/acc1": None}] * 2


def fold(
    folder: Path, number: int, acc1: float, seed: int = 0, images: str = "x", lr: float = 0.1, **data: Any
) -> Path:
    """Write a run of a cross-validation in two folds."""
    run = make_run(folder, lr, acc1, seed=seed, data={"folds": 2, "fold": number, "root": "/images", **data})
    of_split = {"train": f"{seed}-{1 - number}", "val": f"{seed}-{number}"}
    write_summary(run, dataset={"fingerprint": of_split, "fingerprint_of_folds": {"train and val": images}})
    return run


def test_folds_are_one_row_with_mean_and_deviation(tmp_path: Path, compare: Compare) -> None:
    """The deviation of 0.5 and 0.75 is 0.25 / sqrt(2) = 0.1768."""
    fold(tmp_path / "a0", 0, 0.5)
    fold(tmp_path / "a1", 1, 0.75)
    fold(tmp_path / "again", 1, 0.5625)
    fold(tmp_path / "b0", 0, 0.875, lr=0.2)
    fold(tmp_path / "of-other-images", 1, 0.25, images="y")
    a, again = (json.loads(compare(format="json")[0])["groups"])[1:3]
    names = [line.split()[0] for line in compare()[0].splitlines()[1:] if not line.startswith(" ")]
    assert names[:4] == ["b0", "a0", "again", "of-other-images"], "the second run of a fold is a row of its own"
    assert (a["name"], again["name"]) == ("a0 +1", "again")
    assert (a["settings"]["data.fold"], again["settings"]["data.fold"]) == ("0,1", 1)
    assert "seed" not in a["settings"]
    assert a["metrics"]["val/acc1"].items() >= {"mean": 0.625, "std": statistics.stdev([0.5, 0.75]), "n": 2}.items()
    assert "  0.6250±0.1768  " in compare()[0]


def test_rows_have_the_names_that_wandb_shows(tmp_path: Path, compare: Compare) -> None:
    for name, lr, seed in (("one", 0.05, 1), ("two", 0.05, 2), ("three", 0.1, 1)):
        words = [f"optimizer.lr={lr}", f"seed={seed}"]
        make_run(tmp_path / name, lr, lr, seed=seed, overrides=words, data={"name": "demo", "root": "x"})
    _, first, of_first, second, of_second = compare()[0].splitlines()
    assert re.split("  +", first)[:2] == ["alexnet-lr0.1-s1", "finished"]
    assert of_first == "    three  optimizer.lr=0.1 seed=1"
    assert re.split("  +", second)[0] == "alexnet-lr0.05", "of two seeds"
    assert of_second == "    one +1  optimizer.lr=0.05 seed=1,2"
    assert "| alexnet-lr0.05 | one +1 | finished |" in compare(format="markdown")[0]
    assert [row["title"] for row in csv.DictReader(io.StringIO(compare(format="csv")[0]))][1] == "alexnet-lr0.05"
    assert json.loads(compare(format="json")[0])["groups"][0]["title"] == "alexnet-lr0.1-s1"


def test_seeds_times_folds_are_one_row(tmp_path: Path, compare: Compare) -> None:
    scores = {(seed, number): 0.5 + seed / 4 + number / 8 for seed in (0, 1) for number in (0, 1)}
    for (seed, number), acc1 in scores.items():
        fold(tmp_path / f"r{seed}{number}", number, acc1, seed)
    *_, row = compare()[0].splitlines()
    assert row.split()[:3] == ["r00", "+3", "finished"]
    assert f"0.6875±{statistics.stdev(scores.values()):.4f}" in row
    assert {"seed=0,1", "data.fold=0,1"} <= set(row.split())


def test_a_run_from_before_there_were_samplers_shuffled(tmp_path: Path) -> None:
    for seed, data in enumerate(({}, {"sampler": "shuffle", "folds": None, "fold": None}, {"sampler": "balanced"})):
        write_summary(make_run(tmp_path / f"r{seed}", 0.1, 0.5, seed=seed, data=data), dataset={"fingerprint": "f"})
    groups = {group.name: group.settings for group in grouped(read_all(tmp_path))}
    assert groups == {"r0 +1": {"seed": "0,1"}, "r2": {"data.sampler": "balanced", "seed": 2}}


def test_runs_on_other_images_code_or_devices_are_rows_of_their_own(tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "status": "finished", "best": {"val/acc1": 0.5}, "dataset": {"fingerprint": {"train": "aaaa", "val": "b"}},
        "git": {"commit": "c" * 40, "dirty": False}, "world_size": 1,
        "hardware": {"devices": "cuda", "device": "NVIDIA A100"},
    }  # fmt: skip
    others: dict[str, dict] = {
        "a": {}, "b": {}, "images": {"dataset": {"fingerprint": {"train": "aaaa", "val": "c"}}},
        "code": {"git": {"commit": "d" * 40, "dirty": True}}, "ranks": {"world_size": 8}, "pruned": {"pruned": True},
        "device": {"hardware": {"devices": "cpu", "device": "x86_64"}}, "precision": {"precision": "bf16-mixed"},
        "failed": {"status": "failed"},
    }  # fmt: skip
    for seed, (name, more) in enumerate(others.items()):
        write_summary(make_run(tmp_path / name, 0.1, None, seed=seed), **{**base, **more})
    write_summary(make_run(tmp_path / "repeated", 0.1, None, seed=0), **base)
    runs = read_all(tmp_path)
    rows = {group.name: group.settings for group in grouped(runs)}
    assert set(rows) == {"a +1", *(set(others) - {"a", "b"}), "repeated"}, "nor is the same seed grouped twice"
    assert len(rows["images"]["images"]) == len(rows["a +1"]["images"]) == 8
    assert rows["images"]["images"] != rows["a +1"]["images"]
    assert (rows["device"]["device"], rows["a +1"]["device"]) == ("x86_64", "NVIDIA A100")
    assert (rows["precision"]["precision"], rows["a +1"]["precision"]) == ("bf16-mixed", "unknown")
    assert rows["code"]["commit"] == "ddddddd+changes"
    assert rows["ranks"]["world_size"] == 8
    assert next(run.status for run in runs if run.name == "pruned") == "pruned"
    for text, names in {
        f"images={rows['images']['images']}": {"images"}, "commit~ddddddd or device=x86_64": {"code", "device"},
        "precision=unknown": {*others, "repeated"} - {"precision"},
    }.items():  # fmt: skip
        assert names_of(runs, text) == sorted(names)


def test_seeds_are_grouped_whatever_a_resume_and_an_older_run_wrote(tmp_path: Path) -> None:
    """A resume, how a sweep is driven, where images are and null make no difference; another run's checkpoint does."""
    own = str(tmp_path / "b/checkpoints/last.ckpt")
    settings: dict[str, dict] = {
        "a": {"ckpt_path": None, "sweep": {"keep_going": False}, "data": {"root": "/x"}},
        "b": {"ckpt_path": own, "sweep": {"keep_going": True}, "data": {"root": "/y"}},
        "c": {"ckpt_path": "/another/run/checkpoints/last.ckpt", "data": {"root": "/x"}},
        "d": {"ema": {"decay": None}, "trainer": {"limit_val_batches": 1.0}, "data": {"root": "/x"}},
        "e": {"trainer": {"limit_val_batches": 1}, "data": {"root": "/x"}},
    }
    for seed, (name, more) in enumerate(settings.items()):
        write_summary(make_run(tmp_path / name, 0.1, 0.5, seed=seed, **more), dataset={"fingerprint": "f"})
    assert {group.name for group in grouped(read_all(tmp_path))} == {"a +2", "c", "e"}


def test_an_older_run_counts_as_one_on_the_same_images_if_the_names_are_the_same(tmp_path: Path) -> None:
    """A run from before the sizes of files were recorded has the fingerprint of names alone."""

    def grouped_by(**datasets: dict[str, Any]) -> set[str]:
        for seed, (name, dataset) in enumerate(datasets.items()):
            (folder := tmp_path / str(len(datasets)) / name).parent.mkdir(exist_ok=True)
            write_summary(make_run(folder, 0.1, 0.5, seed=seed), dataset=dataset)
        return {group.name for group in grouped(read_all(tmp_path / str(len(datasets))))}

    old = {"fingerprint": {"val": "names"}}
    new, replaced = ({"fingerprint": {"val": f"sizes:{n}"}, "names_fingerprint": {"val": "names"}} for n in "12")
    assert grouped_by(old=old, new=new) == {"old +1"}
    assert grouped_by(a=new, b=replaced, old=old) == {"a", "b", "old"}, "the older run may be of either"


def test_runs_without_a_seed_or_with_unknown_code_are_rows_with_what_is_known() -> None:
    runs = [run_of({"a": 1}), run_of({"a": 1})]
    for run, ranks in zip(runs, (1, 8), strict=True):
        run.summary["world_size"] = ranks
    assert [group.settings for group in grouped(runs)] == [{"world_size": 1}, {"world_size": 8}]
    runs = [run_of({"seed": seed}) for seed in range(3)]
    for run in runs[:2]:
        run.code = {"commit": "c" * 40, "dirty": None, "left_out": "git could not tell it"}
    runs[2].code = {"commit": "c" * 40, "dirty": False}
    assert [group.settings["commit"] for group in grouped(runs)] == ["ccccccc+?", "ccccccc+?", "ccccccc"]


def test_several_sets_of_images_in_one_table_are_mentioned(tmp_path: Path, compare: Compare) -> None:
    for name in "ab":
        write_summary(make_run(tmp_path / name, 0.1, 0.5), dataset={"fingerprint": name})
    assert re.search(r"The list contains 2 sets of images, (\w{8}), \w{8}: where=images=\1 selects one", compare()[0])


# -- where


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("optimizer.lr>0.1", "bc"), ("optimizer.lr>=0.1", "abc"), ("optimizer.lr = 0.1", "a"), ("name='a'", "a"),
        ("optimizer.lr==1e-1", "a"), ("ema=null", "abc"), ("optimizer.lr<1e9", "abc"), ("val/acc1>0", "ab"),
        ("optimizer.lr!=0.1", "bc"), ("val/acc1>0.5 and optimizer.lr<0.3", "b"), ("val/acc1<=0.5 or seed=7", "ac"),
        ("model.name=alexnet and seed=7 or optimizer.lr=0.1", "ac"), ("model.name~LEX", "abc"), ("name~b", "b"),
        ("status=finished", "ab"), ("seed=7 OR name=a", "ac"), ("augment.scale=[0.25,1.0]", "abc"),
        ("note=this and name=a", "a"), ("note~IS or name=b", "ab"), ("rate>0.05", "b"),
        ("status=FINISHED", "ab"), ("compile=true", "c"), ("compile!=true", "ab"), ("hash=70380e39", "a"),
        ("hash!=70380e39", "bc"), ("hash=1.50", "b"), ("late=5", "c"), ("optimizer.lr~0.3", "c"), ("model=resnet", "c"),
        ("label~'>'", "a"), ("label~'y & z'", "a"), ("name=a_1", None), ("hash=1.5", None), ("compile=1", None),
    ],
)  # fmt: skip
def test_conditions_select_runs(text: str, names: str | None) -> None:
    runs = []
    for name, lr, acc in zip("abc", (0.1, 0.2, 0.3), (0.5, 0.75, None), strict=True):
        first, last = name == "a", name == "c"
        settings = {
            "model.name": "alexnet", "optimizer.lr": lr, "ema": None, "augment.scale": [0.25, 1.0],
            "note": "this" if first else "x", "label": "x>y & z" if first else "",
            "rate": "auto" if first else None if last else lr, "seed": 7 if last else 0, "compile": last,
            "hash": {"a": "70380e39", "b": "1.50", "c": "0071"}[name], "choices.model": "resnet" if last else "vgg",
        }  # fmt: skip
        if last:
            settings["late"] = 5
        status = "finished" if acc else "failed"
        runs.append(Run(Path(name), name, status, settings, summary={"best": {"val/acc1": acc}}))
    if names is None:
        with pytest.raises(UserError, match="none of the 3 runs matches"):
            select(runs, text)
    else:
        assert "".join(names_of(runs, text)) == names


def test_names_that_look_like_numbers_are_compared_as_text() -> None:
    names = ("r_0003", "r_0031", "r_26_20", "r_2620", "2620")
    runs = [Run(Path(name), name, "finished", {"optimizer.lr": 0.1 if name == "r_0003" else 0.01}) for name in names]
    assert names_of(runs, "name~0003") == names_of(runs, "optimizer.lr>=1e-1") == ["r_0003"]
    assert names_of(runs, "name!=26_20 and name~2620") == ["r_2620", "2620"]


NO_CONDITION = (
    "is not a condition: write KEY SIGN VALUE with one of == != >= <= = > < ~, as in where='optimizer.lr>0.01"
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("optimizer.l>1", "no run has optimizer.l. Did you mean optimizer.lr?"),
        ("model.name>1", "`alexnet` is not a number: compare text with =, != or ~ (contains)."),
        ("optimizer.lr>abc", "`abc` is not a number: compare text with =, != or ~ (contains)."),
        ("optimizer.lr", f"`optimizer.lr` {NO_CONDITION}"),
        ("optimizer.lr=", f"`optimizer.lr=` {NO_CONDITION}"),
        ("", f"`` {NO_CONDITION}"),
        ("(seed=1)", f"`(seed=1)` {NO_CONDITION}"),
        ("seed=1 and or", f"`or` {NO_CONDITION}"),
        ("optimizer.lr>5", "none of the 2 runs matches: optimizer.lr is, for example, 0.1."),
        ("lr>5", "no run has lr. Did you mean optimizer.lr?"),
        ("unheard=5", "no run has unheard. Keys are status, name, metrics and settings."),
        ("optimizer.lr!=0.01&seed=1", f"`optimizer.lr!=0.01&seed=1` {NO_CONDITION}"),
        ("optimizer.lr>0.01 & seed=1", f"`optimizer.lr>0.01 & seed=1` {NO_CONDITION}"),
    ],
)
def test_conditions_that_cannot_be_met_are_answered(text: str, answer: str) -> None:
    runs = [run_of({"optimizer.lr": lr, "model.name": "alexnet", "seed": 0}) for lr in (0.1, 0.2)]
    with pytest.raises(UserError) as error:
        select(runs, text)
    assert str(error.value).startswith(f"where={text}: {answer}")


# -- formats


def test_markdown_csv_and_json_are_for_other_programs(tmp_path: Path, compare: Compare) -> None:
    make_run(tmp_path / "a", 0.1, 0.5, seed=0, note="x|y")
    make_run(tmp_path / "b", 0.1, 0.75, seed=1, note="x|y")
    make_run(tmp_path / "c", 0.123456789, 0.25, seed=0, note="z")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/config.yaml").write_text("{broken")

    def printed(**settings: Any) -> str:
        out, err = compare(**settings)
        assert err.startswith(f"skipped: {tmp_path}/d: "), "not where another program reads"
        return out

    lines = printed(format="markdown").splitlines()
    heads = "| title | run | status | note | optimizer.lr | seed | val/acc1 | 95 % interval | last/val/acc1 | val/loss "
    assert lines[0] == f"{heads}| test/acc1 | images_per_second | seconds |"
    # 12.706 is Student's t for 97.5 % and one degree of freedom: 0.625 -+ 12.706 * 0.1768 / sqrt(2)
    means = "| 0.6250±0.1768 | -0.9633..2.2133 | 0.3125±0.0884 | 1.5000±0.0000 | 0.2500±0.0000 | 123±0 | 6±0 |"
    assert lines[2] == f"| a +1 | a +1 | finished | x\\|y | 0.1 | 0,1 {means}"
    first, second = csv.DictReader(io.StringIO(printed(format="csv")))
    assert (first["run"], first["n"], first["val/acc1"], first["seed"]) == ("a +1", "2", "0.625", "0,1")
    assert float(first["val/acc1_std"]) == pytest.approx(statistics.stdev([0.5, 0.75]))
    assert (second["optimizer.lr"], second["val/acc1_std"]) == ("0.123456789", "")
    whole = json.loads(printed(format="json"))
    of_first = whole["groups"][0]["metrics"]["val/acc1"]
    assert (of_first["low"], of_first["high"]) == pytest.approx((-0.9633, 2.2133), abs=1e-3)
    assert (float(first["val/acc1_low"]), float(first["val/acc1_high"])) == (of_first.pop("low"), of_first.pop("high"))
    assert of_first == {"mean": 0.625, "std": statistics.stdev([0.5, 0.75]), "n": 2}
    assert whole["groups"][1]["metrics"]["val/acc1"] == {"mean": 0.25, "std": None, "n": 1, "low": None, "high": None}
    assert [run["path"] for run in whole["groups"][0]["runs"]] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert len(whole["left_out"]) == 1

    out, _ = compare(format="csv", out=f"{tmp_path}/new/table.csv")
    assert out.startswith(f"3 of 3 runs: {tmp_path}/new/table.csv")
    assert (tmp_path / "new/table.csv").read_text() == printed(format="csv")


def test_a_metric_that_some_seeds_lack_says_of_how_many_the_mean_is(tmp_path: Path, compare: Compare) -> None:
    for seed in range(3):
        make_run(tmp_path / f"{seed}", 0.1, 0.5, seed=seed)
    write_summary(tmp_path / "2", best={"val/acc1": 0.5})
    (row,) = csv.DictReader(io.StringIO(compare(format="csv")[0]))
    assert (row["n"], row["val/loss_n"], "val/acc1_n" in row) == ("3", "2", False)


def test_texts_of_a_run_hold_no_control_characters(tmp_path: Path, compare: Compare) -> None:
    make_run(tmp_path / "a\x1b[31m", 0.1, 0.75, note="\x1b]0;x\x07\u202e")
    make_run(tmp_path / "e", 0.5, 0.1, status="x", seconds=3)
    for form in ("table", "markdown", "csv", "json"):
        out = "".join(compare(format=form))
        assert not {"\x1b", "\x07", "\u202e"} & set(out)
    *_, last = csv.DictReader(io.StringIO(compare(format="csv")[0]))
    assert (last["run"], last["status"], last["config/status"]) == ("e", "finished", "x")
    assert (last["seconds"], last["config/seconds"]) == ("5.5", "3")


# -- what the command refuses


def test_mistakes_are_answered_with_the_fix(tmp_path: Path, compare: Compare) -> None:
    def answer(**settings: Any) -> str:
        with pytest.raises(UserError) as error:
            compare(**settings)
        return str(error.value)

    assert answer() == (
        f"runs={tmp_path}: {tmp_path}: no run found. A run is a folder with a config.yaml, and names are looked up "
        f"in {tmp_path}/train."
    )
    assert answer(runs=["nowhere", 12]).startswith("runs=[nowhere,12]: nowhere: no run found. 12: no run found.")
    run = make_run(tmp_path / "a", 0.1, 0.5)
    for out, why in ((tmp_path, "Is a directory"), (run / "config.yaml/x", "File exists")):
        assert answer(format="csv", out=str(out)) == f"out={out} cannot be written ({why}): give another file."
    assert answer(equal=True) == "equal=true compares two runs, and 1 were found: give runs=[A,B]. "
    assert f"{tmp_path}/TYPO: no run found." in answer(equal=True, runs=[str(run), f"{tmp_path}/TYPO"])
    assert "none of the 1 runs matches" in answer(where="optimizer.lr>5")


def test_the_command_line_takes_conditions_and_names_like_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # pytest-xdist sets 80, in which rows wrap

    def config_of(name: str, *argv: str) -> dict[str, Any]:
        return composed(*to_overrides([f"paths.logs={tmp_path}", *argv], COMMANDS[name]), command=name)

    for number, name in enumerate(("2026_11", "1e5", "1.50", "12", "1E-5")):
        run = make_run(tmp_path / "train/runs" / name, 0.1 * (number + 1), 0.5, note="it's \\ odd")
        os.utime(run / "config.yaml", (1000 - number, 1000 - number))
    for words, count in {
        "where=optimizer.lr>0.35 and status=finished": 2, "where='optimizer.lr>0.35'": 2, "where=null": 5,
        "where=note~it's and optimizer.lr!=0.1": 4, "runs=latest": 1, "runs=[1e5,2026_11, 12]": 3, "runs=1.50": 1,
    }.items():  # fmt: skip
        show(CompareConfig.model_validate(config_of("compare", words)))
        assert len(capsys.readouterr().out.splitlines()) == 1 + count, words
    assert config_of("eval", "run=2026_11")["run"] == "2026_11", "and not 202611"
    config = config_of("train", "from_run=2026_11", "init_from=2026_11", "resume=2026_11")
    assert config["from_run"] == config["init_from"] == config["resume"]["run"] == "2026_11"
    done = command("compare", f"paths.logs={tmp_path}", "runs=2026_11")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


# -- equal


def test_two_runs_are_equal_or_the_first_difference_is_named(
    tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    head = "epoch,lr,perf/images_per_second,step,train/loss_step,val/loss\n"
    rows = ["0,0.1,55.5,9,1.5,", "0,0.1,57.5,19,1.25,", "0,,,19,,1.125"]
    curves = {
        "a": rows,
        "same": ["0,0.1,99.5,9,1.5,", "0,0.1,98.5,19,1.25,1.125"],  # other speeds, and rows divided differently
        "other": [rows[0], rows[1].replace("1.25", "1.2500001"), rows[2]],
        "nan": [rows[0], rows[1].replace("1.25", "nan"), rows[2]],
        "longer": [*rows, "1,0.1,55.5,29,1.0,"],
        "apart": ["0,0.1,55.5,14,1.5,"],
        "fewer": ["0,,55.5,19,1.25,1.125"],
        "means": ["0,0.1,55.5,14,7.0,", "0,0.1,55.5,19,6.0,"],
        "empty": ["0,0.1,55.5,14,,"],
    }
    for name, lines in curves.items():
        (make_run(tmp_path / name, 0.1, 0.5) / "metrics.csv").write_text(head + "\n".join(lines) + "\n")
    runs = {run.name: run for run in read_all(tmp_path)}

    assert equality(runs["a"], runs["same"]) == (True, "a and same are equal in all 5 numbers of 2 steps.")
    assert equality(runs["nan"], runs["nan"])[0]
    for name, value in (("other", "1.2500001"), ("nan", "nan")):
        difference = f"a and {name} differ first at step 19: train/loss_step is 1.25 and {value}."
        assert equality(runs["a"], runs[name]) == (False, difference)
    stops = "longer stops at step 29 and a at step 19; they are equal until then."
    assert equality(runs["longer"], runs["a"]) == (False, stops)
    # train/loss_step of `fewer` is a mean since the start, and that of `a` since step 9
    few = "a and fewer are equal in all 1 numbers of 1 steps. 5 numbers that only one of them logged were not compared."
    assert equality(runs["a"], runs["fewer"]) == (True, few)
    for name in ("means", "apart", "empty"):
        with pytest.raises(UserError, match=f"a and {name} logged no loss and no accuracy of the same steps: train b"):
            equality(runs["a"], runs[name])

    out, _ = compare(runs=[str(tmp_path / "a"), str(tmp_path / "same")], equal=True)
    assert out == "a and same are equal in all 5 numbers of 2 steps.\n"
    with pytest.raises(SystemExit) as stop:
        compare(runs=[str(tmp_path / "a"), str(tmp_path / "other")], equal=True)
    assert stop.value.code == 1
    assert "differ first at step 19" in capsys.readouterr().out
