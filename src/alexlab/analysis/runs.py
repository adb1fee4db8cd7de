"""Run directories of any age as data. Nothing that a run directory names is imported or run.

Only `curves` and `compare.load_runs` import pandas, which takes 0.4 s: the end of a training does without it.
"""

import copy
import csv
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexlab.data.fingerprint import identities
from alexlab.engine import config as configs
from alexlab.engine import provenance
from alexlab.engine.errors import UserError, did_you_mean
from alexlab.engine.files import is_training, locked_inodes, read_csv
from alexlab.engine.metrics import lower_is_better
from alexlab.engine.naming import run_name
from alexlab.engine.overrides import key_of
from alexlab.engine.run_dir import name_of
from alexlab.engine.settings import canonical, overridden_keys, settings_of
from alexlab.engine.text import printable

if TYPE_CHECKING:
    from pandas import DataFrame

# the numbers at the top level of summary.json
COUNTS = ("parameters", "macs", "epochs", "steps", "best_epoch", "world_size")
NUMBERS = ("seconds", "images_per_second", "data_wait", *COUNTS, "gpu_hours", "effective_lr")
FACTS = ("images", "commit", "device", "world_size", "effective_lr", "precision")
Row = dict[str, float]  # of a metrics.csv: {"step": 9, "val/acc1": 0.5}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class Run:
    """A run."""

    path: Path
    name: str  # the directory, as every command takes it
    status: str  # finished, failed, preempted, pruned, running, or unfinished (killed, or running elsewhere)
    # the flat config without keys that make no difference; "choices.model" is the option of conf/model
    settings: dict[str, Any]
    overridden: set[str] = field(default_factory=set)  # keys that the command line set
    summary: dict[str, Any] = field(default_factory=dict)  # the content of summary.json, {} before the run has ended
    config: dict[str, Any] = field(default_factory=dict)  # the content of config.yaml
    code: dict[str, Any] = field(default_factory=dict)  # the commit, and a hash of how the code differed from it
    fingerprint: Any = None  # equal for equal images among the runs that were read together; None if unknown
    problems: list[str] = field(default_factory=list)  # a sentence for each thing that could not be read

    def title(self, without: Collection[str] = ()) -> str | None:
        """Return the name that W&B shows, such as "alexnet_bn-lr0.05-s1", without the overrides of some keys; None if
        config.yaml is too old for it."""
        try:
            overrides = [text for text in self.config["overrides"] if key_of(text) not in without]
            return printable(run_name({**self.config, "overrides": overrides}))
        except (KeyError, TypeError, AttributeError):  # an old or damaged config.yaml
            return None

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of metrics.csv by step; [] (and a line in `problems`) if they cannot be read."""
        try:
            return read_metrics(self.path / "metrics.csv")
        except (OSError, ValueError) as error:
            self.problems.append(f"the curves of {self.path}: {error}")
            return []

    @cached_property
    def metrics(self) -> dict[str, float]:
        """All finite numbers that a run has: "val/acc1" of best.ckpt, "last/val/acc1" of the last epoch, "test/acc1",
        "images_per_second" and so on. A run without a summary has those of metrics.csv so far."""
        numbers: dict[str, Any] = {key: self.summary.get(key) for key in NUMBERS}
        best, last = self.summary.get("best") or {}, self.summary.get("last") or {}
        if not best and not last:
            monitor = str(self.settings.get("monitor") or "val/acc1")
            best, last, speed = _so_far(self.rows, monitor, self.lower_is_better)
            numbers |= {key: value for key, value in speed.items() if numbers[key] is None}
        numbers |= {key: value for key, value in last.items() if key.startswith("train/")}
        numbers |= {f"last/{key}": value for key, value in last.items() if key.startswith("val/")}
        numbers |= best
        dataset = self.summary.get("dataset")
        images = dataset.get("images") if isinstance(dataset, dict) else None
        if not isinstance(images, dict) or "test" in images:  # without test images, the test used the validation images
            numbers |= self.summary.get("test") or {}
        return {key: value for key, value in numbers.items() if is_number(value) and abs(value) < 1e300}

    def lower_is_better(self, key: str) -> bool:
        """Return whether less of a metric, "val/f1", is better, by the config, summary.json or the metric's name."""
        is_monitor = key == self.settings.get("monitor")
        mode = (is_monitor and self.settings.get("monitor_mode")) or recorded_mode(self.summary, key)
        return mode == "min" if mode else lower_is_better(key)

    @property
    def code_is_unknown(self) -> bool:
        """Whether git could not say how the code differed from the commit."""
        return bool(self.code.get("left_out")) and not self.code.get("patch_sha256")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What may differ between runs of equal settings: a value for each key of FACTS, None if unknown."""
        commit, patch = self.code.get("commit"), self.code.get("patch_sha256")
        changes = f"+{str(patch)[:6]}" if patch else "+changes" if self.code.get("dirty") else ""
        changes = "+?" if self.code_is_unknown else changes
        hardware = self.summary.get("hardware")
        hardware = hardware if isinstance(hardware, dict) else {}
        facts = {key: self.summary.get(key) for key in FACTS}
        facts["images"] = (
            hashlib.sha256(canonical(self.fingerprint).encode()).hexdigest()[:8] if self.fingerprint else None
        )
        facts["commit"] = f"{str(commit)[:7]}{changes}" if commit else None
        facts["device"] = hardware.get("device") or hardware.get("devices")
        return facts


def recorded_mode(summary: dict[str, Any], key: str) -> str | None:
    """Return "min" or "max", whichever is better of a metric, "val/f1"; None if summary.json does not say."""
    modes = summary.get("modes")
    mode = modes.get(key.rpartition("/")[2]) if isinstance(modes, dict) else None
    return mode if mode in ("min", "max") else None


def steps_per_epoch(summary: dict[str, Any], rows: Sequence[Row]) -> float | None:
    """Return the steps per epoch; without a summary, by the first validation, which is usually at an epoch's end."""
    steps: Any = summary.get("steps_per_epoch")
    if is_number(steps) and steps > 0:
        return steps
    return next(((row["step"] + 1) / (row["epoch"] + 1) for row in rows if "val/loss" in row and "epoch" in row), None)


