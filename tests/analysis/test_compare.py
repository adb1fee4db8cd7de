"""The table of runs: found, read, filtered, grouped by seed, in each format, and whether two are equal."""

import csv
import io
import json
import math
import os
import statistics
from pathlib import Path

import pytest
import yaml
from conftest import command

from alexlab.analysis import runs as reading
from alexlab.analysis import table
from alexlab.analysis.finding import find
from alexlab.analysis.groups import grouped, ranked
from alexlab.analysis.runs import Run, read
from alexlab.analysis.settings import differing
from alexlab.analysis.where import chosen
from alexlab.engine import config as configs
from alexlab.engine.files import lock
from alexlab.engine.settings import own_ckpt


def make_run(folder: Path, lr: float, acc1: float | None, **more: object) -> Path:
    folder.mkdir(parents=True)
    config = {"model": {"name": "alexnet"}, "optimizer": {"lr": lr}, "run_dir": str(folder), **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if acc1 is not None:
        summary = {"status": "finished", "best": {"val/acc1": acc1, "val/loss": 1.5}, "last": {"val/acc1": acc1 / 2},
                   "test": {"test/acc1": 0.25}, "images_per_second": 123.4, "seconds": 5.5}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def run_of(config: dict, given: tuple[str, ...] = (), status: str = "finished", **numbers: float) -> Run:
    best = {key.replace("_", "/"): value for key, value in numbers.items()}
    return Run(Path("x"), "x", status, config, {"best": best}, set(given))


# -- the table


def test_best_first_with_the_keys_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", 0.1, 0.5)
    make_run(tmp_path / "runs/b", 0.2, 0.75)
    make_run(tmp_path / "runs/c", 0.2, None)
    (tmp_path / "runs/d").mkdir()
    (tmp_path / "runs/d/config.yaml").write_text("{broken")
    done = command("compare.py", f"runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    head, below, *rows = done.stdout.splitlines()
    assert head.split() == ["best.ckpt", "last", "best.ckpt"]
    assert below.split() == ["3", "runs", "val/acc1", "val/acc1", "val/loss", "test/acc1", "images/s", "seconds"]
    assert [row.split()[0] for row in rows[:3]] == ["b", "a", "c"]
    assert "0.7500" in rows[0]
    assert "0.3750" in rows[0]
    assert "unfinished" in rows[2]
    assert "optimizer.lr=0.2" in rows[0]
    assert "optimizer.lr=0.1" in rows[1]
    assert "model.name" not in done.stdout
    assert f"left out: {tmp_path}/runs/d (" in done.stdout


def test_one_run_globs_lists_and_links(tmp_path: Path) -> None:
    make_run(tmp_path / "multiruns/x/0", 0.1, 0.5)
    make_run(tmp_path / "multiruns/x/1", 0.1, 0.5, seed=1)
    found = find([str(tmp_path / "multiruns/*/0"), str(tmp_path / "multiruns/x/0"), "x/0"], tmp_path)
    assert found == ([tmp_path / "multiruns/x/0"], [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link").symlink_to(tmp_path / "multiruns/x/1")
    assert find([str(tmp_path / "other")], tmp_path) == ([tmp_path / "multiruns/x/1"], [])
    runs, left_out = read(find([str(tmp_path)], tmp_path)[0])
    assert ([run.name for run in runs], left_out) == (["x/0", "x/1"], [])
    assert differing(runs) == [{}, {"seed": 1}]


def test_a_folder_that_holds_itself_ends(tmp_path: Path) -> None:
    make_run(tmp_path / "a/run", 0.1, 0.5)
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert find([str(tmp_path)], tmp_path) == ([tmp_path / "a/run"], [])


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


def test_mistakes(tmp_path: Path) -> None:
    def told(*words: str) -> str:
        done = command("compare.py", f"paths.logs={tmp_path}", *words)
        assert done.returncode == 2, done.stdout
        assert len(done.stderr.splitlines()) <= 4
        return done.stderr

    assert "no run is there" in told(f"runs={tmp_path}")
    make_run(tmp_path / "runs/a", 0.1, 0.5)
    near = "sort=val/acc: no run has such a number. Did you mean val/acc1? There are: images_per_second, last/val/acc1,"
    assert near in told(f"runs={tmp_path}", "sort=val/acc")
    assert "is a folder: give a file's name" in told(f"runs={tmp_path}", "format=csv", f"out={tmp_path}")
    assert "equal=true compares two runs, and there are 1" in told(f"runs={tmp_path}", "equal=true")
    for words, answer in {
        "optimizer.l>1": "where=optimizer.l>1: no run has optimizer.l. Did you mean optimizer.lr?",
        "model.name>1": "where=model.name>1: alexnet is no number: with texts, = and != and ~ (holds) do.",
        "optimizer.lr": "optimizer.lr is no condition: write KEY SIGN VALUE",
        "optimizer.lr>5": "where=optimizer.lr>5: it holds of none of the 1 runs: optimizer.lr is 0.1.",
        "lr>5": "where=lr>5: no run has lr. Did you mean optimizer.lr?",
        "model=alexnt and optimizer.lr>0.01": "no run has model. Did you mean model.name?",
        "optimizer.lr!=0.01&seed=1": "conditions are joined by and and or: optimizer.lr!=0.01&seed=1 has another sign",
        "optimizer.lr>0.01 & status=finished": "conditions are joined by and and or: optimizer.lr>0.01 & status",
    }.items():
        assert answer in told(f"runs={tmp_path}", f"where={words}")
    assert "format=xml: must be one of table, markdown, csv, json, html" in told("format=xml")
    assert "most=0: must be a whole number, at least 1" in told("most=0")


# -- reading runs of any age


def test_a_run_that_goes_on_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    for name in ("on", "killed"):
        folder = make_run(tmp_path / name, 0.1, None)
        (folder / ".lock.rank").touch()
        (folder / "metrics.csv").write_text(
            "step,val/acc1,val/loss,train/loss_step,perf/images,perf/seconds\n9,,,1.5,,\n9,0.5,1.25,,,\n"
            "19,0.75,1.5,,300,20\n24,nan,nan,,,\n29,0.7"
        )
    with lock(tmp_path / "on", ".lock.rank"):
        runs, _ = read([tmp_path / "on", tmp_path / "killed"])
    assert [run.status for run in runs] == ["running", "unfinished"]
    for run in runs:  # what was measured so far; a torn row's numbers may be torn, too
        assert run.numbers == {
            "val/acc1": 0.75, "val/loss": 1.5,  # the best epoch's, as best.ckpt holds it
            "images_per_second": 15.0, "seconds": 20.0,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[]"),
        ("summary.json", '{"best": 3}'),
        ("summary.json", '{"best": {"val/acc1": "x"}}'),
        ("summary.json", '{"status": "\\u001b[2J"}'),
        ("summary.json", "[" * 100_000),
        ("config.yaml", "a: &a [x]\nmodel: *a\n"),
        ("config.yaml", "model: &a [x]\nb: *a\n"),
        ("config.yaml", "x" * (2**20 + 1)),
        ("config.yaml", "[" * 50_000),
        ("config.yaml", "model: {name: a}\n---\nmodel: {name: b}\n"),
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


def test_what_is_odd_in_one_run_does_not_hide_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", 0.1, 0.5)
    make_run(tmp_path / "runs/b", 0.1, 0.75, overrides=5, optimizer=["x"], model={"name": ["x"]}, note={"x": {1: [2]}})
    folder = make_run(tmp_path / "runs/c", 0.1, 0.5)
    odd = {
        "status": "finished",
        "best": {"val/acc1": 10**400},
        "images_per_second": "x",
        "dataset": [],
        "seconds": None,
    }
    (folder / "summary.json").write_text(json.dumps(odd))
    (tmp_path / "runs/d").mkdir()
    os.mkfifo(tmp_path / "runs/d/config.yaml")
    (tmp_path / "runs/e").mkdir()
    os.mkfifo(tmp_path / "runs/e/run-x.wandb")
    for form in ("table", "csv", "html", "json", "markdown"):
        done = command("compare.py", f"runs={tmp_path}", f"format={form}", f"out={tmp_path}/{form}")
        assert done.returncode == 0, done.stderr
        assert f"{tmp_path}/runs/d (ValueError: its config.yaml is no file)" in done.stdout
        assert "0.5" in (tmp_path / form).read_text()


def test_val_tested_again_is_no_test(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 0.1, 0.5)
    summary = json.loads((folder / "summary.json").read_text())
    for images, known in (({"train": 5, "val": 2}, False), ({"train": 5, "test": 2}, True)):
        (folder / "summary.json").write_text(json.dumps({**summary, "dataset": {"images": images}}))
        assert ("test/acc1" in read([folder])[0][0].numbers) == known


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
        assert reading.config_of(path, blocks) == configs.read(path) == yaml.safe_load(text)
    assert b"a: 1\n" in blocks


# -- settings


def test_a_groups_choice_tells_what_comes_with_it() -> None:
    base = {"data.name": "demo", "data.root": "a", "optimizer.lr": 0.1}
    runs = [run_of(base), *(run_of({**base, "data.name": "folder", "data.root": root}) for root in "bc")]
    assert differing(runs) == [
        {"data.name": "demo"},
        {"data.name": "folder", "data.root": "b"},
        {"data.name": "folder", "data.root": "c"},
    ]


def test_an_option_tells_what_comes_with_it() -> None:
    """augment=strong is one setting, and not its erasing, mixup and cutmix as well; what was changed by hand is."""
    base = {"choices.augment": "basic", "augment.erase": 0.0, "augment.mixup": 0.0, "seed": 0}
    strong = {**base, "choices.augment": "strong", "augment.erase": 0.25, "augment.mixup": 0.2}
    assert differing([run_of(base), run_of(strong), run_of({**strong, "augment.mixup": 0.4})]) == [
        {"augment": "basic"},
        {"augment": "strong", "augment.mixup": 0.2},
        {"augment": "strong", "augment.mixup": 0.4},
    ]


def test_what_a_command_line_gave_is_told_beside_another_option() -> None:
    auto = {"choices.trainer": "auto", "trainer.max_epochs": 10, "trainer.devices": 1}
    ddp = {"choices.trainer": "ddp", "trainer.max_epochs": 50, "trainer.devices": 2}
    assert differing([run_of(auto), run_of(ddp, given=("trainer.max_epochs",))]) == [
        {"trainer": "auto", "trainer.max_epochs": 10},
        {"trainer": "ddp", "trainer.max_epochs": 50},
    ]


def test_a_name_that_a_command_line_gave_is_told_of_its_run_alone() -> None:
    ours = {"choices.model": "alexnet", "model.name": "alexnet", "choices.data": "demo", "data.root": "/demo"}
    theirs = {"choices.model": "torchvision", "model.name": "resnet18", "choices.data": "folder", "data.root": "/x"}
    assert differing([run_of(ours), run_of(theirs, given=("model.name", "data.root"))]) == [
        {"model": "alexnet", "data": "demo"},
        {"model": "torchvision", "model.name": "resnet18", "data": "folder", "data.root": "/x"},
    ]


def test_a_runs_own_checkpoint_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real/run/checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    ckpt = str(tmp_path / "real/run/checkpoints/last.ckpt")
    assert own_ckpt({"run_dir": str(tmp_path / "link/run"), "ckpt_path": ckpt})
    assert not own_ckpt({"run_dir": str(tmp_path / "link/other"), "ckpt_path": ckpt})


def test_null_and_what_an_older_run_did_not_know_are_the_same() -> None:
    runs = [run_of({"seed": 0, "ema.decay": None, "trainer.limit_val_batches": 1.0}), run_of({"seed": 1})]
    assert len(grouped(runs)) == 1
    assert len(grouped([run_of({"seed": 0, "trainer.limit_val_batches": 1}), run_of({"seed": 1})])) == 2
    lines = table.table(ranked(grouped([run_of({"ema.decay": None}), run_of({"ema.decay": 0.9})]), "val/acc1"), 2,
                        "val/acc1", 120)  # fmt: skip
    assert "null" not in "".join(lines), "goes without saying"
    assert sum("ema.decay=0.9" in line for line in lines) == 1


def test_code_that_git_could_not_tell_is_the_same_as_none() -> None:
    runs = [run_of({"seed": seed}) for seed in range(3)]
    for run in runs[:2]:
        run.code = {"commit": "c" * 40, "dirty": None, "patch_sha256": None, "left_out": "git could not tell it"}
    runs[2].code = {"commit": "c" * 40, "dirty": False}
    groups = grouped(runs)
    assert [group.apart["commit"] for group in groups] == ["ccccccc+?", "ccccccc+?", "ccccccc"]


def test_runs_from_before_options_were_kept_are_compared_by_their_keys() -> None:
    old, new = run_of({"optimizer.lr": 0.1}), run_of({"optimizer.lr": 0.2, "choices.optimizer": "sgd"})
    assert differing([old, new]) == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}]


# -- seeds


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    scores = [0.5, 0.625, 0.75]
    for seed, score in enumerate(scores):
        make_run(tmp_path / f"runs/s{seed}", 0.1, score, seed=seed)
    make_run(tmp_path / "runs/other", 0.2, 0.7, seed=0)
    make_run(tmp_path / "runs/open", 0.1, None, seed=3)
    done = command("compare.py", f"runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    assert list(rows) == ["other", "s0", "open"], "by the mean, 0.625"
    assert "s0 +2  finished" in rows["s0"]
    assert f"0.6250±{statistics.stdev(scores):.4f}" in rows["s0"]
    assert "seed=0,1,2" in rows["s0"]
    each = command("compare.py", f"runs={tmp_path}", "seeds=each").stdout
    assert [line.split()[0] for line in each.splitlines()[2:]] == ["s2", "other", "s1", "s0", "open"]


def test_losses_ascend_and_what_is_not_known_is_last() -> None:
    runs = [run_of({"a": n}, val_loss=loss) for n, loss in enumerate((2.0, 1.0, float("nan")))] + [run_of({"a": 9})]
    order = [group.runs[0].config["a"] for group in ranked(grouped(runs), "val/loss")]
    assert order[:2] == [1, 0]
    assert set(order[2:]) == {2, 9}


# -- where


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("optimizer.lr>0.1", "bc"), ("optimizer.lr>=0.1", "abc"), ("optimizer.lr = 0.1", "a"), ("name='a'", "a"),
        ("optimizer.lr==1e-1", "a"), ("ema=null", "abc"), ("optimizer.lr<1e9", "abc"), ("val/acc1>0", "ab"),
        ("optimizer.lr!=0.1", "bc"), ("val/acc1>0.5 and optimizer.lr<0.3", "b"), ("val/acc1<=0.5 or seed=7", "ac"),
        ("model.name=alexnet and seed=7 or optimizer.lr=0.1", "ac"), ("model.name~LEX", "abc"), ("name~b", "b"),
        ("status=finished", "ab"), ("seed=7 OR name=a", "ac"),
        ("augment.scale=[0.25,1.0]", "abc"),
        ("note=\"this and that or none\"", "a"), ("rate>0.05", "b"), ("status=FINISHED", "ab"),
        ("compile=true", "c"), ("compile!=true", "ab"), ("compile=1", ""), ("hash=70380e39", "a"),
        ("hash!=70380e39", "bc"), ("hash=1.50", "b"), ("hash=1.5", ""),
    ],
)  # fmt: skip
def test_where(text: str, names: str) -> None:
    more: list[dict] = [{"seed": 0, "compile": False}, {"seed": 0, "compile": False}, {"seed": 7, "compile": True}]
    runs = []
    for name, lr, acc, rest in zip("abc", (0.1, 0.2, 0.3), (0.5, 0.75, None), more, strict=True):
        note, rate = ("this and that or none", "auto") if name == "a" else ("x", lr if name == "b" else None)
        config = {"model.name": "alexnet", "optimizer.lr": lr, "ema": None, "augment.scale": [0.25, 1.0], "note": note,
                  "rate": rate, "hash": {"a": "70380e39", "b": "1.50", "c": "0071"}[name], **rest}  # fmt: skip
        summary = {"best": {"val/acc1": acc}}
        runs.append(Run(Path(name), name, "finished" if acc else "failed", config, summary))
    assert "".join(run.name for run in chosen(runs, text)) == names


def test_where_on_the_command_line(tmp_path: Path) -> None:
    """Whatever signs it has, quoted for Hydra by us or by the user."""
    for lr in (0.1, 0.2, 0.3):
        make_run(tmp_path / f"runs/{lr}", lr, 0.5, note="it's \\ odd")
    for words in (
        "where=optimizer.lr>0.15 and status=finished",
        "where='optimizer.lr>0.15'",
        "where=note~it's and optimizer.lr!=0.1",
    ):
        done = command("compare.py", f"runs={tmp_path}", words)
        assert done.returncode == 0, done.stderr
        assert "2 runs" in done.stdout
    assert "3 runs" in command("compare.py", f"runs={tmp_path}", "where=null").stdout


# -- formats


def test_markdown_csv_and_json(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", 0.1, 0.5, seed=0, note="x|y")
    make_run(tmp_path / "runs/b", 0.1, 0.75, seed=1, note="x|y")
    make_run(tmp_path / "runs/c", 0.123456789, 0.25, seed=0, note="z")
    (tmp_path / "runs/d").mkdir()
    (tmp_path / "runs/d/config.yaml").write_text("{broken")

    def told(*words: str) -> str:
        done = command("compare.py", f"runs={tmp_path}", *words)
        assert done.returncode == 0, done.stderr
        assert "left out" in done.stderr, "beside what another program reads"
        return done.stdout

    lines = told("format=markdown").splitlines()
    heads = "| run | status | seed | note | optimizer.lr | best val/acc1 |"
    assert sorted(lines[0].split(" | ")[2:5]) == ["note", "optimizer.lr", "seed"], heads
    assert "x\\|y" in lines[2]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    first, second = csv.DictReader(io.StringIO(told("format=csv")))
    assert (first["run"], first["n"], first["val/acc1"], first["seed"]) == ("a +1", "2", "0.625", "0,1")
    assert float(first["val/acc1_std"]) == pytest.approx(statistics.stdev([0.5, 0.75]))
    assert (second["optimizer.lr"], second["val/acc1_std"]) == ("0.123456789", "")
    whole = json.loads(told("format=json"))
    assert whole["groups"][0]["metrics"]["val/acc1"] == {"mean": 0.625, "std": statistics.stdev([0.5, 0.75]), "n": 2}
    assert [run["path"] for run in whole["groups"][0]["runs"]] == [f"{tmp_path}/runs/a", f"{tmp_path}/runs/b"]
    assert len(whole["left_out"]) == 1
    make_run(tmp_path / "runs/=e", 0.5, 0.1, status="x", seconds=3, **{"=f": 1, "[g](javascript:x)": "[g](http://x)"})
    (first, *_) = csv.DictReader(io.StringIO(told("format=csv", "where=name~'=e'")))
    assert first["run"] == "'=e"
    (*_, last) = list(csv.DictReader(io.StringIO(told("format=csv"))))
    assert (last["run"], last["status"], last["config/status"]) == ("'=e", "finished", "x")
    assert (last["seconds"], last["config/seconds"], last["'=f"]) == ("5.5", "3", "1")
    assert "](" not in told("format=markdown")
    done = command("compare.py", f"runs={tmp_path}", "format=csv", f"out={tmp_path}/new/table.csv")
    assert f"written to {tmp_path}/new/table.csv" in done.stdout
    assert (tmp_path / "new/table.csv").read_text() == told("format=csv")


# -- equal


def test_equal_names_the_first_step_that_differs(tmp_path: Path) -> None:
    head = "epoch,lr,perf/images_per_second,step,train/loss_step,val/loss\n"
    rows = ["0,0.1,55.5,9,1.5,", "0,0.1,57.5,19,1.25,", "0,,,19,,1.125"]
    folders = {
        "a": rows,
        "same": ["0,0.1,99.5,9,1.5,", "0,0.1,98.5,19,1.25,1.125"],  # speeds differ, and rows are divided otherwise
        "other": [rows[0], rows[1].replace("1.25", "1.2500001"), rows[2]],
        "longer": [*rows, "1,0.1,55.5,29,1.0,"],
        "apart": ["0,0.1,55.5,14,1.5,"],
        "fewer": ["0,,55.5,19,1.25,1.125"],
        "means": ["0,0.1,55.5,14,7.0,", "0,0.1,55.5,19,6.0,"],
    }
    for name, lines in folders.items():
        (make_run(tmp_path / name, 0.1, 0.5) / "metrics.csv").write_text(head + "\n".join(lines) + "\n")

    def equal(a: str, b: str) -> tuple[int, str]:
        done = command("compare.py", f"runs=[{tmp_path / a},{tmp_path / b}]", "equal=true")
        return done.returncode, done.stdout + done.stderr

    assert equal("a", "same") == (0, "a and same are equal in all 5 numbers of 2 steps.\n")
    assert equal("a", "other") == (1, "a and other differ first at step 19: train/loss_step is 1.25 and 1.2500001.\n")
    assert equal("longer", "a") == (1, "a ends at step 19, and longer goes on to step 29; equal up to there.\n")
    code, told = equal("a", "fewer")
    few = "equal in all 1 numbers of 1 steps. 1 more steps and 2 more numbers were logged by one of them alone"
    assert (code, few in told) == (0, True), "a mean since step 9 is none since the start"
    code, told = equal("a", "means")
    assert code == 2
    assert "no loss and no accuracy of a and means can be compared, as none is of the same steps" in told
    code, told = equal("a", "apart")
    assert code == 2
    assert "no step is logged in both a and apart" in told
    (tmp_path / "apart/metrics.csv").unlink()
    assert f"{tmp_path}/apart has no numbers to compare" in equal("a", "apart")[1]


# -- what sets runs with the same settings apart


def test_other_images_code_or_devices_are_no_seeds(tmp_path: Path) -> None:
    base = {"status": "finished", "best": {"val/acc1": 0.5}, "dataset": {"fingerprint": {"train": "aaaa", "val": "b"}},
            "git": {"commit": "c" * 40, "dirty": False}, "world_size": 1,
            "hardware": {"devices": "cuda", "device": "NVIDIA A100"}}  # fmt: skip
    others: dict[str, dict] = {
        "a": {}, "b": {}, "images": {"dataset": {"fingerprint": {"train": "aaaa", "val": "c"}}},
        "code": {"git": {"commit": "d" * 40, "dirty": True}}, "ranks": {"world_size": 8}, "pruned": {"pruned": True},
        "device": {"hardware": {"devices": "cpu", "device": "x86_64"}},
    }  # fmt: skip
    for seed, (name, more) in enumerate(others.items()):
        folder = make_run(tmp_path / name, 0.1, 0.5, seed=seed)
        (folder / "summary.json").write_text(json.dumps({**base, **more}))
    make_run(tmp_path / "again", 0.1, None, seed=0)
    (tmp_path / "again/summary.json").write_text(json.dumps(base))
    runs, _ = read(find([str(tmp_path)], tmp_path)[0])
    rows = {group.name: group.apart for group in grouped(runs)}
    assert set(rows) == {"a +1", "again", "images", "code", "ranks", "pruned", "device"}, "nor is the same seed again"
    assert len(rows["images"]["images"]) == len(rows["a +1"]["images"]) == 8
    assert rows["images"]["images"] != rows["a +1"]["images"]
    assert (rows["device"]["device"], rows["a +1"]["device"]) == ("x86_64", "NVIDIA A100")
    assert [run.name for run in chosen(runs, "precision=unknown")] == [run.name for run in runs]
    assert [run.name for run in chosen(runs, f"images={rows['images']['images']}")] == ["images"]
    assert {run.name for run in chosen(runs, "commit~ddddddd or device=x86_64")} == {"code", "device"}
    assert rows["code"]["commit"] == "ddddddd+changes"
    assert rows["ranks"]["world_size"] == 8
    assert next(run.status for run in runs if run.name == "pruned") == "pruned"


def test_runs_without_a_seed_tell_their_facts_too() -> None:
    runs = [run_of({"a": 1}), run_of({"a": 1})]
    for run, ranks in zip(runs, (1, 8), strict=True):
        run.summary["world_size"] = ranks
    assert [group.apart for group in grouped(runs)] == [{"world_size": 1}, {"world_size": 8}]


def test_what_is_no_number_is_in_no_mean() -> None:
    runs = [run_of({"seed": seed, "a": 1}, val_acc1=acc) for seed, acc in enumerate((0.5, math.nan, 0.75))]
    (group,) = grouped(runs)
    stat = group.stat("val/acc1")
    assert stat is not None
    assert (stat.mean, stat.n) == (0.625, 2)
    assert table.cell(group, "val/acc1", ".3f") == f"0.625±{statistics.stdev([0.5, 0.75]):.3f} (2)"


def test_a_name_with_brackets_and_names_of_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "exp[1]/a", 0.1, 0.5)
    done = command("compare.py", f"runs=['{tmp_path}/exp[1]/a',{tmp_path}/nope*]")
    assert done.returncode == 0, done.stderr
    assert "1 run " in done.stdout
    assert f"left out: {tmp_path}/nope* (no run is there)" in done.stdout
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/summary.json").write_text("{}")
    assert "lost (ValueError: it has no config.yaml)" in command("compare.py", f"runs={tmp_path}").stdout


def test_curves_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.1, 0.5)
    folder = make_run(tmp_path / "b", 0.1, None)
    (folder / "metrics.csv").write_text(f"step,note\n1,{'x' * 200_000}\n")
    for form in ("table", "html"):
        done = command("compare.py", f"runs={tmp_path}", f"format={form}", f"out={tmp_path}/{form}.txt")
        assert done.returncode == 0, done.stderr
        assert f"left out: the curves of {tmp_path}/b (Error: field larger" in done.stdout


def test_no_text_of_a_run_reaches_the_terminal_as_more_than_text(tmp_path: Path) -> None:
    make_run(tmp_path / "a\x1b[31m", 0.1, 0.5, note="\x1b]0;x\x07\u202e")
    make_run(tmp_path / "b", 0.1, 0.5, note="<b> =1")
    make_run(tmp_path / "c", 0.1, 0.5, note="=HYPERLINK(1)")
    for form in ("table", "markdown", "csv", "json"):
        out = command("compare.py", f"runs={tmp_path}", f"format={form}").stdout
        assert not {"\x1b", "\x07", "\u202e"} & set(out)
        assert "<b>" not in out or form != "markdown"
        assert ",=HYPERLINK" not in out


def test_what_no_run_learns_from_keeps_no_seeds_apart(tmp_path: Path) -> None:
    """A resume, how a sweep is driven, and a run that failed with the same seed before."""
    own = str(tmp_path / "b/checkpoints/last.ckpt")
    make_run(tmp_path / "a", 0.1, 0.5, seed=0, ckpt_path=None, sweep={"keep_going": False})
    make_run(tmp_path / "b", 0.1, 0.5, seed=1, ckpt_path=own, sweep={"keep_going": True})
    make_run(tmp_path / "0", 0.1, 0.5, seed=1, ckpt_path=None)
    summary = json.loads((tmp_path / "0/summary.json").read_text())
    (tmp_path / "0/summary.json").write_text(json.dumps({**summary, "status": "failed"}))
    make_run(tmp_path / "c", 0.1, 0.5, seed=2, ckpt_path="/another/run/checkpoints/last.ckpt")
    runs, _ = read(find([str(tmp_path)], tmp_path)[0])
    groups = {tuple(run.path.name for run in group.runs): group.apart for group in grouped(runs)}
    assert set(groups) == {("a", "b"), ("0",), ("c",)}
    assert groups["c",]["ckpt_path"] == "/another/run/checkpoints/last.ckpt"


def test_code_is_known_by_its_patch(tmp_path: Path) -> None:
    """Of a run's code.json; a working tree may be dirty by what is no code."""
    git = {"status": "finished", "best": {"val/acc1": 0.5}, "git": {"commit": "c" * 40, "dirty": True}}
    patches: dict[str, dict] = {
        "a": {"dirty": False}, "b": {"dirty": False}, "c": {"dirty": True, "patch_sha256": "1" * 64},
        "d": {"dirty": True, "patch_sha256": "2" * 64},
    }  # fmt: skip
    for seed, (name, code) in enumerate(patches.items()):
        folder = make_run(tmp_path / name, 0.1, 0.5, seed=seed)
        (folder / "summary.json").write_text(json.dumps(git))
        (folder / "code.json").write_text(json.dumps({"commit": "c" * 40, **code}))
    runs, _ = read(find([str(tmp_path)], tmp_path)[0])
    rows = {group.name: group.apart.get("commit") for group in grouped(runs)}
    assert rows == {"a +1": "ccccccc", "c": "ccccccc+111111", "d": "ccccccc+222222"}


def test_equal_names_what_is_not_there(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.1, 0.5)
    done = command("compare.py", f"runs=[{tmp_path}/a,{tmp_path}/TYPO]", "equal=true")
    assert (done.returncode, f"equal=true: {tmp_path}/TYPO (no run is there)" in done.stderr) == (2, True)
