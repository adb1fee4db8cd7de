"""A kept index is what a scan finds, and only as long as no folder has changed."""

import io
import logging
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alexlab.data.datamodule import ImageFolders
from alexlab.data.fast import folder_cache as index_cache
from alexlab.data.fast.folder_cache import scan_or_recall
from alexlab.data.folder import ImageIndex, scan
from alexlab.data.transforms import SampleTransform


def settle(root: Path) -> None:
    """As if nothing had changed for a minute."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        before = folder.stat().st_mtime - 60
        os.utime(folder, (before, before))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index_cache, "FROM", 3)
    for name in ("cat/1.jpg", "cat/deep/2.jpg", "dog/naïve.jpg", "dog/\udcff.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    settle(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were read."""
    done: list[Path] = []

    def counted(folder: Path, *words: object) -> ImageIndex:
        done.append(folder)
        return scan(folder, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(index_cache, "scan", counted)
    return done


def test_what_is_recalled_is_what_was_read(root: Path, tmp_path: Path, scans: list[Path]) -> None:
    before = sorted(root.rglob("*"))
    for _ in range(3):
        found = scan_or_recall(root, None, tmp_path / "kept")
    expected = scan(root)
    assert scans == [root]
    assert (found.root, found.names, found.classes) == (expected.root, expected.names, expected.classes)
    assert np.array_equal(found.ends, expected.ends)
    assert np.array_equal(found.targets, expected.targets)
    assert found.fingerprint() == expected.fingerprint()
    assert sorted(root.rglob("*")) == before, "nothing is written into the images' folder"
    scan_or_recall(root, ("bird", "cat", "dog"), tmp_path / "kept")  # other targets than without `classes`
    assert scan_or_recall(root, ("bird", "cat", "dog"), tmp_path / "kept").targets.tolist() == [1, 1, 2, 2]
    assert scans == [root, root]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "cat/3.jpg").touch(),
        lambda root: (root / "cat/1.jpg").unlink(),
        lambda root: (root / "cat/deep/2.jpg").rename(root / "cat/deep/9.jpg"),
        lambda root: (root / "dog/naïve.jpg").rename(root / "cat/naïve.jpg"),
        lambda root: (root / "dog").rename(root / "wolf"),
        lambda root: [(root / "emu").mkdir(), (root / "emu/1.jpg").touch()],
    ],
    ids=["added", "removed", "renamed below", "moved", "class renamed", "class added"],
)
def test_a_change_is_seen(root: Path, tmp_path: Path, scans: list[Path], change: Callable[[Path], object]) -> None:
    scan_or_recall(root, None, tmp_path / "kept")
    change(root)
    for _ in range(2):  # so soon after the change nothing is kept: another might follow within the clock's tick
        assert scan_or_recall(root, None, tmp_path / "kept").fingerprint() == scan(root).fingerprint()
    assert scans == [root] * 3
    settle(root)
    for _ in range(2):
        assert scan_or_recall(root, None, tmp_path / "kept").fingerprint() == scan(root).fingerprint()
    assert scans == [root] * 4


@pytest.mark.parametrize("size", [0, 100, -30])
def test_a_torn_file_is_read_anew(root: Path, tmp_path: Path, scans: list[Path], size: int) -> None:
    scan_or_recall(root, None, tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("*.npz")
    file.write_bytes(file.read_bytes()[:size])
    for _ in range(2):
        assert len(scan_or_recall(root, None, tmp_path / "kept")) == 4
    assert scans == [root, root], "read once more, and whole again"


def test_one_reads_and_the_others_wait(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on, done = threading.Event(), threading.Event(), []

    def slow(*words: object) -> ImageIndex:
        done.append(1)
        reading.set()
        assert go_on.wait(60)
        return scan(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(index_cache, "scan", slow)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(scan_or_recall(root, None, tmp_path / "kept"))))
        for _ in range(3)
    ]
    threads[0].start()
    assert reading.wait(60)
    threads[1].start()
    threads[2].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert (found, done) == ([4, 4, 4], [1])


def test_without_a_place_to_keep_it(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "alexlab"):
        logging.getLogger("alexlab").propagate = True
        assert len(scan_or_recall(root, None, tmp_path / "file/kept")) == 4
    assert f"the names in {root} are read anew next time: {tmp_path}/file/kept/" in caplog.text


def test_small_folders_are_not_kept_and_large_ones_are(root: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(root)
    (root / "dog/\udcff.png").unlink()
    settle(root)

    def read() -> dict[str, int]:
        transform = SampleTransform(32)
        data = ImageFolders(
            str(tmp_path / "data"), 1, 0, train_transform=transform, eval_transform=transform,
            kept=str(tmp_path / "kept"),
        )  # fmt: skip
        return data.read().images

    assert read() == {"train": 3, "val": 3}
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 2
    index_cache.FROM = 4  # put back by the fixture
    for file in (tmp_path / "kept").glob("*.npz"):
        file.unlink()
    (tmp_path / "kept/lock").unlink()
    (tmp_path / "kept").rmdir()
    assert read() == {"train": 3, "val": 3}
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"ends": np.array([9, 5, 3, 1])},
        {"ends": np.array([1.0, 2.0, 3.0, 4.0])},
        {"targets": np.array([0, 0, 1, 2])},
        {"targets": np.array([-1, 0, 1, 1])},
        {"targets": np.array([1, 1, 0, 0])},
        {"version": np.array([1, 2])},
        {"ignored": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"ignored": np.frombuffer(b'{"a": "b"}', np.uint8)},
    ],
    ids=str,
)
def test_a_kept_index_that_does_not_fit_is_read_anew(
    change: dict[str, np.ndarray], root: Path, tmp_path: Path, scans: list[Path]
) -> None:
    scan_or_recall(root, None, tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("*.npz")
    with np.load(file) as held:
        arrays = dict(held)
    np.savez(file, **{**arrays, **change})
    found = scan_or_recall(root, None, tmp_path / "kept")
    assert scans == [root, root]
    assert found.fingerprint() == scan(root).fingerprint()


def test_what_was_left_out_is_kept_too(root: Path, tmp_path: Path, scans: list[Path]) -> None:
    (root / "cat/notes.txt").touch()
    settle(root)
    for _ in range(2):
        assert scan_or_recall(root, None, tmp_path / "kept").ignored == {".txt": 1}
    assert scans == [root]


@pytest.mark.parametrize("names", [[b"/etc/passwd", b"cat/2.jpg"], [b"cat/1.jpg", b"cat/../../x.jpg"], [b"..", b"a"]])
def test_a_kept_index_of_names_elsewhere_is_read_anew(
    names: list[bytes], root: Path, tmp_path: Path, scans: list[Path]
) -> None:
    scan_or_recall(root, None, tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("*.npz")
    with np.load(file) as held:
        arrays = dict(held)
    arrays |= {"names": np.frombuffer(b"".join(names), np.uint8), "ends": np.cumsum([len(n) for n in names])}
    np.savez(file, **{**arrays, "targets": np.zeros(2, np.int64)})
    found = scan_or_recall(root, None, tmp_path / "kept")
    assert len(scans) == 2
    assert found.names == scan(root).names


def test_a_kept_index_that_claims_to_be_larger_is_read_anew(root: Path, tmp_path: Path, scans: list[Path]) -> None:
    scan_or_recall(root, None, tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("*.npz")
    with np.load(file) as held:
        arrays = dict(held)
    arrays.pop("targets")
    np.savez(file, **arrays)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(file, "a") as packed:
        packed.writestr("targets.npy", header.getvalue())
    scan_or_recall(root, None, tmp_path / "kept")
    assert len(scans) == 2