def table_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one dict per run: name, title, path, status, metrics, facts, settings ("optimizer.lr", "model" for the
    chosen option). A setting that is called like a metric or a fact has the key "config/NAME"."""
    rows = [
        {"name": run.name, "title": run.title() or run.name, "path": str(run.path), "status": run.status}
        | {**run.facts, **run.metrics}
        for run in runs
    ]
    taken = set().union(*rows)
    for run, row in zip(runs, rows, strict=True):
        for key, value in run.settings.items():
            label = key.removeprefix("choices.")
            row[f"config/{label}" if label in taken else label] = value
    return rows


def curves(run_dir: Path | str) -> "DataFrame":
    """Return a run's metrics.csv: one row per step (the index), one column per metric, NaN if it was not measured.

    Raises:
        UserError: the file cannot be read as a run's metrics.csv.
    """
    import pandas as pd

    return pd.DataFrame(read_metrics(Path(run_dir) / "metrics.csv") or {"step": []}).groupby("step").last()


# -- finding


def find(names: Iterable[str], logs: Path) -> tuple[list[Path], list[str]]:
    """Return the run directories that `names` stand for, and a sentence for each that is missing or cannot be opened.

    Args:
        names: folders that hold runs, globs, names of runs or sweeps as tables show them, or "latest".
        logs: the folder of runs/ and multiruns/.
    """
    run_dirs: dict[Path, None] = {}
    problems: list[str] = []
    for name in names:
        runs: list[Path] = []
        for place in (Path(name).expanduser(), logs / "runs" / name, logs / "multiruns" / name):
            # a name may contain brackets, so it is a glob only if no such file exists
            matches = [str(place)] if place.exists() else sorted(glob.glob(str(place)))  # noqa: PTH207
            runs = [run for match in matches if os.path.isdir(match) for run in _below(match, problems)]  # noqa: PTH112
            if runs:
                break
        if not runs and name == "latest":
            runs = sorted(_below(str(logs), []), key=modified)[-1:]
        if not runs:
            hint = did_you_mean(name, {path.name for path in logs.glob("*runs/*")}, most=2)
            problems.append(f"{name}: no run found.{hint}")
        run_dirs |= dict.fromkeys(run.resolve() for run in runs)
    return list(run_dirs), problems


def _below(folder: str, problems: list[str]) -> Iterator[Path]:
    """Yield the run directories at and below `folder`, except in hidden folders; run directories are not nested."""
    seen: set[tuple[int, int]] = set()  # links may lead to a folder again

    for path, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda error: problems.append(f"{error.filename}: {error.strerror}.")
    ):
        status = Path(path).stat()
        if {"config.yaml", "summary.json"} & {*files, *folders}:
            yield Path(path)
            folders.clear()
        elif (status.st_dev, status.st_ino) in seen:
            folders.clear()
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def modified(run_dir: Path) -> float:
    """Return when config.yaml was written, in seconds since 1970; 0 if it does not exist."""
    try:
        return (run_dir / "config.yaml").stat().st_mtime
    except OSError:
        return 0.0


# -- reading


def read(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs, and for each folder that could not be read a sentence with the reason."""
    runs: list[Run] = []
    problems: list[str] = []
    blocks: dict[bytes, Any] = {}
    locked = locked_inodes()
    for folder in folders:
        try:
            runs.append(_read_run(folder, locked, blocks))
        except Exception as error:  # whatever somebody's folder contains, the remaining runs are shown
            why = str(error).partition("\n")[0][:200] or type(error).__name__
            problems.append(printable(f"{folder}: {why}"))
    for run, fingerprint in zip(runs, identities([run.summary.get("dataset") for run in runs]), strict=True):
        run.fingerprint = fingerprint
    return runs, problems


