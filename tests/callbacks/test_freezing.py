"""finetune: first the head, then all layers, on any number of ranks, resumed or not."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_train
from resuming import Harness

from alexlab.engine.errors import UserError

CONSTANT = ["scheduler=constant", "scheduler.warmup=0", "trainer.precision=32-true", "test=false"]
FROZEN = [*CONSTANT, "finetune.freeze_epochs=2", "finetune.backbone_lr_factor=0.1"]
HEAD = {"net.head.weight", "net.head.bias"}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_only_the_head_learns_at_first(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    """BatchNorm's statistics stay too. Later each layer learns, also if the run was resumed in between."""
    one, two, four = (
        weights(harness.train(str(epochs), *FROZEN, f"trainer.max_epochs={epochs}")) for epochs in (1, 2, 4)
    )
    printed = capsys.readouterr().out
    assert "`finetune.freeze_epochs=2` keeps random weights frozen: give init_from=RUN" in printed
    assert changed(one, two) == HEAD
    faster = harness.train("lr", *FROZEN, "trainer.max_epochs=1", "optimizer.lr=0.05")
    assert changed(one, weights(faster)) == HEAD, "already in the first epoch"
    assert changed(two, four) == {*one} - {"net.layers.0.bias"}, "BatchNorm subtracts that bias: it has no gradient"
    last = f"ckpt_path={harness.folder / '2/checkpoints/last.ckpt'}"
    resumed = harness.train("more", *FROZEN, "trainer.max_epochs=4", last)
    assert changed(four, weights(resumed)) == set()
    with pytest.raises(UserError, match=r"finetune.freeze_epochs=0 \(the checkpoint has 2\)"):
        harness.train("no", *CONSTANT, "trainer.max_epochs=4", last)
    capsys.readouterr()
    harness.train("from", *FROZEN, f"init_from={harness.folder / '2'}", "trainer.max_epochs=3")
    assert "finetune.freeze_epochs" not in capsys.readouterr().out


def test_two_ranks_learn_as_one(shapes: Path, tmp_path: Path) -> None:
    """Also after the release, when DDP must sum gradients of layers that had none before."""
    # without BatchNorm, which sees one image per rank and step
    words = [*FROZEN, "augment=none", "model=alexnet", "model.name=alexnet", "+model.net.hidden=[16,16]"]
    words += ["model.net.dropout=0.0"]
    for name, epochs, devices in (("frozen", 2, 1), ("one", 4, 1), ("two", 4, 2)):
        more = [f"trainer.max_epochs={epochs}", f"trainer.devices={devices}"]
        done = tiny_train(shapes, tmp_path / name, *words, *more, ranks=2)
        assert done.returncode == 0, done.stderr
    frozen, one, two = (weights(tmp_path / name) for name in ("frozen", "one", "two"))
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5)
    assert changed(frozen, two) == set(one)


def test_wrong_settings_are_refused(shapes: Path, tmp_path: Path) -> None:
    words = ["finetune.freeze_epochs=-1", "finetune.backbone_lr_factor=0", "augment.sizes=[[2,64]]"]
    wrong = tiny_train(shapes, tmp_path / "run", *words, "augment.pca_by=size")
    assert wrong.returncode == 2
    assert "`finetune.freeze_epochs=-1` must be at least 0." in wrong.stderr
    assert "`finetune.backbone_lr_factor=0` must be above 0." in wrong.stderr
    assert "`augment.sizes=[[2, 64]]` must be pairs of a first epoch, from 1 on, and at least 8 pixels" in wrong.stderr
    assert "`augment.pca_by=size` must be eigenvalues or deviations." in wrong.stderr
    needs = "AlexNet needs images of at least 64 pixels, and these have 32 x 32: set data.image_size=64 or more"
    for words, message in [
        (
            ["finetune.freeze_epochs=1", "trainer.strategy=fsdp"],
            "`finetune.freeze_epochs` with FSDP, which shards the weights: reset",
        ),
        (["model=alexnet", "model.name=alexnet", "augment.sizes=[[1,32],[3,64]]"], needs),
    ]:
        wrong = tiny_train(shapes, tmp_path / "run", *words)
        assert (wrong.returncode, message in wrong.stderr) == (2, True), wrong.stderr


def test_growing_images_train_and_resume(harness: Harness) -> None:
    words = [*CONSTANT, "augment.sizes=[[1,32],[2,48]]"]
    harness.train("one", *words, "trainer.max_epochs=1")
    two = harness.train("two", *words, "data.num_workers=1")
    last = harness.folder / "one/checkpoints/last.ckpt"
    assert changed(weights(two), weights(harness.train("more", *words, f"ckpt_path={last}"))) == set()
    assert changed(weights(two), weights(harness.train("32", *CONSTANT))) != set(), "images of the second epoch grew"
