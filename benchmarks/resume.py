"""How many runs that are stopped after a batch and resumed equal a run that was not stopped, Lightning's and ours.

python benchmarks/resume.py [--every 1]

All runs train the same small network with BatchNorm and dropout on the same drawn shapes, on a CPU, for two epochs of
five batches. They are stopped after each batch, or after every Nth. A resumed run counts as equal if weights, optimizer
state and logged training losses are equal bit for bit.
Lightning is used as its documentation shows: seed_everything, a shuffling DataLoader, and a checkpoint callback.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from common import ROOT, options
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(ROOT / "tests"))
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
    crop, flip = v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()
    steps = v2.Compose([crop, flip, v2.PILToTensor(), v2.ToDtype(torch.float32)])
    train = DataLoader(ImageFolder(str(root / "train"), steps), 8, shuffle=True)
    val = DataLoader(ImageFolder(str(root / "val"), steps), 8)
    model = Stock()
    settings: Any = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    trainer = pl.Trainer(callbacks=[callback(), *([End(end)] if end is not None else [])], **settings)
    trainer.fit(model, train, val, ckpt_path=ckpt, weights_only=False)
    return model


def same(a: Stock, b: Stock) -> bool:
    weights = all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    steps = all(a.losses.get(step) == loss for step, loss in b.losses.items())
    return weights and steps and all(a.epoch_losses.get(epoch) == loss for epoch, loss in b.epoch_losses.items())


def of_stock(root: Path, folder: Path, every: int, make: Callable[[Path], Callback]) -> list[bool]:
    equal = []
    straight = stock(root, folder, lambda: make(folder / "straight"), None, None)
    for count in range(every, BATCHES + 1, every):
        place = folder / str(count)
        with contextlib.suppress(Killed):
            stock(root, place, partial(make, place), count, None)
        ckpts = sorted(place.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        equal.append(same(straight, stock(root, place, partial(make, place), None, ckpts[-1] if ckpts else None)))
    return equal


def of_ours(root: Path, folder: Path, every: int, place: str, *overrides: str) -> list[bool]:
    equal = []
    with pytest.MonkeyPatch.context() as patch:
        harness = Harness(root, folder, patch)
        straight = harness.train("straight", *overrides)
        for count in range(every, BATCHES + 1, every):
            harness.stop(at_batch(count, place), str(count), *overrides)
            resumed = harness.train(str(count), *overrides, "resume.run=auto")
            equal.append(difference(straight, resumed) is None)
    return equal


def main() -> None:
    every = options(__doc__, every=1).every
    warnings.filterwarnings("ignore")
    for noisy in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    cli.register_resolvers("")
    with tempfile.TemporaryDirectory() as name:
        root, folder = Path(name, "shapes"), Path(name)
        write_demo(root, per_class={"train": 4, "val": 2, "test": 1})

        def lightning(when: str, make: Callable[[Path], Callback]) -> tuple[str, list[bool]]:
            return f"Lightning {pl.__version__}, checkpoint at {when}", of_stock(root, folder / when, every, make)

        def ours(when: str, place: str, *overrides: str) -> tuple[str, list[bool]]:
            return f"ours, {when}", of_ours(root, folder / when, every, place, *overrides)

        with contextlib.redirect_stdout(io.StringIO()):
            step: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": 0}
            rows = [
                lightning("each step", lambda path: ModelCheckpoint(path, save_last=True, **step)),
                lightning("each epoch", lambda path: ModelCheckpoint(path, save_last=True)),
                lightning("an exception", lambda path: OnExceptionCheckpoint(path)),
                ours("each step, stopped before a step's checkpoint", "before"),
                ours("each step, stopped after a step's checkpoint", "after"),
                ours("each epoch", "after", "checkpoint.every_n_steps=null"),
            ]
    for what, equal in rows:
        print(f"{what:60s} {sum(equal)} of {len(equal)} are equal")


if __name__ == "__main__":
    main()
