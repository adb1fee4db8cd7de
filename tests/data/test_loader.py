"""Batches by threads: the same as without threads, in order; and threads that end in time."""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from torch.utils.data import Sampler

from alexlab.data import decode
from alexlab.data.dataset import Batch, ImageDataset
from alexlab.data.folder import ImageIndex, scan
from alexlab.data.loader import AHEAD, Loader
from alexlab.data.sampler import EvalBatchSampler, Key, TrainBatchSampler
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

COUNT = 60


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """JPEGs of several sizes and a few PNGs, one per class."""
    root = tmp_path_factory.mktemp("loader")
    for i in range(COUNT):
        photo(root / f"{i:02d}" / f"x.{'png' if i % 9 == 0 else 'jpg'}", (70 + 9 * i, 50 + 5 * i), seed=i)
    return scan(root)


def loader(index: ImageIndex, workers: int, batch: int = 7, world_size: int = 1, rank: int = 0) -> Loader:
    transform = SampleTransform(40, "random_resized", flip=0.5, policy="trivial")
    return Loader(ImageDataset(index, transform, 3), TrainBatchSampler(len(index), batch, 3, rank, world_size), workers)


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.skipped == b.skipped
        for a, b in zip(one, two, strict=True)
    )


# -- the same batches


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_drawn_twice_in_an_epoch_is_cropped_twice(index: ImageIndex, workers: int) -> None:
    class Twice(Sampler[list[Key]]):
        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[list[Key]]:
            return iter([[(3, 1), (3 + COUNT, 1), (3, 1), (3 + 2 * COUNT, 1)]])

    dataset = ImageDataset(index, SampleTransform(40, "random_resized", flip=0.5), 3)
    (batch,) = Loader(dataset, Twice(), workers)
    first, second, again, third = batch.images
    assert batch.targets.tolist() == [3] * 4
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_batches_do_not_depend_on_the_number_of_threads(index: ImageIndex, workers: int) -> None:
    alone, threaded = loader(index, 0), loader(index, workers)
    for epoch in (0, 1):
        for each in (alone, threaded):
            each.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(threaded)
        assert len(batches) == len(threaded) == COUNT // 7
        assert same(list(alone), batches)
        assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
        assert (batches[0].images.dtype, batches[0].images.shape) == (torch.uint8, (7, 3, 40, 40))


def test_the_ranks_of_a_step_together_have_the_images_that_one_rank_would(index: ImageIndex) -> None:
    whole = list(loader(index, 0, batch=12))
    for world_size in (2, 3, 4):
        ranks = [list(loader(index, 2, 12, world_size, rank)) for rank in range(world_size)]
        together = [
            Batch(torch.cat([b.images for b in step]), torch.cat([b.targets for b in step]), {})
            for step in zip(*ranks, strict=True)
        ]
        assert same(whole, together)


def test_a_late_start_reads_no_image_before_it(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    late = loader(index, 0)
    expected = [index.path(i) for i in np.random.Generator(np.random.PCG64([3, 0])).permutation(COUNT)[49:56]]
    read, opened = decode.open_picture, []
    monkeypatch.setattr(decode, "open_picture", lambda path: (opened.append(path), read(path))[1])
    late.batch_sampler.resume_at = (0, 7)  # type: ignore[attr-defined]
    assert len(list(late)) == 1
    assert opened == expected


class CountingSampler(Sampler[list[Key]]):
    """Counts the batches that were asked for."""

    def __init__(self, batches: int, size: int) -> None:
        self.batches, self.size, self.asked = batches, size, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        for _ in range(self.batches):
            self.asked += 1
            yield [(i, 0) for i in range(self.size)]


def test_only_a_few_batches_are_begun_ahead(index: ImageIndex) -> None:
    data = ImageDataset(index, SampleTransform(16), 0)
    for workers, ahead in ((2, AHEAD + 1), (0, 1)):
        sampler = CountingSampler(30, 8)
        batches = iter(Loader(data, sampler, workers))
        assert sampler.asked == 0
        next(batches)
        assert sampler.asked == ahead
        next(batches)
        assert sampler.asked == ahead + 1
    sampler = CountingSampler(30, 1)
    next(iter(Loader(data, sampler, 5)))
    assert sampler.asked == 4 * 5, "enough small batches to keep all threads busy"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_in_inference_mode(index: ImageIndex, workers: int) -> None:
    """As in an evaluation; with crops of a resized image, and mirrored ones."""
    data = ImageDataset(index, SampleTransform(24, flip=0.5), 0)
    plain = list(Loader(data, EvalBatchSampler(20, 8), workers))
    with torch.inference_mode():
        assert same(plain, list(Loader(data, EvalBatchSampler(20, 8), workers)))


# -- the threads


def test_threads_do_not_change_torchs_number_of_threads(index: ImageIndex) -> None:
    before = torch.get_num_threads()
    numbers: list[int] = []
    each = loader(index, 3)
    list(each)
    assert each._threads is not None
    assert [each._threads.submit(torch.get_num_threads).result() for _ in range(9)] == [1] * 9
    thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), numbers) == (before, [before])


