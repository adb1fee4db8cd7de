"""Comparisons of runs: the settings that differ, means over seeds, conditions, tables, equality, a run's rank."""

import contextlib
import csv
import difflib
import io
import json
import math
import operator
import re
import statistics
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alexlab.analysis.intervals import NOISE, difference_of_means, holm, mean_interval
from alexlab.analysis.runs import FACTS, Run, find, is_number, modified, read, table_of
from alexlab.engine.config import ROOT
from alexlab.engine.errors import UserError
from alexlab.engine.metrics import lower_is_better
from alexlab.engine.overrides import shown
from alexlab.engine.settings import REPETITIONS, canonical
from alexlab.engine.text import printable, shorten

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_SIBLINGS = 1000  # runs that a finished run is ranked among, the newest
MAX_JOBS = 10  # rows in the table of a sweep
MAX_OTHER_METRICS = 8  # columns of a table for validation metrics besides the one that it is sorted by
MAX_TITLE = 40  # characters of a title in a table
MODEL = ("model", "model.name", "model.net._target_")  # settings that name the network
SPEED = ("images_per_second", "seconds")


def load_runs(logs: Path | str | Sequence[Path | str] = ROOT / "logs/train", where: str | None = None) -> "DataFrame":
    """Return a DataFrame with one row per run, for a notebook, with the columns of `runs.table_of`.

    Args:
        logs: a folder that holds runs, a glob, the name of a run or sweep, or a list of them.
        where: a condition, such as "optimizer.lr>0.01 and status=finished".

    Raises:
        UserError: `where` is not a condition, or no run matches it.
    """
    import pandas as pd

    names = [logs] if isinstance(logs, str | Path) else logs
    folders, missing = find([str(name) for name in names], ROOT / "logs/train")
    runs, skipped = read(folders)
    for line in (*missing, *skipped):
        warnings.warn(f"skipped: {line}", stacklevel=2)
    runs = runs if where is None else [runs[number] for number in select(runs, where)]
    return pd.DataFrame(table_of(runs))


# -- the settings that differ


def differing(runs: Sequence[Run], texts: list[dict[str, str]] | None = None) -> list[dict[str, Any]]:
    """Return for each run the settings in which the runs differ.

    The chosen option of a group stands for the settings that come with it: `augment=strong` for all keys of augment.
    Another key of the group is listed for runs with the same option that differ in it, and for all runs if a command
    line set it. A name or a folder that a command line set is listed for that run only.

    The model comes first, then options, what command lines set, the rest, and last what only one of many runs changed.
    `texts` are `canonical_settings(runs)`, if known already.
    """
    texts = canonical_settings(runs) if texts is None else texts
    differences: list[dict[str, Any]] = [{} for _ in runs]
    places: dict[str, float] = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [each.get(key) for each in texts]
        if len(set(values)) == 1:
            continue
        group, label = key.split(".")[0], key.removeprefix("choices.")
        if group == "choices" and not all(key in run.settings for run in runs):
            continue  # older runs did not record which option was chosen
        overridden = {number for number, run in enumerate(runs) if {key, label} & run.overridden}
        names = (f"choices.{group}", f"{group}.name", f"{group}._target_")
        options = [name for name in names if all(name in run.settings for run in runs)]
        is_name = key in options or key == "data.root"
        implied_by = options[: options.index(key)] if key in options else options
        if overridden and not is_name:
            implied_by = []
        peers: dict[Any, set[int]] = defaultdict(set)
        for number, each in enumerate(texts):
            peers[tuple(each.get(name) for name in implied_by)].add(number)
        listed = set(overridden) if is_name else set()
        listed.update(*(same for same in peers.values() if len({values[number] for number in same}) > 1))
        for number in listed:
            if key in runs[number].settings:
                differences[number][label] = runs[number].settings[key]
        is_alone = len(runs) > 3 and max(Counter(values).values()) == len(runs) - 1
        is_swept = overridden and key not in REPETITIONS
        is_option = is_name or group == "choices"
        rest = 4 if is_alone else 1 if is_option else 2 if is_swept else 3
        places[label] = MODEL.index(label) / 10 if label in MODEL else rest
    return [{key: each[key] for key in sorted(each, key=places.__getitem__)} for each in differences]


