"""The loader's processes under several ranks: forked from a server of their own, and gone when their rank is."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from alexlab.data import workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers start the platform's own way elsewhere")

RANK = """
import os, signal, sys
from pathlib import Path
from torch.utils.data import DataLoader
from alexlab.data import workers
from alexlab.data.dataset import ImageDataset, collate
from alexlab.data.index import scan
from alexlab.data.transforms import SampleTransform

if __name__ == "__main__":
    data = ImageDataset(scan(Path(sys.argv[1]) / "train"), SampleTransform(64, "center", crop_ratio=0.875), seed=0)
    loader = DataLoader(
        data, batch_sampler=[[(0, 0), (1, 0)]] * 3, num_workers=2, collate_fn=collate, persistent_workers=True,
        worker_init_fn=workers.start_worker, multiprocessing_context=workers.context(int(sys.argv[2])),
    )
    batches = iter(loader)
    images, _, _ = next(batches)
    print(tuple(images.shape), *[worker.pid for worker in batches._workers], flush=True)
    sys.stdin.readline()
    print(len(list(batches)), flush=True)
"""


def start_rank(shapes: Path, tmp_path: Path, ranks: int) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A process with two workers that have given a batch; it gives the others after a line to it."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen(
        [sys.executable, str(script), str(shapes), str(ranks)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert rank.stdout is not None
    shape, pids = rank.stdout.readline().split(")")
    assert shape == "(2, 3, 64, 64"
    return rank, [psutil.Process(int(pid)) for pid in pids.split()]


def held_back(pid: int, number: int) -> bool:
    """Whether a process blocks or ignores a signal (proc(5): masks of bits from signal 1 on)."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool((int(status["SigBlk"], 16) | int(status["SigIgn"], 16)) >> (number - 1) & 1)


@linux
def test_workers_are_no_forks_of_a_rank_with_others(shapes: Path, tmp_path: Path) -> None:
    """gdb showed where such a fork had waited: in _PyThreadState_DeleteExcept, for a lock of a thread that was gone."""
    for ranks, forked in ((1, True), (2, False)):
        rank, loaders = start_rank(shapes, tmp_path, ranks)
        assert [worker.ppid() == rank.pid for worker in loaders] == [forked, forked]
        rank.communicate("\n", timeout=60)
        assert rank.returncode == 0
        psutil.wait_procs(loaders, timeout=60)
        assert not any(worker.is_running() for worker in loaders)


@linux
@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_end_when_their_rank_is_killed(shapes: Path, tmp_path: Path, ranks: int) -> None:
    rank, loaders = start_rank(shapes, tmp_path, ranks)
    started = psutil.Process(rank.pid).children(recursive=True)
    assert len(started) == (2 if ranks == 1 else 4)  # with the server, and Python's own that tracks semaphores
    rank.kill()
    rank.communicate()
    _, left = psutil.wait_procs([*started, *loaders], timeout=60)
    assert left == []


@linux
def test_a_signal_to_all_leaves_the_answer_to_the_rank(shapes: Path, tmp_path: Path) -> None:
    rank, loaders = start_rank(shapes, tmp_path, 2)
    for process in psutil.Process(rank.pid).children(recursive=True):
        for number in workers.ENDING:
            assert held_back(process.pid, number), process.cmdline()
            process.send_signal(number)
    told, _ = rank.communicate("\n", timeout=60)
    assert (rank.returncode, told) == (0, "2\n")
    psutil.wait_procs(loaders, timeout=60)
    assert not any(worker.is_running() for worker in loaders)


def test_starting_a_server_leaves_the_signals_of_the_rank_alone() -> None:
    code = """
import signal
from alexlab.data import workers
workers.start_server()
workers.start_server()
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
    assert done.stderr == ""
