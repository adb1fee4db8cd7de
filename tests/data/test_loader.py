"""Batches by threads: the same as without, in order, and ended in time."""

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
from alexlab.data.dataset import Batch, ImageDataset, Key
from alexlab.data.folder import ImageIndex, scan
from alexlab.data.loader import AHEAD, Loader
from alexlab.data.sampler import EvalBatches, TrainBatches
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

COUNT = 60


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """JPEGs of several sizes and a few PNGs, a class each."""
    root = tmp_path_factory.mktemp("loader")
    for i in range(COUNT):
        photo(root / f"{i:02d}" / f"x.{'png' if i % 9 == 0 else 'jpg'}", (70 + 9 * i, 50 + 5 * i), seed=i)
    return scan(root)


def loader(
    index: ImageIndex, workers: int, batch: int = 7, world_size: int = 1, rank: int = 0, **more: object
) -> Loader:
    transform = SampleTransform(40, "random_resized", flip=0.5, policy="trivial")
    return Loader(
        ImageDataset(index, transform, 3, **more),
        TrainBatches(len(index), batch, 3, rank, world_size),
        workers,  # type: ignore[arg-type]
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_the_batches_do_not_depend_on_the_threads(index: ImageIndex, workers: int) -> None:
    alone, threaded = loader(index, 0), loader(index, workers)
    for epoch in (0, 1):
        for each in (alone, threaded):
            each.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found = list(threaded)
        assert len(found) == len(threaded) == COUNT // 7
        assert same(list(alone), found)
        assert found[0].images.is_contiguous(memory_format=torch.channels_last)
        assert (found[0].images.dtype, found[0].images.shape) == (torch.uint8, (7, 3, 40, 40))


def test_all_ranks_of_a_step_have_the_images_that_one_would(index: ImageIndex) -> None:
    whole = list(loader(index, 0, batch=12))
    for world_size in (2, 3, 4):
        ranks = [list(loader(index, 2, 12, world_size, rank)) for rank in range(world_size)]
        together = [
            Batch(torch.cat([b.images for b in step]), torch.cat([b.targets for b in step]), {})
            for step in zip(*ranks, strict=True)
        ]
        assert same(whole, together)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_pass_can_begin_at_any_step(index: ImageIndex, workers: int) -> None:
    whole, late = loader(index, 0), loader(index, workers)
    for each in (whole, late):
        each.batch_sampler.set_epoch(4)  # type: ignore[attr-defined]
    late.batch_sampler.begins_at = (4, 5)  # type: ignore[attr-defined]
    assert same(list(whole)[5:], list(late))
    for each in (whole, late):
        each.batch_sampler.set_epoch(5)  # type: ignore[attr-defined]
    assert same(list(whole), list(late)), "the next epoch is whole again"


def test_a_late_step_reads_nothing_before_it(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    late = loader(index, 0)
    expected = [index.path(i) for i in np.random.Generator(np.random.PCG64([3, 0])).permutation(COUNT)[49:56]]
    read, opened = decode.open_picture, []
    monkeypatch.setattr(decode, "open_picture", lambda path: (opened.append(path), read(path))[1])
    late.batch_sampler.begins_at = (0, 7)  # type: ignore[attr-defined]
    assert len(list(late)) == 1
    assert opened == expected


class Slow(Sampler[list[Key]]):
    """Counts the batches that were asked for."""

    def __init__(self, batches: int, size: int) -> None:
        self.batches, self.size, self.asked = batches, size, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        for _ in range(self.batches):
            self.asked += 1
            yield [(i, 0) for i in range(self.size)]


def test_a_few_batches_are_begun_ahead_and_no_more(index: ImageIndex) -> None:
    for workers, ahead in ((2, AHEAD + 1), (0, 1)):
        sampler = Slow(30, 8)
        batches = iter(Loader(ImageDataset(index, SampleTransform(16), 0), sampler, workers))
        assert sampler.asked == 0
        next(batches)
        assert sampler.asked == ahead
        next(batches)
        assert sampler.asked == ahead + 1
    sampler = Slow(30, 1)
    next(iter(Loader(ImageDataset(index, SampleTransform(16), 0), sampler, 5)))
    assert sampler.asked == 4 * 5, "of small batches enough to keep all threads busy"


def test_a_batch_stays_as_it_was_however_long_it_is_kept(index: ImageIndex) -> None:
    kept = [(batch, batch.images.clone()) for batch in loader(index, 3)]
    assert all(torch.equal(batch.images, then) for batch, then in kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_in_inference_mode(index: ImageIndex, workers: int) -> None:
    """As in an evaluation; with crops that are cut out of a resized picture, and mirrored ones."""
    data = ImageDataset(index, SampleTransform(24, flip=0.5), 0)
    plain = list(Loader(data, EvalBatches(20, 8), workers))
    with torch.inference_mode():
        assert same(plain, list(Loader(data, EvalBatches(20, 8), workers)))


def test_threads_leave_torchs_own_number_alone(index: ImageIndex) -> None:
    before = torch.get_num_threads()
    found: list[int] = []
    each = loader(index, 3)
    list(each)
    assert [each._pool().submit(torch.get_num_threads).result() for _ in range(9)] == [1] * 9
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), found) == (before, [before])


def test_a_broken_image_ends_the_pass_and_its_threads_go(tmp_path: Path) -> None:
    for i in range(20):
        photo(tmp_path / "c" / f"{i:02d}.jpg", seed=i)
    (tmp_path / "c/13.jpg").write_bytes(b"none")
    for workers in (0, 2):
        each = Loader(ImageDataset(scan(tmp_path), SampleTransform(16), 0), EvalBatches(20, 4), workers)
        with pytest.raises(decode.BrokenImageError, match=r"13.jpg cannot be read as an image"):
            list(each)
        skipping = Loader(ImageDataset(scan(tmp_path), SampleTransform(16), 0, "skip"), EvalBatches(20, 4), workers)
        found = list(skipping)
        assert [len(batch.images) for batch in found] == [4, 4, 4, 3, 4]
        assert list(found[3].skipped) == [str(tmp_path / "c/13.jpg")]
    threads = each._pool()._threads
    del each
    gc.collect()  # the errors hold their frames
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_threads_that_cannot_start_are_told(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that could start do not wait for the others for ever."""
    start, started = threading.Thread.start, []

    def three(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", three)
    with pytest.raises(UserError, match=r"num_workers=5: the system starts no more threads \(can't start new thread\)"):
        next(iter(loader(index, 5)))
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()


class Stuck(SampleTransform):
    """As with a network's file system that has gone."""

    def write(self, *words: object) -> None:
        threading.Event().wait(60)


def test_a_disk_that_hangs_is_told_with_the_files(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexlab.data.loader.hanging", threading.Event())
    data = ImageDataset(index, Stuck(32), 0)
    batches = Loader(data, [[(3, 0), (4, 0)]], 1, timeout=0.2)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"^no image came for 0.2 s, and these are still being read: .*/03/x.jpg. Is their"
    ):
        next(iter(batches))


HANGING = """
import sys
from pathlib import Path
from test_loader import ImageDataset, Loader, Stuck, UserError, scan
from alexlab.engine.process import leave

try:
    next(iter(Loader(ImageDataset(scan(Path(sys.argv[1])), Stuck(32), 0), [[(3, 0)]], 2, timeout=0.2)))
except UserError:
    leave(2)
"""


def test_a_program_with_a_thread_that_hangs_ends(index: ImageIndex) -> None:
    words = [sys.executable, "-c", HANGING, str(index.root)]
    done = subprocess.run(words, cwd=Path(__file__).parent, timeout=50, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), RuntimeError("x")])
