"""Runs as compare.py knows them, read from directories of any age: a run's own, and W&B's where there is no other."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from alexlab import config as configs
from alexlab.compare import boards
from alexlab.compare.settings import settings_of, words_of
from alexlab.config import LARGEST
from alexlab.rundir import name_of

LONGEST = 2**28  # bytes of a metrics.csv
FACTS = ("seconds", "images_per_second", "data_wait", "parameters", "macs", "epochs", "steps", "gpu_hours",
         "effective_lr", "best_epoch", "world_size")  # numbers at the top of summary.json  # fmt: skip
LOW_IS_GOOD = ("loss", "seconds", "data_wait", "parameters", "macs", "gpu_hours")
Row = dict[str, float]


@dataclass
class Run:
    """
    Attributes:
        config: its settings that may make a difference, flat.
        given: keys of its command line.
        source: what holds its curves: metrics.csv, or a file of W&B's.
    """

    path: Path
    name: str
    status: str
    config: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    source: Path | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """The numbers of its curves, in the order of their steps; each row has "step"."""
        if self.source is None or not self.source.is_file():
            return []
        return list(boards.history(self.source) if self.source.suffix == ".wandb" else rows_of(self.source))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """All numbers that sort= and where= know: "val/acc1" is the best, "last/val/acc1" the last, then "test/acc1",
        "images_per_second" and the like."""
        found: dict[str, float] = {key: self.summary[key] for key in FACTS if _is_number(self.summary.get(key))}
        last = self.summary.get("last") or {}
        best = self.summary.get("best") or {}
        if not last and not best:  # it goes on, or was killed
            last, best = _from_rows(self.rows)
        found |= {key: value for key, value in last.items() if key.startswith("train/")}
        found |= {f"last/{key}": value for key, value in last.items() if key.startswith("val/")}
        found |= best
        if "test" in _images_of(self.summary):  # else val was tested again
            found |= self.summary.get("test") or {}
        return {key: value for key, value in found.items() if _is_number(value)}

    def value(self, key: str) -> Any:
        """A number, or a setting, or its status or name; None where it has none such."""
        for known in (self.numbers, self.config, {"status": self.status, "name": self.name}):
            if key in known:
                return known[key]
        return self.config.get(f"choices.{key}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _images_of(summary: dict[str, Any]) -> dict[str, Any]:
    """How many images each split had; of a run that does not say it, all that there may be."""
    dataset = summary.get("dataset")
    images = dataset.get("images") if isinstance(dataset, dict) else None
    return images if isinstance(images, dict) else {"test": None}


def _from_rows(rows: list[Row]) -> tuple[Row, Row]:
    """The last and the best of what was measured."""
    last: Row = {}
    best: Row = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(("train/", "val/")) and not key.endswith(("_best", "_step")):
                last[key] = value
                if key.startswith("val/"):
                    better = min if low_is_good(key) else max
                    best[key] = better(value, best.get(key, value))
    return last, best


def low_is_good(key: str) -> bool:
    return key.endswith(LOW_IS_GOOD)


# -- finding


def find(named: list[str], logs: Path) -> list[Path]:
    """The directories of runs at or below folders or globs, or of the names that the table shows."""
    found: dict[Path, None] = {}
    for name in named:
        places = [Path(name).expanduser(), logs / "runs" / name, logs / "multiruns" / name]
        place = next((place for place in places if glob.glob(str(place))), places[0])  # noqa: PTH207
        for match in sorted(glob.glob(str(place))):  # noqa: PTH207 (absolute patterns)
            for path in below(match, set()):
                found[Path(path).resolve()] = None
    return list(found)


def below(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Runs at `folder` and below it, without a look into them: no run lies in another.

    Args:
        seen: folders that were looked into; links may lead to one again.
    """
    try:
        known = Path(folder).stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if (known.st_dev, known.st_ino) in seen:
        return
    seen.add((known.st_dev, known.st_ino))
    names = {entry.name for entry in entries}
    if "config.yaml" in names or any(name.endswith(".wandb") for name in names):  # `_read` says what is no file
        yield folder
        return
    for entry in entries:
        if entry.is_dir():
            yield from below(entry.path, seen)


# -- reading


def read(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and why others could not be read."""
    runs, left_out = [], []
    going_on = locked_files()
    blocks: dict[bytes, Any] = {}
    for folder in folders:
        try:
            runs.append(_read(folder, going_on, blocks))
        except (OSError, ValueError) as error:
            left_out.append(f"{folder} ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
    return runs, left_out


def _read(folder: Path, going_on: set[int] | None, blocks: dict[bytes, Any]) -> Run:
    """
    Raises:
        ValueError: it is nothing that a run writes.
    """
    if (folder / "config.yaml").exists() and not (folder / "config.yaml").is_file():
        raise ValueError("its config.yaml is no file")
    if not (folder / "config.yaml").is_file() or (folder / "wandb-summary.json").is_file():
        return Run(folder, **boards.read(folder))
    config = config_of(folder / "config.yaml", blocks)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError("its config.yaml is not a run's")
    summary = summary_of(folder)
    lock = folder / ".lock.rank"
    if going_on is not None and lock.exists() and lock.stat().st_ino in going_on:
        status, summary = "running", {key: value for key, value in summary.items() if key != "status"}
    else:
        status = str(summary.get("status", "unfinished"))
    return Run(folder, name_of(folder), status, settings_of(config), summary, words_of(config), folder / "metrics.csv")


def config_of(path: Path, blocks: dict[bytes, Any]) -> Any:
    """What `config.read` gives. Runs differ in a few of their blocks (model:, data:, ...), and YAML is slow to read:
    each is read once.

    Args:
        blocks: those that were read before; new ones are added.
    """
    with path.open("rb") as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        return configs.read(path)  # which says so
    whole: dict[str, Any] = {}
    for block in re.split(rb"^(?=[^\s#\-])", raw, flags=re.MULTILINE):
        if block not in blocks:
            try:
                found = configs.parsed(block)
            except ValueError:
                found = None
            if not isinstance(found, dict) and block.strip():
                return configs.read(path)
            blocks[block] = found or {}
        whole |= blocks[block]
    return whole


def summary_of(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is nothing that a run writes.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST:
        raise ValueError(f"its summary.json has more than {LARGEST} bytes")
    try:
        told = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("its summary.json is no summary") from None
    numbers = [told.get(key) or {} for key in ("best", "last", "test")] if isinstance(told, dict) else [None]
    whole = all(
        isinstance(part, dict) and all(isinstance(value, (int, float, type(None))) for value in part.values())
        for part in numbers
    )
    if not whole or not str(told.get("status", "")).isalpha():
        raise ValueError("its summary.json is no summary")
    return told


def rows_of(path: Path) -> Iterator[Row]:
    """A metrics.csv; what is no number in it is left out.

    Raises:
        ValueError: it is larger than any run's.
    """
    if path.stat().st_size > LONGEST:
        raise ValueError(f"its metrics.csv has more than {LONGEST} bytes")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file)
        keys = next(reader, [])
        for cells in reader:
            row: Row = {}
            for key, cell in zip(keys, cells, strict=False):
                if cell:
                    try:
                        row[key] = float(cell)
                    except ValueError:
                        continue
            if "step" in row:
                yield row


def locked_files() -> set[int] | None:
    """The inodes that processes of this machine have locked, as a run has its directory; None where nothing tells.
    Asking for the lock itself would keep a run that begins from it."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    return {int(found[1]) for line in lines if (found := re.search(r"FLOCK .*:(\d+) \d+ \S+$", line))}
