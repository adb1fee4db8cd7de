"""What W&B's client leaves on a disk: the file of a run, and a run's files as its server gives them."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexlab import config as configs
from alexlab.compare.settings import settings_of, words_of
from alexlab.config import LARGEST, flat
from alexlab.kinds import printable

# The records of a .wandb file lie in LevelDB's log format: blocks of 32 KiB, in them pieces of (CRC, length, kind).
BLOCK, HEAD, FILE_HEAD = 32768, struct.Struct("<IHB"), 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
LONGEST = 2**30  # bytes of a .wandb file
DEEPEST = 20
Row = dict[str, float]


def read(folder: Path) -> dict[str, Any]:
    """A run from W&B's folder of it: `name`, `status`, `config`, `summary` and `source`, as `Run` wants them.

    Raises:
        ValueError: it is nothing that W&B writes.
    """
    file = next((path for path in sorted(folder.glob("*.wandb")) if path.is_file()), None)
    return _read_file(file) if file is not None else _read_downloaded(folder)


def _run(
    name: str, status: str, config: dict[str, Any], summary: dict[str, Any], source: Path | None, board_id: str
) -> dict[str, Any]:
    """Of a run of ours W&B's summary has our own, in it; of another's there are numbers alone."""
    ours = isinstance(summary.get("best"), dict)
    if not ours:
        numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
        last = {key: value for key, value in numbers.items() if key.startswith(("train/", "val/"))}
        test = {key: value for key, value in numbers.items() if key.startswith("test/")}
        others = {key: value for key, value in numbers.items() if not key.startswith(("_", "train/", "val/", "test/"))}
        summary = {**numbers, "last": {} if source else last, "test": test, "others": others}
        summary.setdefault("seconds", numbers.get("_runtime"))
    status = "pruned" if summary.get("pruned") is True else str(summary.get("status", status))
    return {"name": printable(name), "status": printable(status), "board_id": board_id, "config": settings_of(config),
            "summary": summary, "given": words_of(config), "source": source}  # fmt: skip


def _read_downloaded(folder: Path) -> dict[str, Any]:
    """config.yaml and wandb-summary.json, as `run.files()` downloads them and `wandb/run-*/files` has them."""
    config = configs.read(folder / "config.yaml")
    with (folder / "wandb-summary.json").open("rb") as file:
        raw = file.read(LARGEST + 1)
    summary = _value(raw) if len(raw) <= LARGEST else None
    if not isinstance(config, dict) or not isinstance(summary, dict):
        raise ValueError("its config.yaml or wandb-summary.json is not W&B's")
    values = {k: v["value"] for k, v in config.items() if isinstance(v, dict) and "value" in v and k != "_wandb"}
    place = folder.parent if folder.name == "files" else folder
    known = re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(\w+)", place.name)
    return _run(known[1] if known else place.name, "unfinished", values, summary, None, known[1] if known else "")


def _read_file(path: Path) -> dict[str, Any]:
    name = board_id = path.stem.removeprefix("run-")
    status = "unfinished"
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records(path, {"run", "config", "summary", "exit"}):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            board_id = record.run.run_id or board_id
            name = record.run.display_name or board_id
            _take(config, record.run.config.update)
        elif kind == "config":
            _take(config, record.config.update)
        elif kind == "summary":
            _take(summary, record.summary.update)
        elif kind == "exit":
            status = "failed" if record.exit.exit_code else "finished"
    config.pop("_wandb", None)
    return _run(name, status, config, summary, path, board_id)


def _take(values: dict[str, Any], items: Any) -> None:
    for item in items:
        keys = list(item.nested_key) or [item.key]
        if len(keys) > DEEPEST:
            raise ValueError("it is nested too deep")
        here = values
        for key in keys[:-1]:
            inner = here.get(key)
            here[key] = here = inner if isinstance(inner, dict) else {}
        here[keys[-1]] = _value(item.value_json)


def _value(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def history(path: Path) -> Iterator[Row]:
    """The numbers that were logged, a row each time, with "step": the trainer's where it was logged, else W&B's."""
    for record in records(path, {"history"}):
        if record.WhichOneof("record_type") != "history":
            continue
        row: dict[str, Any] = {}
        _take(row, record.history.item)
        numbers = {
            key: float(value)
            for key, value in flat(row).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        numbers["step"] = numbers.get("trainer/global_step", numbers.get("_step", record.history.step.num))
        yield numbers


def records(path: Path, kinds: set[str]) -> Iterator[Any]:
    """The records of a .wandb file, up to its end or to the first that is torn, as a kill leaves it.

    Args:
        kinds: such as {"run", "history"}; of a run with long curves most of the time goes into parsing the others.

    Raises:
        ValueError: it is no such file, or larger than any.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path.name} has more than {LONGEST} bytes")
    fields = wandb_internal_pb2.Record.DESCRIPTOR.fields_by_name  # type: ignore[attr-defined]
    numbers = {fields[kind].number for kind in kinds}
    with path.open("rb") as file:
        if not file.read(FILE_HEAD).startswith(b":W&B"):
            raise ValueError(f"{path.name} is no run of W&B")
        place, held = FILE_HEAD, b""
        while True:
            left = BLOCK - place % BLOCK
            if left < HEAD.size:  # filled up with zeros
                place += len(file.read(left))
                continue
            head = file.read(HEAD.size)
            if len(head) < HEAD.size:
                return
            _, length, kind = HEAD.unpack(head)
            piece = file.read(length)
            place += HEAD.size + len(piece)
            if len(piece) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
                return
            held = piece if kind in (FULL, FIRST) else held + piece
            if kind in (FULL, LAST) and not numbers.isdisjoint(_fields(held)):
                record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
                try:
                    record.ParseFromString(held)
                except DecodeError:
                    return
                yield record


def _fields(raw: bytes) -> Iterator[int]:
    """The numbers of a message's fields, in order, by protocol buffers' wire format; what they hold is skipped."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while place < len(raw) and shift < 70:
            byte = raw[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    while place < len(raw):
        tag = varint()
        yield tag >> 3
        if tag & 7 == 0:
            varint()
        elif tag & 7 == 2:
            length = varint()
            place += length
        else:
            place += {1: 8, 5: 4}.get(tag & 7, len(raw))
