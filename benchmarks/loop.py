"""What Lightning's loop with our classifier, callbacks and loggers costs over a bare PyTorch loop on the same batches.

python benchmarks/loop.py [--rounds 5] [--steps 1000] [--only tiny]      On a CPU that does nothing else.

Both loops train the same network on the same in-memory uint8 batches with the same optimizer, in turn, round by round,
in one process. The first step of each round is not counted. The script prints a line per network, and JSON. `host_ms`
is the difference of the medians, in milliseconds per step.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import ROOT, about, options
from pytorch_lightning.callbacks import Callback
from torch import nn

sys.path.insert(0, str(ROOT / "tests"))
from conftest import config_of

from alexlab.callbacks.preemption import SignalRecorder
from alexlab.commands.build import build_callbacks, build_loggers, build_trainer
from alexlab.commands.plan import Plan
from alexlab.data.dataset import Batch
from alexlab.engine.devices import Devices, choose_precision
from alexlab.engine.memory import keep_memory
from alexlab.models.alexnet import AlexNet
from alexlab.tasks import optimizers as optim
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import RunInfo
from alexlab.tasks.classification import ImageClassifier

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OVERRIDES = ["trainer=cpu", "scheduler=constant", "trainer.max_epochs=1", "callbacks.progress=none"]
OVERRIDES += ["logger.wandb.mode=offline"]


class Batches:
    """`count` passes over a few uint8 batches (images, targets, skipped)."""

    def __init__(self, count: int, batch: int, size: int) -> None:
        self.count, self.batch = count, batch
        self.batches: list[Any] = [
            Batch(torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8), torch.randint(0, 10, (batch,)), {})
            for _ in range(4)
        ]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.count))


class Clock(Callback):
    """Measures the time from the end of the first step to the end of the last step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step == 1:
            self.start = now
        self.end = now


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def bare(net: nn.Module, batches: Batches, settings: dict[str, Any], bf16: bool) -> float:
    """Return the seconds per step of the plain loop."""
    augment = BatchAugment(MEAN, STD, 10)
    optimizer = optim.build_optimizer(net, settings, 64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    start = 0.0
    for step, (images, targets, *_) in enumerate(batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(augment.normalize(images)), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (len(batches) - 1)


def lightning(net: nn.Module, batches: Batches, folder: Path) -> float:
    """Return the seconds per step of train.py's Trainer: its default callbacks, metrics.csv and W&B offline."""
    folder.mkdir(parents=True)
    config = config_of(*OVERRIDES, f"data.batch_size={batches.batch}", run_dir=folder)
    count = len(batches)
    plan = Plan(batches.batch, batches.batch, batches.batch, count, count, count, 0, config.optimizer.lr)
    settings = optim.OptimizerSettings(
        config.optimizer.model_dump(exclude_unset=True), config.scheduler.model_dump(), batches.batch, count, count
    )
    run = RunInfo(class_names=[str(i) for i in range(10)])
    task = ImageClassifier(net, BatchAugment(MEAN, STD, 10), optimizer=settings, run=run)
    loggers, wandb = build_loggers(config)
    if wandb is not None:
        wandb.start()
    preemption, checkpointing, callbacks = build_callbacks(config, SignalRecorder(), plan, wandb)
    clock = Clock()
    trainer = build_trainer(config, Devices("cpu", 1, 1), loggers, [*callbacks, clock])
    preemption.install(trainer)
    checkpointing.install(trainer)
    trainer.fit(task, train_dataloaders=batches)
    if wandb is not None:
        wandb.finish("finished")
    return (clock.end - clock.start) / (count - 1)


def measure(name: str, make: Any, size: int, batch: int, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    batches = Batches(steps, batch, size)
    settings = config_of(*OVERRIDES, f"data.batch_size={batch}").optimizer.model_dump(exclude_unset=True)
    bf16 = str(choose_precision("auto", "cpu")) == "bf16-mixed"
    times: dict[str, list[float]] = {"bare": [], "lightning": []}
    for number in range(rounds + 1):  # the first round warms up
        torch.manual_seed(0)
        first = bare(make(), batches, settings, bf16)
        torch.manual_seed(0)
        second = lightning(make(), batches, folder / f"{name}-{number}")
        if number:
            times["bare"].append(first)
            times["lightning"].append(second)
    medians = {key: statistics.median(values) for key, values in times.items()}
    ratios = [b / a for a, b in zip(times["bare"], times["lightning"], strict=True)]
    host = medians["lightning"] - medians["bare"]
    return {
        "net": name,
        **{f"{key}_ms": round(median * 1e3, 3) for key, median in medians.items()},
        "ratio": round(statistics.median(ratios), 4),
        "host_ms": round(host * 1e3, 3),
    }


def main() -> None:
    args = options(__doc__, rounds=5, steps=1000, only=["tiny", "alexnet"])
    warnings.filterwarnings("ignore")
    keep_memory()  # as a run does
    nets = {"tiny": (tiny, 8, 8, args.steps), "alexnet": (lambda: AlexNet(10), 64, 64, max(2, args.steps // 40))}
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, *nets[name], args.rounds, Path(folder)) for name in args.only]
    for result in results:
        print("{net:8} bare {bare_ms} ms, Lightning {lightning_ms} ms: {host_ms} ms/step, x{ratio}".format(**result))
    threads = torch.get_num_threads()
    print(about("torch", "pytorch-lightning", rounds=args.rounds, steps=args.steps, threads=threads, results=results))


if __name__ == "__main__":
    main()
