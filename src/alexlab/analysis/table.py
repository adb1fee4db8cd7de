"""The table in a terminal: a line a run, or a group of seeds, of numbers and of what sets it apart."""

import textwrap
from collections.abc import Sequence

from alexlab.analysis.groups import Group
from alexlab.analysis.settings import told

# key of a number, its heading (above, below) and how it is written
Column = tuple[str, str, str]
COLUMNS: tuple[Column, ...] = (
    ("val/acc1", "best.ckpt\nval/acc1", ".4f"), ("last/val/acc1", "last\nval/acc1", ".4f"),
    ("val/loss", "best.ckpt\nval/loss", ".4f"), ("test/acc1", "test/acc1", ".4f"),
    ("parameters", "parameters", "M"), ("images_per_second", "images/s", ".0f"), ("seconds", "seconds", ".0f"),
)  # fmt: skip
# these go first where a terminal is narrow
DROPPED = ("seconds", "images_per_second", "parameters", "last/val/acc1", "val/loss", "test/acc1")


def columns_for(groups: Sequence[Group], sort: str) -> list[Column]:
    """Those of which there is a number, and the one that the rows are sorted by; parameters where they differ."""
    wanted = list(COLUMNS)
    if sort not in {key for key, _, _ in COLUMNS}:
        how = "M" if sort == "macs" else ".6g"
        wanted.insert(0, (sort, f"best.ckpt\n{sort}" if sort.startswith("val/") else sort, how))
    sizes = {stat.mean for group in groups if (stat := group.stat("parameters"))}
    there = [column for column in wanted if column[0] == sort or any(group.stat(column[0]) for group in groups)]
    return [column for column in there if column[0] != "parameters" or len(sizes) > 1 or sort == "parameters"]


def cell(group: Group, key: str, how: str) -> str:
    """The number, or mean±std of several; empty where nothing was measured."""
    stat = group.stat(key)
    if stat is None:
        return ""
    if how == "M":
        return f"{stat.mean / 1e6:.4g} M"
    mean = format(stat.mean, how)
    few = f" ({stat.n})" if stat.n < len(group.runs) else ""
    return mean + ("" if stat.std is None else f"±{format(stat.std, how)}") + few


def _label(group: Group) -> str:
    """What sets it apart; null, beside others' values, goes without saying."""
    return told({key: value for key, value in group.apart.items() if value is not None})


def table(groups: Sequence[Group], runs: int, sort: str, width: int) -> list[str]:
    """The lines, none wider than `width`; what sets a run apart stands below it where it does not fit beside it.

    Args:
        runs: how many there are in all.
    """
    columns = columns_for(groups, sort)
    name = max(len(group.name) for group in groups)
    status = max(len(group.status) for group in groups)
    for dropped in ("", *DROPPED):
        columns = [column for column in columns if column[0] != dropped or dropped == sort]
        cells = [[cell(group, key, how) for key, _, how in columns] for group in groups]
        heads = [heading.rpartition("\n")[::2] for _, heading, _ in columns]
        wide = [
            max(10, 2 + max(len(text) for text in (*head, *column)))
            for head, column in zip(heads, zip(*cells, strict=True), strict=True)
        ]
        used = name + 2 + status + sum(wide)
        if used <= width:
            break
    beside = max((len(_label(group)) for group in groups), default=0) + 2 <= width - used
    lines: list[str] = []
    for group, row in zip(groups, cells, strict=True):
        start = f"{group.name:{name}}  {group.status:{status}}"
        line = start + "".join(f"{text:>{room}}" for text, room in zip(row, wide, strict=True))
        apart = _label(group)
        lines.append(f"{line}  {apart}" if beside else line)
        if not beside and apart:
            lines += textwrap.wrap(
                apart, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
    above = " " * (name + 2 + status) + "".join(f"{head[0]:>{room}}" for head, room in zip(heads, wide, strict=True))
    counted = f"{runs} run" + ("s" if runs > 1 else "")
    below = f"{counted:{name + 2 + status}}"
    below += "".join(f"{head[1]:>{room}}" for head, room in zip(heads, wide, strict=True))
    return [line.rstrip() for line in (above, below, *lines)]
