"""The commands with a bucket of a real S3 server: images are prepared into it, and training reads them from it."""

import json
import os
import random
import shutil
import signal
import time
import uuid
from pathlib import Path

import pytest
from conftest import TINY, command, photo
from resuming import difference
from s3_server import SECRET, Faults, variables
from test_faults import kill_when, rows

from alexlab.data.fast import remote
from alexlab.engine.storage import Bucket

TIMES = int(os.environ.get("ALEXLAB_FAULTS", "1"))
KILLS = 8  # of a run
FAULTS = ("", "refuse", "500", "503", "cut", "wrong", "slow")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        photo(root / "train" / "abc"[i % 3] / f"{i}.jpg", (70, 80), seed=i)
        photo(root / "val" / "abc"[i % 3] / f"{i}.jpg", (70, 80), seed=100 + i)
    return root


def new_address() -> str:
    return f"s3://tests/{uuid.uuid4().hex}"


def prepare_words(photos: Path, out: Path | str, data: Path, *more: str) -> list[str]:
    small = ["short_side=64", "shard_mb=0.005", "num_workers=1"]
    return ["prepare", f"data.root={photos}", f"out={out}", *small, f"paths.data={data}", *more]


KILLED = """
import os, signal
from alexlab.engine import storage
write, done = storage.Bucket.write, []

def write_and_die(self, name, content):
    done.append(name)
    write(self, name, content)
    if len(done) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

storage.Bucket.write = write_and_die
"""


