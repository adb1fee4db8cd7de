"""A saved index equals what a scan returns, and is used only as long as no folder has changed."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alexlab.data.datamodule import ImageFolders
from alexlab.data.fast import folder_cache
from alexlab.data.fast.folder_cache import cached_scan
from alexlab.data.folder import ImageIndex, scan
from alexlab.data.transforms import SampleTransform


def settle(root: Path) -> None:
    """Set the times of all folders to a minute ago."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        before = folder.stat().st_mtime - 60
        os.utime(folder, (before, before))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_cache, "MIN_IMAGES", 3)
    for name in ("cat/1.jpg", "cat/deep/2.jpg", "cat/notes.txt", "dog/naïve.jpg", "dog/\udcff.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    settle(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were read."""
    done: list[Path] = []

    def counted(folder: Path, *args: object) -> ImageIndex:
        done.append(folder)
        return scan(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_cache, "scan", counted)
    return done


def test_the_saved_index_equals_the_scan(root: Path, tmp_path: Path, scans: list[Path]) -> None:
    before = sorted(root.rglob("*"))
    for _ in range(3):
        index = cached_scan(root, None, tmp_path / "cache")
    expected = scan(root)
    assert scans == [root]
    for field in ("root", "names", "classes", "ignored", "fingerprint", "names_fingerprint"):
        assert getattr(index, field) == getattr(expected, field), field
    assert np.array_equal(index.ends, expected.ends)
    assert np.array_equal(index.targets, expected.targets)
    assert sorted(root.rglob("*")) == before, "nothing is written into the images' folder"
    cached_scan(root, ("bird", "cat", "dog"), tmp_path / "cache")  # other targets than without `classes`
    assert cached_scan(root, ("bird", "cat", "dog"), tmp_path / "cache").targets.tolist() == [1, 1, 2, 2]
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
def test_a_changed_folder_is_read_again(
    root: Path, tmp_path: Path, scans: list[Path], change: Callable[[Path], object]
) -> None:
    cached_scan(root, None, tmp_path / "cache")
    change(root)
    for _ in range(2):  # nothing is saved so soon after a change: another might follow within a tick of the clock
        assert cached_scan(root, None, tmp_path / "cache").names == scan(root).names
    assert scans == [root] * 3
    settle(root)
    for _ in range(2):
        assert cached_scan(root, None, tmp_path / "cache").names == scan(root).names
    assert scans == [root] * 4


def test_a_file_written_again_in_place_changes_the_fingerprint_of_a_saved_index(root: Path, tmp_path: Path) -> None:
    """The folder's time does not change, so the sizes are read each time."""
    before = [cached_scan(root, None, tmp_path / "cache").fingerprint for _ in range(2)]
    (root / "cat/1.jpg").write_bytes(b"more")
    after = cached_scan(root, None, tmp_path / "cache").fingerprint
    assert before[0] == before[1] != after == scan(root).fingerprint


@pytest.mark.parametrize("damage", ["empty", "cut", "lacks targets"])
def test_a_damaged_file_is_written_again(root: Path, tmp_path: Path, scans: list[Path], damage: str) -> None:
    cached_scan(root, None, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npz")
    with np.load(file) as held:
        arrays = dict(held)
    if damage in ("empty", "cut"):
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -30])
    else:
        arrays.pop("targets")
        np.savez(file, **arrays)
    for _ in range(2):
        assert cached_scan(root, None, tmp_path / "cache").names == scan(root).names
    assert scans == [root, root], "read once more, and saved again"


def test_an_index_that_cannot_be_saved_is_a_warning(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "alexlab"):
        logging.getLogger("alexlab").propagate = True
        assert len(cached_scan(root, None, tmp_path / "file/cache")) == 4
    assert f"the names in {root} will be read again next time: {tmp_path}/file/cache/" in caplog.text


def test_the_datamodule_saves_large_folders_only(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        (tmp_path / "data" / name).symlink_to(root)

    def read(cache: Path) -> dict[str, int]:
        transform = SampleTransform(32)
        return ImageFolders(str(tmp_path / "data"), 1, 0, transform, transform, index_cache=str(cache)).read().images

    assert read(tmp_path / "cache") == {"train": 4, "val": 4}
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2
    monkeypatch.setattr(folder_cache, "MIN_IMAGES", 6)
    assert read(tmp_path / "none") == {"train": 4, "val": 4}
    assert not (tmp_path / "none").exists()
