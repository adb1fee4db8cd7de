"""What sets runs apart: their settings, where they differ and where that makes a difference."""

import json
import os
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


def comparable(runs: "Sequence[Run]") -> list[dict[str, str]]:
    """Of each run its settings as texts that are equal where the settings mean the same; null is left out, as what an
    older run did not know. Where a folder of images lies makes no difference between runs that know by a fingerprint
    that their images are the same."""
    found = []
    roots: dict[str, str] = {}
    for run in runs:
        texts = {key: same_as(value, key) for key, value in run.config.items() if not _is_null(value, key)}
        if "data.root" in texts and run.images is not None:
            texts["data.root"] = roots.setdefault(same_as(run.images), texts["data.root"])
        found.append(texts)
    return found


def differing(runs: "Sequence[Run]", texts: list[dict[str, str]] | None = None) -> list[dict[str, Any]]:
    """Of each run the settings that set it apart.

    What an option brings with it (augment=strong its erasing, model=timm another net) is told by the option: a group's
    other keys count where runs with the same option and name differ, or where a run's command line gave them: names and
    folders for that run alone, others (as max_epochs) for all.
    What no run of ours has, or of others in W&B, sets none of them apart.

    Args:
        texts: of `comparable`, where they are known.
    """
    texts = comparable(runs) if texts is None else texts
    found: list[dict[str, Any]] = [{} for _ in runs]
    known = [number for number, run in enumerate(runs) if run.config]  # of W&B's file that was cut early nothing is
    if len(known) < len(runs):
        told_of = iter(differing([runs[number] for number in known], [texts[number] for number in known]))
        return [next(told_of) if run.config else {} for run in runs]
    for key in dict.fromkeys(key for run in runs for key in run.config):
        if len({each.get(key) for each in texts}) == 1:
            continue
        having = {run.foreign for run in runs if key in run.config}
        among = [number for number, run in enumerate(runs) if run.foreign in having]
        group = key.split(".")[0]
        names = [f"choices.{group}", f"{group}.name", f"{group}._target_"]
        names = [name for name in names if all(name in runs[number].config for number in among)]  # older runs lack some
        if group == "choices" and key not in names and not all(key in runs[number].config for number in among):
            continue
        told_by = names[: names.index(key)] if key in names else names
        named = key in names or key == "data.root"
        if not named and any({key, key.removeprefix("choices.")} & runs[number].given for number in among):
            told_by = []
        peers: dict[Any, list[int]] = {}
        for number in among:
            peers.setdefault(tuple(texts[number].get(name) for name in told_by), []).append(number)
        differ: set[int] = set()
        for members in peers.values():
            if len({texts[number].get(key) for number in members}) > 1:
                differ |= set(members)
        if named and len({texts[number].get(key) for number in among}) > 1:
            differ |= {number for number in among if {key, key.removeprefix("choices.")} & runs[number].given}
        for number in differ:
            if key in runs[number].config:
                found[number][key.removeprefix("choices.")] = runs[number].config[key]
    return found


LIMITS = {f"trainer.limit_{name}_batches": 1.0 for name in ("train", "val", "test")}  # what null is
LIMITS["trainer.overfit_batches"] = 0.0


def _is_null(value: Any, key: str) -> bool:
    return value is None or (key in LIMITS and same_as(value, key) == same_as(None, key))


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


def told(settings: dict[str, Any]) -> str:
    """In words; numbers to six places, as json has them whole."""
    return printable(
        " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={shown(v)}" for k, v in settings.items())
    )
