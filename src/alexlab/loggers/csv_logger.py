"""metrics.csv: the durable record of a run. Whatever ends a process, all rows but perhaps the last are whole."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from alexlab.engine.errors import naming
from alexlab.engine.run_dir import unlinked


class MetricsLogger(Logger):
    """A row each time that something is logged, with columns for all that was ever logged.

    Lightning's CSVLogger removes what a directory holds, and writes its file over where a column comes along.

    Args:
        run_dir: holds metrics.csv; rows that are there stay.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self.columns: list[str] | None = None  # None before the file was looked at
        self.rows = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {**metrics, "step": step}
        self._look()
        assert self.columns is not None
        new = row.keys() - set(self.columns)
        if new:
            self.columns = sorted({*self.columns, *new})
            write(self.path, self.columns, read(self.path)[1])
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.columns).writerow(row)
        with (
            naming(self.path),
            open(self.path, "ab", opener=unlinked) as file,
        ):  # one write: a kill leaves it out, or leaves it whole
            file.write(line.getvalue().encode())
        self.rows += 1

    def _look(self) -> None:
        if self.columns is None:
            self.columns, held = read(self.path)
            self.rows = len(held)

    @rank_zero_only
    def settle(self) -> int:
        """The number of rows, which are on the disk now."""
        self._look()
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.rows


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and whole rows of a metrics.csv; none where there is no file."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]  # what follows was being written when its process ended
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    columns = list(rows.fieldnames or [])
    return columns, [row for row in rows if None not in row and None not in row.values()]


def write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Put a file with these rows in the place of `path`, in one go."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    with naming(path), beside.open("x", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def cut_back(path: Path, rows: int) -> int:
    """Keep the first rows alone, for a run that goes on from when it had so many; returns how many were taken away."""
    columns, held = read(path)
    if columns:
        write(path, columns, held[:rows])
    return max(0, len(held) - rows)
