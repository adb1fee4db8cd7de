"""metrics.csv: the durable record of a run. However a process ends, all rows except perhaps the last are whole."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from alexlab.engine.errors import naming
from alexlab.engine.run_dir import unlinked, written


class CsvLogger(Logger):
    """Append one row per call of `log_metrics`, with a column for each metric that was ever logged.

    Lightning's CSVLogger empties its directory at the start, and rewrites its file in place when a metric is new.

    Args:
        run_dir: directory of metrics.csv; existing rows are kept.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self.columns: list[str] | None = None  # None until the file was read
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

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds the config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {**metrics, "step": step}
        columns = self._read_columns()
        if row.keys() - set(columns):
            columns = self.columns = sorted({*columns, *row})
            write(self.path, columns, read(self.path)[1])
        line = io.StringIO(newline="")
        csv.DictWriter(line, columns).writerow(row)
        # a single write: after a kill the row is either whole or missing
        with naming(self.path), open(self.path, "ab", opener=unlinked) as file:
            file.write(line.getvalue().encode())
        self.rows += 1

    def _read_columns(self) -> list[str]:
        if self.columns is None:
            self.columns, rows = read(self.path)
            self.rows = len(rows)
        return self.columns

    @rank_zero_only
    def sync(self) -> int:
        """Flush the file to the disk; return its number of rows."""
        self._read_columns()
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.rows


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the whole rows of a metrics.csv; none if there is no file."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]  # the process was killed while it wrote what follows
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    columns = list(rows.fieldnames or [])
    return columns, [row for row in rows if None not in row and None not in row.values()]


def write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Replace `path` by a file with these rows, atomically."""
    with written(path, "x", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def truncate(path: Path, rows: int) -> int:
    """Keep the first `rows` rows, as a resumed run needs; return the number of removed rows."""
    columns, existing = read(path)
    if columns:
        write(path, columns, existing[:rows])
    return max(0, len(existing) - rows)
