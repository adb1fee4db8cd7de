"""Runs as compare.py knows them, read from directories of any age: a run's own, and W&B's where there is no other."""

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from alexlab.analysis import wandb_files as boards
from alexlab.engine import config as configs
from alexlab.engine import provenance as code_state
from alexlab.engine.kinds import printable
from alexlab.engine.run_dir import LARGEST, name_of
from alexlab.engine.settings import same_as, settings_of, words_of

LONGEST = 2**28  # bytes of a metrics.csv
# numbers at the top of summary.json
FACTS = ("seconds", "images_per_second", "data_wait", "parameters", "macs", "epochs", "steps", "gpu_hours",
         "effective_lr", "best_epoch", "world_size")  # fmt: skip
LOW_IS_GOOD = re.compile(r"loss(?!less|y|i)|error|perplexity|(^|[/._-])(err|ppl|m[as]e|rmse|wer|cer)\d*($|[/._-])"
                         r"|(^|/)(seconds|data_wait|parameters|macs|gpu_hours)$", re.IGNORECASE)  # fmt: skip
Row = dict[str, float]


@dataclass
class Run:
    """
    Attributes:
        config: its settings that may make a difference, flat.
        given: keys of its command line.
        source: what holds its curves: metrics.csv, or a file of W&B's.
        board_id: W&B's, where it was read from a folder of W&B's.
        code: its commit, and whether and how its code differed from that.
        problems: what of it could not be read.
        earlier: the run before it went on in a folder of its own, as W&B's do.
    """

    path: Path
    name: str
    status: str
    config: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    source: Path | None = None
    board_id: str = ""
    code: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    earlier: "Run | None" = None

    @property
    def foreign(self) -> bool:
        """Whether it is not of this project: a run in W&B whose settings are called otherwise."""
        return bool(self.board_id) and not any(key.startswith("choices.") for key in self.config)

    @cached_property
    def rows(self) -> list[Row]:
        """The numbers of its curves, in the order of their steps; each row has "step". What cannot be read is in
        `problems`."""
        rows: list[Row] = []
        if self.source is not None and self.source.is_file():
            try:
                rows = list(boards.history(self.source) if self.source.suffix == ".wandb" else rows_of(self.source))
            except (OSError, ValueError, csv.Error) as error:
                self.problems.append(f"the curves of {self.path} ({type(error).__name__}: {str(error)[:100]})")
        if self.earlier is not None:
            rows = boards.joined(self.earlier.rows, rows)
            self.problems += [line for line in self.earlier.problems if line not in self.problems]
        return sorted(rows, key=lambda row: row["step"])

    @property
    def images(self) -> Any:
        """The fingerprint of its images, or None."""
        dataset = self.summary.get("dataset")
        return dataset.get("fingerprint") if isinstance(dataset, dict) else None

    @property
    def code_untold(self) -> bool:
        """Whether git could not say how its code differs from the commit."""
        return bool(self.code.get("left_out")) and not self.code.get("patch_sha256")

    @property
    def facts(self) -> dict[str, Any]:
        """What may set runs with the same settings apart all the same."""
        commit, patch = self.code.get("commit"), self.code.get("patch_sha256")
        dirty = (f"+{str(patch)[:6]}" if patch else "+changes") if self.code.get("dirty") else ""
        dirty = "+?" if self.code_untold else dirty
        hardware = self.summary.get("hardware")
        hardware = hardware if isinstance(hardware, dict) else {}
        facts = {
            "images": hashlib.sha256(same_as(self.images).encode()).hexdigest()[:8] if self.images else None,
            "commit": f"{str(commit)[:7]}{dirty}" if commit else None,
            "device": hardware.get("device") or hardware.get("devices"),
        }
        return facts | {key: self.summary.get(key) for key in ("world_size", "effective_lr", "precision")}

    @cached_property
    def numbers(self) -> dict[str, float]:
        """All numbers that sort= and where= know: "val/acc1" of best.ckpt's epoch, "last/val/acc1" of the last, then
        "test/acc1", "images_per_second" and the like."""
        found: dict[str, float] = {key: self.summary[key] for key in FACTS if _is_number(self.summary.get(key))}
        last = self.summary.get("last") or {}
        best = self.summary.get("best") or {}
        if not last and not best:  # it goes on, or was killed
            last, best = _from_rows(self.rows, str(self.config.get("monitor") or "val/acc1"))
            found = _speed(self.rows) | found
        found |= {key: value for key, value in (self.summary.get("others") or {}).items() if key not in found}
        found |= {key: value for key, value in last.items() if key.startswith("train/")}
        found |= {f"last/{key}": value for key, value in last.items() if key.startswith("val/")}
        found |= best
        if "test" in _images_of(self.summary):  # else val was tested again
            found |= self.summary.get("test") or {}
        return {key: value for key, value in found.items() if _is_number(value) and math.isfinite(value)}

    def value(self, key: str) -> Any:
        """A setting, or what its label says of it, or a number, or its status or name; None where it has none such."""
        facts = {key: "unknown" if fact is None else fact for key, fact in self.facts.items()}
        label = {"status": self.status, "name": self.name, **facts}
        for known in (self.config, self.numbers, label):
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


