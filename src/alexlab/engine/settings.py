"""What of a run's config sets it apart from other runs."""

import json
import os
from pathlib import PurePath
from typing import Any

from alexlab.engine.config import flat

# differ without making a difference, or say again what another key says
IGNORED = {
    "run", "run_dir", "overrides", "paths", "sweep", "task", "dry_run", "test", "logger", "resume",
    "callbacks.progress", "callbacks.figures", "callbacks.lr_monitor", "callbacks.model_summary",
    "callbacks.device_stats", "callbacks.grad_norm", "data.num_workers", "data.timeout", "data.num_classes",
    "model.net.name", "trainer.log_every_n_steps", "trainer.profiler", "trainer.timeout", "trainer.master_port",
    "choices.logger", "choices.callbacks", "checkpoint.every_n_steps", "checkpoint.every_minutes", "from_run",
    "from_wandb", "repeats", "floats",
}  # fmt: skip


CKPTS = ("last.ckpt", "previous.ckpt")  # that a run goes on from


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Flat, without what makes no difference."""
    found = {key: value for key, value in flat(config).items() if not {key, key.split(".")[0]} & IGNORED}
    if own_ckpt(config):  # it was gone on with
        found["ckpt_path"] = None
    if "model.pretrained" in found:  # which says the same
        found.pop("model.net.pretrained", None)
    return found


def own_ckpt(config: dict[str, Any]) -> bool:
    """Whether a run's config names a checkpoint of the run's own, as it does after a resume."""
    ckpt, run_dir = config.get("ckpt_path"), config.get("run_dir")
    if not isinstance(ckpt, str):
        return False
    if run_dir:
        folder = PurePath(str(run_dir), "checkpoints")
        return PurePath(ckpt).parent == folder or os.path.realpath(os.path.dirname(ckpt)) == os.path.realpath(folder)  # noqa: PTH120
    gone_on = config.get("resume")  # in W&B, which hears of no folders, and of another run's the name before it
    return isinstance(gone_on, dict) and gone_on.get("run") is not None and ckpt in CKPTS


def words_of(config: dict[str, Any]) -> set[str]:
    """The keys that the run's command line gave."""
    words = config.get("overrides")
    return {str(word).lstrip("+~").partition("=")[0] for word in words} if isinstance(words, list) else set()


LIMITS = {f"trainer.limit_{name}_batches": 1.0 for name in ("train", "val", "test")}  # what null is
LIMITS["trainer.overfit_batches"] = 0.0


def same_as(value: Any, key: str = "") -> str:
    """Equal for equal values: 1 and true are none; 1 and 1.0 are, but where 1.0 is all batches, and 1 is one."""
    if key in LIMITS:
        value = LIMITS[key] if value is None else value
        return repr(value) if value else "0"
    if isinstance(value, str):
        return f'"{value}'  # as no other begins
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value)
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
