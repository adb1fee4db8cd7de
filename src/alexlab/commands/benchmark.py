"""`alexlab benchmark`: measure decoding, the loader, the device and the whole training, and say which one limits it."""

import itertools
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from alexlab.commands import plan as plans
from alexlab.commands.build import build_data, build_task, plain_trainer
from alexlab.commands.build_transforms import build_transforms
from alexlab.commands.summary import INPUT_BOUND, bound_by
from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import Batch
from alexlab.data.reader_threads import ReaderThreads
from alexlab.data.sources import need_index
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.memory import keep_memory
from alexlab.engine.run_dir import quiet_libraries
from alexlab.engine.schema import BenchmarkConfig

WARM_UP = 3  # steps that are not counted


def benchmark(config: BenchmarkConfig) -> None:
    """Measure decoding, loader, device and training on one device, `config.seconds` each; print images per second."""
    devices = Devices(find_devices(config.trainer).kind, local=1, nodes=1)
    if devices.kind == "cpu":
        keep_memory()
    plain = config.model_dump(exclude_unset=True)
    plain["trainer"] |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    # training on one batch again and again must not make the weights NaN
    plain["optimizer"] |= {"lr": 1e-9, "lr_reference_batch": None}
    plain["scheduler"] = {"name": "constant"}  # OneCycleLR ends after the steps of the run
    config = BenchmarkConfig.model_validate(plain)
    quiet_libraries()
    logging.getLogger("alexlab").setLevel(logging.WARNING)
    user = build_transforms(config, trusted=None)
    data = need_index(build_data(config, devices, user, None), "benchmark").read()
    plan = plans.make_plan(config, 1, data.images)
    rates: dict[str, Any] = {"decode_only": decode_only(data, config.seconds)}
    rates["loader"] = rate_of((len(batch.images) for batch in endless(data)), config.seconds)
    batch = next(iter(data.train_dataloader()))
    rates["device"] = trained(config, devices.kind, data, plan, itertools.repeat(batch))
    rates["end_to_end"] = trained(config, devices.kind, data, plan, endless(data))
    rates = {name: round(rate, 1) for name, rate in rates.items()}
    bound = "input" if rates["loader"] < rates["device"] else "device"
    if config.format == "json":
        print(json.dumps({**rates, "bound_by": bound}), flush=True)
        return
    print(f"{config.model.name}, {data.root.name}, {devices.kind}, batch {config.data.batch_size}")
    labels = ("decoding alone", "the loader alone", "the device alone, on one batch", "the whole training")
    for label, rate in zip(labels, rates.values(), strict=True):
        print(f"{label:30} {rate:9,.0f} images/s")
    print(verdict(rates, bound, data, devices.kind), flush=True)


def verdict(rates: dict[str, float], bound: str, data: ImageFolders, kind: str) -> str:
    """Say what limits the training, and what would help."""
    reached = rates["end_to_end"] / rates["device"]
    if bound == "input":
        return bound_by(max(INPUT_BOUND, 1 - reached), data)
    line = f"Device-bound: the loader alone is {rates['loader'] / rates['device']:.1f} times as fast."
    shared = f" Both share the CPU's cores: the training reaches {reached:.0%} of the device alone."
    return line + (shared if kind == "cpu" and reached < 0.95 else "")


def decode_only(data: ImageFolders, seconds: float) -> float:
    """Return how many images per second are read and decoded at full size."""
    index = data.splits["train"]
    size = min(len(index), 64 * max(1, data.num_workers))

    def decode(i: int) -> None:
        try:
            index.picture(i).pixels(channels=data.transforms["train"].channels)
        except OSError:
            if data.on_error == "raise":
                raise

    def batches() -> Iterator[int]:
        with ReaderThreads(max(1, data.num_workers)) as pool:
            while True:
                for start in range(0, len(index), size):
                    part = range(start, min(start + size, len(index)))
                    list(pool.map(decode, part))
                    yield len(part)

    return rate_of(batches(), seconds)


def endless(data: ImageFolders) -> Iterator[Batch]:
    """Yield the batches of epoch after epoch."""
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from loader
        epoch += 1


def rate_of(counts: Iterator[int], seconds: float) -> float:
    """Return the sum of `counts` per second; the first WARM_UP counts are skipped."""
    for _ in range(WARM_UP):
        next(counts)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += next(counts)
    return done / (time.perf_counter() - start)


def timed(batches: Iterator[Batch], seconds: float, kind: str, rates: list[float]) -> Iterator[Batch]:
    """Yield batches for some seconds after the warm-up, and append the images per second to `rates`."""

    def now() -> float:
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    yield from itertools.islice(batches, WARM_UP)
    start, images = now(), 0
    while time.perf_counter() - start < seconds:
        batch = next(batches)
        images += len(batch.targets)
        yield batch
    rates.append(images / (now() - start))


def trained(
    config: BenchmarkConfig, kind: str, data: ImageFolders, plan: plans.Plan, batches: Iterator[Batch]
) -> float:
    """Return images per second of Lightning's loop, with the task, precision and memory layout of a training."""
    pl.seed_everything(config.seed, verbose=False)
    model = build_task(config, data, kind, plan, trusted=None)
    if config.compile:
        model.net.compile()
    t, rates = config.trainer, list[float]()
    trainer = plain_trainer(
        kind,
        choose_precision(t.precision, kind),
        [],
        max_epochs=1,
        accumulate_grad_batches=t.accumulate_grad_batches,
        limit_val_batches=0,
        gradient_clip_val=t.gradient_clip_val,
        benchmark=t.cudnn_benchmark and kind == "cuda",
    )
    trainer.fit(model, train_dataloaders=timed(batches, config.seconds, kind, rates))
    return rates[0]
