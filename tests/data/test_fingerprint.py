"""What a fingerprint of images sees, and how old runs are recognised."""

import os
from pathlib import Path

import numpy as np
import pytest

from alexlab.data import fingerprint
from alexlab.data.datamodule import ImageFolders
from alexlab.data.demo import write_demo
from alexlab.data.fingerprint import changed_splits
from alexlab.data.folder import scan
from alexlab.data.transforms import SampleTransform


def write(root: Path, size: int = 3, count: int = 4) -> Path:
    for i in range(count):
        path = root / f"{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size + i))
    return root


def test_the_fingerprint_is_that_of_names_classes_and_sizes(tmp_path: Path) -> None:
    first = scan(write(tmp_path / "a"))
    assert first.fingerprint.startswith("sizes:")
    assert len(first.fingerprint) == len("sizes:") + 16
    assert first.fingerprint == scan(write(tmp_path / "b")).fingerprint, "the folder's own name does not count"
    larger = scan(write(tmp_path / "c", size=4))
    assert first.fingerprint != larger.fingerprint
    assert first.names_fingerprint == larger.names_fingerprint
    more = scan(write(tmp_path / "d", count=6))
    assert first.fingerprint != more.fingerprint
    assert first.names_fingerprint != more.names_fingerprint
    (tmp_path / "b/1").rename(tmp_path / "b/one")
    assert first.names_fingerprint != scan(tmp_path / "b").names_fingerprint


def test_the_names_fingerprint_is_that_of_older_runs(tmp_path: Path) -> None:
    """Computed by the program before sizes were part of it."""
    write_demo(tmp_path / "demo", per_class={"train": 4, "val": 2, "test": 1})
    assert scan(tmp_path / "demo/train").names_fingerprint == TRAIN_BEFORE


TRAIN_BEFORE = "cf4a7c385b798699"  # pragma: allowlist secret


def test_val_and_test_of_the_demo_have_different_fingerprints(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", per_class={"train": 1, "val": 2, "test": 2})
    val, test = (scan(tmp_path / "demo" / split) for split in ("val", "test"))
    assert val.names_fingerprint == test.names_fingerprint
    assert val.fingerprint != test.fingerprint


def test_of_a_large_folder_a_sample_of_the_sizes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SAMPLE", 20)
    root = write(tmp_path, count=200)
    before = scan(root).fingerprint
    looked_at = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: (looked_at.append(path), stat(path, **more))[1])
    index = scan(root)
    looked_at.clear()
    assert index.fingerprint == before == index.fingerprint
    assert 15 <= len(set(looked_at)) == len(looked_at) <= 20, "and once"
    monkeypatch.setattr(os, "stat", stat)
    for i, path in enumerate(sorted(root.rglob("*.jpg"))):
        path.write_bytes(bytes(1000 + i))
    assert scan(root).fingerprint != before


def test_the_sample_depends_on_the_names_only_and_is_spread_over_all_images() -> None:
    one, two = (fingerprint.sample(bytes([n]) * 32, 1_000_000) for n in (1, 2))
    assert np.array_equal(one, fingerprint.sample(bytes([1]) * 32, 1_000_000))
    assert not np.array_equal(one, two)
    assert (np.diff(one) > 0).all()
    tenths = np.histogram(one, 10, (0, 1_000_000))[0]
    assert np.abs(tenths - len(one) / 10).max() < 4.5 * (len(one) / 10) ** 0.5
    assert one[:3].tolist() == ONE, "the same with every version of NumPy"


ONE = [25, 169, 248]


def test_a_file_that_cannot_be_read_does_not_stop_the_fingerprint(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "0/9.jpg").symlink_to(root / "nowhere.jpg")
    assert scan(root).fingerprint.startswith("sizes:")


def describe(root: Path) -> dict:
    transform = SampleTransform(8)
    return ImageFolders(str(root), 1, 0, transform, transform).read().describe()


def as_before(dataset: dict) -> dict:
    """As a run has saved it before sizes were part of the fingerprint."""
    names = dataset["names_fingerprint"]
    return {key: value for key, value in dataset.items() if key != "names_fingerprint"} | {"fingerprint": names}


@pytest.mark.parametrize("old", [False, True])
def test_runs_of_any_age_recognise_the_same_images_and_see_others(tmp_path: Path, old: bool) -> None:
    for split in ("train", "val"):
        write(tmp_path / "a" / split)
        write(tmp_path / "b" / split)
    then = as_before(describe(tmp_path / "a")) if old else describe(tmp_path / "a")
    assert changed_splits(then, describe(tmp_path / "a")) == changed_splits(then, describe(tmp_path / "b")) == []
    assert changed_splits(as_before(describe(tmp_path / "b")), then) == [], "two old runs, or a new and an old one"
    (tmp_path / "b/val/0/0.jpg").write_bytes(b"another image")
    assert changed_splits(then, describe(tmp_path / "b")) == ([] if old else ["val"]), "an old run knows no sizes"
    (tmp_path / "b/val/0/5.jpg").touch()
    assert changed_splits(then, describe(tmp_path / "b")) == ["val"]
    write(tmp_path / "b/test")
    assert changed_splits(then, describe(tmp_path / "b")) == ["val", "test"]
    assert changed_splits(describe(tmp_path / "b"), then) == ["val", "test"]