def canonical_settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return each run's settings as texts that are equal for equal settings.

    Settings that are null, or mean the same, are dropped, because an older run may lack the key. The folder of the
    images counts only if the fingerprint of the images is unknown.
    """
    settings: list[dict[str, str]] = []
    roots: dict[str, str] = {}
    for run in runs:
        texts = {key: canonical(value, key) for key, value in run.settings.items()}
        texts = {key: text for key, text in texts.items() if text != canonical(None, key)}
        if "data.root" in texts and run.fingerprint is not None:
            texts["data.root"] = roots.setdefault(canonical(run.fingerprint), texts["data.root"])
        settings.append(texts)
    return settings


def as_text(settings: dict[str, Any]) -> str:
    """Return settings as text: "optimizer.lr=0.1 seed=1", with at most six digits of a float."""
    values = {key: f"{value:.6g}" if isinstance(value, float) else shown(value) for key, value in settings.items()}
    return printable(" ".join(f"{key}={value}" for key, value in values.items()))


# -- seeds and folds


class Stat(NamedTuple):
    """A metric of a group: mean, standard deviation of a sample (None for one run), and how many runs have it."""

    mean: float
    std: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean; None for one run."""
        return None if self.std is None else mean_interval(self.mean, self.std, self.n)


@dataclass
class Group:
    """A row of a table: runs that differ only in their seed or fold, or one run."""

    runs: list[Run]  # at least one
    settings: dict[str, Any]  # what sets the group apart from the rest, and the seeds and folds

    @property
    def title(self) -> str:
        return self.runs[0].title(without=REPETITIONS if len(self.runs) > 1 else ()) or self.name

    @property
    def name(self) -> str:
        return self.runs[0].name + (f" +{len(self.runs) - 1}" if len(self.runs) > 1 else "")

    @property
    def status(self) -> str:
        return self.runs[0].status

    @cached_property
    def stats(self) -> dict[str, Stat]:
        stats = {}
        for key in dict.fromkeys(key for run in self.runs for key in run.metrics):
            values = [run.metrics[key] for run in self.runs if key in run.metrics]
            std = statistics.stdev(values) if len(values) > 1 else None
            stats[key] = Stat(sum(values) / len(values), std, len(values))
        return stats


