"""The pictures of a run: which images are chosen, and that they are what the network sees."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import clean_env
from PIL import Image
from torch import nn

from alexlab.analysis.drawing import GAP, TITLE
from alexlab.callbacks.media import MISTAKES, Media, captions_of, most_confused
from alexlab.engine.launcher import free_port
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import RunInfo
from alexlab.tasks.classification import ImageClassifier

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


TASK: Any = SimpleNamespace(one_class_per_image=True)


def test_the_most_confident_mistakes_of_a_test_are_chosen() -> None:
    media, trainer = Media(Path()), SimpleNamespace(world_size=1)
    # three classes; of 40 images every second one is wrong, each a little more confident than the one before
    logits, targets = torch.zeros(40, 3), torch.zeros(40, dtype=torch.int64)
    logits[torch.arange(40), torch.arange(40) % 2] = torch.arange(1, 41) / 4
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    for part in (slice(0, 25), slice(25, 40)):
        media.on_test_batch_end(trainer, TASK, logits[part], (images[part], targets[part], []), 0)  # type: ignore[arg-type]
    media.on_test_batch_end(trainer, TASK, None, None, 1)  # type: ignore[arg-type]
    assert [int(m.image[0, 0, 0]) for m in media.mistakes] == list(range(39, 39 - 2 * MISTAKES, -2))
    assert {(m.truth, m.top5[0][0]) for m in media.mistakes} == {(0, 1)}
    first = media.mistakes[0]  # logits (0, 10, 0), and the truth is the first class
    assert first.top5[0] == (1, pytest.approx(1 / (1 + 2 * math.exp(-10))))
    assert first.confidence == first.top5[0][1]
    assert [k for k, _ in first.top5[1:]] in ([0, 2], [2, 0])
    assert first.loss == pytest.approx(10 + math.log(1 + 2 * math.exp(-10)))


OF_RANKS = """
import json, torch, torch.distributed as dist
from pathlib import Path
from alexlab.callbacks.media import Media, Mistake
from alexlab.engine.ranks import meet
ranks = meet(1)
dist.init_process_group("gloo")
media = Media(Path(), ranks=ranks)
# rank 0 has 0.97, 0.94 ..., rank 1 has 0.98, 0.95 ... and rank 2 has one that is the surest and 15 that are not sure
confidences = [0.97 - 0.03 * i + 0.01 * ranks.rank for i in range(16)] if ranks.rank < 2 else [0.99, *[0.01] * 15]
media.mistakes = [Mistake(c, torch.full((3, 2, 2), ranks.rank), 0, [(1, c)], 1.0) for c in confidences]
media.on_test_epoch_end(None, None)
print(json.dumps([[round(m.confidence, 2), int(m.image[0, 0, 0])] for m in media.mistakes]))
"""


def test_rank_0_gets_the_most_confident_mistakes_of_all_ranks(tmp_path: Path) -> None:
    """And nothing else: the others keep the images of their own that it draws."""
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(None))}
    running = [
        subprocess.Popen([sys.executable, "-c", OF_RANKS], env=clean_env({**shared, "RANK": str(rank)}), stdout=-1)
        for rank in range(3)
    ]
    first, second, third = (json.loads(process.communicate(timeout=120)[0]) for process in running)
    pairs = [(0.97 - 0.03 * i + 0.01 * rank, rank) for i in range(16) for rank in range(2)]
    expected = sorted([*pairs, (0.99, 2)], reverse=True)[:MISTAKES]
    assert first == [[pytest.approx(confidence), rank] for confidence, rank in expected]
    assert [len(second), len(third)] == [sum(rank == 1 for _, rank in expected), 1]


def test_the_confusion_matrix_shows_the_classes_confused_most() -> None:
    matrix = np.diag([50, 50, 50, 50])
    matrix[0, 3] = 5
    matrix[2, 1] = 1
    assert most_confused(matrix, 2) == [0, 3]
    assert most_confused(matrix, 9) == [0, 1, 2, 3]


def test_an_image_is_captioned_with_its_class_or_its_mixture() -> None:
    names = ["cat", "dog", "eel"]
    assert captions_of(torch.tensor([2, 0]), names) == [("eel",), ("cat",)]
    mixed = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert captions_of(mixed, names) == [("70% eel", "30% cat"), ("100% dog", "")]


def test_the_grid_shows_the_images_of_the_first_step(tmp_path: Path) -> None:
    logged: list = []
    logger = SimpleNamespace(log_image=lambda *args, step: logged.append((*args, step)))
    model = ImageClassifier(
        nn.Identity(), BatchAugment(MEAN, STD, 3, pca=0.1, erase=0.5), run=RunInfo(["a", "b", "c"], seed=4)
    )
    model._trainer = trainer = SimpleNamespace(  # type: ignore[assignment]
        current_epoch=0,
        global_rank=0,
        world_size=1,
        global_step=0,
        is_global_zero=True,
        loggers=[object(), logger],
    )
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    batch = (images, torch.zeros(20, dtype=torch.int64), [])
    Media(tmp_path / "figures").on_train_batch_start(trainer, model, batch, 0)  # type: ignore[arg-type]
    with Image.open(tmp_path / "figures/train_images.png") as opened:
        drawn = np.asarray(opened)
    [(key, [picture], step)] = logged
    assert (key, step, np.array_equal(np.asarray(picture), drawn)) == ("images/train", 0, True)
    seen, _ = model.augmented(images, batch[1], 0)
    first = ((seen[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255).clamp(0, 255)
    tile = drawn[TITLE + GAP : TITLE + GAP + 144 : 18, GAP : GAP + 144 : 18].transpose(
        2, 0, 1
    )  # eight pixels, eighteen times enlarged
    assert np.abs(tile.astype(float) - first.numpy()).max() <= 1


def test_figures_that_fail_are_one_warning_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0, datamodule=SimpleNamespace(test_split="val"))
    task: Any = SimpleNamespace(
        one_class_per_image=True, class_names=["a", "b"], confusion_matrix=torch.tensor([[3, 1], [0, 2]])
    )
    logger: Any = SimpleNamespace(experiment=None)  # whose `log` raises AttributeError
    media = Media(tmp_path / "figures", logger)
    media.on_test_end(trainer, task)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["confusion_matrix.png", "per_class.png"]
    monkeypatch.setattr("alexlab.analysis.plots.confusion", lambda *args: {}["no such font"])
    Media(tmp_path / "figures").on_test_end(trainer, task)
    media.on_train_batch_start(trainer, task, (torch.zeros(2, 3, 8, 8), torch.zeros(2)), 0)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "W&B's tables of the test could not be drawn or logged (AttributeError",
        "The figures of the test could not be drawn or logged (KeyError",
        "The training images could not be drawn or logged (AttributeError",
    ]