def test_a_broken_image_ends_the_pass_and_unused_threads_end(tmp_path: Path) -> None:
    for i in range(20):
        photo(tmp_path / "c" / f"{i:02d}.jpg", seed=i)
    (tmp_path / "c/13.jpg").write_bytes(b"none")
    for workers in (0, 2):
        raising = Loader(ImageDataset(scan(tmp_path), SampleTransform(16), 0), EvalBatchSampler(20, 4), workers)
        with pytest.raises(decode.BrokenImageError, match=r"13.jpg cannot be read as an image"):
            list(raising)
        skipping = ImageDataset(scan(tmp_path), SampleTransform(16), 0, "skip")
        batches = list(Loader(skipping, EvalBatchSampler(20, 4), workers))
        assert [len(batch.images) for batch in batches] == [4, 4, 4, 3, 4]
        assert list(batches[3].skipped) == [str(tmp_path / "c/13.jpg")]
    assert raising._threads is not None
    threads = raising._threads._readers
    del raising
    gc.collect()  # the error refers to frames, and they to the loader
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_threads_that_cannot_start_are_reported(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the threads that could start do not wait for the others forever."""
    start, started = threading.Thread.start, []

    def start_three(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_three)
    with pytest.raises(UserError, match=r"num_workers=5: the system starts no more threads \(can't start new thread\)"):
        next(iter(loader(index, 5)))
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), RuntimeError("x")])
def test_an_error_in_a_thread_names_the_file(error: Exception, index: ImageIndex) -> None:
    class Failing(SampleTransform):
        def write(self, *args: object) -> None:
            raise error

    with pytest.raises(type(error)) as raised:
        next(iter(Loader(ImageDataset(index, Failing(32), 0), [[(3, 0)]], 1)))  # type: ignore[arg-type]
    assert raised.value.__notes__ == [f"while {index.root}/03/x.jpg was read"]


# -- disks that hang, and programs that end

IMPORTS = """
import atexit, itertools, sys, threading
from pathlib import Path

steps = itertools.count()
atexit.register(lambda: print(next(steps)))  # called last, as it is registered first
from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import scan
from alexlab.data.loader import Loader
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError
from alexlab.engine.process import leave
"""

HANGING = """
class Stuck(SampleTransform):
    def write(self, *args):
        threading.Event().wait(600)  # a network file system that has gone

data = ImageDataset(scan(Path(sys.argv[1])), Stuck(32), 0)
try:
    next(iter(Loader(data, [[(3, 0), (4, 0)]], 2, timeout=0.2)))
except UserError as error:
    print(error)
    leave(2) if sys.argv[2] == "leave" else sys.exit(2)
"""

ENDING = """
class Counting(SampleTransform):
    def write(self, *args):
        next(steps)
        return super().write(*args)

data = ImageDataset(scan(Path(sys.argv[1])), Counting(512), 0)
batches = iter(Loader(data, [[(i % 60, 0) for i in range(900)]] * 50, 2))
next(batches)
print(next(steps), flush=True)
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", IMPORTS + code, *words]
    return subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("way", ["leave", "exit"])
def test_a_disk_that_hangs_is_reported_with_the_files_and_the_program_ends(index: ImageIndex, way: str) -> None:
    done = run(HANGING, str(index.root), way)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("no image arrived for 0.2 s, and these are still being read: ")
    assert "/03/x.jpg" in done.stdout


def test_a_program_that_ends_does_not_wait_for_images_that_were_queued(index: ImageIndex) -> None:
    """3,600 images are begun ahead; each of the two threads finishes only the image that it is decoding."""
    done = run(ENDING, str(index.root))
    before, after = map(int, done.stdout.split())
    assert after - before <= 40, "with what is decoded between the count and the end"
    assert (done.returncode, done.stderr) == (0, "")
