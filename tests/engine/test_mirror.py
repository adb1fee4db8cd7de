"""Copies of runs in a bucket of a real S3 server: each moment of them can be resumed, and one machine trains a run."""

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import wait_for
from s3_server import Faults

from alexlab.engine import mirror, storage
from alexlab.engine.checkpoint_io import AtomicCheckpointIO, read_sums
from alexlab.engine.errors import UserError
from alexlab.engine.files import RANK_LOCK, lock
from alexlab.engine.mirror import Mirror, download_named, download_run, download_tables, upload
from alexlab.engine.resume import newest_checkpoint
from alexlab.engine.schema import PathsConfig
from alexlab.engine.storage import Bucket


@pytest.fixture
def paths(proxy: Faults, tmp_path: Path) -> PathsConfig:
    return machine(f"s3://tests/{uuid.uuid4().hex}/logs", tmp_path / "one")


def machine(logs: str, scratch: Path) -> PathsConfig:
    return PathsConfig(data="data", logs=logs, scratch=str(scratch))


def started(paths: PathsConfig, is_new: bool = True) -> tuple[Mirror, AtomicCheckpointIO, Path]:
    """A run that can write checkpoints, which are copied."""
    run_dir = paths.local / "train/runs/a"
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("seed: 0\n")
    copying = Mirror(paths, run_dir, patience=20)
    copying.hold(None, False, is_new)
    copying.start()
    writer = AtomicCheckpointIO()
    writer.after = copying.checkpoint_written
    return copying, writer, run_dir


def elsewhere(paths: PathsConfig, scratch: Path) -> tuple[Path, list[str]]:
    """Download the run to another machine. Return the checkpoint that would be resumed, and what is said about it."""
    other = machine(paths.logs, scratch)
    download_run(other, other.local / "train/runs/a")
    path, notes = newest_checkpoint(other.local / "train/runs/a/checkpoints")
    assert path is not None
    return path, notes


def write(writer: AtomicCheckpointIO, run_dir: Path, number: int, name: str = "last.ckpt") -> None:
    with (run_dir / "metrics.csv").open("a") as file:
        file.write(f"{number}\n")
    writer.save_checkpoint({"number": torch.full((1000,), float(number))}, run_dir / "checkpoints" / name)


def number_in(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["number"][0])


def test_a_run_is_whole_on_another_machine(paths: PathsConfig, tmp_path: Path) -> None:
    copying, writer, run_dir = started(paths)
    for number in range(3):
        write(writer, run_dir, number)
    write(writer, run_dir, 7, "best.ckpt")
    (run_dir / "summary.json").write_text("{}")
    (run_dir / "figures").mkdir()
    (run_dir / "figures/a.png").write_bytes(b"png")
    (run_dir / ".lock").touch()
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb/x").touch()
    copying.finish()
    there = Bucket(f"{paths.logs}/train/runs/a").list()
    assert {*there} == {
        "config.yaml", "metrics.csv", "summary.json", "figures/a.png", "checkpoints/SHA256SUMS",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt",
    } | ({"checkpoints/previous.ckpt"} & {*there})  # fmt: skip
    assert [path.name for path in (run_dir / "checkpoints").glob(".*")] == [".sent"]

    found, notes = elsewhere(paths, tmp_path / "two")
    assert (found.name, number_in(found), notes) == ("last.ckpt", 2, [])
    assert number_in(found.with_name("best.ckpt")) == 7
    assert found.parents[1].joinpath("metrics.csv").read_text() == "0\n1\n2\n7\n"
    assert not list(found.parent.glob("*.tmp"))


def test_a_file_that_is_removed_is_removed_in_the_bucket(paths: PathsConfig) -> None:
    """A resumed run has no summary.json, which would say that it is finished."""
    copying, writer, run_dir = started(paths)
    (run_dir / "summary.json").write_text("{}")
    write(writer, run_dir, 1)
    copying.finish()
    assert "summary.json" in copying.bucket.list()
    copying, writer, run_dir = started(paths, is_new=False)
    (run_dir / "summary.json").rename(run_dir / "summary.before.json")
    write(writer, run_dir, 2)
    wait_for(lambda: "summary.json" not in copying.bucket.list())
    copying.finish()
    assert "summary.before.json" in copying.bucket.list()


