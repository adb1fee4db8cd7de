"""The pictures in a run's figures/."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_train
from PIL import Image

from alexlab.analysis.drawing import FULL, GAP, TEXT, confusion, tiles


def test_tiles_lie_row_by_row_each_whole() -> None:
    images = [np.full((200, 150, 3), 40 * i, dtype=np.uint8) for i in range(5)]
    sheet = np.asarray(tiles(images, columns=3))
    assert sheet.shape == (2 * (200 + 2 * GAP) + GAP, 3 * (150 + GAP) + GAP, 3)
    step = (200 + 2 * GAP, 150 + GAP)
    for i in range(5):
        y, x = GAP + i // 3 * step[0], GAP + i % 3 * step[1]
        assert (sheet[y : y + 200, x : x + 150] == 40 * i).all()
    assert (sheet[:GAP] == 255).all()


def test_captions_stay_below_their_tile() -> None:
    black = np.zeros((144, 144, 3), dtype=np.uint8)
    sheet = np.asarray(tiles([black, black], [("a word " * 20, "b"), ("", "")], columns=2))
    below = sheet[GAP + 144 + 2 :]
    assert (below[:, GAP : GAP + 144] < 100).any(), "the first has words"
    assert (below[:, GAP + 144 :] == 255).all(), "which end where the tile does"


def test_letters_of_other_languages_are_drawn() -> None:
    """Not as the box that a face has for what it lacks."""
    from alexlab.analysis.drawing import _font

    drawn = {letter: bytes(_font().getmask(letter)) for letter in "äéßжαł\uffff"}
    assert len(set(drawn.values())) == len(drawn)


def test_a_part_of_a_matrix_is_coloured_by_the_whole_rows() -> None:
    counts = np.array([[5, 5], [0, 10]])
    part = np.asarray(confusion(counts, ["a", "b"], totals=np.array([10, 1000]), classes=60))
    whole = np.asarray(confusion(counts, ["a", "b"]))
    y, x = part.shape[0] - 12 - 88 + 3, part.shape[1] - 12 - 88 + 3
    assert part[y, x].tolist() == whole[y, x].tolist()
    assert whole[y + 44, x + 44].tolist() == FULL.tolist()
    assert part[y + 44, x + 44].mean() > 200, "ten of a thousand is little"
    assert (part[:16] < 100).sum() > (whole[:16] < 100).sum(), "the number of classes is written above"
    named = np.asarray(confusion(counts, ["a", "b"], of="val, last.ckpt"))
    assert (named[:16] < 100).sum() > (whole[:16] < 100).sum(), "so are the images and weights"


def test_the_matrix_is_darkest_where_a_whole_row_lies() -> None:
    counts = np.array([[4, 0], [3, 1]])
    sheet = np.asarray(confusion(counts, ["cat", "a class with a name that is much too long for its margin"]))
    side = 44 * 2
    corner = (sheet.shape[0] - 12 - side, sheet.shape[1] - 12 - side)
    cells = [[sheet[corner[0] + 44 * r + 3, corner[1] + 44 * c + 3].tolist() for c in (0, 1)] for r in (0, 1)]
    assert cells[0][0] == FULL.tolist()
    assert cells[0][1] == [246, 246, 246]
    assert sum(cells[0][0]) < sum(cells[1][0]) < sum(cells[1][1]) < sum(cells[0][1])
    assert max(confusion(np.eye(60, dtype=int), [str(i) for i in range(60)]).size) < 1200


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_without_wandb_draws_them(devices: int, shapes: Path, tmp_path: Path) -> None:
    words = [f"trainer.devices={devices}", "trainer.precision=32-true", "callbacks.figures=true"]
    assert tiny_train(shapes, tmp_path / "run", *words).returncode == 0
    drawn = {path.stem for path in (tmp_path / "run/figures").iterdir()}
    test = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    assert test["test/acc1"] < 1
    of_weights = {"confusion_matrix", "per_class", "mistakes", "filters", "curves", "top5", "neighbours"}
    assert drawn == {"train_images", *of_weights}
    with Image.open(tmp_path / "run/figures/train_images.png") as sheet:
        rows = -(-8 // devices // 4)  # of the first rank's share
        with_class_below = 128 + 2 * GAP + TEXT + 3
        assert sheet.size == (4 * (128 + GAP) + GAP, rows * with_class_below + GAP)
