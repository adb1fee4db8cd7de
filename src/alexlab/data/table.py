"""Images and labels that a table lists: CSV, TSV or Parquet. A class by index, see items.py."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexlab.data.fingerprint import sample
from alexlab.data.folder import SPELLINGS, listed
from alexlab.engine.errors import UserError


class Table:
    """All images of a table. The arguments are keys of conf/data/table.yaml, and those of conf/data/_base.yaml.

    Raises:
        UserError: a column is missing, a row is wrong, or images do not exist.
    """

    def __init__(
        self,
        file: str,
        root: str,
        columns: dict[str, Any] | None = None,
        separator: str = " ",
        classes: Sequence[Any] | None = None,
        multilabel: bool = False,
        on_error: str = "raise",
    ) -> None:
        self.file, self.root = Path(file).expanduser(), str(root)
        if not isinstance(columns or {}, Mapping):
            raise UserError(f"`data.columns={columns}` must be a mapping, such as data.columns.path=NAME.")
        column = {key: key for key in ("path", "label", "split", "fold", "group", "weight")} | (columns or {})
        of_classes = list(column.pop("labels", None) or [])
        if of_classes and not multilabel:
            raise UserError("`data.columns.labels` is for images with any number of classes: add task=multilabel.")
        table = read(self.file)
        needed = [column["path"], *(of_classes or [column["label"]])]
        if absent := [str(name) for name in needed if name not in table]:
            names = " and no column ".join(absent)
            raise UserError(
                f"{self.file} has no column {names}, but {listed(list(map(str, table)))}: name another with "
                "data.columns.path=NAME, data.columns.label=NAME or data.columns.labels=[NAME,...]."
            )
        for key in ("split", "fold", "group", "weight"):
            if column[key] not in (None, key, *table):  # the names in conf/data/table.yaml are optional
                raise UserError(
                    f"{self.file} has no column {column[key]}, but {listed(list(map(str, table)))}: correct "
                    f"`data.columns.{key}={column[key]}`, or set it to null."
                )
        cells = {key: table[name] for key, name in column.items() if name in table}
        self.paths = cells["path"].tolist()
        self._refuse(cells["path"] == "", "no path")
        self.splits = cells["split"].tolist() if "split" in cells else None
        if "split" in cells:
            known = cells["split"].str.lower().isin(list(SPELLINGS))
            wrong = cells["split"].iloc[int(np.argmax(~known))]
            self._refuse(~known, f"the split `{wrong}`, which is none of {', '.join(SPELLINGS)}")
        if on_error == "raise":  # of at most 10,000 images, because looking at a million takes long
            missing = np.zeros(len(table), bool)
            for i in sample(bytes(16), len(table)).tolist():
                missing[i] = not os.path.isfile(os.path.join(self.root, self.paths[i]))  # noqa: PTH113
            rule = "write it relative to that folder, with / and with the suffix; or skip such rows: data.on_error=skip"
            self._refuse(missing, f"a path that does not exist in data.root={self.root}: {rule}")
        if "label" in cells:  # in one Unicode form, whether they were written on macOS or Linux
            cells["label"] = cells["label"].map(lambda cell: unicodedata.normalize("NFC", cell))
        self.classes = of_classes or (classes and [unicodedata.normalize("NFC", str(name)) for name in classes])
        if of_classes:
            flags = table[of_classes].replace({"0.0": "0", "1.0": "1"})
            self._refuse(~flags.isin(["0", "1"]).all(axis=1), f"a cell that is not 0 or 1 in {listed(of_classes)}")
            self.targets: Any = (flags == "1").to_numpy(np.uint8)
        elif multilabel:
            self.targets = [{label.strip() for label in cell.split(separator)} - {""} for cell in cells["label"]]
        else:
            self._refuse(cells["label"] == "", "no label")
            self.targets = cells["label"].tolist()

        # what splits and sampling use
        self.groups = np.unique(cells["group"], return_inverse=True)[1] if "group" in cells else None
        self.weights = self._numbers(cells["weight"], "weight") if "weight" in cells else None
        self.folds = None
        if "fold" in cells:
            is_test = np.zeros(len(table), bool) if self.splits is None else cells["split"] == "test"
            folds = self._numbers(cells["fold"].mask(is_test, "0"), "fold")
            self._refuse(folds % 1 != 0, "a fold that is not a whole number")
            self.folds = np.where(is_test, -1, folds).astype(np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[str, Any]:
        return os.path.join(self.root, self.paths[i]), self.targets[i]

    def name(self, i: int) -> str:
        return self.paths[i]

    def where(self, i: int) -> str:
        """Return where image i is listed, for messages."""
        return f"{self.file}, line {i + 2}" + (f" ({self.paths[i]})" if self.paths[i] else "")

    def _numbers(self, cells: Any, what: str) -> np.ndarray:
        import pandas as pd

        numbers = pd.to_numeric(cells, errors="coerce")
        self._refuse(~(numbers.ge(0) & numbers.lt(np.inf)), f"a {what} that is not a number from 0 on")
        return numbers.to_numpy(np.float64)

    def _refuse(self, wrong: Any, what: str) -> None:
        """Raise UserError for the first row that is wrong."""
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{self.where(row)} has {what}.")


def read(file: Path) -> Any:
    """Read a table of texts, without spaces around them or empty rows at the end. Raises UserError if it cannot."""
    import pandas as pd

    if file.is_dir():
        raise UserError(f"`data.file={file}` is a folder: give the table, a CSV, TSV or Parquet file.")
    if not file.is_file():
        raise UserError(f"`data.file={file}`: {file.absolute()} does not exist: give the table with data.file=PATH.")
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        else:
            with file.open(encoding="utf-8-sig", errors="replace") as opened:
                header = opened.readline()
            separator = "\t" if file.suffix == ".tsv" else max(",;\t", key=header.count)
            more: Any = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "encoding": "utf-8-sig"}
            table = pd.read_csv(file, sep=separator, **more)
    except ImportError:
        raise UserError(f"{file} needs the extra: pip install 'alexlab[parquet]'.") from None
    except (OSError, ValueError) as error:  # ValueError: syntax or encoding
        rule = "" if file.suffix == ".parquet" else ": save it in UTF-8, with the same number of cells in each line"
        raise UserError(f"{file} cannot be read as a table ({str(error).strip()}){rule}.") from None
    table = table.astype(object).where(table.notna(), "").map(lambda cell: str(cell).strip())
    table.columns = [str(name).strip() for name in table]
    table = table.iloc[: np.flatnonzero((table != "").any(axis=1)).max(initial=-1) + 1]
    if not len(table):
        raise UserError(f"{file} has no rows: it must list at least one image.")
    return table
