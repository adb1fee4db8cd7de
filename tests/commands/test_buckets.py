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
from s3_server import SECRET, Faults, faulty_proxy, variables
from test_faults import kill_when, rows

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


@pytest.fixture
def proxy(s3: int, monkeypatch: pytest.MonkeyPatch) -> "Faults":
    with faulty_proxy(s3) as (port, faults):
        for key, value in variables(port).items():
            monkeypatch.setenv(key, value)
        yield faults  # type: ignore[misc]


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
    Bucket(address).write("val-00000.shard", b"x" * Bucket(address).list()["val-00000.shard"])
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
    """One rank brings each file to this machine, and no file has the credentials."""
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
    assert done.returncode == 2
    assert "disk_cach" in done.stderr


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
        proxy.set(FAULTS[(number + part) % len(FAULTS)], "shard", draw.randrange(1, 6))
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
