"""The same for other programs: Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from alexlab.compare.groups import Group
from alexlab.compare.table import cell, columns_for
from alexlab.kinds import shown


def _settings(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(key for group in groups for key in group.apart))


def markdown(groups: Sequence[Group], sort: str) -> str:
    """A table of GitHub's Markdown: what sets runs apart, then the numbers."""
    columns, settings = columns_for(groups, sort), _settings(groups)
    heads = ["run", "status", *settings, *(heading.replace("\n", " ") for _, heading, _ in columns)]
    rows = [
        [group.name, group.status, *(shown(group.apart[key]) if key in group.apart else "" for key in settings),
         *(cell(group, key, how) for key, _, how in columns)]
        for group in groups
    ]  # fmt: skip
    rules = ["---"] * (2 + len(settings)) + ["---:"] * len(columns)
    lines = [heads, rules, *rows]
    return "\n".join("| " + " | ".join(_one_line(text) for text in line) + " |" for line in lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def as_csv(groups: Sequence[Group]) -> str:
    """A line a group: name, status, n, what sets it apart, all numbers; of several runs KEY_std as well."""
    settings = _settings(groups)
    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.numbers))
    spread = [key for key in keys if any((stat := group.stat(key)) and stat.std is not None for group in groups)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "status", "n", *settings, *keys, *(f"{key}_std" for key in spread)])
    for group in groups:
        stats = {key: group.stat(key) for key in keys}
        means = [stat.mean if (stat := stats[key]) else "" for key in keys]
        stds = [stat.std if (stat := stats[key]) and stat.std is not None else "" for key in spread]
        apart = [shown(group.apart[key]) if key in group.apart else "" for key in settings]
        writer.writerow([group.name, group.status, len(group.runs), *apart, *means, *stds])
    return text.getvalue()


def as_json(groups: Sequence[Group], left_out: Sequence[str]) -> str:
    """{"groups": [{name, status, n, settings, metrics: {key: {mean, std, n}}, runs: [...]}],
    "left_out": [...]}; what is no number is null."""
    found = [
        {
            "name": group.name, "status": group.status, "n": len(group.runs), "settings": group.apart,
            "metrics": {
                key: {"mean": _finite(stat.mean), "std": stat.std, "n": stat.n}
                for key in dict.fromkeys(key for run in group.runs for key in run.numbers)
                if (stat := group.stat(key))
            },
            "runs": [
                {"name": run.name, "path": str(run.path), "status": run.status, "config": run.config,
                 "metrics": {key: _finite(value) for key, value in run.numbers.items()}}
                for run in group.runs
            ],
        }
        for group in groups
    ]  # fmt: skip
    return json.dumps({"groups": found, "left_out": list(left_out)}, indent=2, default=str) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
