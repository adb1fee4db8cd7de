"""The settings in which runs differ, for run names and comparisons."""

import json
from pathlib import Path
from typing import Any

from alexlab.engine.config import flat
from alexlab.engine.overrides import by_key

# Keys that do not change what is trained, or that repeat another key; "" is the top.
IGNORED_IN = {
    "": "run run_dir overrides paths sweep command dry_run allow test logger metrics resume from_run from_wandb "
    "repeats floats",
    "callbacks.": "progress figures lr_monitor model_summary device_stats grad_norm",
    "checkpoint.": "every_n_steps every_minutes keep",
    "choices.": "logger callbacks metrics",
    "data.": "num_workers timeout num_classes",
    "model.net.": "name",
    "model.training.": "lr warmup weight_decay",
    "trainer.": "log_every_n_steps profiler timeout master_port lr_find batch_size_find",
}
REPETITIONS = ("seed", "data.fold")  # runs that differ in nothing else repeat one setting
IGNORED = {group + name for group, names in IGNORED_IN.items() for name in names.split()}

# What null means for these keys. A float is a fraction and an integer a number of batches: 1.0 is all, 1 is one batch.
NULL_LIMITS: dict[str, Any] = {f"trainer.limit_{split}_batches": 1.0 for split in ("train", "val", "test")}
NULL_LIMITS |= {"trainer.overfit_batches": 0.0, "data.sampler": "shuffle"}  # older runs lack the last one


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the flat config ("optimizer.lr") without the keys that make no difference."""
    settings = {key: value for key, value in flat(config).items() if not {key, key.split(".")[0]} & IGNORED}
    if is_own_checkpoint(config):
        settings["ckpt_path"] = None
    if "model.pretrained" in settings:
        settings.pop("model.net.pretrained", None)  # it repeats model.pretrained
    if "model.name" in settings:
        settings.setdefault("model.in_channels", 3)  # older runs lack it
        settings.pop("model.net.in_channels", None)
    return settings


def is_own_checkpoint(config: dict[str, Any]) -> bool:
    """Return whether `ckpt_path` is a checkpoint of the run itself, as it is after a resume."""
    ckpt_path, run_dir = config.get("ckpt_path"), config.get("run_dir")
    if not isinstance(ckpt_path, str) or not isinstance(run_dir, str):
        return False
    return Path(ckpt_path).parent.resolve() == Path(run_dir, "checkpoints").resolve()  # either may be below a link


def overridden_keys(config: dict[str, Any]) -> set[str]:
    """Return the keys that the run's command line set."""
    overrides = config.get("overrides")
    return set(by_key(overrides)) if isinstance(overrides, list) else set()


def canonical(value: Any, key: str = "") -> str:
    """Return a text that is equal for equal settings: 1 and 1.0, except for NULL_LIMITS, but not 1, true and "1"."""
    if key in NULL_LIMITS:
        value = NULL_LIMITS[key] if value is None else value
        return repr(value) if value else "0"
    if isinstance(value, str):
        return f'"{value}'  # only strings begin with a quote
    if value is None or isinstance(value, bool | int):
        return str(value)
    return json.dumps(_whole_as_int(value), sort_keys=True, default=str)


def _whole_as_int(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {str(key): _whole_as_int(item) for key, item in value.items()}
    return [_whole_as_int(item) for item in value] if isinstance(value, list | tuple) else value
