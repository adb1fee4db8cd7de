"""What sets runs apart: their settings, where they differ and where that makes a difference."""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from alexlab.config import flat
from alexlab.kinds import printable, shown

if TYPE_CHECKING:
    from alexlab.compare.runs import Run

# differ without making a difference, or say again what another key says
IGNORED = {
    "run", "run_dir", "overrides", "paths", "sweep", "task", "dry_run", "test", "logger", "resume",
    "callbacks.progress", "callbacks.figures", "callbacks.lr_monitor", "callbacks.model_summary",
    "callbacks.device_stats", "callbacks.grad_norm", "data.num_workers", "data.timeout", "data.num_classes",
    "model.net.name", "trainer.log_every_n_steps", "trainer.profiler", "trainer.timeout", "trainer.master_port",
    "choices.logger", "choices.callbacks", "checkpoint.every_n_steps", "checkpoint.every_minutes", "from_run",
    "from_wandb", "repeats", "floats",
}  # fmt: skip


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
    where = PurePath(ckpt)
    return (
        where.parent == PurePath(str(run_dir), "checkpoints")
        if run_dir
        else ckpt in ("last.ckpt", "previous.ckpt")  # of W&B; another run's has that run's name before it
    )


def words_of(config: dict[str, Any]) -> set[str]:
    """The keys that the run's command line gave."""
    words = config.get("overrides")
    return {str(word).lstrip("+~").partition("=")[0] for word in words} if isinstance(words, list) else set()


def differing(runs: "Sequence[Run]") -> list[dict[str, Any]]:
    """Of each run the settings that set it apart.

    What an option brings with it (augment=strong its erasing, model=timm another net) is told by the option: a group's
    other keys count where runs with the same option and name differ, or where a run's command line gave them.
    """
    found: list[dict[str, Any]] = [{} for _ in runs]
    known = [run for run in runs if run.config]  # of W&B's file that was cut early nothing is known
    if len(known) < len(runs):
        told_of = iter(differing(known))
        return [next(told_of) if run.config else {} for run in runs]
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    given = {key for run in runs for key in run.given}
    absent = object()
    for key in keys:
        everywhere = [run.config.get(key, absent) for run in runs]
        same = [value if value is absent else same_as(value) for value in everywhere]
        if not any(value != same[0] for value in same):
            continue
        group = key.split(".")[0]
        names = [name for name in (f"choices.{group}", f"{group}.name", f"{group}._target_") if name in keys]
        names = [name for name in names if all(name in run.config for run in runs)]  # older runs lack `choices`
        if group == "choices" and key not in names and not all(key in run.config for run in runs):
            continue
        peers: dict[Any, list[int]] = {}
        for number, run in enumerate(runs):
            told_by = [] if key in given else names[: names.index(key) if key in names else None]
            peers.setdefault(tuple(str(run.config.get(name)) for name in told_by), []).append(number)
        for members in peers.values():
            values = [same[number] for number in members]
            if any(value != values[0] for value in values):
                for number in members:
                    if everywhere[number] is not absent:
                        found[number][key.removeprefix("choices.")] = everywhere[number]
    return found


def same_as(value: Any) -> str:
    """Equal for equal values: 1 and true are none, 1 and 1.0 are."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def told(settings: dict[str, Any]) -> str:
    """In words; numbers to six places, as json has them whole."""
    return printable(
        " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={shown(v)}" for k, v in settings.items())
    )
