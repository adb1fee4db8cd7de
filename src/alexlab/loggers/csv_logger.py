"""metrics.csv: the durable record of a run. However a process ends, all rows except perhaps the last are whole."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from alexlab.engine.files import name_in_errors, open_no_link, read_csv, write_csv


class CsvLogger(Logger):
    """Append one row per call of `log_metrics`, with a column for each metric that was ever logged.

    Lightning's CSVLogger empties the directory at the start, and rewrites the file in place when a metric is new.

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
            write_csv(self.path, columns, read_csv(self.path)[1])
        line = io.StringIO(newline="")
        csv.DictWriter(line, columns).writerow(row)
        # a single write: after a kill the row is either whole or missing
        with name_in_errors(self.path), open(self.path, "ab", opener=open_no_link) as file:
            file.write(line.getvalue().encode())
        self.rows += 1

    def _read_columns(self) -> list[str]:
        if self.columns is None:
            self.columns, rows = read_csv(self.path)
            self.rows = len(rows)
        return self.columns

    @rank_zero_only
    def sync(self) -> int:
        """Flush the file to the disk, and return the number of rows."""
        self._read_columns()
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.rows
