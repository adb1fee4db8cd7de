"""Prepared images in a bucket of a real S3 server: the same batches as from local files, whatever happens."""

import os
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command, photo, wait_for
from s3_server import Faults
from torch import Tensor

from alexlab.data.datamodule import ImageFolders
from alexlab.data.decode import BrokenImageError
from alexlab.data.fast import remote
from alexlab.data.fast.remote import PartialShard, PreparedImages
from alexlab.data.index import Selection
from alexlab.data.transforms import SampleTransform
from alexlab.engine import storage
from alexlab.engine.errors import UserError
from alexlab.engine.storage import Bucket

COUNT = 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        photo(root / "train" / "ab"[i % 2] / f"{i}.jpg", (90, 80), seed=i)
        photo(root / "val" / "ab"[i % 2] / f"{i}.jpg", (90, 80), seed=100 + i)
    return root


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def local(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards per split."""
    out = tmp_path_factory.mktemp("prepared") / request.param
    mb = {"jpeg": 0.01, "raw": 0.1}[request.param]
    made = command("prepare", f"data.root={photos}", f"out={out}", f"format={request.param}", "square=true",
                   "short_side=64", f"shard_mb={mb}")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert len(list(out.glob("train-*.shard"))) > 2
    return out


@pytest.fixture
def address(local: Path, proxy: Faults) -> str:
    return sent(local)


def sent(folder: Path) -> str:
    """Copy a prepared folder to the server, as any tool would."""
    address = f"s3://tests/{uuid.uuid4().hex}"
    for path in folder.iterdir():
        Bucket(address).write(path.name, path)
    return address


def data_of(root: Path | str, cache: Path, workers: int = 0, **more: object) -> ImageFolders:
    transform = SampleTransform(32, "random_resized", flip=0.5)
    where = {"disk_cache": str(cache), "disk_cache_gb": more.pop("gb", None)} if isinstance(root, str) else {}
    settings = {"batch_size": 8, "seed": 5, "num_workers": workers, "timeout": 20.0} | where | more
    kind = PreparedImages if isinstance(root, str) else ImageFolders
    return kind(str(root), train_transform=transform, eval_transform=SampleTransform(32), **settings)  # type: ignore[arg-type]


def batches(data: ImageFolders) -> list[tuple[Tensor, Tensor]]:
    data.read()
    found = [(batch.images, batch.targets) for batch in data.train_dataloader()]
    return found + [(batch.images, batch.targets) for batch in data.val_dataloader()]


def assert_same(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/*.shard")} | {path.name for path in folder.glob("*.shard")}


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("crop_on", ["cpu", "device"])
def test_batches_are_those_of_local_files_in_each_state_of_the_cache(
    local: Path, address: str, tmp_path: Path, workers: int, crop_on: str, proxy: Faults
) -> None:
    if crop_on == "device" and local.name == "jpeg":
        crop_on = "auto"
    expected = batches(data_of(local, tmp_path, crop_on=crop_on))
    cold = data_of(address, tmp_path / "cache", workers, crop_on=crop_on)
    assert_same(batches(cold), expected)
    wait_for(lambda: shards(tmp_path / "cache") == shards(local))
    assert_same(batches(cold), expected)

    first, second, third = sorted((tmp_path / "cache").glob("*/train-*.shard"))[:3]
    first.unlink()
    second.write_bytes(b"less")  # damaged: read again
    if local.name == "jpeg":  # pixels are not looked at
        third.write_bytes(bytes(third.stat().st_size))
    assert_same(batches(data_of(address, tmp_path / "cache", workers, crop_on=crop_on)), expected)
    wait_for(lambda: shards(tmp_path / "cache") == shards(local))
    proxy.seen.clear()
    assert_same(batches(data_of(address, tmp_path / "cache", workers, crop_on=crop_on)), expected)
    assert [path for _, path in proxy.seen if ".json" not in path] == [], "after the first epoch nothing is asked for"


def test_it_is_the_same_set_as_the_local_one(local: Path, address: str, tmp_path: Path) -> None:
    near, far = data_of(local, tmp_path).read(), data_of(address, tmp_path / "cache").read()
    described = {key: value for key, value in near.describe().items() if key != "root"}
    assert {key: value for key, value in far.describe().items() if key != "root"} == described
    assert far.describe()["root"] == address
    assert far.readable_classes == near.readable_classes
    assert far.splits["train"].path(0).startswith(f"{address}/train-00000.shard:")


@pytest.mark.parametrize("kind", ["refuse", "hang", "500", "503", "cut", "wrong"])
@pytest.mark.parametrize("of", ["prepared.json", "npz", "shard"])
def test_faults_that_pass_change_nothing(
    local: Path, address: str, kind: str, of: str, tmp_path: Path, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "wrong" and of == "prepared.json":
        pytest.skip("it has no checksum: a wrong byte in it is another set, or none")
    monkeypatch.setattr(storage, "REQUEST", 1)
    expected = batches(data_of(local, tmp_path))
    proxy.set(kind, of, 2)
    assert_same(batches(data_of(address, tmp_path / "cache", 2)), expected)
    assert proxy.left == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_shard_knows_which_bytes_it_lacks(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    content = random.bytes(size := int(random.integers(1, 3 * remote.PIECE)))
    path, has = tmp_path / "shard", np.zeros(size, bool)
    shard = PartialShard(path, os.open(path, os.O_RDWR | os.O_CREAT))

    def write(start: int, end: int) -> None:
        shard.write(content[start:end], start)
        has[start:end] = True

    for start, length in zip(random.integers(0, size, 30), random.integers(1, 90_000, 30), strict=True):
        write(int(start), min(size, int(start + length)))
        first, last = sorted(random.integers(0, size + 1, 2).tolist())
        assert first == last or shard.has(first, last - first) == has[first:last].all()
    for start, length in list(shard.gaps(size)):
        assert 0 < length <= remote.PIECE
        assert not has[start : start + length].any()
        write(start, start + length)
    assert has.all()
    assert list(shard.gaps(size)) == []
    shard.remove()
    assert not path.exists()


@pytest.mark.parametrize("local", ["jpeg"], indirect=True)
class TestOfJpegs:
    """What does not depend on the format."""

    def test_a_server_that_is_gone_ends_the_run_with_one_line(
        self, address: str, tmp_path: Path, proxy: Faults, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = data_of(address, tmp_path / "cache", timeout=5.0).read()
        proxy.set("503")
        with pytest.raises(
            UserError, match=r"s3://tests/\w+/train-0.*\.shard: no success for 5 seconds: 503 Service Un"
        ):
            batches(data)
        printed = capfd.readouterr().err
        assert "s (503 Service Unavailable: We encountered an error): trying again for up to 5 seconds" in printed

    def test_training_waits_for_a_server_that_comes_back(
        self, local: Path, address: str, tmp_path: Path, proxy: Faults
    ) -> None:
        data = data_of(address, tmp_path / "cache").read()
        proxy.set("refuse")
        wait_until = threading.Timer(2, lambda: proxy.set(""))
        wait_until.start()
        assert_same(batches(data), batches(data_of(local, tmp_path)))

    def test_bytes_that_are_wrong_in_the_bucket_are_never_an_image(
        self, local: Path, address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        content = bytearray((local / "train-00001.shard").read_bytes())
        content[len(content) // 2] ^= 1
        Bucket(address).write("train-00001.shard", bytes(content))
        data = data_of(address, tmp_path / "cache", on_error="skip").read()
        skipped: dict[str, str] = {}
        for batch in data.train_dataloader():
            skipped |= batch.skipped
        (what,) = skipped.values()
        assert what.endswith("cannot be read as an image (its bytes in the bucket are not those that were written)")
        wait_for(lambda: len(shards(tmp_path / "cache") & shards(local)) == len(list(local.glob("train-*"))) - 1)
        wait_for(
            lambda: "train-00001.shard is missing or damaged: its images are read one by" in capfd.readouterr().err
        )

    def test_a_key_that_is_gone_is_a_broken_image(self, address: str, tmp_path: Path) -> None:
        Bucket(address).delete("train-00001.shard")
        with pytest.raises(
            BrokenImageError, match=r"train-00001.shard:\w/\d+.jpg cannot be read .*1.shard does not ex"
        ):
            batches(data_of(address, tmp_path / "cache"))

    def test_shards_of_other_sets_make_room(self, local: Path, address: str, tmp_path: Path) -> None:
        size = sum(path.stat().st_size for path in local.glob("*.shard"))
        cache, other = tmp_path / "cache", sent(local)
        before = data_of(other, cache)
        batches(before)
        wait_for(lambda: shards(cache) == shards(local))
        for index in before.splits.values():
            for file in index._files.values():  # type: ignore[attr-defined]
                os.close(file)  # as at the end of that process
        assert_same(batches(data_of(address, cache, gb=1.2 * size / 1e9)), batches(data_of(local, tmp_path)))
        folders = {len(list(folder.glob("*.shard"))): folder for folder in cache.iterdir()}
        wait_for(lambda: max(len(list(folder.glob("*.shard"))) for folder in cache.iterdir()) == len(shards(local)))
        assert sum(path.stat().st_size for path in cache.glob("*/*.shard")) <= 1.2 * size
        assert len(folders) >= 1

    def test_a_set_larger_than_the_cache_trains(
        self, local: Path, address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        size = sum(path.stat().st_size for path in local.glob("*.shard"))
        data = data_of(address, tmp_path / "cache", gb=0.5 * size / 1e9)
        expected = batches(data_of(local, tmp_path))
        for _ in range(2):
            assert_same(batches(data), expected)
        wait_for(lambda: "no room for further shards within disk_cache_gb=" in capfd.readouterr().err)
        assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.shard")) <= 0.5 * size

    def test_a_full_disk_ends_no_training(
        self, local: Path, address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "small").mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", tmp_path / "small"], check=False)
        if mounted.returncode:
            pytest.skip("a disk of 28 kB needs root")
        try:
            remote_spare = pytest.MonkeyPatch()
            remote_spare.setattr(remote, "SPARE", -(1 << 40))
            data = data_of(address, tmp_path / "small")
            assert_same(batches(data), batches(data_of(local, tmp_path)))
            wait_for(lambda: "No space left on device: other images are read from the bucket" in capfd.readouterr().err)
            remote_spare.undo()
        finally:
            subprocess.run(["umount", "-l", tmp_path / "small"], check=True)

    def test_an_image_that_occurs_often_is_asked_for_once(self, address: str, tmp_path: Path, proxy: Faults) -> None:
        data = data_of(address, tmp_path / "cache").read()
        index = data.splits["train"]
        both = Selection([index, index], np.arange(2 * len(index)))  # as the parts of folds
        proxy.seen.clear()
        rows = np.array([0, 0, 1, len(index), len(index) + 2, 2])
        both.ahead(rows)
        pictures = [both.picture(int(i)).pixels()[0] for i in rows]
        assert np.array_equal(pictures[0], pictures[3])
        ranges = [path for method, path in proxy.seen if method == "GET" and path.endswith(".shard")]
        wait_for(lambda: shards(tmp_path / "cache"))
        assert len(ranges) == 3

    def test_bytes_are_downloaded_once(
        self, local: Path, address: str, tmp_path: Path, proxy: Faults, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, expected = threading.Event(), batches(data_of(local, tmp_path))
        monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda _: gate.wait()))  # before shards are completed
        data = data_of(address, tmp_path / "cache").read()
        index = data.splits["train"]
        index.ahead(np.array([0]))
        wait_for(lambda: index.cache._collects)  # type: ignore[attr-defined]
        assert_same(batches(data), expected)
        seen = list(proxy.seen)
        assert_same(batches(data), expected)
        assert proxy.seen == seen, "the images come from the shards' files, which are not complete"
        for path in (tmp_path / "cache").glob("*/.train-00001.shard.*"):
            path.write_bytes(bytes(path.stat().st_size))  # damaged on the disk
        assert_same(batches(data), expected)
        assert shards(tmp_path / "cache") == set()
        gate.set()
        wait_for(lambda: shards(tmp_path / "cache") == shards(local))
        for path in (tmp_path / "cache").glob("*/*.shard"):
            assert path.read_bytes() == (local / path.name).read_bytes()
        sent = {path.rpartition("/")[2]: size for path, size in proxy.sent.items() if path.endswith(".shard")}
        sizes = {path.name: path.stat().st_size for path in local.glob("*.shard")}
        assert 2 <= sent.pop("train-00001.shard") / sizes.pop("train-00001.shard") <= 3, "each byte again"
        first = index.path(0).removeprefix(f"{address}/").partition(":")[0]
        again = sent.pop(first) - sizes.pop(first)
        assert again in (0, int(index.arrays["sizes"][0])), "image 0, which was read before"  # type: ignore[attr-defined]
        assert sent == sizes

    def test_incomplete_shards_count_and_do_not_stay(
        self,
        local: Path,
        address: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        size = sum(path.stat().st_size for path in local.glob("*.shard"))
        cache, gate, expected = tmp_path / "cache", threading.Event(), batches(data_of(local, tmp_path))
        monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda _: gate.wait()))  # before shards are completed

        def incomplete() -> list[Path]:
            return list(cache.glob("*/.*.shard.*.tmp"))

        def start(address: str, **more: object) -> ImageFolders:
            data = data_of(address, cache, **more).read()  # type: ignore[arg-type]
            index: Any = data.splits["train"]
            index.ahead(np.array([0]))
            lock = index.cache.folder / ".fetching"
            wait_for(lambda: lock.exists() and not remote.is_unused(lock))
            assert_same(batches(data), expected)
            return data

        limit = 1.1 * size
        for other in (address, sent(local)):
            start(other, gb=limit / 1e9)
        assert 0 < sum(path.stat().st_size for path in incomplete()) <= limit
        gate.set()
        wait_for(lambda: not incomplete())
        assert sum(path.stat().st_size for path in cache.glob("*/*.shard")) <= limit

        gate.clear()
        monkeypatch.setattr(remote, "FILES", 2)
        data = start(sent(local))
        assert len(incomplete()) == 2
        monkeypatch.setattr(remote, "SPARE", 1 << 50)  # others have filled the disk
        gate.set()
        wait_for(lambda: not incomplete())
        wait_for(lambda: "less than 1125900 GB of the disk are free: other images are" in capfd.readouterr().err)
        assert_same(batches(data), expected)

    def test_a_process_that_ends_leaves_no_incomplete_shard(self, address: str, tmp_path: Path) -> None:
        program = f"""
            import numpy as np
            from alexlab.data.fast import remote
            from conftest import wait_for

            remote.HEAD_START = 1000.0
            index = remote.read({address!r}, remote.Path({str(tmp_path)!r}), None, 20.0)["train"]
            index.ahead(np.array([0]))
            wait_for(lambda: index.cache._collects)
            for i in range(1, len(index)):
                index.picture(i)
            print(len(list(remote.Path({str(tmp_path)!r}).glob("*/.*.shard.*.tmp"))))
        """
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 2
        assert list(tmp_path.glob("*/.*.tmp")) == []

    def test_a_shard_that_a_process_reads_is_not_removed(self, local: Path, address: str, tmp_path: Path) -> None:
        cache, other = tmp_path / "cache", sent(local)
        used = data_of(other, cache).read()
        batches(used)
        wait_for(lambda: shards(cache) == shards(local))
        batches(used)
        data = data_of(address, cache, gb=1e-6)
        batches(data)
        assert shards(cache) == shards(local)

    def test_one_process_of_a_machine_downloads_shards(self, address: str, tmp_path: Path, proxy: Faults) -> None:
        datas = [data_of(address, tmp_path / "cache").read() for _ in range(2)]
        threads = [threading.Thread(target=batches, args=(data,)) for data in datas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: len(shards(tmp_path / "cache")) > 4)
        assert proxy.seen.count(("GET", f"/{address.removeprefix('s3://')}/train.npz")) == 1, "arrays too"

    def test_what_is_no_prepared_set_is_refused(self, address: str, tmp_path: Path, proxy: Faults) -> None:
        with pytest.raises(
            UserError, match=r"`data.root=s3://tests/none` contains no prepared.json: write it with alexl"
        ):
            data_of("s3://tests/none", tmp_path / "cache").read()
        with pytest.raises(UserError, match=r"`nothing://tests/none` is no address of objects"):
            data_of("nothing://tests/none", tmp_path / "cache").read()
        Bucket(address).write("train.npz", b"nothing")
        with pytest.raises(
            UserError, match=r"train.npz is missing or damaged: run alexlab prepare out=s3://tests/\w+ ag"
        ):
            data_of(address, tmp_path / "cache").read()
        text = Bucket(address).read("prepared.json").decode()
        for name in ("train-00000", "val"):
            Bucket(address).write("prepared.json", text.replace(f'"{name}', f'"../../{name}').encode())
            with pytest.raises(UserError, match=r"prepared.json has the name '../../\w+.*', which|writes none such"):
                data_of(address, tmp_path / "cache").read()
        for wrong in ("abc", 0, True):
            with pytest.raises(UserError, match=f"`data.disk_cache_gb={wrong}` must be a number above 0, or null."):
                data_of(address, tmp_path / "cache", gb=wrong)
        with pytest.raises(
            UserError, match=r"`data.disk_cache=s3://a/b` must be a folder of this machine, no address."
        ):
            PreparedImages(address, 8, 0, SampleTransform(8), SampleTransform(8), disk_cache="s3://a/b")
        Bucket(address).write("prepared.json", text.replace('"arrays"', '"before"').encode())
        with pytest.raises(
            UserError, match="was prepared by an earlier version, without the checksums that reading fr"
        ):
            data_of(address, tmp_path / "cache").read()
        (tmp_path / "file").touch()
        with pytest.raises(
            UserError, match=r"`data.disk_cache=.*file` cannot be written \(.*\): choose another folder"
        ):
            data_of(address, tmp_path / "file").read()

    def test_wrong_credentials_are_answered_at_once(
        self, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(
            UserError, match=r"prepared.json: the server refuses: 403 Forbidden: .*AWS_SECRET_ACCESS_KEY"
        ) as told:
            data_of(address, tmp_path / "cache").read()
        assert "wrong" not in str(told.value)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")  # without it, the client asks Amazon's machines for a role
        with pytest.raises(UserError, match=r"Not set: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY."):
            data_of(address, tmp_path / "cache").read()
