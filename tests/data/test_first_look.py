"""The first look at the images: pictures of one colour, and equal files."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import photo
from PIL import Image

from alexlab.data import first_look
from alexlab.data.folder import find_splits
from alexlab.data.index import Index
from alexlab.data.items import ItemData
from alexlab.data.splits import cross_validation
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError


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
        f"Pictures of nearly one colour: 1 of the first 5 training images, such as {root}/train/cat/1.png."
    ]


@pytest.mark.parametrize("bits", [4, 14])
def test_pictures_that_use_a_part_of_their_values_are_named(bits: int, tmp_path: Path) -> None:
    """As 14 bits in 16, or digits of 0 to 16; one pixel is white."""
    for label in ("cat", "dog"):
        (tmp_path / f"train/{label}").mkdir(parents=True)
        for i in range(3):
            values = np.random.default_rng(i).integers(0, 2**bits, (30, 40))
            values[0, 0] = 65535 if bits > 8 else 255
            pixels = values.astype(np.uint16 if bits > 8 else np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"train/{label}/{i}.png")
    line, *_ = first_look.warnings_of(find_splits(tmp_path))
    highest = 15 if bits == 4 else 63
    assert line.startswith(f"The first 6 training images have only the values 0 to {highest} of 0 to 255, ")


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


def test_a_class_that_ignores_the_split_is_noticed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    pictures = {"train": noise[:30], "val": noise[30:]}

    def made(parts: dict[str, np.ndarray]) -> dict[str, Index]:
        """Build the splits of a class that returns images; the last one cannot be read."""

        class Pictures:
            def __init__(self, split: str) -> None:
                self.pictures, self.targets = parts[split], [i % 2 for i in range(len(parts[split]))]

            def __len__(self) -> int:
                return len(self.pictures)

            def __getitem__(self, i: int) -> tuple[object, int]:
                if i == 3:
                    raise OSError("broken")
                return self.pictures[i], self.targets[i]

        each: Any = {"train_transform": SampleTransform(8), "eval_transform": SampleTransform(8), "seed": 0}

        def make(split: str) -> Any:
            if split not in parts:
                raise UserError("no such split") from KeyError(split)
            return Pictures(split)

        return ItemData(make, True, "own.Pictures", root="x", batch_size=4, **each).read().splits

    assert first_look.warnings_of(made(pictures)) == []
    both = {"train": noise, "val": noise}
    (line,) = first_look.warnings_of(made(both))
    pattern = (
        r"Of the images that were compared, 39 are in two splits, such as own.Pictures\((\w+)\)\[(\d+)\] and own\..*"
    )
    assert re.fullmatch(pattern, line), line
