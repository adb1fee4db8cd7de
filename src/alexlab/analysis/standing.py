"""Where a run stands among its siblings: the finished runs below logs/train on the same images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexlab.analysis.finding import changed, find
from alexlab.analysis.groups import grouped, ranked
from alexlab.analysis.runs import Run, low_is_good, read
from alexlab.analysis.settings import differing, told
from alexlab.analysis.table import table
from alexlab.engine.settings import same_as

MOST = 1000  # runs that are looked at, the newest
SHOWN = 10  # jobs of a sweep


def siblings_of(run: Run, logs: Path) -> list[Run]:
    """The finished runs on the images of `run`, itself among them."""
    folders, _ = find([str(logs / "train")], logs / "train")
    if len(folders) > MOST:
        folders = sorted(folders, key=changed)[-MOST:]
    runs, _ = read([folder for folder in folders if folder != run.path])
    return [run, *(other for other in runs if other.status == "finished" and _scored_on(other) == _scored_on(run))]


def _scored_on(run: Run) -> tuple[Any, ...]:
    """The images, and how many of them."""
    limits = ("trainer.limit_val_batches", "trainer.overfit_batches")
    return run.images, *(same_as(run.config.get(key), key) for key in limits)


def stands(run_dir: Path, logs: Path, monitor: str) -> str | None:
    """Such as "3rd of 12 by val/acc1: 0.8123, 0.0222 below the best, NAME, which has optimizer.lr=0.02 (here 0.01)".

    None where nothing stands beside it, or it has no such number.
    """
    (run, *_), _ = read([run_dir.resolve()])
    if run.images is None or run.status != "finished":
        return None
    known = [other for other in siblings_of(run, logs) if monitor in other.numbers]
    if run not in known or len(known) < 2:
        return None
    mine, sign = run.numbers[monitor], 1 if low_is_good(monitor) else -1
    best = min(known, key=lambda other: sign * other.numbers[monitor])
    rank = 1 + sum(sign * other.numbers[monitor] < sign * mine for other in known)
    start = f"{ordinal(rank)} of {len(known)} by {monitor}: {mine:.4f}"
    if rank == 1:
        others = [other for other in known if other is not run]
        second = min(others, key=lambda other: sign * other.numbers[monitor])
        far = _far(abs(mine - second.numbers[monitor]), "above" if sign < 0 else "below")
        return f"{start}, {far} the next, {second.name}{_apart(second, run)}"
    far = _far(abs(mine - best.numbers[monitor]), "below" if sign < 0 else "above")
    return f"{start}, {far} the best, {best.name}{_apart(best, run)}"


def _far(distance: float, how: str) -> str:
    return "as" if not distance else f"{'less than 0.0001' if distance < 5e-5 else f'{distance:.4f}'} {how}"


def _apart(other: Run, run: Run) -> str:
    """In what the other differs; a few settings, as many make no sentence."""
    theirs, ours = differing([other, run])
    if not theirs and ours:
        return f", which has no {' and '.join(list(ours)[:4])}"
    if not theirs:
        facts = {key: value for key, value in other.facts.items() if value is not None and value != run.facts[key]}
        return f", with the same settings{f' and {told(facts)}' if facts else ''}"
    few = list(theirs)[:4]
    each = " ".join(told({key: theirs[key]}) + _here(ours, key) for key in few)
    return f", which has {each}{' and more' if len(theirs) > len(few) else ''}"


def _here(ours: dict[str, Any], key: str) -> str:
    return f" (here {told({key: ours[key]}).partition('=')[2]})" if key in ours else ""


def ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def of_sweep(folder: Path, monitor: str, width: int) -> Sequence[str]:
    """The table of a sweep's jobs, the best first; empty where there is one job, or none has a number."""
    runs, _ = read(find([str(folder)], folder)[0])
    if len(runs) < 2 or not any(monitor in run.numbers for run in runs):
        return []
    groups = ranked(grouped(runs), monitor)
    lines = table(groups[:SHOWN], len(runs), monitor, width)
    return [*lines, *([f"... and {len(groups) - SHOWN} more"] if len(groups) > SHOWN else [])]