def test_what_is_newer_is_kept(paths: PathsConfig, tmp_path: Path) -> None:
    """Of this machine after a copy that lags behind, and of the bucket after another machine has trained."""
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    copying.finish()
    AtomicCheckpointIO().save_checkpoint({"number": torch.ones(3) * 2}, run_dir / "checkpoints/last.ckpt")
    download_run(paths, run_dir)
    assert number_in(run_dir / "checkpoints/last.ckpt") == 2

    other = machine(paths.logs, tmp_path / "two")
    download_run(other, other.local / "train/runs/a")
    copying, writer, there = started(other, is_new=False)
    for number in range(3, 9):
        write(writer, there, number)
        wait_for(lambda: not copying._pending)
    copying.finish()
    download_run(paths, run_dir)
    assert number_in(run_dir / "checkpoints/last.ckpt") == 8
    assert (run_dir / "metrics.csv").read_text() == "1\n3\n4\n5\n6\n7\n8\n"


def test_what_a_command_writes_on_another_machine_comes_to_the_one_that_trained(
    paths: PathsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    (run_dir / "figures").mkdir()
    for name in ("summary.json", "figures/filters.png", "figures/same.png", "eval.json"):
        (run_dir / name).write_text("first")
        os.utime(run_dir / name, (1e9, 1e9))  # servers have times in whole seconds
    copying.finish()
    other = machine(paths.logs, tmp_path / "two")
    there = other.local / "train/runs/a"
    download_run(other, there)
    (there / "figures/same.png").write_text("equal")
    names = ["summary.json", "figures/filters.png", "figures/new.png", "eval.json", "report.html", "secret"]
    for name in names:
        (there / name).write_text("second")
    upload(other, there, [there / name for name in [*names[:-1], "figures/same.png"]] + [tmp_path / "outside"])
    assert "secret" not in copying.bucket.list()
    capsys.readouterr()

    download_run(paths, run_dir)
    assert {name: (run_dir / name).read_text() for name in names[:-1]} == {
        "summary.json": "first",  # of the training, as this machine has written it
        "figures/filters.png": "second",
        "figures/new.png": "second",
        "eval.json": "second",
        "report.html": "second",
    }
    assert (run_dir / "figures/same.png").read_text() == "first", "of the same size: as the training has drawn it"
    assert f"downloading {copying.bucket.address} to {run_dir} ..." in capsys.readouterr().err
    download_run(paths, run_dir)
    download_run(other, there)
    assert capsys.readouterr().err == ""
    (run_dir / "eval.json").write_text("third")
    download_run(paths, run_dir)
    assert (run_dir / "eval.json").read_text() == "third"
    (there / "eval.json").write_text("fourth")  # on a machine that has not trained the run
    download_run(other, there)
    assert (there / "eval.json").read_text() == "fourth"


def test_a_result_that_cannot_be_copied_is_a_warning(
    paths: PathsConfig, proxy: Faults, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    copying.finish()
    (run_dir / "eval.json").touch()
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    proxy.set("503")
    upload(paths, run_dir, [run_dir / "eval.json"])
    proxy.set("")
    assert "warning: what was written stays on this machine: s3://tests/" in capsys.readouterr().err
    assert "eval.json" not in copying.bucket.list()


def test_what_a_command_writes_stays_here_if_the_bucket_has_no_such_run(paths: PathsConfig, tmp_path: Path) -> None:
    for run_dir in (paths.local / "train/runs/b", tmp_path / "b"):
        run_dir.mkdir(parents=True)
        (run_dir / "eval.json").touch()
        upload(paths, run_dir, [run_dir / "eval.json"])
    upload(PathsConfig(data="data", logs=str(tmp_path), scratch=str(tmp_path)), run_dir, [run_dir / "eval.json"])
    assert Bucket(paths.logs).list() == {}


def test_each_moment_of_a_copy_can_be_resumed(
    paths: PathsConfig, tmp_path: Path, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine dies after each of the requests that replace checkpoints: another one finds the new or the old one."""
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 0)
    wait_for(lambda: "checkpoints/last.ckpt" in copying.bucket.list() and not copying._pending)
    copying.finish()

    class Died(BaseException):
        pass

    found = []
    for after in range(1, 8):
        again = Mirror(paths, run_dir, 20)
        again._listed = mirror.sums_in(again.bucket)
        requests: list[str] = []

        def dies(kind: str, call: Callable[..., None], requests: list[str], after: int) -> Callable[..., None]:
            def ask(*given: object) -> None:
                call(*given)
                requests.append(f"{kind} {given[0]}")
                if len(requests) == after:
                    raise Died

            return ask

        for kind in ("write", "copy"):
            monkeypatch.setattr(again.bucket, kind, dies(kind, getattr(again.bucket, kind), requests, after))
        writer.after = None
        write(writer, run_dir, after)
        again.checkpoint_written(run_dir / "checkpoints/last.ckpt")
        with contextlib.suppress(Died):
            again._copy()
        path, _ = elsewhere(paths, tmp_path / f"after{after}")
        number = number_in(path)
        rows = path.parents[1].joinpath("metrics.csv").read_text().split()
        assert str(number) in rows, "metrics are never older than the checkpoint"
        found.append((len(requests), number))
    assert [number for _, number in found][-1] == 7, "the whole copy has fewer requests"
    assert any(number < after for after, (_, number) in enumerate(found, 1)), "some died before the new one was there"


def test_copying_goes_on_after_faults_and_training_does_not_wait(paths: PathsConfig, proxy: Faults) -> None:
    copying, writer, run_dir = started(paths)
    proxy.set("503", "", 4)
    started_at = time.monotonic()
    for number in range(5):
        write(writer, run_dir, number)
    assert time.monotonic() - started_at < 5
    copying.finish()
    held = Bucket(f"{paths.logs}/train/runs/a").read("checkpoints/last.ckpt")
    assert hashlib.sha256(held).hexdigest() == read_sums(run_dir / "checkpoints")["last.ckpt"][-1]


def test_a_server_that_is_gone_ends_the_run_and_names_what_is_whole(
    paths: PathsConfig, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, writer, run_dir = started(paths)
    copying.bucket.patience = 1
    proxy.set("500")
    write(writer, run_dir, 1)
    with pytest.raises(
        UserError, match=r"is incomplete: .* no success for 1 seconds: 500 .* This machine has it all: .*/trai"
    ):
        copying.finish()
    with pytest.raises(UserError, match="This machine has it all"):
        write(writer, run_dir, 2)


def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_one(
    paths: PathsConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    wait_for(lambda: copying._listed.get("last.ckpt"))
    write(writer, run_dir, 2)
    copying.finish()
    bucket = Bucket(f"{paths.logs}/train/runs/a")
    bucket.write("checkpoints/last.ckpt", b"something else")
    path, notes = elsewhere(paths, tmp_path / "two")
    assert (path.name, number_in(path), notes) == ("previous.ckpt", 1, [])
    assert "checkpoints/last.ckpt is damaged, and was not downloaded" in capfd.readouterr().err
    bucket.write("checkpoints/previous.ckpt", b"something else")
    last = machine(paths.logs, tmp_path / "three")
    with pytest.raises(UserError, match=r"last.ckpt, .*previous.ckpt: the SHA-256 is not the one in SHA256SUMS, so"):
        download_run(last, last.local / "train/runs/a")


def test_one_machine_trains_a_run(
    paths: PathsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "SILENT", 3.0)
    monkeypatch.setattr(mirror, "EVERY", 0.5)
    copying, _, run_dir = started(paths)
    bucket = Bucket(f"{paths.logs}/train/runs/a")
    wait_for(lambda: "config.yaml" in bucket.list())
    with pytest.raises(
        UserError, match=r"s3://tests/.*/train/runs/a holds a run already: choose another hydra.run.dir"
    ):
        Mirror(machine(paths.logs, tmp_path / "x"), tmp_path / "x" / run_dir.relative_to(tmp_path / "one"), 20).hold(
            None, False, True
        )
    mine = json.loads(bucket.read(mirror.OWNER))
    assert mine == {"host": os.uname().nodename, "process": os.getpid(), "job": None}
    copying.owner |= {"host": "elsewhere", "process": 7, "job": "j1"}
    wait_for(lambda: json.loads(bucket.read(mirror.OWNER))["host"] == "elsewhere")
    with pytest.raises(
        UserError, match=r"is still training on elsewhere \(process 7\): wait for it.*resume.break_lock=tr"
    ):
        Mirror(paths, run_dir, 20).hold(None, False, False)
    assert "was trained on elsewhere: waiting up to 3 seconds" in capfd.readouterr().err
    copying.finish()
    assert mirror.OWNER not in bucket.list()

    gone = json.dumps({"host": "elsewhere", "process": 7, "job": "j1"}).encode()
    monkeypatch.setattr(mirror, "SILENT", 600.0)
    for job, breaks in (("j1", False), (None, True)):  # the same job, or on demand: at once
        bucket.write(mirror.OWNER, gone)
        taken = Mirror(paths, run_dir, 20)
        taken.hold(job, breaks, False)
        taken.finish()
    monkeypatch.setattr(mirror, "SILENT", 3.0)  # an owner that was killed
    bucket.write(mirror.OWNER, gone)
    taken = Mirror(paths, run_dir, 20)
    taken.hold(None, False, False)
    taken.start()
    bucket.write(mirror.OWNER, gone)  # another one that takes it over all the same
    wait_for(lambda: taken.error)
    with pytest.raises(
        UserError, match=r"was taken over by another machine: this one stops. This machine has it all: /"
    ):
        taken.finish()


def test_one_of_several_machines_takes_a_run_over(paths: PathsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SILENT", 2.0)
    monkeypatch.setattr(mirror, "EVERY", 0.3)
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    copying.finish()
    bucket = Bucket(f"{paths.logs}/train/runs/a")
    bucket.write(mirror.OWNER, json.dumps({"host": "elsewhere", "process": 7, "job": None}).encode())
    held, refused = list[Mirror](), list[UserError]()

    def take(number: int) -> None:
        one = Mirror(paths, run_dir, 20)
        one.owner["host"] = f"machine{number}"
        try:
            one.hold(None, False, False)
            held.append(one)
            one._threads[1].start()
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 2)
    assert all("is still training on machine" in str(error) for error in refused)
    held[0]._release()


def test_a_run_that_another_machine_continued_meanwhile_is_downloaded_again_first(
    paths: PathsConfig, tmp_path: Path
) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    copying.finish()
    other = machine(paths.logs, tmp_path / "two")
    there = other.local / "train/runs/a"
    download_run(other, there)
    copying, writer, run_dir = started(paths, is_new=False)
    write(writer, run_dir, 2)
    copying.finish()
    with pytest.raises(UserError, match="was continued on another machine while this one waited: give the same comm"):
        Mirror(other, there, 20).hold(None, False, False)
    assert mirror.OWNER not in copying.bucket.list()
    download_run(other, there)
    Mirror(other, there, 20).hold(None, False, False)


def test_kills_in_copies_one_after_the_other_leave_a_whole_checkpoint(
    paths: PathsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process sends the new hashes, and dies before the file has arrived."""
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 0)
    copying.finish()
    for number in range(1, 5):
        dying = Mirror(paths, run_dir, 20)
        dying.hold(None, False, False)
        writer.after = None
        write(writer, run_dir, number)
        dying._keep(run_dir / "checkpoints/last.ckpt")
        put = dying.bucket.write

        def dies(name: str, content: object, put: Callable[..., None] = put) -> None:
            if name == "checkpoints/last.ckpt":
                raise ConnectionError
            put(name, content)

        monkeypatch.setattr(dying.bucket, "write", dies)
        with pytest.raises(ConnectionError):
            dying._copy()
        path, _ = elsewhere(paths, tmp_path / f"after{number}")
        assert number_in(path) == 0


def test_a_run_whose_first_checkpoint_never_arrived_starts_on_another_machine(
    paths: PathsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket lists the hash of a file that it does not have. The first machine, once it is back, sends the file."""
    dying, writer, run_dir = started(paths)
    put = dying.bucket.write

    def dies(name: str, content: object) -> None:
        if name == "checkpoints/last.ckpt":
            raise ConnectionError
        put(name, content)  # type: ignore[arg-type]

    monkeypatch.setattr(dying.bucket, "write", dies)
    write(writer, run_dir, 1)
    with pytest.raises(UserError, match="ConnectionError"):
        dying.finish()
    objects = Bucket(f"{paths.logs}/train/runs/a").list()
    assert "checkpoints/SHA256SUMS" in objects
    assert "checkpoints/last.ckpt" not in objects
    other = machine(paths.logs, tmp_path / "two")
    there = other.local / "train/runs/a"
    download_run(other, there)
    one = Mirror(other, there, 20)
    one.hold(None, False, False)
    one.finish()

    again, _, _ = started(paths, is_new=False)
    again.finish()
    held = Bucket(f"{paths.logs}/train/runs/a").read("checkpoints/last.ckpt")
    assert hashlib.sha256(held).hexdigest() == read_sums(run_dir / "checkpoints")["last.ckpt"][-1]


def test_what_a_killed_process_did_not_copy_is_copied_by_the_next_one(paths: PathsConfig) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    write(writer, run_dir, 1, "best.ckpt")
    copying.finish()
    for name in ("best.ckpt", "last.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"number": torch.ones(3) * 2}, run_dir / "checkpoints" / name)
    again, _, _ = started(paths, is_new=False)
    again.finish()
    for name in ("best.ckpt", "last.ckpt"):
        held = Bucket(f"{paths.logs}/train/runs/a").read(f"checkpoints/{name}")
        assert hashlib.sha256(held).hexdigest() == read_sums(run_dir / "checkpoints")[name][-1]


def test_other_objects_below_the_address_stay(paths: PathsConfig) -> None:
    bucket = Bucket(f"{paths.logs}/train/runs/a")
    for name in ("seed1/config.yaml", "notes.txt", "checkpoints/mine.ckpt"):
        bucket.write(name, b"mine")
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    copying.finish()
    assert {"seed1/config.yaml", "notes.txt", "checkpoints/mine.ckpt", "config.yaml"} <= {*bucket.list()}


def test_a_file_that_cannot_be_copied_ends_the_run_with_the_reason(
    paths: PathsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, writer, run_dir = started(paths)

    def fails(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(copying.bucket, "write", fails)
    with contextlib.suppress(UserError):
        write(writer, run_dir, 1)
    with pytest.raises(
        UserError, match=r"The copy of the run in .* is incomplete: MemoryError: no memory. This machine ha"
    ):
        copying.finish()


def test_names_and_tables_are_downloaded(paths: PathsConfig, tmp_path: Path, proxy: Faults) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1, "best.ckpt")
    copying.finish()
    for named in ("a", "latest"):
        other = machine(paths.logs, tmp_path / f"of-{named}")
        download_named(other, named, "best")
        assert number_in(other.local / "train/runs/a/checkpoints/best.ckpt") == 1
    other = machine(paths.logs, tmp_path / "tables")
    download_named(other, "unknown")
    download_tables(other, False)
    assert {path.name for path in other.local.rglob("*") if path.is_file()} == {
        "config.yaml", "metrics.csv",
    }  # fmt: skip
    proxy.seen.clear()
    download_tables(other, False)
    assert [path for method, path in proxy.seen if "list-type" not in path] == [], "nothing has changed"


def test_a_run_elsewhere_cannot_be_copied(paths: PathsConfig, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"`hydra.run.dir=.*/b` must be below .*/one/s3/tests/\w+/logs, from where runs"
    ):
        Mirror(paths, tmp_path / "b", 20)


def test_folders_are_no_buckets(tmp_path: Path) -> None:
    here = PathsConfig(data="data", logs=str(tmp_path))
    download_run(here, tmp_path / "train/runs/a")
    download_named(here, "a")
    download_tables(here, True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_this_machine_trains_is_not_touched(paths: PathsConfig, tmp_path: Path) -> None:
    copying, writer, run_dir = started(paths)
    write(writer, run_dir, 1)
    copying.finish()
    other = machine(paths.logs, tmp_path / "two")
    there = other.local / "train/runs/a"
    there.mkdir(parents=True)
    (there / "metrics.csv").write_text("mine\n")
    with lock(there, RANK_LOCK):
        download_run(other, there)
        download_named(other, "latest")
        download_tables(other, True)
        assert sorted(path.name for path in there.iterdir()) == [RANK_LOCK, "metrics.csv"]
        assert (there / "metrics.csv").read_text() == "mine\n"
    download_run(other, there)
    assert (there / "metrics.csv").read_text() == "1\n"
