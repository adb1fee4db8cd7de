"""How many runs that are stopped after a batch and resumed equal a run that was not stopped, Lightning's and ours.

python benchmarks/resume.py

All runs train the same small network with BatchNorm and dropout on the same drawn shapes, on a CPU, for two epochs of
five batches. A run counts as equal if weights, optimizer state and logged training losses are equal bit for bit.
Lightning is used as its documentation shows: seed_everything, a shuffling DataLoader, and a checkpoint callback.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from resuming import Harness, Killed, TinyNet, at_batch, difference

from alexlab.commands import cli
from alexlab.data.demo import write_demo

BATCHES = 10


class Stock(pl.LightningModule):
    """The LightningModule of a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet(10)
        self.losses: dict[int, float] = {}
        self.epoch_losses: dict[int, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.losses[self.trainer.global_step] = float(loss)
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epoch_losses[self.current_epoch] = float(self.trainer.callback_metrics["loss_epoch"])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class End(Callback):
    """Stop the run after a batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        if progress.processed == self.count:
            raise Killed


def stock(root: Path, folder: Path, callback: Callable[[], Callback], end: int | None, ckpt: Path | None) -> Stock:
    pl.seed_everything(0, verbose=False)
    steps = v2.Compose(
        [v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32)]
    )
    train = DataLoader(ImageFolder(str(root / "train"), steps), 8, shuffle=True)
    val = DataLoader(ImageFolder(str(root / "val"), steps), 8)
    model = Stock()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=str(folder),
        callbacks=[callback(), *([End(end)] if end is not None else [])],
    )  # fmt: skip
    trainer.fit(model, train, val, ckpt_path=ckpt, weights_only=False)
    return model


def same(a: Stock, b: Stock) -> bool:
    weights = all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    steps = all(a.losses.get(step) == loss for step, loss in b.losses.items())
    return weights and steps and all(a.epoch_losses.get(epoch) == loss for epoch, loss in b.epoch_losses.items())


def of_stock(root: Path, folder: Path, name: str, make: Callable[[Path], Callback]) -> str:
    equal = 0
    straight = stock(root, folder / name, lambda: make(folder / name / "straight"), None, None)
    for count in range(1, BATCHES + 1):
        place = folder / name / str(count)
        with contextlib.suppress(Killed):
            stock(root, place, lambda place=place: make(place), count, None)  # type: ignore[misc]
        ckpts = sorted(place.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        again = stock(root, place, lambda place=place: make(place), None, ckpts[-1] if ckpts else None)  # type: ignore[misc]
        equal += same(straight, again)
    return f"{equal} of {BATCHES}"


def of_ours(root: Path, folder: Path, place: str, *overrides: str) -> str:
    equal = 0
    with pytest.MonkeyPatch.context() as patch:
        harness = Harness(root, folder, patch)
        straight = harness.train("straight", *overrides)
        for count in range(1, BATCHES + 1):
            harness.stop(at_batch(count, place), str(count), *overrides)
            equal += difference(straight, harness.train(str(count), *overrides, "resume.run=auto")) is None
    return f"{equal} of {BATCHES}"


def main() -> None:
    warnings.filterwarnings("ignore")
    for noisy in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    cli.register_resolvers("")
    stocks: dict[str, Callable[[Path], Callback]] = {
        "each step": lambda p: ModelCheckpoint(p, save_last=True, every_n_train_steps=1, save_top_k=0),
        "each epoch": lambda p: ModelCheckpoint(p, save_last=True),
        "an exception": lambda p: OnExceptionCheckpoint(p),
    }
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "shapes")
        write_demo(root, per_class={"train": 4, "val": 2, "test": 1})
        rows: list[tuple[str, str]] = []
        with contextlib.redirect_stdout(io.StringIO()):
            for when, make in stocks.items():
                rows.append(
                    (f"Lightning {pl.__version__}, checkpoint at {when}", of_stock(root, Path(name), when, make))
                )
            for place in ("before", "after"):
                ours = of_ours(root, Path(name, f"ours-{place}"), place)
                rows.append((f"ours, each step, stopped {place} a step's checkpoint", ours))
            epochs = of_ours(root, Path(name, "ours-epochs"), "after", "checkpoint.every_n_steps=null")
            rows.append(("ours, each epoch", epochs))
    for what, equal in rows:
        print(f"{what:60s} {equal} are equal")


if __name__ == "__main__":
    main()