def test_a_preparation_into_a_bucket_is_that_of_a_folder_also_after_a_kill(
    photos: Path, tmp_path: Path, proxy: Faults
) -> None:
    address, data = new_address(), tmp_path / "data"
    (tmp_path / "killed.py").write_text(KILLED)
    killed = command(*prepare_words(photos, address, data), before=tmp_path / "killed.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(Bucket(address).list()) == 4
    assert command("train.py", *TINY, "data=prepared", f"data.root={address}", "dry_run=true").returncode == 2
    done = command(*prepare_words(photos, address, data))
    assert done.returncode == 0, done.stderr
    assert "train: continuing after " in done.stdout
    assert f"train with it: python train.py data=prepared data.root={address}" in done.stdout
    assert not list((data / ".prepare").iterdir()), "nothing is left on this machine"

    assert command(*prepare_words(photos, tmp_path / "local", data)).returncode == 0
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    there = {name: Bucket(address).read(name) for name in Bucket(address).list()}
    assert json.loads(there.pop("prepared.json")) == json.loads(local.pop("prepared.json"))
    assert there == local

    again = command(*prepare_words(photos, address, data))
    assert f"{address} is complete, and the checksums are right: train 24, val 24 images." in again.stdout
    other = command(*prepare_words(photos, address, data, "quality=80"))
    assert f"error: out={address} was prepared from different images or in a different way (recipe)" in other.stderr
    Bucket(address).write("val-00000.shard", b"x" * Bucket(address).list()["val-00000.shard"].bytes)
    changed = command(*prepare_words(photos, address, data))
    assert changed.returncode == 1
    assert "val-00000.shard has changed since it was written: remove s3://tests/" in changed.stderr
    Bucket(address).delete("prepared.json")
    occupied = command(*prepare_words(photos, address, data))
    assert f"error: out={address} has objects, such as " in occupied.stderr
    source = command("prepare", "data=prepared", f"data.root={address}", f"out={tmp_path / 'x'}")
    assert f"error: data.root={address} is a prepared set: give the folder of the images that" in source.stderr


@pytest.fixture(scope="module")
def sets(photos: Path, s3: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same prepared images in a folder and in a bucket."""
    folder, address = tmp_path_factory.mktemp("sets"), new_address()
    done = command(*prepare_words(photos, folder / "local", folder))
    assert done.returncode == 0, done.stderr
    done = command(*prepare_words(photos, address, folder), env=variables(s3))
    assert done.returncode == 0, done.stderr
    return folder / "local", address


EXACT = [*TINY, "data.batch_size=8", "trainer.precision=32-true", "trainer.log_every_n_steps=1", "augment=basic"]


def train_words(root: Path | str, folder: Path, *more: str) -> list[str]:
    words = ["train.py", *EXACT, "data=prepared", f"data.root={root}", f"paths.logs={folder.parent}"]
    return [*words, f"data.disk_cache={folder.parent}/cache", f"hydra.run.dir={folder}", *more]


def test_two_ranks_train_from_a_bucket_as_from_files(sets: tuple[Path, str], tmp_path: Path, proxy: Faults) -> None:
    """One rank downloads each file, and no file has the credentials."""
    more = ["trainer=ddp_cpu", "trainer.max_epochs=2"]
    done = command(*train_words(sets[0], tmp_path / "local", *more))
    assert done.returncode == 0, done.stderr
    done = command(*train_words(sets[1], tmp_path / "remote", *more))
    assert done.returncode == 0, done.stderr
    assert difference(tmp_path / "local", tmp_path / "remote") is None
    asked = [path for method, path in proxy.seen if method == "GET" and path.endswith("train.npz")]
    assert len(asked) == 1
    assert (tmp_path / "cache").is_dir()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path

    tested = command("eval.py", f"run={tmp_path / 'local'}", f"data.root={sets[1]}", f"paths.data={tmp_path}")
    assert tested.returncode == 0, tested.stderr
    ours = json.loads((tmp_path / "local/eval.json").read_text())
    assert ours["root"] == sets[1]


def test_only_prepared_sets_are_read_from_a_bucket(sets: tuple[Path, str], proxy: Faults) -> None:
    done = command("train.py", *TINY, "data=folder", "data.root=s3://tests/photos")
    assert "`data.root=s3://tests/photos` is an address: of a bucket, only data=prepared reads images." in done.stderr
    done = command("train.py", *TINY, "data=prepared", f"data.root={sets[1]}", "data.disk_cach=x", "dry_run=true")
    assert "error: `data.disk_cach=x`: there is no such key, and alexlab.data.fast.remote.P" in done.stderr
    assert "does not take it. Did you mean `data.disk_cache`?" in done.stderr
    unknown = "s3://no-such-bucket/x"
    for words in (
        ["data=prepared", f"data.root={unknown}"],
        ["data=demo", f"paths.logs={unknown}", "data.batch_size=8"],
    ):
        done = command("train.py", *TINY, *words)
        assert done.returncode == 2
        assert "the server refuses: 404 Not Found: The specified bucket does not exist" in done.stderr


def test_a_run_in_a_bucket_is_read_and_resumed_on_another_machine(photos: Path, tmp_path: Path, proxy: Faults) -> None:
    logs = f"{new_address()}/logs"

    def on(machine: str) -> list[str]:
        return [f"paths.logs={logs}", f"paths.scratch={tmp_path / machine}"]

    words = ["train.py", *EXACT, "data=folder", f"data.root={photos}", "trainer.max_epochs=2"]
    straight = command(*words, f"hydra.run.dir={tmp_path / 'straight'}")
    assert straight.returncode == 0, straight.stderr
    straight = command("train.py", f"resume={tmp_path / 'straight'}", "trainer.max_epochs=4")
    assert straight.returncode == 0, straight.stderr
    done = command(*words, *on("one"), "hydra.run.dir=${logs:}/train/runs/mine")
    assert done.returncode == 0, done.stderr
    assert f"alexlab compare paths.logs={logs} paths.scratch={tmp_path / 'one'}" in done.stdout
    assert f"python eval.py run=mine paths.logs={logs} paths.scratch={tmp_path / 'one'}" in done.stdout
    assert f"copied to {logs}/train/runs/mine" in done.stdout
    there = Bucket(f"{logs}/train/runs/mine").list()
    assert {"config.yaml", "summary.json", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= {*there}
    assert "owner.json" not in there

    shown = command("compare", *on("two"))
    assert "finished" in shown.stdout
    assert shown.stdout.rstrip().endswith("mine")
    tested = command("eval.py", "run=mine", *on("three"))
    assert tested.returncode == 0, tested.stderr
    assert f"copied to {logs}/train/runs/mine" in tested.stderr
    results = {"eval.json", "eval.csv", "report.html", "temperature.json"}
    assert results <= {*Bucket(f"{logs}/train/runs/mine").list()}
    predicted = command("predict", "run=latest", f"images={photos / 'val/a'}", *on("four"))
    assert predicted.returncode == 0, predicted.stderr
    assert Bucket(f"{logs}/train/runs/mine").read("predictions.csv").startswith(b"path,rank,class,probability")
    drawn = command("figures", "run=mine", "format=pdf", *on("one"))  # which has trained the run
    assert drawn.returncode == 0, drawn.stderr
    assert results <= {path.name for path in (tmp_path / f"one/s3/{logs[5:]}/train/runs/mine").iterdir()}
    longer = command("train.py", "resume=mine", "trainer.max_epochs=4", *on("five"))
    assert longer.returncode == 0, longer.stderr
    assert f"downloading {logs}/train/runs/mine to {tmp_path / 'five'}/s3/" in longer.stderr
    assert difference(tmp_path / "straight", tmp_path / f"five/s3/{logs[5:]}/train/runs/mine") is None
    again = command(*words, *on("six"), "hydra.run.dir=${logs:}/train/runs/mine")
    assert f"error: {logs}/train/runs/mine holds a run already" in again.stderr
    outside = command(*words, *on("six"), f"hydra.run.dir={tmp_path / 'outside'}")
    assert f"error: `hydra.run.dir={tmp_path / 'outside'}` must be below " in outside.stderr
    small = ["data=folder", f"data.root={photos}", "trainer.max_epochs=1", "test=false", "data.batch_size=8"]
    other = command("train.py", *TINY, *small, "init_from=mine", *on("seven"))
    assert other.returncode == 0, other.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("part", range(TIMES))
def test_kills_and_faults_change_no_run_in_a_bucket(part: int, photos: Path, tmp_path: Path, proxy: Faults) -> None:
    """Each start is on a machine that has nothing, or on the one before, and one kind of fault may come."""
    draw = random.Random(part)
    logs = f"{new_address()}/logs"
    words = ["train.py", *EXACT, "data=folder", f"data.root={photos}", f"trainer.max_epochs={KILLS}"]
    words += ["checkpoint.every_n_steps=1", "test=false"]
    done = command(*words, f"hydra.run.dir={tmp_path / 'straight'}")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "0"
    for number in range(KILLS + 1):
        if number and draw.random() < 0.6:
            place = tmp_path / f"{number}"
        run_dir = place / f"s3/{logs[5:]}/train/runs/mine"
        more = [f"paths.logs={logs}", f"paths.scratch={place}", "hydra.run.dir=${logs:}/train/runs/mine", "resume=auto"]
        if number == KILLS:
            proxy.set("")
            done = command(*words, *more)
            break
        proxy.set(FAULTS[(number + part) % 4], "", draw.randrange(1, 6))  # no body is damaged: it would be read again
        before, moment, began = checkpoints_in(run_dir), draw.uniform(0, 0.4), list[float]()

        def due(
            run_dir: Path = run_dir, before: int = before, moment: float = moment, began: list[float] = began
        ) -> bool:
            if not began and checkpoints_in(run_dir) >= before + 2:
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] > moment

        done = command(*words, *more, watch=kill_when(due))
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    assert done.returncode == 0, done.stderr
    assert difference(tmp_path / "straight", run_dir) is None


def checkpoints_in(run_dir: Path) -> int:
    """Count the last.ckpt that were copied, or downloaded."""
    path = run_dir / "checkpoints/.sent"
    return len(path.read_text().split()) if path.is_file() else 0


@pytest.mark.parametrize("part", range(TIMES))
def test_kills_and_faults_of_the_server_change_no_result(
    part: int, sets: tuple[Path, str], tmp_path: Path, proxy: Faults
) -> None:
    """Each start has one kind of fault, and is killed at random: in a step, in a request, while a shard arrives."""
    draw = random.Random(part)
    more = [f"trainer.max_epochs={KILLS // 2}", "checkpoint.every_n_steps=1", "resume=auto"]
    done = command(*train_words(sets[0], tmp_path / "straight", *more))
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    for number in range(KILLS):
        if draw.random() < 0.3:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        proxy.rate = 20_000
        kind = FAULTS[(number + part) % len(FAULTS)]
        most = remote.TRIES if kind == "wrong" else 6  # bytes that stay wrong are a broken image
        proxy.set(kind, "shard", draw.randrange(1, most))
        enough, moment, began = rows(killed) + 1, draw.uniform(0, 0.3), list[float]()

        def due(enough: int = enough, moment: float = moment, began: list[float] = began) -> bool:
            if not began and rows(killed) >= enough:
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] > moment

        words = train_words(sets[1], killed, *more, f"data.num_workers={draw.choice([0, 1, 2])}")
        done = command(*words, watch=kill_when(due))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    proxy.set("")
    done = command(*train_words(sets[1], killed, *more))
    assert done.returncode == 0, done.stderr
    assert difference(tmp_path / "straight", killed) is None
