"""Which images each epoch of a real Lightning training sees, resumed or not, with any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import photo
from torch import Tensor, nn

from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import Batch
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

COUNT, BATCH = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class an image, so that the targets tell which image it is."""
    root = tmp_path_factory.mktemp("one-a-class")
    for i in range(COUNT):
        photo(root / "train" / f"{i:02d}" / "x.jpg", (48, 40), seed=i)
        photo(root / "val" / f"{i:02d}" / "x.jpg", (48, 40), seed=i)
    return root


def data_of(folder: Path, workers: int = 0, **more: object) -> ImageFolders:
    transform = SampleTransform(32, "random_resized", flip=0.5)
    settings = {"batch_size": BATCH, "seed": 5, "num_workers": workers} | more
    return ImageFolders(str(folder), train_transform=transform, eval_transform=SampleTransform(32), **settings)  # type: ignore[arg-type]


class Recorder(pl.LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}
        self.pixels: dict[tuple[int, int], Tensor] = {}  # by epoch and image

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets, *_ = batch
        self.seen.setdefault(self.current_epoch, []).extend(targets.tolist())
        self.pixels |= {(self.current_epoch, int(t)): image for t, image in zip(targets, images, strict=True)}
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Validation takes its turn, as in a real run."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data: ImageFolders, epochs: int, folder: Path, ckpt_path: Path | None = None, **more: object) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, "last", enable_version_counter=False,
                                                save_on_train_epoch_end=True)],
        enable_model_summary=False, num_sanity_val_steps=0, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model


def order(epoch: int) -> list[int]:
    """NumPy's own permutation for (seed, epoch)."""
    return np.random.Generator(np.random.PCG64([5, epoch])).permutation(COUNT).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_its_own_order_and_crops(folder: Path, tmp_path: Path, workers: int) -> None:
    model = train(data_of(folder, workers), 3, tmp_path)
    assert model.seen == {epoch: order(epoch) for epoch in range(3)}
    assert order(0) != order(1) != order(2)
    changed = [not torch.equal(model.pixels[0, i], model.pixels[1, i]) for i in range(COUNT)]
    assert sum(changed) > COUNT // 2, "an image is cropped anew in each epoch"


def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    alone, three = (train(data_of(folder, workers), 2, tmp_path / str(workers)) for workers in (0, 3))
    assert alone.seen == three.seen
    assert all(torch.equal(alone.pixels[key], three.pixels[key]) for key in alone.pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_next_epochs_order(folder: Path, tmp_path: Path, workers: int) -> None:
    train(data_of(folder, workers), 2, tmp_path)
    resumed = train(data_of(folder, workers), 4, tmp_path, tmp_path / "last.ckpt")
    assert resumed.seen == {2: order(2), 3: order(3)}


def test_overfitting_sees_the_same_batches_again(folder: Path, tmp_path: Path) -> None:
    model = train(data_of(folder), 3, tmp_path, overfit_batches=2)
    assert model.seen == {epoch: order(0)[: 2 * BATCH] for epoch in range(3)}


def test_workers_default_to_the_cores_shared_by_the_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexlab.data.datamodule.cores", lambda: 16)
    assert data_of(folder, None).num_workers == 12, "more than Python's lock lets work"  # type: ignore[arg-type]
    assert data_of(folder, None, local_world_size=8).num_workers == 2  # type: ignore[arg-type]
    assert data_of(folder, None, local_world_size=32).num_workers == 1  # type: ignore[arg-type]


def test_no_val_and_no_train(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a/train").mkdir(parents=True)
    photo(tmp_path / "a/train/cat/1.jpg")
    with pytest.raises(UserError, match=r"has train/ but no val/: add .*data.val_fraction=0.1"):
        data_of(tmp_path / "a").read()
    for near in (tmp_path / "a/train", tmp_path):
        with pytest.raises(UserError, match=rf"no train/ folder: .* Did you mean data.root={tmp_path}/a\?"):
            data_of(near).read()
    (tmp_path / "b/cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no train/ folder: .* data.val_fraction=0.1\.$"):
        data_of(tmp_path / "b").read()
    with pytest.raises(UserError, match=r"val_fraction=0.5, .*they split class folders, and .* has train/ already"):
        data_of(folder, val_fraction=0.5).read()
    with pytest.raises(UserError, match=r"data.num_classes=7, but .* holds 12 classes: data.num_classes=null"):
        data_of(folder, num_classes=7).read()


def test_one_folder_is_split_by_fractions(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for i in range(10):
            photo(tmp_path / label / f"{i}.jpg", seed=i)
    data = data_of(tmp_path, val_fraction=0.2, test_fraction=0.1).read()
    assert data.images == {"train": 14, "val": 4, "test": 2}
    assert data.tested_split == "test"
    assert data.describe()["num_classes"] == 2
