"""Runs of a tiny network in this process, stopped where a test wants it, and compared with uninterrupted ones."""

import contextlib
import copy
import csv
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from alexlab.callbacks.checkpointing import Checkpointing
from alexlab.commands import train as run
from alexlab.engine import targets
from alexlab.engine.schema import TrainConfig
from alexlab.tasks import load

IMAGES = ["data=folder", "data.image_size=32", "data.batch_size=8", "data.num_workers=0", "augment=strong"]
LOGS = ["logger=csv", "callbacks.figures=false", "callbacks.progress=none", "callbacks.model_summary=0"]
STEPS = ["trainer.max_epochs=2", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=1"]
OVERRIDES = [*IMAGES, *LOGS, *STEPS, "trainer.accelerator=cpu", "model.net.dropout=0.5"]
composed_once = functools.cache(composed)  # composing takes longer than a few steps of the tiny network


def own_schedule(target: str, *keys: str) -> list[str]:
    """Return overrides for a schedule by _target_, as a yaml of a user's would set it."""
    removed = [f"~scheduler.{key}" for key in ("name", "unit", "warmup")]
    return ["scheduler=constant", *removed, f"+scheduler._target_={target}", *(f"+scheduler.{key}" for key in keys)]


class TinyNet(nn.Module):
    """Has what a resume could forget: BatchNorm's statistics and dropout."""

    def __init__(self, num_classes: int, **_: Any) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Dropout(0.3))
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images))

    def group_matcher(self, coarse: bool) -> Callable[[str], int]:
        """Return the number of the layer of a parameter, for optimizer.layer_decay."""
        return lambda name: int(name.startswith("head"))


class Killed(BaseException):
    """Stands for a process that was killed."""


class Harness:
    """Trains on the images in `root`, in run directories below `folder`."""

    def __init__(self, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.folder, self.monkeypatch = root, folder, monkeypatch
        for module in (targets, load):
            monkeypatch.setattr(module, "build_network", lambda _, num_classes, **__: TinyNet(num_classes))

    def train(self, name: str, *words: str) -> Path:
        plain = copy.deepcopy(composed_once(*OVERRIDES, f"data.root={self.root}", *words))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the network is tiny
        try:
            run.train(TrainConfig.model_validate({**plain, "run_dir": str(self.folder / name)}))
        finally:
            torch.set_num_threads(threads)
        return self.folder / name

    def stop(self, at: "Callable[[Checkpointing, str], bool]", name: str, *words: str) -> Path:
        """Train until `at(checkpointing, "before" or "after" the end of a batch)` is true."""
        plain = Checkpointing._after_step

        def after_step(self: Checkpointing, fetcher: Any) -> None:
            if at(self, "before"):
                raise Killed
            plain(self, fetcher)
            if at(self, "after"):
                raise Killed

        with self.monkeypatch.context() as patch:
            patch.setattr(Checkpointing, "_after_step", after_step)
            with pytest.raises(Killed):
                self.train(name, *words)
        return self.folder / name

    def train_with_stops(self, name: str, stops: "list[tuple[int, str]]", *words: str) -> Path:
        """Train from scratch; stop at each (batch, "before" or "after"), and resume with another number of workers."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        for n, (count, place) in enumerate(stops):
            self.stop(at_batch(count, place), name, *words, "resume.run=auto", f"data.num_workers={n % 3}")
        return self.train(name, *words, "resume.run=auto", f"data.num_workers={len(stops) % 3}")

    @contextlib.contextmanager
    def own_callbacks(self, *callbacks: Callback) -> Iterator[None]:
        """Add callbacks to the runs of this block, as a user's own."""
        with self.monkeypatch.context() as patch:
            patch.setattr("alexlab.commands.build.build_own_callbacks", lambda *_: [*callbacks])
            yield


def at_batch(count: int, place: str) -> "Callable[[Checkpointing, str], bool]":
    """Stop "before" or "after" the end of batch `count` of the run."""
    return lambda checkpointing, where: (
        where == place and checkpointing.trainer.fit_loop.epoch_loop.batch_progress.total.completed == count
    )


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    """Read metrics.csv without what a clock measured."""
    with (run_dir / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("perf/")} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"epoch", "step"}]


def difference(one: Path, other: Path) -> str | None:
    """Return the first difference of two runs: weights, states, rows of metrics, or summary."""
    a, b = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (one, other))
    for key, value in a["state_dict"].items():
        if not torch.equal(value, b["state_dict"][key]):
            return f"{key} differs by {(value.float() - b['state_dict'][key].float()).abs().max()}"
    for part in ("optimizer_states", "lr_schedulers"):
        if str(a[part]) != str(b[part]):
            return part
    best, other_best = (torch.load(path / "checkpoints/best.ckpt", weights_only=True) for path in (one, other))
    if any(not torch.equal(value, other_best["state_dict"][key]) for key, value in best["state_dict"].items()):
        return "best.ckpt"
    for n, (row, other_row) in enumerate(itertools.zip_longest(rows_of(one), rows_of(other))):
        if row != other_row:
            return f"row {n} of metrics.csv: {row} and {other_row}"
    ends = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    for key in ("status", "best", "best_epoch", "last", "test"):
        if ends[0][key] != ends[1][key]:
            return f"{key} in summary.json: {ends[0][key]} and {ends[1][key]}"
    return None
