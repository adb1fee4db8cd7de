"""The same for other programs: Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from alexlab.analysis.groups import Group
from alexlab.analysis.table import cell, columns_for
from alexlab.engine.kinds import is_number, printable, shown


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
    plain = " ".join(printable(text).split())
    return plain.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")  # a run's name is no link


def as_csv(groups: Sequence[Group]) -> str:
    """A line a group: name, status, n, what sets it apart, all numbers; of several runs KEY_std as well."""
    settings = _settings(groups)
    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.numbers))
    spread = [key for key in keys if any((stat := group.stat(key)) and stat.std is not None for group in groups)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    fewer = [key for key in keys if any((stat := group.stat(key)) and stat.n < len(group.runs) for group in groups)]
    heads = [*keys, *(f"{key}_std" for key in spread), *(f"{key}_n" for key in fewer)]
    # a column a name: a setting may be called like a number, or like one of the first
    taken = {"run", "status", "n", *heads}
    named = [f"config/{key}" if key in taken else key for key in settings]
    writer.writerow([_cell(head) for head in ("run", "status", "n", *named, *heads)])
    for group in groups:
        stats = {key: group.stat(key) for key in keys}
        means = [stat.mean if (stat := stats[key]) else "" for key in keys]
        stds = [stat.std if (stat := stats[key]) and stat.std is not None else "" for key in spread]
        counts = [stat.n if (stat := stats[key]) else 0 for key in fewer]
        apart = [_cell(group.apart[key]) if key in group.apart else "" for key in settings]
        writer.writerow([_cell(group.name), group.status, len(group.runs), *apart, *means, *stds, *counts])
    return text.getvalue()


def as_json(groups: Sequence[Group], left_out: Sequence[str]) -> str:
    """{"groups": [{name, status, n, settings, metrics: {key: {mean, std, n}}, runs: [...]}],
    "left_out": [...]}; what is no number is null."""
    found = [
        {
            "name": group.name, "status": group.status, "n": len(group.runs), "settings": group.apart,
            "metrics": {
                key: {"mean": stat.mean, "std": stat.std, "n": stat.n}
                for key in dict.fromkeys(key for run in group.runs for key in run.numbers)
                if (stat := group.stat(key))
            },
            "runs": [
                {"name": run.name, "path": str(run.path), "status": run.status, "config": run.config,
                 "metrics": run.numbers}
                for run in group.runs
            ],
        }
        for group in groups
    ]  # fmt: skip
    return json.dumps(finite({"groups": found, "left_out": list(left_out)}), indent=2, default=str) + "\n"


def _cell(value: Any) -> str:
    """A text that begins like a formula is none: spreadsheets would work it out."""
    text = printable(shown(value))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not is_number(value) else text


def finite(value: Any) -> Any:
    """null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