def test_what_fails_in_a_thread_tells_its_file(error: Exception, index: ImageIndex) -> None:
    class Failing(SampleTransform):
        def write(self, *words: object) -> None:
            raise error

    with pytest.raises(type(error)) as told:
        next(iter(Loader(ImageDataset(index, Failing(32), 0), [[(3, 0)]], 1)))  # type: ignore[arg-type]
    assert told.value.__notes__ == [f"while {index.root}/03/x.jpg was read"]


ENDING = """
import atexit, itertools, sys
from pathlib import Path
from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import scan
from alexlab.data.loader import Loader
from alexlab.data.transforms import SampleTransform

class Counting(SampleTransform):
    done = itertools.count()

    def write(self, *words):
        next(self.done)
        return super().write(*words)

count = lambda: print(next(Counting.done), flush=True)
atexit.register(count)
data = ImageDataset(scan(Path(sys.argv[1])), Counting(512), 0)
batches = iter(Loader(data, [[(i % 60, 0) for i in range(900)]] * 50, 2))
next(batches)
count()
"""


def test_an_ended_program_does_not_wait_for_what_was_begun(index: ImageIndex) -> None:
    """3,600 images are begun; each of the two threads does no more than the one that it has in hand."""
    words = [sys.executable, "-c", ENDING, str(index.root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before <= 40, "also for what is done between the count and the end"
