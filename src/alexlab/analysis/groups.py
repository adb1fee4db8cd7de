"""Runs that differ in their seed alone are one row: mean, standard deviation and number."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alexlab.analysis.runs import Run, low_is_good
from alexlab.analysis.settings import comparable, differing
from alexlab.engine.kinds import shown
from alexlab.engine.settings import same_as


@dataclass(frozen=True)
class Stat:
    """
    Attributes:
        std: of a sample (over n - 1); None of one run.
        n: runs that have measured it.
    """

    mean: float
    std: float | None
    n: int


@dataclass
class Group:
    """
    Attributes:
        runs: at least one.
        apart: the settings that set it apart from other groups, and its seeds.
    """

    runs: list[Run]
    apart: dict[str, Any]

    @property
    def name(self) -> str:
        first = self.runs[0].name
        return first if len(self.runs) == 1 else f"{first} +{len(self.runs) - 1}"

    @property
    def status(self) -> str:
        return self.runs[0].status

    def stat(self, key: str) -> Stat | None:
        return self._stats.get(key)

    @cached_property
    def _stats(self) -> dict[str, Stat]:
        found = {}
        for key in dict.fromkeys(key for run in self.runs for key in run.numbers):
            values = [run.numbers[key] for run in self.runs if key in run.numbers]
            std = statistics.stdev(values) if len(values) > 1 else None
            found[key] = Stat(sum(values) / len(values), std, len(values))
        return found


def grouped(runs: Sequence[Run], by_seed: bool = True) -> list[Group]:
    """One group a run, or those that finished and differ in nothing but their seed together: not in their images,
    commit, devices or precision either. A seed that comes a second time is a row of its own."""
    texts = comparable(runs)
    apart = differing(runs, texts)
    together: dict[Any, list[int]] = {}
    seen: set[Any] = set()
    alike: dict[Any, list[int]] = {}  # runs with the same settings
    for number, run in enumerate(runs):
        rest = frozenset(item for item in texts[number].items() if item[0] != "seed")
        key: Any = rest, same_as(run.facts)
        alike.setdefault(rest, []).append(number)
        once = (key, same_as(run.config.get("seed")))
        if not by_seed or run.code_untold or run.status != "finished" or "seed" not in run.config or once in seen:
            key = number
        else:
            seen.add(once)
        together.setdefault(key, []).append(number)
    for members in alike.values():
        facts = [runs[number].facts for number in members]
        differ = [key for key in facts[0] if len({same_as(each[key]) for each in facts}) > 1]
        for number, each in zip(members, facts, strict=True):
            apart[number] |= {key: "unknown" if each[key] is None else each[key] for key in differ}
    groups = []
    for members in together.values():
        members.sort(key=lambda number: shown(runs[number].config.get("seed")).zfill(20))
        settings = dict(apart[members[0]])
        if len(members) > 1:
            settings["seed"] = ",".join(shown(runs[number].config["seed"]) for number in members)
        groups.append(Group([runs[number] for number in members], settings))
    return groups


def ranked(groups: Sequence[Group], key: str) -> list[Group]:
    """The best first; those without a number of that name last."""
    sign = 1 if low_is_good(key) else -1

    def place(group: Group) -> tuple[bool, float]:
        stat = group.stat(key)
        known = stat is not None and not math.isnan(stat.mean)
        return not known, sign * stat.mean if known and stat is not None else 0.0

    return sorted(groups, key=place)
