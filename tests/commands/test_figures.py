"""The pictures in a run's figures/."""

import json
from pathlib import Path

import numpy as np
from conftest import tiny_train
from matplotlib import colormaps
from PIL import Image, ImageFont

from alexlab.analysis.drawing import GAP, TEXT, TITLE, fonts_for, save, tiles
from alexlab.analysis.plots import confusion


def test_tiles_lie_row_by_row_each_whole() -> None:
    images = [np.full((200, 150, 3), 40 * i, dtype=np.uint8) for i in range(5)]
    sheet = np.asarray(tiles(images, "title", columns=3))
    assert (sheet[:TITLE] < 100).any(), "the title"
    sheet = sheet[TITLE:]
    assert sheet.shape == (2 * (200 + 2 * GAP) + GAP, 3 * (150 + GAP) + GAP, 3)
    step = (200 + 2 * GAP, 150 + GAP)
    for i in range(5):
        y, x = GAP + i // 3 * step[0], GAP + i % 3 * step[1]
        assert (sheet[y : y + 200, x : x + 150] == 40 * i).all()
    assert (sheet[:GAP] == 255).all()


def test_captions_stay_below_their_tile() -> None:
    black = np.zeros((144, 144, 3), dtype=np.uint8)
    sheet = np.asarray(tiles([black, black], "", [("a word " * 20, "b"), ("", "")], columns=2))
    below = sheet[TITLE + GAP + 144 + 2 :]
    assert (below[:, GAP : GAP + 144] < 100).any(), "the first has words"
    assert (below[:, GAP + 144 :] == 255).all(), "which end where the tile does"


def test_letters_of_other_languages_are_drawn() -> None:
    """Not as the box that a face has for what it lacks."""
    font = ImageFont.truetype(fonts_for("äéßжαł")[0][0][1], TEXT)
    drawn = {letter: bytes(font.getmask(letter)) for letter in "äéßжαł\uffff"}
    assert len(set(drawn.values())) == len(drawn)


def test_the_matrix_is_coloured_by_the_fraction_of_the_whole_row(tmp_path: Path) -> None:
    names, counts = ["cat", "a class with a name that is much too long for its margin"], np.array([[4, 0], [3, 1]])
    for totals, classes, fractions in (([4, 4], 2, (1, 0, 0.75, 0.25)), ([4, 300], 60, (1, 0, 0.01))):
        path = save(confusion(counts, names, np.array(totals), classes, "val, last.ckpt"), tmp_path / "figure.png")
        pixels = {colour: count for count, colour in Image.open(path).convert("RGB").getcolors(10_000) or []}
        for fraction in fractions:
            assert pixels[tuple(map(int, colormaps["Blues"](float(fraction), bytes=True)[:3]))] > 500


def test_a_run_without_wandb_draws_them(shapes: Path, tmp_path: Path) -> None:
    words = ["trainer.devices=2", "trainer.precision=32-true", "callbacks.figures=true"]
    assert tiny_train(shapes, tmp_path / "run", *words).returncode == 0
    drawn = {path.stem for path in (tmp_path / "run/figures").iterdir()}
    test = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    assert test["test/acc1"] < 1
    of_weights = {"confusion_matrix", "per_class", "mistakes", "filters", "curves", "top5", "neighbours"}
    assert drawn == {"train_images", *of_weights}
    with Image.open(tmp_path / "run/figures/train_images.png") as sheet:
        with_class_below = 128 + 2 * GAP + TEXT + 3  # one row: the first rank's four of eight images
        assert sheet.size == (4 * (128 + GAP) + GAP, TITLE + with_class_below + GAP)
