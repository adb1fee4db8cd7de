"""Going on from a checkpoint: as if nothing had happened, or a refusal."""

from pathlib import Path

import pytest
import torch
from conftest import summary_of, tiny_train

WORDS = ["scheduler=constant", "test=false", "trainer.limit_train_batches=null", "data.batch_size=8"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def two_epochs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "two"
    done = tiny_train(shapes, folder, *WORDS, "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    return folder


def go_on(shapes: Path, run_dir: Path, two_epochs: Path, *words: str):  # type: ignore[no-untyped-def]
    last = two_epochs / "checkpoints/last.ckpt"
    return tiny_train(shapes, run_dir, *WORDS, f"ckpt_path={last}", "trainer.max_epochs=3", *words)


def test_three_epochs_are_two_and_one_more_bit_for_bit(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    straight = tiny_train(shapes, tmp_path / "straight", *WORDS, "trainer.max_epochs=3")
    done = go_on(shapes, tmp_path / "more", two_epochs, "data.num_workers=1")
    assert (straight.returncode, done.returncode) == (0, 0), done.stderr
    assert "epoch 3/3" in done.stdout
    assert "epoch 2/3" not in done.stdout
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "more")
    assert all(torch.equal(a[key], b[key]) for key in a)
    # its directory holds the third epoch's best.ckpt alone, and says so
    last = summary_of(tmp_path / "straight")["last"]
    assert summary_of(tmp_path / "more")["best"] == pytest.approx(
        {k: v for k, v in last.items() if k.startswith("val/")}
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lr=0.5"], "these differ: optimizer.lr=0.5 (there 0.005). Give the same ones"),
        (["scheduler=cosine"], "scheduler.name=cosine (there constant)"),
        (["seed=1", "data.batch_size=4"], "data.batch_size=4 (there 8), seed=1 (there 0)"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    words: list[str], told: str, shapes: Path, two_epochs: Path, tmp_path: Path
) -> None:
    done = go_on(shapes, tmp_path / "x", two_epochs, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "x").exists(), "found wrong before the directory is made"


def test_other_classes_and_weights_alone_are_refused(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "data"
    for split in ("train", "val"):
        for folder in (shapes / split).iterdir():
            target = renamed / split / ("zebra" if folder.name == "arrow" else folder.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder)
    done = go_on(renamed, tmp_path / "x", two_epochs)
    assert done.returncode == 2
    assert "has other classes than the run: missing arrow, new zebra." in done.stderr
    best = two_epochs / "checkpoints/best.ckpt"
    done = tiny_train(shapes, tmp_path / "x", *WORDS, f"ckpt_path={best}")
    assert done.returncode == 2
    assert "holds weights alone, and training cannot go on from it: give last.ckpt" in done.stderr


def test_the_middle_of_an_epoch_is_refused(shapes: Path, tmp_path: Path) -> None:
    words = [*WORDS, "trainer.max_epochs=null"]
    assert tiny_train(shapes, tmp_path / "a", *words, "trainer.max_steps=3").returncode == 0
    last = tmp_path / "a/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "b", *words, "trainer.max_steps=8", f"ckpt_path={last}")
    assert done.returncode == 2
    assert "was saved in the middle of epoch 1, and training goes on from whole epochs alone" in done.stderr
