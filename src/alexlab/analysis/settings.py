"""What sets runs apart: their settings, where they differ and where that makes a difference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alexlab.engine.kinds import printable, shown
from alexlab.engine.settings import LIMITS, same_as

if TYPE_CHECKING:
    from alexlab.analysis.runs import Run


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


def _is_null(value: Any, key: str) -> bool:
    return value is None or (key in LIMITS and same_as(value, key) == same_as(None, key))


def told(settings: dict[str, Any]) -> str:
    """In words; numbers to six places, as json has them whole."""
    return printable(
        " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={shown(v)}" for k, v in settings.items())
    )
