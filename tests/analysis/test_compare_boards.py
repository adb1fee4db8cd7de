"""W&B's files of runs: as its client writes them, and as its server gives them."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import yaml
from conftest import command

from alexlab.analysis import wandb_files as boards
from alexlab.analysis.finding import find
from alexlab.analysis.groups import grouped
from alexlab.analysis.runs import Run, read
from alexlab.analysis.settings import differing


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that W&B's own client leaves of a run of somebody's, with records longer than its blocks of 32 KiB."""
    import wandb

    folder = tmp_path_factory.mktemp("board")
    config = {"optimizer": {"lr": 0.5}, "model": {"name": "theirs"}, "long": "x" * 100_000}
    with wandb.init(mode="offline", dir=folder, project="p", name="their-run", config=config,
                    settings=wandb.Settings(silent=True, console="off", x_disable_stats=True)) as run:  # fmt: skip
        for step in range(300):
            row = {"train/loss": 2.0 - step / 300, "val/acc1": step / 300, "note": "y" * 300, "in": {"it": 1}}
            run.log({**row, "trainer/global_step": 2 * step})
    return next(folder.glob("wandb/offline-run-*"))


def test_a_run_that_was_offline(offline: Path) -> None:
    runs, left_out = read(find([str(offline.parent)], offline)[0])
    assert left_out == []
    (run,) = runs
    assert (run.name, run.status) == ("their-run", "finished")
    assert run.config == {"optimizer.lr": 0.5, "model.name": "theirs", "long": "x" * 100_000}
    assert [row["step"] for row in run.rows] == [2.0 * step for step in range(300)]
    assert run.rows[-1]["train/loss"] == 2.0 - 299 / 300
    assert run.rows[-1]["in.it"] == 1
    assert run.numbers["train/loss"] == 2.0 - 299 / 300
    assert run.numbers["val/acc1"] == 299 / 300
    assert run.numbers["seconds"] >= 0


def test_beside_ours(offline: Path, tmp_path: Path) -> None:
    from test_compare import make_run

    make_run(tmp_path / "ours", 0.1, 0.5)
    done = command("compare.py", f"runs=[{tmp_path},{offline}]")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[2:] if not line.startswith(" ")}
    assert list(rows)[:2] == ["their-run", "ours"]
    assert "0.9967" in rows["their-run"]