def _read_run(folder: Path, locked: set[int] | None, blocks: dict[bytes, Any]) -> Run:
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError("config.yaml is not a file." if path.exists() else "config.yaml is missing.")
    config = _read_config(path, blocks)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError("config.yaml is not the config of a run.")
    summary = {}
    if (folder / "summary.json").is_file():
        try:
            summary = json.loads((folder / "summary.json").read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"summary.json cannot be read: {error}.") from None
        parts = [summary.get(key) or {} for key in ("best", "last", "test")] if isinstance(summary, dict) else [None]
        if not all(isinstance(part, dict) and all(v is None or is_number(v) for v in part.values()) for part in parts):
            raise ValueError("summary.json is not the summary of a run.")
    if is_training(folder, locked):  # a summary.json is from before the resume
        old = ("status", "best", "last", "test", "seconds", "images_per_second")
        status, summary = "running", {key: value for key, value in summary.items() if key not in old}
    else:
        status = "pruned" if summary.get("pruned") is True else printable(str(summary.get("status", "unfinished")))
    name, code = printable(name_of(folder)), provenance.read(folder)
    return Run(folder, name, status, settings_of(config), overridden_keys(config), summary, config, code)


def _read_config(path: Path, blocks: dict[bytes, Any]) -> Any:
    """Return the content of a config.yaml.

    Parsing YAML takes most of the time of a comparison, and runs differ in few of their top-level blocks (model:,
    data:, ...), so each block is parsed once and kept in `blocks`.
    """
    config: dict[str, Any] = {}
    try:
        for block in re.split(rb"^(?=[^\s#\-])", path.read_bytes(), flags=re.MULTILINE):
            if block not in blocks:
                blocks[block] = configs.with_current_targets(configs.parsed(block) or {})
            config |= copy.deepcopy(blocks[block]) if block.startswith(b"choices") else blocks[block]
    except (ValueError, TypeError):  # some block cannot be read alone
        config = configs.with_current_targets(configs.read(path))
    if isinstance(config, dict) and "model" in config:
        configs.fill_in(config)
    return config


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.csv by step, without cells that are not numbers; [] if it does not exist.

    Rows without a step, torn rows and a last line without an end (it is being written) are skipped.

    Raises:
        UserError: the file is not a CSV file.
    """
    try:
        lines = read_csv(path)[1]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a run's: {error}.") from None
    rows: list[Row] = []
    for cells in lines:
        row: Row = {}
        for key, cell in cells.items():
            try:
                row[key] = float(cell)
            except ValueError:
                continue
        if 0 <= row.get("step", -1) < 2**63 and 0 <= row.get("epoch", 0) < 2**63:
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def _so_far(rows: list[Row], monitor: str, is_lower_better: Callable[[str], bool]) -> tuple[Row, Row, Row]:
    """Return what was measured at the best epoch by `monitor`, what was measured last, and the speed so far."""
    last: Row = {}
    speed: Row = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if re.match(r"(train|val)/(?!.*_(best|step)$)", key)}
        if row.get("perf/seconds") and row.get("perf/images"):
            seconds = row["perf/seconds"]
            speed = {"seconds": round(seconds, 2), "images_per_second": round(row["perf/images"] / seconds, 1)}
    sign = -1 if is_lower_better(monitor) else 1
    measured = [row for row in rows if abs(row.get(monitor, math.inf)) < 1e300]  # False for NaN
    best = max(measured, key=lambda row: sign * row[monitor], default={})
    return {key: best[key] for key in best if key in last and key.startswith("val/")}, last, speed
