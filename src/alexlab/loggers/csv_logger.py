"""metrics.csv: the durable record of a run. Whatever ends a process, all rows but perhaps the last are whole."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from alexlab.engine.files import name_in_errors, open_no_link, read_csv, write_csv


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
            write_csv(self.path, self.columns, read_csv(self.path)[1])
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.columns).writerow(row)
        with (
            name_in_errors(self.path),
            open(self.path, "ab", opener=open_no_link) as file,
        ):  # one write: a kill leaves it out, or leaves it whole
            file.write(line.getvalue().encode())
        self.rows += 1

    def _look(self) -> None:
        if self.columns is None:
            self.columns, held = read_csv(self.path)
            self.rows = len(held)

    @rank_zero_only
    def settle(self) -> int:
        """The number of rows, which are on the disk now."""
        self._look()
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.rows