def test_cut_off_anywhere_what_was_whole_is_read(offline: Path, tmp_path: Path) -> None:
    """As a kill leaves it: W&B's own `sync` reads as far."""
    whole = next(offline.glob("*.wandb")).read_bytes()
    rows = len(list(boards.history(next(offline.glob("*.wandb")))))
    before = 0
    for size in (8, 1000, len(whole) // 3, len(whole) // 2, 32768 * 3 - 3, len(whole) - 5):
        path = tmp_path / "run-x.wandb"
        path.write_bytes(whole[:size])
        found = len(list(boards.history(path)))
        assert found <= rows
        before = max(before, found)
    assert before == rows
    for damaged in (b"", b"no", b":W&B" + bytes(3) + struct.pack("<IHB", 0, 4, 1) + b"\xff\xff\xff\xff"):
        path.write_bytes(damaged)
        if damaged.startswith(b":W&B"):
            assert list(boards.records(path, {"run"})) == []
        else:
            with pytest.raises(ValueError, match=r"run-x\.wandb is no run of W&B"):
                list(boards.records(path, {"run"}))


def test_what_a_disk_has_turned_is_not_read(offline: Path, tmp_path: Path) -> None:
    """W&B's own sums say so: a bit anywhere ends what is read, and all before it is as it was."""
    whole = next(offline.glob("*.wandb")).read_bytes()
    rows = list(boards.history(next(offline.glob("*.wandb"))))
    path = tmp_path / "run-x.wandb"
    counts = []
    for place in range(len(whole) // 2, len(whole), 5003):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = list(boards.history(path))
        assert found == rows[: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_records_that_come_joined_say_the_same(offline: Path) -> None:
    """In the order in which they were told, so that the last of a key counts."""
    file = next(offline.glob("*.wandb"))
    one_by_one: list[tuple[str, str]] = []
    for record in boards.records(file, {"summary"}):
        one_by_one += [(item.key, item.value_json) for item in record.summary.update]
    (joined,) = boards.records(file, {"summary"}, joined=True)
    assert [(item.key, item.value_json) for item in joined.summary.update] == one_by_one
    assert len(one_by_one) > 1000


def test_downloaded_from_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "run-20260101_000000-abc123/files"
    folder.mkdir(parents=True)
    config = {"_wandb": {"value": {"t": 1}}, "optimizer": {"desc": None, "value": {"lr": 0.25}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {"val/acc1": 0.5, "train/loss": 1.5, "test/acc1": 0.25, "_runtime": 12.5, "_step": 9, "note": "x"}
    (folder / "wandb-summary.json").write_text(json.dumps(summary))
    (run,), left_out = read(find([str(tmp_path)], tmp_path)[0])
    assert left_out == []
    assert (run.name, run.config) == ("abc123", {"optimizer.lr": 0.25})
    assert run.numbers == {"seconds": 12.5, "train/loss": 1.5, "last/val/acc1": 0.5, "test/acc1": 0.25}
    assert run.rows == []
    (folder / "wandb-summary.json").write_text("[" * 50_000)
    _, left_out = read([folder])
    assert "too deep" in left_out[0]


def test_a_folder_of_ours_alone_says_what_the_run_says(shapes: Path, tmp_path: Path) -> None:
    """A run directory, and the folder of W&B in it, which may have come alone."""
    from conftest import TINY

    words = [word for word in TINY if not word.startswith("logger")]
    done = command("train.py", *words, "data=folder", f"data.root={shapes}", "data.batch_size=8", "logger=wandb",
                   "logger.wandb.mode=offline", "trainer.max_epochs=2",
                   f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    shutil.move(next((tmp_path / "run/wandb").glob("offline-run-*")), tmp_path / "alone")
    (ours, theirs), left_out = read([tmp_path / "run", tmp_path / "alone"])
    assert left_out == []
    assert (ours.status, theirs.status) == ("finished", "finished")
    assert ours.config | {"data.root": "shapes"} == theirs.config
    assert differing([ours, theirs]) == [{}, {}], "their images are the same"
    assert ours.facts == theirs.facts
    assert None not in ours.facts.values()
    assert ours.numbers == theirs.numbers

    def curve(run: Run, key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in run.rows if key in row]

    for key in ("val/acc1", "val/loss", "train/loss"):
        assert curve(ours, key) == curve(theirs, key) != []
    # beside each rate, too, in W&B
    assert set(curve(ours, "perf/images")) == set(curve(theirs, "perf/images")) != set()


def test_a_run_that_was_gone_on_with_is_one(tmp_path: Path) -> None:
    import wandb

    for part in range(2):
        with wandb.init(mode="offline", dir=tmp_path / str(part), project="p", id="same", config={"inf": float("inf")},
                        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True)) as run:  # fmt: skip
            for step in range(3):
                run.log({"val/acc1": [[0.5, 0.875, 0.75], [0.25, 0.125, 0.0625]][part][step], "trainer/global_step":
                         3 * part + step - part})  # fmt: skip
            run.log({"score": part})
    parts = sorted(tmp_path.glob("*/wandb/offline-run-*"))
    for number, part in enumerate(parts):  # which may have been made within a second; the first was online
        part.rename(tmp_path / f"{'offline-' * number}run-20260101_00000{number}-same")
    done = command("compare.py", f"runs={tmp_path}", "format=json")
    assert done.returncode == 0, done.stderr
    (group,) = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["groups"]
    numbers = {key: stat["mean"] for key, stat in group["metrics"].items()}
    assert numbers.pop("seconds") >= 0
    assert numbers.pop("trainer/global_step") == 4
    assert numbers == {"score": 1, "val/acc1": 0.875, "last/val/acc1": 0.0625}, "the best was before"
    (run,), _ = read(find([str(tmp_path)], tmp_path)[0])
    curve = [(row["step"], row["val/acc1"]) for row in run.rows if "val/acc1" in row]
    assert curve == [(0, 0.5), (1, 0.875), (2, 0.25), (3, 0.125), (4, 0.0625)], "step 2 was lost and done again"
    assert run.path.name == "offline-run-20260101_000001-same"
    done = command("compare.py", f"runs={tmp_path}", "format=html", f"out={tmp_path}/page.html")
    assert done.returncode == 0, done.stderr


def made(folder: Path, config: dict, summary: dict) -> Path:
    """A run of W&B's as its server gives it."""
    (folder / "files").mkdir(parents=True)
    values = {key: {"value": value} for key, value in config.items()}
    (folder / "files/config.yaml").write_text(yaml.safe_dump(values))
    (folder / "files/wandb-summary.json").write_text(json.dumps(summary))
    return folder / "files"


@pytest.mark.parametrize("best", [0.9, {"score": {"test": 0.5}}, ["x"], None])
def test_numbers_of_others_may_have_our_names(best: object, tmp_path: Path) -> None:
    summary = {"best": best, "last": 0.25, "others": 3, "loss": 1.5, "status": 7, "code": "x", "dataset": [1]}
    made(tmp_path / "run-20260101_000000-abc", {"epochs": 90}, {**summary, "epochs": 3})
    done = command("compare.py", f"runs={tmp_path}", "format=json", "sort=loss")
    assert done.returncode == 0, done.stderr
    (group,) = json.loads(done.stdout)["groups"]
    assert {key: stat["mean"] for key, stat in group["metrics"].items()} == {
        **({"best": 0.9} if best == 0.9 else {}), "last": 0.25, "others": 3, "loss": 1.5, "status": 7, "epochs": 3,
    }  # fmt: skip


def test_settings_that_others_do_not_have_set_nobody_apart(tmp_path: Path) -> None:
    ours = {
        "choices": {"model": "alexnet"},
        "model": {"name": "alexnet"},
        "optimizer": {"lr": 0.1},
        "ema": {"decay": 0},
    }
    made(tmp_path / "run-20260101_000000-ours", ours, {"best": {"val/acc1": 0.5}})
    made(tmp_path / "run-20260101_000001-mine", {**ours, "ema": {"decay": 0.9}}, {"best": {"val/acc1": 0.5}})
    made(tmp_path / "run-20260101_000002-other", {"arch": "vit", "optimizer": {"lr": 0.2}}, {"val/acc1": 0.5})
    runs, _ = read(find([str(tmp_path)], tmp_path)[0])
    assert [run.foreign for run in runs] == [False, False, True]
    assert differing(runs) == [
        {"optimizer.lr": 0.1, "ema.decay": 0}, {"optimizer.lr": 0.1, "ema.decay": 0.9}, {"optimizer.lr": 0.2},
    ]  # fmt: skip


def test_what_is_no_seed_in_our_directories_is_none_in_wandbs(tmp_path: Path) -> None:
    """Other code, and a run that began from another's checkpoint; one that went on from its own is one."""
    gone_on = {"ckpt_path": "last.ckpt", "resume": {"run": "latest"}}
    for seed, (name, config, commit) in enumerate([
        ("a", {}, "c" * 40), ("b", {}, "c" * 40), ("code", {}, "d" * 40), ("on", gone_on, "c" * 40),
        ("from", {"ckpt_path": "last.ckpt", "resume": {"run": None}}, "c" * 40),
    ]):  # fmt: skip
        base = {"choices": {"model": "alexnet"}, "model": {"name": "x"}, "ckpt_path": None, "seed": seed}
        told = {"status": "finished", "best": {"val/acc1": 0.5}, "code": {"commit": commit, "dirty": False}}
        made(tmp_path / f"run-20260101_000000-{name}", {**base, **config}, told)
    runs, _ = read(find([str(tmp_path)], tmp_path)[0])
    rows = {group.name: group.apart for group in grouped(runs)}
    assert {name: apart.get("commit") for name, apart in rows.items()} == {
        "a +2": "ccccccc", "code": "ddddddd", "from": None,
    }  # fmt: skip
    assert rows["from"]["ckpt_path"] == "last.ckpt"


def test_one_batch_and_all_of_them_are_two_settings(tmp_path: Path) -> None:
    """W&B makes 1 of 1.0, which `floats` tells."""
    for name, value, floats in (("one", 1, []), ("all", 1, ["trainer.limit_val_batches"]), ("null", None, [])):
        config = {"choices": {"model": "x"}, "trainer": {"limit_val_batches": value}, "floats": floats, "seed": value}
        made(tmp_path / f"run-20260101_000000-{name}", config, {"status": "finished", "best": {"val/acc1": 0.5}})
    runs, _ = read(find([str(tmp_path)], tmp_path)[0])
    assert sorted(group.name for group in grouped(runs)) == ["all +1", "one"]


def test_folders_of_the_same_name_are_other_runs(tmp_path: Path) -> None:
    """As W&B's files of several projects lie when one has downloaded them."""
    for project, score in (("a", 0.9), ("b", 0.8)):
        shutil.move(made(tmp_path / "x", {"net": project}, {"val/acc1": score}), tmp_path / project / "best")
    runs, left_out = read(find([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path)[0])
    assert [(run.name, run.numbers["last/val/acc1"], run.foreign) for run in runs] == [("best", 0.9, True),
                                                                                       ("best", 0.8, True)]  # fmt: skip
    assert left_out == []


def test_the_same_run_offline_and_downloaded_is_one(offline: Path, tmp_path: Path) -> None:
    name = offline.name.removeprefix("offline-")
    made(tmp_path / name, {"optimizer": {"lr": 0.5}}, {"val/acc1": 0.5, "more": 7})
    runs, _ = read(find([str(offline), str(tmp_path)], tmp_path)[0])
    (run,) = runs
    assert (run.status, len(run.rows), run.numbers["more"]) == ("finished", 300, 7)


def test_parts_without_the_trainers_step_stand_behind_each_other(tmp_path: Path) -> None:
    """W&B's own count begins anew in each part that is offline."""
    import wandb

    for part in range(2):
        with wandb.init(mode="offline", dir=tmp_path / str(part), project="p", id="same", resume="allow",
                        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True)) as run:  # fmt: skip
            for score in [(0.5, 0.875, 0.75), (0.25, 0.125)][part]:
                run.log({"val/acc1": score})
    for number, part in enumerate(sorted(tmp_path.glob("*/wandb/offline-run-*"))):
        part.rename(tmp_path / f"offline-run-20260101_00000{number}-same")
    (found,), left_out = read(find([str(tmp_path)], tmp_path)[0])
    assert [(row["step"], row["val/acc1"]) for row in found.rows] == [
        (0, 0.5), (1, 0.875), (2, 0.75), (3, 0.25), (4, 0.125),
    ]  # fmt: skip
    assert (found.numbers["val/acc1"], found.numbers["last/val/acc1"], left_out) == (0.875, 0.125, [])


@pytest.mark.parametrize(
    "config",
    [
        {"floats": [[1]]},
        {"floats": [{"a": 1}]},
        {"floats": ["lr"], "lr": 10**400},
        {"x": [{1: 2, "a": 3}]},
        {"floats": 3},
    ],
)
def test_odd_settings_of_one_run_take_no_other_along(config: dict, tmp_path: Path) -> None:
    made(tmp_path / "run-20260101_000000-odd", config, {"val/acc1": 0.5})
    made(tmp_path / "run-20260101_000000-good", {"lr": 0.1}, {"val/acc1": 0.75})
    done = command("compare.py", f"runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "good" in done.stdout


def test_a_damage_is_told_and_an_end_that_a_kill_has_torn_is_not(offline: Path, tmp_path: Path) -> None:
    whole = next(offline.glob("*.wandb")).read_bytes()
    for name, content in {
        "cut": whole[:-200], "bit": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4])
        + whole[len(whole) // 2 + 1 :],
    }.items():  # fmt: skip
        folder = tmp_path / name / "offline-run-20260101_000000-x"
        folder.mkdir(parents=True)
        (folder / "run-x.wandb").write_bytes(content)
        (run,), _ = read([folder])
        assert bool(run.problems) == (name == "bit"), name
    done = command("compare.py", f"runs={tmp_path}/bit")
    assert "left out: " in done.stdout
    assert re.search(r"run-x\.wandb from byte \d+ on \(damaged\)", done.stdout)


def test_updates_count_in_their_order(tmp_path: Path) -> None:
    """A key as a whole, and keys in it, told one after the other; by W&B's own client."""
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, project="p",
                    settings=wandb.Settings(silent=True, console="off", x_disable_stats=True)) as run:  # fmt: skip
        run.config.update({"a": 1, "b": {"x": 1, "y": 2}})
        run.config.update({"a": 2, "b": {"x": 3}}, allow_val_change=True)
    (found,), _ = read(find([str(tmp_path)], tmp_path)[0])
    assert found.config == {"a": 2, "b.x": 3}


def test_a_downloaded_run_of_another_project_with_the_same_id_is_another(offline: Path, tmp_path: Path) -> None:
    """Ids are of a project; W&B's folder has the time before it."""
    made(tmp_path / f"run-20200101_000000-{offline.name[-8:]}", {"net": "big"}, {"val/acc1": 0.125})
    runs, _ = read(find([str(offline), str(tmp_path)], tmp_path)[0])
    assert [run.config.get("net") for run in runs] == [None, "big"]
    assert all(run.earlier is None for run in runs)


def test_a_copy_of_a_run_is_left_out_and_told(offline: Path, tmp_path: Path) -> None:
    for name in ("orig", "backup"):
        shutil.copytree(offline, tmp_path / name / offline.name)
    (run,), left_out = read(find([str(tmp_path)], tmp_path)[0])
    assert len(run.rows) == 300
    assert len(left_out) == 1
    assert "(the same run as" in left_out[0]


def test_a_picture_without_a_step_costs_no_part_before(tmp_path: Path) -> None:
    import wandb

    for part in range(2):
        with wandb.init(mode="offline", dir=tmp_path / str(part), project="p", id="same",
                        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True)) as run:  # fmt: skip
            run.log({"size": 3})
            for row in range(3):
                run.log({"val/acc1": (0.5, 0.25)[part], "trainer/global_step": 100 * (3 * part + row + 1)})
    for number, part in enumerate(sorted(tmp_path.glob("*/wandb/offline-run-*"))):
        part.rename(tmp_path / f"offline-run-20260101_00000{number}-same")
    (found,), _ = read(find([str(tmp_path)], tmp_path)[0])
    assert [row["step"] for row in found.rows if "val/acc1" in row] == [100, 200, 300, 400, 500, 600]
    assert (found.numbers["val/acc1"], found.numbers["last/val/acc1"]) == (0.5, 0.25)