def _from_rows(rows: list[Row], monitor: str) -> tuple[Row, Row]:
    """The last of what was measured, and that of the epoch that was best by `monitor`, as best.ckpt holds it."""
    last: Row = {}
    best: Row = {}
    for _, together in itertools.groupby(rows, key=lambda row: row["step"]):
        here = {
            key: value for row in together for key, value in row.items()
            if key.startswith(("train/", "val/")) and not key.endswith(("_best", "_step"))
        }  # fmt: skip
        last |= here
        measured = {key: value for key, value in here.items() if key.startswith("val/")}
        by = monitor if monitor in measured else next(iter(sorted(measured)), "")
        sign = 1 if low_is_good(by) else -1
        new = measured.get(by, math.nan)
        if math.isfinite(new) and (by not in best or sign * new < sign * best[by]):
            best = measured
    return last, best


def _speed(rows: list[Row]) -> Row:
    """So far."""
    known = [row for row in rows if row.get("perf/seconds") and row.get("perf/images")]
    if not known:
        return {}
    seconds, images = known[-1]["perf/seconds"], known[-1]["perf/images"]
    return {"seconds": round(seconds, 2), "images_per_second": round(images / seconds, 1)}


def low_is_good(key: str) -> bool:
    """Whether of a number of that name the smaller is the better."""
    return LOW_IS_GOOD.search(key) is not None


# -- reading


def read(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and why others could not be read."""
    runs, left_out = [], []
    going_on = locked_files()
    blocks: dict[bytes, Any] = {}
    for folder in folders:
        try:
            runs.append(_read(folder, going_on, blocks))
        except Exception as error:  # of folders that may be anybody's: the others are shown
            why = (str(error).splitlines() or [""])[0][:100]
            left_out.append(printable(f"{folder} ({type(error).__name__}: {why})"))
    return _one_each(runs, left_out), left_out


def _one_each(runs: list[Run], left_out: list[str]) -> list[Run]:
    """A run of W&B's that was gone on with has several folders, by time: the last one says how it ended, and the curves
    are of all."""
    last: dict[str, Run] = {}
    named = {  # by the folder's name: of what was downloaded the project is not known
        _begun(run)[0]: run.board_id for run in runs if run.board_id and not run.board_id.startswith("/")
    }
    for run in sorted((run for run in runs if run.board_id), key=_begun):
        if run.board_id.startswith("/"):
            run.board_id = named.get(_begun(run)[0], run.board_id)
        before = last.get(run.board_id)
        if before is not None:
            copied = _begun(run)[0] == _begun(before)[0]
            if copied and (before.source is None) == (run.source is None):
                left_out.append(f"{before.path} (the same run as {run.path})")
                last[run.board_id] = run
                continue
            run.earlier, run.problems = None if copied else before, before.problems + run.problems
            run.config, run.given = before.config | run.config, before.given | run.given
            others = [part.summary.get("others") or {} for part in (before, run)]
            run.summary["others"] = others[0] | others[1]
        last[run.board_id] = run
    return [run for run in runs if not run.board_id or last[run.board_id] is run]


def _begun(run: Run) -> tuple[str, bool]:
    """The name of W&B's folder, which begins with the time; what was downloaded of it tells less."""
    folder = run.path.parent if run.path.name == "files" else run.path
    return folder.name.removeprefix("offline-"), run.source is not None


def _read(folder: Path, going_on: set[int] | None, blocks: dict[bytes, Any]) -> Run:
    """
    Raises:
        ValueError: it is nothing that a run writes.
    """
    if (folder / "config.yaml").exists() and not (folder / "config.yaml").is_file():
        raise ValueError("its config.yaml is no file")
    board = (folder / "wandb-summary.json").is_file() or any(folder.glob("*.wandb"))
    if not (folder / "config.yaml").is_file() and not board:
        raise ValueError("it has no config.yaml")
    if not (folder / "config.yaml").is_file() or (folder / "wandb-summary.json").is_file():
        return Run(folder, **boards.read(folder))
    config = configs.with_current_targets(config_of(folder / "config.yaml", blocks))
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError("its config.yaml is not a run's")
    summary = summary_of(folder)
    lock = folder / ".lock.rank"
    if going_on is not None and lock.is_file() and lock.stat().st_ino in going_on and _held(lock):
        status, summary = "running", {key: value for key, value in summary.items() if key != "status"}
    else:
        status = "pruned" if summary.get("pruned") is True else str(summary.get("status", "unfinished"))
    name, source, code = printable(name_of(folder)), folder / "metrics.csv", code_state.read(folder)
    run = Run(folder, name, status, settings_of(config), summary, words_of(config), source, code=code)
    if not code and (folder / "code.json").exists():
        run.problems.append(f"which code {folder} was trained with (its code.json cannot be read)")
    return run


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
    numbers = [told.get(key) or {} for key in ("best", "last", "test", "others")] if isinstance(told, dict) else [None]
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
    text = path.read_text(encoding="utf-8", errors="replace")
    reader = csv.reader(text[: text.rfind("\n") + 1].splitlines())  # what follows was being written, or is cut
    keys = next(reader, [])
    for cells in reader:
        row: Row = {}
        for key, cell in zip(keys, cells, strict=False):
            if cell and len(cells) == len(keys):
                try:
                    row[key] = float(cell)
                except ValueError:
                    continue
        if math.isfinite(row.get("step", math.nan)):
            yield row


def locked_files() -> set[int] | None:
    """The inodes that processes of this machine have locked, as a run has its directory; None where nothing tells.
    Asking for each lock itself might keep a run that begins from it."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    return {int(found[1]) for line in lines if (found := re.search(r"FLOCK .*:(\d+) \d+ \S+$", line))}


def _held(lock: Path) -> bool:
    """Whether it is this file that is locked, and not another file system's of the same number."""
    import fcntl  # where /proc/locks is, this is

    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
