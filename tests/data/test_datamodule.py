"""Which images each epoch of a real Lightning training sees, resumed or not, with any number of threads."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import photo
from torch import Tensor, nn

from alexlab.data.datamodule import ImageFolders, default_threads
from alexlab.data.dataset import Batch
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

COUNT, BATCH = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class per image, so that the targets identify the images."""
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
    """Records the images that it receives."""

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
        """Let validation run between the epochs, as in a real run."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data: ImageFolders, epochs: int, folder: Path, ckpt_path: Path | None = None, **more: object) -> Recorder:
    model = Recorder()
    checkpoint = pl.callbacks.ModelCheckpoint(
        folder, "last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings = {"max_epochs": epochs, "accelerator": "cpu", "use_distributed_sampler": False} | quiet | more
    trainer = pl.Trainer(callbacks=[checkpoint], **settings)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model


def order(epoch: int) -> list[int]:
    """Return NumPy's permutation for (seed, epoch)."""
    return np.random.Generator(np.random.PCG64([5, epoch])).permutation(COUNT).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_its_own_order_and_crops_also_after_a_resume(folder: Path, tmp_path: Path, workers: int) -> None:
    model = train(data_of(folder, workers), 2, tmp_path)
    resumed = train(data_of(folder, workers), 4, tmp_path, tmp_path / "last.ckpt")
    assert model.seen == {0: order(0), 1: order(1)}
    assert resumed.seen == {2: order(2), 3: order(3)}
    assert order(0) != order(1) != order(2)
    changed = [not torch.equal(model.pixels[0, i], model.pixels[1, i]) for i in range(COUNT)]
    assert sum(changed) > COUNT // 2, "an image is cropped anew in each epoch"


def test_overfitting_repeats_the_same_batches(folder: Path, tmp_path: Path) -> None:
    model = train(data_of(folder), 3, tmp_path, overfit_batches=2)
    assert model.seen == {epoch: order(0)[: 2 * BATCH] for epoch in range(3)}


def test_the_default_number_of_threads_is_the_cores_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexlab.data.datamodule.cores", lambda: 16)
    assert [default_threads(devices) for devices in (1, 8, 32)] == [12, 2, 1], "at most as Python's lock allows"


def test_the_number_of_classes_must_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.num_classes=7, but .* contains 12 classes: data.num_classes=null"):
        data_of(folder, num_classes=7).read()
    for split in ("train", "val"):
        photo(tmp_path / split / "images" / "cat" / "1.jpg")
    with pytest.raises(UserError, match=r"only one class, images: .* images/ contains cat: are these the classes\?"):
        data_of(tmp_path).read()


def test_one_folder_is_split_by_fractions(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for i in range(10):
            photo(tmp_path / label / f"{i}.jpg", seed=i)
    data = data_of(tmp_path, val_fraction=0.2, test_fraction=0.1).read()
    assert data.images == {"train": 14, "val": 4, "test": 2}
    assert data.test_split == "test"
    assert data.describe()["num_classes"] == 2
    assert set(data.describe()["fingerprint"]) == {"train", "val", "test"}
