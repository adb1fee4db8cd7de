"""finetune: first the head, then all layers, on any number of ranks, resumed or not."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_train

FROZEN = [
    "finetune.freeze_epochs=2",
    "finetune.backbone_lr_factor=0.1",
    "scheduler=constant",
    "scheduler.warmup=0",
    "trainer.precision=32-true",
    "test=false",
    "augment=none",
]


def weights(run_dir: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run_dir / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_only_the_head_learns_at_first(shapes: Path, tmp_path: Path) -> None:
    """BatchNorm's statistics stay too. Later each layer learns, also if the run was resumed in between."""
    for epochs in (1, 2, 4):
        done = tiny_train(shapes, tmp_path / str(epochs), *FROZEN, f"trainer.max_epochs={epochs}")
        assert done.returncode == 0, done.stderr
    one, two, four = (weights(tmp_path / str(epochs)) for epochs in (1, 2, 4))
    assert changed(one, two) == {"net.fc.weight", "net.fc.bias"}
    done = tiny_train(shapes, tmp_path / "lr", *FROZEN, "trainer.max_epochs=1", "optimizer.lr=0.05")
    assert done.returncode == 0, done.stderr
    assert changed(one, weights(tmp_path / "lr")) == {"net.fc.weight", "net.fc.bias"}, "already in the first epoch"
    released = changed(two, four)
    assert {key for key in one if "running" in key or "conv" in key or "fc" in key} <= released
    assert {key for key in one if key.endswith("num_batches_tracked")} <= released
    last = tmp_path / "2/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "more", *FROZEN, "trainer.max_epochs=4", f"ckpt_path={last}")
    assert done.returncode == 0, done.stderr
    assert changed(four, weights(tmp_path / "more")) == set()
    wrong = tiny_train(shapes, tmp_path / "no", "trainer.max_epochs=4", f"ckpt_path={last}")
    assert wrong.returncode == 2
    assert "finetune.freeze_epochs=0 (the checkpoint has 2)" in wrong.stderr


def test_settings_that_make_little_sense_are_reported(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", *FROZEN)
    assert "`finetune.freeze_epochs=2`: only the head learns in all 1 epochs" in done.stdout
    assert "`finetune.freeze_epochs=2` keeps random weights frozen: give init_from=RUN" in done.stdout
    done = tiny_train(shapes, tmp_path / "from", *FROZEN, f"init_from={tmp_path / 'run'}", "trainer.max_epochs=3")
    assert "finetune.freeze_epochs" not in done.stdout


def test_two_ranks_learn_as_one(shapes: Path, tmp_path: Path) -> None:
    """Also after the release, when DDP must sum gradients of layers that had none before."""
    # without BatchNorm, which sees one image per rank and step
    words = [
        *FROZEN,
        "model=alexnet",
        "model.name=alexnet",
        "+model.net.hidden=[16,16]",
        "model.net.dropout=0.0",
        "trainer.max_epochs=4",
    ]
    for devices in (1, 2):
        done = tiny_train(shapes, tmp_path / str(devices), *words, f"trainer.devices={devices}")
        assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / str(devices)) for devices in (1, 2))
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5)
    first = tmp_path / "frozen"
    assert tiny_train(shapes, first, *words, "trainer.max_epochs=2", "trainer.devices=2").returncode == 0
    assert changed(weights(first), two) == set(one)


def test_mistakes(shapes: Path, tmp_path: Path) -> None:
    wrong = tiny_train(
        shapes, tmp_path / "run", "finetune.freeze_epochs=-1", "finetune.backbone_lr_factor=0",
        "augment.sizes=[[2,64]]", "augment.pca_by=size",
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "`finetune.freeze_epochs=-1` must be at least 0." in wrong.stderr
    assert "`finetune.backbone_lr_factor=0` must be above 0." in wrong.stderr
    assert "`augment.sizes=[[2, 64]]` must be pairs of a first epoch, from 1 on, and at least 8 pixels" in wrong.stderr
    assert "`augment.pca_by=size` must be eigenvalues or deviations." in wrong.stderr
    for words, told in [
        (["finetune.freeze_epochs=1", "trainer.strategy=fsdp"], "does not work with FSDP, which shards the weights"),
        (
            ["model=alexnet", "model.name=alexnet", "augment.sizes=[[1,32],[3,64]]"],
            "AlexNet needs images of at least 64 pixels, and these have 32 x 32: set data.image_size=64 or more",
        ),
    ]:
        wrong = tiny_train(shapes, tmp_path / "run", *words)
        assert (wrong.returncode, told in wrong.stderr) == (2, True), wrong.stderr


def test_growing_images_train_and_resume(shapes: Path, tmp_path: Path) -> None:
    words = ["augment.sizes=[[1,64],[2,80]]", "trainer.precision=32-true", "scheduler=constant", "test=false"]
    assert tiny_train(shapes, tmp_path / "two", *words, "trainer.max_epochs=2", "data.num_workers=1").returncode == 0
    assert tiny_train(shapes, tmp_path / "one", *words, "trainer.max_epochs=1").returncode == 0
    last = tmp_path / "one/checkpoints/last.ckpt"
    assert tiny_train(shapes, tmp_path / "more", *words, "trainer.max_epochs=2", f"ckpt_path={last}").returncode == 0
    assert changed(weights(tmp_path / "two"), weights(tmp_path / "more")) == set()
