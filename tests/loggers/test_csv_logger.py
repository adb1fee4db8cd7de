"""metrics.csv: rows that are never lost, with any columns."""

from pathlib import Path

import pytest

from alexlab.engine.files import cut_csv, read_csv, write_csv
from alexlab.loggers.csv_logger import CsvLogger


def test_rows_are_appended_and_new_metrics_add_columns(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.5, "epoch": 0}, step=1)
    before = (tmp_path / "metrics.csv").read_bytes()
    logger.log_metrics({"train/loss": 1.25}, step=2)
    assert (tmp_path / "metrics.csv").read_bytes() == before + b",2,1.25\r\n", "appended, not written again"
    resumed = CsvLogger(tmp_path)
    resumed.log_metrics({"mine": 7.0}, step=3)
    assert resumed.sync() == 3
    columns, rows = read_csv(tmp_path / "metrics.csv")
    assert columns == ["epoch", "mine", "step", "train/loss"]
    assert [[row[key] for key in ("step", "train/loss", "mine")] for row in rows] == [
        ["1", "1.5", ""], ["2", "1.25", ""], ["3", "", "7.0"]
    ]  # fmt: skip


def test_a_row_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,0.5\n2,0.2")
    assert read_csv(path) == (["step", "train/loss"], [{"step": "1", "train/loss": "0.5"}])
    assert read_csv(tmp_path / "none.csv") == ([], [])
    assert CsvLogger(tmp_path).sync() == 1


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_csv(path, ["step"], [{"step": str(step)} for step in range(5)])
    assert cut_csv(path, 3) == 2
    assert [row["step"] for row in read_csv(path)[1]] == ["0", "1", "2"]
    assert cut_csv(path, 9) == 0
    assert cut_csv(tmp_path / "none.csv", 0) == 0


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("step\n")
    (tmp_path / "metrics.csv").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=r"metrics\.csv"):
        CsvLogger(tmp_path).log_metrics({}, step=1)
    assert (tmp_path / "theirs").read_text() == "step\n"
