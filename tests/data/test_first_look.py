"""The first look at the images: pictures of one colour, and equal files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image

from alexlab.data import first_look
from alexlab.data.folder import find_splits
from alexlab.data.splits import cross_validation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for k, label in enumerate(("cat", "dog")):
            for i in range(3):
                photo(tmp_path / split / label / f"{i}.png", (40, 30), seed=9 * k + i + 100 * (split == "val"))
    return tmp_path


def test_photos_give_no_warning(root: Path) -> None:
    assert first_look.warnings_of(find_splits(root)) == []


def test_pictures_of_one_colour_are_named(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 3, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise + np.array([200, 3, 90], np.uint8)).save(root / "train/cat/1.png")
    (root / "train/cat/0.png").write_bytes(b"broken")
    assert first_look.warnings_of(find_splits(root)) == [
        f"1 of the first 5 training images have nearly one colour, such as {root}/train/cat/1.png."
    ]


def test_files_with_the_same_bytes_are_found_across_splits_and_classes(root: Path) -> None:
    shutil.copy(root / "train/cat/0.png", root / "train/cat/copy.png")  # the same class: no mistake
    assert first_look.warnings_of(find_splits(root)) == []
    shutil.copy(root / "train/cat/0.png", root / "val/cat/9.png")
    shutil.copy(root / "train/cat/1.png", root / "val/dog/9.png")
    changed = bytearray((root / "train/dog/0.png").read_bytes())
    changed[-1] ^= 1
    (root / "val/dog/8.png").write_bytes(changed)  # only the size is the same
    splits, same = find_splits(root), "with identical bytes, such as"
    assert first_look.warnings_of(splits) == [
        f"2 pictures are in two splits, {same} {root}/train/cat/copy.png and {root}/val/cat/9.png.",
        f"1 picture is in two classes, {same} {root}/train/cat/1.png and {root}/val/dog/9.png.",
    ]
    assert len(first_look.warnings_of(cross_validation(splits, 2, 0, seed=0))) >= 1, "of folds too"
