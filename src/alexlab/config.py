"""The rules that a composed config must keep, checked together and told together; reading and writing config.yaml."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexlab.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]  # in words, and as a test


def _number(words: str, test: Callable[[float], bool]) -> Rule:
    return words, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and test(v)


def _whole(words: str, least: int) -> Rule:
    return words, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


def _one_of(*options: Any) -> Rule:
    return f"one of {', '.join(map(str, options))}", lambda v: v in options


SWITCH: Rule = ("true or false", lambda v: isinstance(v, bool))
SHARE = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
ABOVE_0 = _number("a number above 0", lambda v: v > 0)
FROM_0 = _number("a number, at least 0", lambda v: v >= 0)
PRECISIONS = ("auto", "32", "32-true", "bf16", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 32, 64, 16)

RULES: dict[str, Rule] = {
    "seed": _whole("a whole number, at least 0", 0),
    "label_smoothing": _number("a number from 0 to below 1", lambda v: 0 <= v < 1),
    "compile": SWITCH,
    "test": SWITCH,
    "dry_run": SWITCH,
    "mode": _one_of("min", "max"),
    "ema.decay": _or_null(_number("a number above 0 and below 1", lambda v: 0 < v < 1)),
    "sweep.keep_going": SWITCH,
    "data.batch_size": _whole("a whole number, at least 1", 1),
    "data.image_size": _whole("a whole number of pixels, at least 8", 8),
    "data.num_workers": _or_null(_whole("a whole number, at least 0", 0)),
    "data.num_classes": _or_null(_whole("a whole number, at least 2", 2)),
    "data.val_fraction": _or_null(_number("a number above 0 and below 1", lambda v: 0 < v < 1)),
    "data.test_fraction": _number("a number from 0 to below 1", lambda v: 0 <= v < 1),
    "data.on_error": _one_of("raise", "skip"),
    "callbacks.progress": _one_of("auto", "rich", "plain", "none"),
    "callbacks.early_stopping": _or_null(_whole("a whole number of epochs, at least 1", 1)),
    "augment.crop": _one_of("random_resized", "random", "center"),
    "augment.crop_ratio": _number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "augment.flip": SHARE,
    "augment.policy": _one_of("none", "trivial", "rand"),
    "augment.pca": FROM_0,
    "augment.erase": SHARE,
    "augment.mixup": FROM_0,
    "augment.cutmix": FROM_0,
    "optimizer.lr": ABOVE_0,
    "optimizer.weight_decay": FROM_0,
    "optimizer.momentum": _number("a number from 0 to below 1", lambda v: 0 <= v < 1),
    "optimizer.decay_norm_and_bias": SWITCH,
    "optimizer.fused": _one_of("auto", True, False),
    "optimizer.lr_reference_batch": _or_null(_whole("a whole number, at least 1", 1)),
    "scheduler.warmup": FROM_0,
    "scheduler.unit": _one_of("epoch", "step"),
    "scheduler.step_size": ABOVE_0,
    "scheduler.gamma": _number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "scheduler.factor": _number("a number above 0 and below 1", lambda v: 0 < v < 1),
    "scheduler.patience": _whole("a whole number, at least 0", 0),
    "scheduler.min_factor": SHARE,
    "trainer.max_epochs": _or_null(_whole("a whole number, at least -1", -1)),
    "trainer.max_steps": _whole("a whole number, at least -1", -1),
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": ("auto, a whole number above 0, or a list of GPU numbers", lambda v: _devices(v)),
    "trainer.num_nodes": _whole("a whole number, at least 1", 1),
    "trainer.strategy": _one_of("auto", "ddp", "fsdp"),
    "trainer.precision": _one_of(*PRECISIONS),
    "trainer.accumulate_grad_batches": _whole("a whole number, at least 1", 1),
    "trainer.gradient_clip_val": _or_null(ABOVE_0),
    "trainer.timeout": ABOVE_0,
    "trainer.channels_last": _one_of("auto", True, False),
    "trainer.master_port": _or_null(
        ("a port from 1 to 65535", lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 < v < 65536)
    ),
}


def _devices(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(v, int) and v >= 0 for v in value)
    return value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def check(config: DictConfig) -> None:
    """Raises UserError with every value that breaks its rule, one a line."""
    plain = OmegaConf.to_container(config, resolve=False)
    wrong = []
    for key, (words, test) in RULES.items():
        value: Any = plain
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT and not (isinstance(value, str) and "${" in value) and not test(value):
            wrong.append(f"{key}={value}: must be {words}.")
    data = plain.get("data", {}) if isinstance(plain, dict) else {}
    if data.get("root") in (None, "???"):
        wrong.append("data.root is missing: give the folder of the images with data.root=PATH.")
    if wrong:
        raise UserError(
            wrong[0] if len(wrong) == 1 else f"{len(wrong)} values of the config are wrong:\n  " + "\n  ".join(wrong)
        )


_ABSENT = object()


def resolved(config: DictConfig) -> DictConfig:
    """A copy without interpolations, its data root absolute (relative ones are seen from the working directory)."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["data"]["root"] = os.path.abspath(os.path.expanduser(str(plain["data"]["root"])))  # noqa: PTH100, PTH111
    return OmegaConf.create(plain)


def plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def save(config: DictConfig, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(config, resolve=True))


def load(path: Path) -> DictConfig:
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return loaded
