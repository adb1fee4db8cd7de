"""Folders -> arrays, and the answers to folders that are wrong."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import photo

from alexlab.data.folder import scan, split
from alexlab.engine.errors import UserError


def make(root: Path, **classes: int) -> Path:
    for label, count in classes.items():
        (root / label).mkdir(parents=True)
        for i in range(count):
            (root / label / f"{i}.jpg").touch()
    return root


def test_sorted_classes_and_paths(tmp_path: Path) -> None:
    make(tmp_path, dog=2, cat=1)
    (tmp_path / "cat" / "deep").mkdir()
    (tmp_path / "cat" / "deep" / "B.JPEG").touch()
    (tmp_path / "cat" / ".hidden.jpg").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    index = scan(tmp_path)
    assert index.classes == ("cat", "dog")
    assert [index.path(i) for i in range(len(index))] == [
        str(tmp_path / name) for name in ("cat/0.jpg", "cat/deep/B.JPEG", "dog/0.jpg", "dog/1.jpg")
    ]
    assert index.targets.tolist() == [0, 0, 1, 1]


def test_names_in_any_encoding(tmp_path: Path) -> None:
    make(tmp_path, a=0)
    photo(tmp_path / "a" / "naïve.jpg")
    raw = bytes(tmp_path / "a") + b"/\xff\xfe.jpg"
    Path(raw.decode(errors="surrogateescape")).touch()
    index = scan(tmp_path)
    assert all(Path(index.path(i)).exists() for i in range(2))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "holds no class folders"),
        ({"cat": 1, "dog": 0}, "dog is a class without images"),
    ],
)
def test_wrong_folders(tmp_path: Path, layout: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        scan(make(tmp_path, **layout))


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist: give the folder"):
        scan(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, and a folder of images is needed"):
        scan(tmp_path / "file")


def test_val_classes_not_in_train(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes that the training images do not: bird"):
        scan(make(tmp_path, bird=1, cat=1), ("cat", "dog"))


def test_val_may_lack_a_class_and_keeps_the_numbers(tmp_path: Path) -> None:
    assert scan(make(tmp_path, dog=2), ("cat", "dog")).targets.tolist() == [1, 1]


def test_no_images_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds class folders but no image"):
        scan(make(tmp_path, dog=0), ("cat", "dog"))


def test_split_is_stratified_disjoint_and_by_seed(tmp_path: Path) -> None:
    index = scan(make(tmp_path, a=20, b=40))
    parts = split(index, {"val": 0.2, "test": 0.1}, seed=3)
    assert {name: Counter(part.targets.tolist()) for name, part in parts.items()} == {
        "train": {0: 14, 1: 28}, "val": {0: 4, 1: 8}, "test": {0: 2, 1: 4},
    }  # fmt: skip
    paths = [part.path(i) for part in parts.values() for i in range(len(part))]
    assert len(set(paths)) == 60
    again, other = split(index, {"val": 0.2, "test": 0.1}, 3), split(index, {"val": 0.2, "test": 0.1}, 4)
    assert again["val"].fingerprint() == parts["val"].fingerprint() != other["val"].fingerprint()


def test_split_needs_enough_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 1 images, and at least 2 are needed"):
        split(scan(make(tmp_path, a=1, b=9)), {"val": 0.1}, 0)


def test_fingerprint_sees_names_and_classes(tmp_path: Path) -> None:
    first = scan(make(tmp_path / "x", a=2))
    assert first.fingerprint() == scan(make(tmp_path / "y", a=2)).fingerprint()
    assert first.fingerprint() != scan(make(tmp_path / "z", a=3)).fingerprint()
    assert first.subset(np.array([1])).path(0).endswith("a/1.jpg")


def test_links_are_followed_and_circles_refused(tmp_path: Path) -> None:
    make(tmp_path / "real", more=2)
    make(tmp_path / "data", cat=1)
    (tmp_path / "data/dog").symlink_to(tmp_path / "real/more")
    (tmp_path / "data/cat/linked").symlink_to(tmp_path / "real/more")
    (tmp_path / "data/cat/one.JPG").symlink_to(tmp_path / "real/more/0.jpg")
    index = scan(tmp_path / "data")
    names = [index.path(i).removeprefix(f"{tmp_path}/data/") for i in range(len(index))]
    assert names == ["cat/0.jpg", "cat/linked/0.jpg", "cat/linked/1.jpg", "cat/one.JPG", "dog/0.jpg", "dog/1.jpg"]
    (tmp_path / "real/more/back").symlink_to(tmp_path / "data/cat")
    with pytest.raises(UserError, match=r"cat/linked/back is a link to a folder that it lies in: remove it"):
        scan(tmp_path / "data")
