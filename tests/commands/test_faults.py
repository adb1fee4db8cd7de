"""Processes that are really killed: runs, ranks, and writers of checkpoints.

`make faults` does the same with larger numbers: ALEXLAB_FAULTS multiplies them.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY, command, summary_of
from resuming import difference, rows_of

from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine.files import remove_temporary

TIMES = int(os.environ.get("ALEXLAB_FAULTS", "1"))
WORDS = [*TINY, "data=folder", "data.batch_size=8", "data.image_size=32", "trainer.max_epochs=2"]
WORDS += ["trainer.log_every_n_steps=1", "callbacks.progress=none", "callbacks.model_summary=0"]


def kill_when(due: Callable[[], bool], number: int = signal.SIGKILL) -> Callable[[int], None]:
    """For `command`: kills it and what it has started, once."""
    done: list[int] = []

    def watch(pid: int) -> None:
        if done or not due():
            return
        done.append(pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                process.send_signal(number)

    return watch


def rows(run_dir: Path) -> int:
    path = run_dir / "metrics.csv"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


KILLS = 9  # of each of these runs


@pytest.mark.parametrize("part", range(2 if TIMES == 1 else 5 * TIMES))
def test_kills_at_random_with_other_numbers_of_threads(part: int, shapes: Path, tmp_path: Path) -> None:
    """Each run is killed nine times: some lines of metrics.csv after the last kill, and up to 50 ms later.

    That is in a step, in a validation, or while a checkpoint is written.
    """
    draw = random.Random(part)
    every = f"checkpoint.every_n_steps={draw.choice([1, 2, 3])}"
    words = ["train.py", *WORDS, f"data.root={shapes}", every, "trainer.max_epochs=7"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = command(*words, f"hydra.run.dir={straight}")
    assert done.returncode == 0, done.stderr
    for _ in range(KILLS):
        enough, moment, began = rows(killed) + draw.randint(1, 6), draw.uniform(0, 0.05), list[float]()

        def due(enough: int = enough, moment: float = moment, began: list[float] = began) -> bool:
            if not began and rows(killed) >= enough:
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] > moment

        more = [f"data.num_workers={draw.choice([0, 1, 2])}", "resume=auto", f"hydra.run.dir={killed}"]
        done = command(*words, *more, watch=kill_when(due))
        assert done.returncode == -signal.SIGKILL, f"it was not killed: {done.stderr}"
    done = command(*words, "resume=auto", f"hydra.run.dir={killed}")
    assert done.returncode == 0, done.stderr
    assert difference(straight, killed) is None


@pytest.mark.parametrize("how", ["kill", "signal"])
def test_two_ranks_resume_and_one_rank_resumes_their_run(how: str, shapes: Path, tmp_path: Path) -> None:
    """Bit for bit as two, each with its own statistics of BatchNorm; as one, without BatchNorm, equal to rounding."""
    net = [] if how == "kill" else ["model=alexnet", "model.name=alexnet", "+model.net.hidden=[16,16]"]
    net += [] if how == "kill" else ["model.net.dropout=0", "data.image_size=64"]
    words = ["train.py", *WORDS, f"data.root={shapes}", "trainer=ddp_cpu", "checkpoint.every_n_steps=1"]
    words += ["augment=basic", "trainer.precision=32-true", *net]
    straight, ended = tmp_path / "straight", tmp_path / "ended"
    done = command(*words, f"hydra.run.dir={straight}")
    assert done.returncode == 0, done.stderr
    number = signal.SIGKILL if how == "kill" else signal.SIGTERM
    done = command(*words, f"hydra.run.dir={ended}", watch=kill_when(lambda: rows(ended) > 5, number))
    assert done.returncode == (143 if how == "signal" else done.returncode)
    assert done.returncode != 0
    if how == "signal":
        assert summary_of(ended)["status"] == "preempted"
    alone = shutil.copytree(ended, tmp_path / "alone")
    done = command(*words, "resume=auto", f"hydra.run.dir={ended}")
    assert done.returncode == 0, done.stderr
    assert difference(straight, ended) is None
    done = command("train.py", f"resume={alone}", "trainer.devices=1", "resume.allow_changes=true")
    assert done.returncode == 0, done.stderr
    one, two = (summary_of(run_dir) for run_dir in (alone, straight))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert [part["world_size"] for part in one["world_sizes"]] == [2, 1]
    assert "world_sizes" not in two
    if how == "signal":
        assert one["last"] == pytest.approx(two["last"], rel=1e-3)


def test_kills_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TMPDIR on another file system, from where a move is a copy. The newest file is always complete, and at most
    one write old."""
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    folder = tmp_path / "checkpoints"
    draw = random.Random(0)
    last = 0
    for _ in range(100 * TIMES):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # writes one after the other, and reports each
            try:
                for n in range(last + 1, last + 10_000):
                    state = {"n": torch.full((20_000,), n), "state_dict": {}, "alexlab": {}}  # too few for OpenMP
                    checkpoint.AtomicCheckpointIO().save_checkpoint(state, folder / "last.ckpt")
                    os.write(writing, n.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(writing)
        os.read(reading, 4)  # it has begun
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written = b""
        while part := os.read(reading, 65536):
            written += part
        os.close(reading)
        last = max(last + 1, int.from_bytes(written[-4:], "little") if written else 0)
        remove_temporary(folder)
        path = folder / "last.ckpt"
        assert checkpoint.damage_of(path) is None
        saved = torch.load(path, weights_only=True)["n"]
        assert (saved == saved[0]).all()
        assert int(saved[0]) in (last, last + 1)
        last = int(saved[0])
        previous = folder / "previous.ckpt"
        if previous.is_file():
            assert checkpoint.damage_of(previous) is None
        assert {each.name for each in folder.iterdir()} - {"previous.ckpt"} == {"SHA256SUMS", "last.ckpt"}


@pytest.mark.parametrize("with_sums", [True, False])
def test_each_flipped_bit_and_each_cut_is_noticed(with_sums: bool, tmp_path: Path) -> None:
    """Also without SHA256SUMS, by the archive's own checksums, if the bit is part of the stored values."""
    draw = random.Random(1)
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "last.ckpt"
    checkpoint.AtomicCheckpointIO().save_checkpoint({"weights": weights, "state_dict": {}, "alexlab": {}}, path)
    if not with_sums:
        (tmp_path / checkpoint.SUMS).unlink()
    assert checkpoint.damage_of(path) is None
    whole = path.read_bytes()
    stored = whole.index(weights.numpy().tobytes())
    for _ in range(200):
        damaged = bytearray(whole)
        at = draw.randrange(len(whole)) if with_sums else stored + draw.randrange(40_000)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert checkpoint.damage_of(path) is not None
    for _ in range(100):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        assert checkpoint.damage_of(path) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_during_training_is_reported(small_disk: Path, shapes: Path) -> None:
    """The error names the file. What was written before is undamaged; once there is space, the run can be resumed."""
    run_dir, filler = small_disk / "run", small_disk / "filler"

    def fill(pid: int) -> None:
        if (run_dir / "checkpoints/previous.ckpt").is_file() and not filler.exists():
            file = os.open(filler, os.O_CREAT | os.O_WRONLY)
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, bytes(4096))
            os.close(file)

    words = ["train.py", *WORDS, f"data.root={shapes}", f"hydra.run.dir={run_dir}"]
    done = command(*words, "trainer.max_epochs=200", watch=fill)
    assert done.returncode == 2
    assert re.search(rf"error: {run_dir}/.*: no space is left on that disk: free some, or write elsewhere", done.stderr)
    assert "Traceback" not in done.stderr
    for name in ("last", "previous"):
        assert checkpoint.damage_of(run_dir / f"checkpoints/{name}.ckpt") is None
    filler.unlink()
    before = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    done = command("train.py", f"resume={run_dir}", "trainer.max_epochs=200", f"trainer.max_steps={before + 10}")
    assert done.returncode == 0, done.stderr
    steps = [int(row["step"]) for row in rows_of(run_dir) if "train/loss_step" in row]
    assert steps == list(range(before + 10)), "each once"