def grouped(runs: Sequence[Run], by_seed: bool = True) -> list[Group]:
    """Group finished runs that differ only in their seed or fold; each of the rest is a group of one.

    Runs with different images, code, devices or precision are not grouped, nor are two runs of the same seed and fold.
    """
    texts = canonical_settings(runs)
    apart = differing(runs, texts)
    groups: dict[Any, dict[Any, int]] = defaultdict(dict)  # group -> {seed and fold: number of the run}
    same_settings: dict[Any, list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        repetition = tuple(texts[number].get(key) for key in REPETITIONS)
        settings = frozenset({**texts[number], **dict.fromkeys(REPETITIONS, "")}.items())
        same_settings[settings].append(number)
        key: Any = (settings, canonical(run.facts))
        can_join = by_seed and run.status == "finished" and "seed" in run.settings and not run.code_is_unknown
        groups[key if can_join and repetition not in groups[key] else number][repetition] = number
    for members in same_settings.values():  # what sets runs of equal settings apart
        for fact in FACTS:
            if len({canonical(runs[number].facts[fact]) for number in members}) > 1:
                for number in members:
                    value = runs[number].facts[fact]
                    apart[number][fact] = "unknown" if value is None else value
    made = []
    for numbers in groups.values():
        ordered = [numbers[each] for each in sorted(numbers, key=lambda each: [str(text).zfill(20) for text in each])]
        settings_of_group = dict(apart[ordered[0]])
        for key in REPETITIONS:
            values = dict.fromkeys(shown(runs[number].settings.get(key)) for number in ordered)
            if len(values) > 1:
                settings_of_group[key] = ",".join(values)
        made.append(Group([runs[number] for number in ordered], settings_of_group))
    return made


def ranked(groups: Iterable[Group], sort: str) -> list[Group]:
    """Return the groups by a metric, the best first; groups without it come last."""
    groups = list(groups)
    having = [run for group in groups for run in group.runs if sort in run.metrics]
    sign = 1 if (having[-1].lower_is_better(sort) if having else lower_is_better(sort)) else -1
    return sorted(groups, key=lambda group: sign * group.stats[sort].mean if sort in group.stats else math.inf)


def p_values(groups: Sequence[Group], sort: str) -> list[float | None]:
    """Return for each group how probable a difference to the first one as large as that of `sort` is by chance.

    Welch's t test between the seeds, with Holm's correction for the number of tests. None for the first group, and
    for the rest if it has one run; also for groups with one run, and if the standard deviations of both are 0.
    """
    samples: list[Any] = [group.stats.get(sort) for group in groups]
    if not samples or samples[0] is None or samples[0].std is None:
        return [None] * len(groups)
    tested = [n for n, stat in enumerate(samples) if n and stat and stat.std is not None and stat.std + samples[0].std]
    corrected = holm([difference_of_means(samples[0], samples[n]) for n in tested])
    by_number = dict(zip(tested, corrected, strict=True))
    return [by_number.get(number) for number in range(len(groups))]


def sort_metric(runs: Sequence[Run], sort: str | None) -> str:
    """Return the metric to sort by: `sort`, or a usual one that some run has.

    Raises:
        UserError: no run has `sort`.
    """
    known = sorted({key for run in runs for key in run.metrics})
    if sort is None:
        monitors = [str(run.settings.get("monitor")) for run in runs]
        usual = ("val/acc1", "last/val/acc1", *monitors, "val/loss", "last/val/loss", "train/loss", *known)
        return next((key for key in usual if key in known), usual[0])
    if sort not in known:
        raise UserError(f"sort={sort}: no run has this metric. Measured were: {', '.join(known) or 'none'}.")
    return sort


# -- conditions: where="optimizer.lr>0.01 and status=finished"

ORDERING = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
CONDITION = re.compile(r"""([\w./@-]+)\s*(==|!=|>=|<=|=|>|<|~)\s*('[^']*'|"[^"]*"|[^=<>&|]+)""")


def select(runs: Sequence[Run], text: str) -> list[int]:
    """Return the numbers of the runs for which a condition holds: `optimizer.lr>0.1 and model~resnet or seed=7`.

    `and` binds closer than `or`; `=` and `~` (contains) ignore upper and lower case. The keys are those of
    `runs.table_of`.

    Raises:
        UserError: the text is not a condition, no run has a key, a text is compared by size, or no run matches.
    """
    ways = [
        [_condition(part, text) for part in re.split(r"\s+and\s+", way, flags=re.IGNORECASE)]
        for way in re.split(r"\s+or\s+", text, flags=re.IGNORECASE)
    ]
    rows = table_of(runs)
    known = list(dict.fromkeys(key for row in rows for key in row))
    values: dict[str, list[Any]] = {}
    for key, (sign, wanted, number) in (condition for way in ways for condition in way if runs):
        if key not in known:
            near = sorted(name for name in known if name.endswith((f".{key}", f"/{key}")))[:3]  # lr: optimizer.lr
            near = near or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else " Keys are status, name, metrics and settings."
            raise UserError(f"where={text}: no run has {key}.{hint}")
        values[key] = ["unknown" if row.get(key) is None and key in FACTS else row.get(key) for row in rows]
        if sign in ORDERING and (number is None or not any(map(is_number, values[key]))):
            text_of = wanted if number is None else shown(values[key][0])
            raise UserError(f"where={text}: `{text_of}` is not a number: compare text with =, != or ~ (contains).")
    matching = [
        number
        for number in range(len(runs))
        if any(all(_holds(values[key][number], *rest) for key, rest in way) for way in ways)
    ]
    if runs and not matching:
        some = "; ".join(f"{key} is, for example, {shown(column[0])}" for key, column in values.items())
        raise UserError(f"where={text}: none of the {len(runs)} runs matches: {some}.")
    return matching


def _condition(part: str, text: str) -> tuple[str, tuple[str, str, float | None]]:
    """Return the key, and the sign, the value, and the value as a number (None if it is none)."""
    match = CONDITION.fullmatch(part.strip())
    if match is None:
        raise UserError(
            f"where={text}: `{part.strip()}` is not a condition: write KEY SIGN VALUE with one of == != >= <= = > < ~, "
            "as in where='optimizer.lr>0.01 and status=finished', joined with `and` or `or`, without brackets. Quote "
            "it: to a shell, > is a redirection."
        )
    number = None
    with contextlib.suppress(ValueError):
        number = float(match[3])
    return match[1], (match[2], match[3].strip("'\""), number)


def _holds(value: Any, sign: str, text: str, number: Any) -> bool:
    if sign == "~":
        return text.lower() in shown(value).lower()
    if sign in ORDERING:
        return is_number(value) and ORDERING[sign](value, number)
    bare = [re.sub(r"[\s'\"]", "", each).lower() for each in (shown(value), text)]  # the spaces of lists do not matter
    equal = bare[0] == bare[1] or (is_number(value) and value == number)
    return equal == (sign != "!=")


# -- tables


def columns_of(groups: Sequence[Group], sort: str) -> list[str]:
    """Return the metrics that a table shows: the one that it is sorted by, also at the last epoch; further
    validation metrics; the test metric; the size, if it differs between groups; and the speed."""
    measured = {key for group in groups for key in group.stats}
    # with few classes val/acc5 is 1; sort=val/acc5, csv, json and html show it
    validated = {key for key in measured if key.startswith("val/") and key != "val/acc5"}
    main = sort if sort.startswith("val/") else min(validated, key=lambda key: (key != "val/acc1", key), default=sort)
    other_metrics = sorted(validated - {main}, key=lambda key: (key != "val/loss", key))[:MAX_OTHER_METRICS]
    test = f"test/{main.removeprefix('val/')}"
    sizes = {group.stats["parameters"].mean for group in groups if "parameters" in group.stats}
    size = ("parameters",) if len(sizes) > 1 else ()
    wanted = dict.fromkeys((sort, main, f"last/{main}", *other_metrics, test, *size, *SPEED))
    return [key for key in wanted if key in measured or key == sort]


def cell(group: Group, key: str) -> str:
    """Return "0.5000", "0.5000±0.0100" of several runs, or "0.5000±0.0100 (2)" if not all have it; "" if none has."""
    if key not in group.stats:
        return ""
    mean, std, n = group.stats[key]
    if key in ("parameters", "macs"):
        return f"{mean / 1e6:.4g} M"
    how = ".0f" if key in SPEED else ".4f" if not mean or 1e-3 <= abs(mean) < 1e5 else ".4g"
    few = f" ({n})" if n < len(group.runs) else ""
    return f"{mean:{how}}" + ("" if std is None else f"±{std:{how}}") + few


def sureness(groups: Sequence[Group], sort: str) -> dict[str, list[str]]:
    """Return further columns by their headings, if any group has several runs: the 95 % interval of the mean of
    `sort`, and whether the difference to the first group is within noise."""
    intervals = [group.stats[sort].interval if sort in group.stats else None for group in groups]
    columns: dict[str, list[str]] = {}
    if any(intervals):
        columns["95 % interval"] = [f"{each[0]:.4f}..{each[1]:.4f}" if each else "" for each in intervals]
    p = p_values(groups, sort)
    if any(each is not None for each in p):
        texts = ["" if each is None else f"{'noise, ' if each > NOISE else ''}p={each:.2g}" for each in p]
        columns["vs first"] = texts
    return columns


def table(groups: Sequence[Group], runs: int, sort: str, width: int) -> list[str]:
    """Return the lines of a table for a terminal, none wider than `width` characters if names permit.

    A row starts with the title, as W&B names the run, and ends with the directory and the settings that differ, which
    are printed below the row if they do not fit. Columns that do not fit are dropped: speed, size, last epoch, further
    validation metrics, test, `sureness`, but never `sort`. `runs` is the number of runs in all groups.
    """
    titles = [shorten(group.title, MAX_TITLE) for group in groups]
    names = max(map(len, titles))
    rows_of = zip(titles, groups, strict=True)
    starts = [f"{runs} run{'s' if runs > 1 else ''}", *(f"{title:{names}}  {group.status}" for title, group in rows_of)]
    labels = []
    for group in groups:
        settings = as_text({key: value for key, value in group.settings.items() if value is not None})
        labels.append(settings if group.title == group.name else f"{group.name}  {settings}".rstrip())
    columns, more = columns_of(groups, sort), sureness(groups, sort)
    columns[1:1] = more
    droppable = [key for key in reversed(columns) if key != sort]
    droppable.sort(key=lambda key: (key in more, key.startswith("test/"), key.startswith("val/"), key[:5] == "last/"))

    def lines() -> list[str]:
        rows = [columns, *_cells(groups, columns, more)]
        widths = [max(10, 2 + max(map(len, column))) for column in zip(*rows, strict=True)]
        first = names + 2 + max(len(group.status) for group in groups)
        return [
            f"{start:{first}}" + "".join(f"{text:>{room}}" for text, room in zip(row, widths, strict=True))
            for start, row in zip(starts, rows, strict=True)
        ]

    while len((printed := lines())[0]) > width and droppable:
        columns.remove(droppable.pop(0))
    for key in [key for key in more if key not in columns]:  # printed below the row
        labels = [f"{text}  {key}: {value}" if value else text for text, value in zip(labels, more[key], strict=True)]
    if len(printed[0]) + 2 + max(map(len, labels)) <= width:
        return [f"{line}  {label}".rstrip() for line, label in zip(printed, ["", *labels], strict=True)]
    for place, label in reversed(list(enumerate(labels, 2))):
        wrapped = textwrap.wrap(label, width - 4, break_long_words=False, break_on_hyphens=False)
        printed[place:place] = [f"    {line}" for line in wrapped]
    return [line.rstrip() for line in printed]


def _cells(groups: Sequence[Group], columns: list[str], more: dict[str, list[str]]) -> list[list[str]]:
    return [
        [more[key][number] if key in more else cell(group, key) for key in columns]
        for number, group in enumerate(groups)
    ]


def as_markdown(groups: Sequence[Group], sort: str) -> str:
    """Return a table in GitHub's Markdown: the settings that differ, then the metrics."""
    columns, settings = columns_of(groups, sort), list(dict.fromkeys(key for each in groups for key in each.settings))
    more = sureness(groups, sort)
    columns[1:1] = more
    lines = [["title", "run", "status", *settings, *columns], ["---"] * (3 + len(settings)) + ["---:"] * len(columns)]
    for group, cells in zip(groups, _cells(groups, columns, more), strict=True):
        values = [shown(group.settings[key]) if key in group.settings else "" for key in settings]
        lines.append([group.title, group.name, group.status, *values, *cells])
    escaped = [[printable(text).replace("|", "\\|") for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def as_csv(groups: Sequence[Group], sort: str) -> str:
    """Return one line per group: run, title, status, n, the settings that differ, all metrics, KEY_std, KEY_low and
    KEY_high (the 95 % interval) of several runs, KEY_n if only n of them have the metric, and SORT_p (see `p_values`).
    A setting that is called like another column is config/NAME."""
    taken = {"run", "title", "status", "n"}.union(*(group.stats for group in groups))
    rows = []
    for group, p in zip(groups, p_values(groups, sort), strict=True):
        row: dict[str, Any] = {"run": group.name, "title": group.title, "status": group.status, "n": len(group.runs)}
        row |= {f"config/{key}" if key in taken else key: shown(value) for key, value in group.settings.items()}
        for key, stat in group.stats.items():
            row[key] = stat.mean
            if stat.interval is not None:
                row |= dict(zip([f"{key}_std", f"{key}_low", f"{key}_high"], [stat.std, *stat.interval], strict=True))
            row |= {f"{key}_n": stat.n} if stat.n < len(group.runs) else {}
        row |= {f"{sort}_p": p} if p is not None else {}
        rows.append({printable(key): printable(str(value)) for key, value in row.items()})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_json(groups: Sequence[Group], skipped: Sequence[str], sort: str) -> str:
    """Return {"groups": [{name, title, status, n, settings, metrics: {key: {mean, std, n, low, high}}, p: {sort: p},
    runs: [{name, status, path, config, metrics}]}], "left_out": [sentences]}; null stands for NaN and infinity. See
    `p_values` for p."""

    def fields(each: Group | Run, **more: Any) -> dict[str, Any]:
        return {"name": each.name, "status": each.status, **more}

    rows = []
    for group, p in zip(groups, p_values(groups, sort), strict=True):
        stats = {
            key: stat._asdict() | dict(zip(("low", "high"), stat.interval or (None, None), strict=True))
            for key, stat in group.stats.items()
        }
        runs = [fields(run, path=str(run.path), config=run.settings, metrics=run.metrics) for run in group.runs]
        more = {"title": group.title, "n": len(group.runs), "settings": group.settings}
        rows.append(fields(group, **more, metrics=stats, p={sort: p}, runs=runs))
    left_out = [*skipped, *(problem for group in groups for run in group.runs for problem in run.problems)]
    return json.dumps(finite({"groups": rows, "left_out": left_out}), indent=2) + "\n"


def finite(values: Any) -> Any:
    """Return plain values for JSON, which has no NaN and no infinity: null stands for them."""
    return json.loads(json.dumps(values, default=str), parse_constant=lambda name: None)


# -- equality: whether a change of code changed what is trained


def equality(a: Run, b: Run) -> tuple[bool, str]:
    """Compare exactly all losses, accuracies and learning rates that two runs logged at the same steps.

    Speed and time are not compared, nor the test, which depends on the rest. The result is whether the runs are equal,
    and a sentence that names the first difference.

    Raises:
        UserError: no loss and no accuracy can be compared.
    """
    values_a, values_b = _logged(a), _logged(b)
    paired = sorted(values_a.keys() & values_b.keys())
    if not any(key.startswith(("train/", "val/")) for _, key, _ in paired):
        raise UserError(
            f"equal=true: {a.name} and {b.name} logged no loss and no accuracy of the same steps: train both with the "
            "same trainer.log_every_n_steps."
        )
    for each in paired:
        if values_a[each] != values_b[each]:
            difference = f"{each[1]} is {values_a[each]} and {values_b[each]}"
            return False, f"{a.name} and {b.name} differ first at step {each[0]}: {difference}."
    # the last step that was trained: a validation at the end may have a separate row
    end_a, end_b = (
        max((step for step, key, _ in each if key.startswith("train/")), default=0) for each in (values_a, values_b)
    )
    if end_a != end_b:
        return False, f"{a.name} stops at step {end_a} and {b.name} at step {end_b}; they are equal until then."
    steps, alone = len({step for step, *_ in paired}), len(values_a) + len(values_b) - 2 * len(paired)
    note = f" {alone} numbers that only one of them logged were not compared." if alone else ""
    return True, f"{a.name} and {b.name} are equal in all {len(paired)} numbers of {steps} steps.{note}"


def _logged(run: Run) -> dict[tuple[int, str, int], str]:
    """Return what a run logged in training: {(step, metric, since): value}.

    A `train/..._step` value is a mean since the previous row, whose step is `since`; for the rest, `since` is -1. The
    value is a text, because NaN differs from itself.
    """
    values: dict[tuple[int, str, int], str] = {}
    previous: dict[str, int] = {}
    for row in run.rows:
        for key, value in row.items():
            if key.startswith(("train/", "val/", "lr")):
                step = int(row["step"])
                values[step, key, previous.get(key, -1) if key.endswith("_step") else -1] = repr(value)
                previous[key] = step
    return values


# -- the end of a training


def standing(run_dir: Path, logs: Path, monitor: str) -> str | None:
    """Return the rank of a finished run among the finished runs of logs/train that were validated on the same images.

    An example is "3 of 12 by val/acc1: 0.8123; the best other run NAME has 0.8345 with optimizer.lr=0.02 (this run:
    optimizer.lr=0.01)". The result is None if this is the only run on these images, or if it lacks the metric.
    """
    folders = [folder for folder in find([str(logs / "train")], logs / "train")[0] if folder != run_dir.resolve()]
    (run, *candidates), _ = read([run_dir.resolve(), *sorted(folders, key=modified)[1 - MAX_SIBLINGS :]])
    assert run.path == run_dir.resolve()
    if run.fingerprint is None or run.status != "finished" or monitor not in run.metrics:
        return None

    def images_of(each: Run) -> list[str]:
        limits = ("trainer.limit_val_batches", "trainer.overfit_batches")
        has_folds = each.fingerprint is not None and each.settings.get("data.folds")  # which share one fingerprint
        fold = each.summary["dataset"].get("fingerprint") if has_folds else None
        return [*map(canonical, (each.fingerprint, fold)), *(canonical(each.settings.get(key), key) for key in limits)]

    finished = [each for each in candidates if each.status == "finished" and monitor in each.metrics]
    siblings = [each for each in finished if images_of(each) == images_of(run)]
    if not siblings:
        return None
    sign = 1 if run.lower_is_better(monitor) else -1
    best = min(siblings, key=lambda sibling: sign * sibling.metrics[monitor])
    value = run.metrics[monitor]
    rank = 1 + sum(sign * sibling.metrics[monitor] < sign * value for sibling in siblings)
    theirs, ours = (as_text(dict(list(settings.items())[:4])) for settings in differing([best, run]))
    difference = f"{theirs or 'the same settings'}{f' (this run: {ours})' if ours else ''}"
    other = f"the best other run {best.name} has {best.metrics[monitor]:.4f} with {difference}"
    return f"{rank} of {1 + len(siblings)} by {monitor}: {value:.4f}; {other}"


def sweep_table(sweep: Path, monitor: str, width: int) -> list[str]:
    """Return the lines of a table of a sweep's jobs, the best first; [] for a single job, or if no job was measured."""
    runs, _ = read(find([str(sweep)], sweep)[0])
    if len(runs) < 2 or not any(monitor in run.metrics for run in runs):
        return []
    groups = ranked(grouped(runs), monitor)
    lines = table(groups[:MAX_JOBS], len(runs), monitor, width)
    return [*lines, *([f"... and {len(groups) - MAX_JOBS} more"] if len(groups) > MAX_JOBS else [])]
