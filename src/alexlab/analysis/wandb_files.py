"""What W&B's client leaves on a disk: the file of a run, and a run's files as its server gives them."""

import itertools
import json
import math
import operator
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexlab.engine import config as configs
from alexlab.engine.config import LARGEST, flat
from alexlab.engine.kinds import is_number, printable
from alexlab.engine.settings import settings_of, words_of

# The records of a .wandb file lie in LevelDB's log format: blocks of 32 KiB, in them pieces of (CRC, length, kind).
BLOCK, HEAD, FILE_HEAD = 32768, struct.Struct("<IHB"), 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
KINDS = {kind: zlib.crc32(bytes([kind])) for kind in (FULL, FIRST, MIDDLE, LAST)}
START = re.compile(rb"(?:\x08[\x80-\xff]*[\x00-\x7f])?([\x80-\xff]*[\x00-\x7f])")
LONGEST = 2**30  # bytes of a .wandb file
DEEPEST = 20
TOLD = ("status", "pruned", "dataset", "precision", "hardware", "world_size", "effective_lr",
        "steps_per_epoch")  # at a run's start  # fmt: skip
Row = dict[str, float]
NO_NUMBERS = {'"', "[", "t", "f", "n", ""}  # how JSON begins that is none
Texts = dict[tuple[str, ...], str]  # JSON by nested keys


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
    settings = settings_of(config)
    whole = config.get("floats")
    for key in map(str, whole if isinstance(whole, list) else []):  # which W&B has made 1 of 1.0
        if isinstance(value := settings.get(key), int) and not isinstance(value, bool) and abs(value) < 2**53:
            settings[key] = float(value)
    code = next((part for key in ("code", "git") if isinstance(part := summary.get(key), dict) and part), {})
    if not _is_ours(summary):
        numbers = {key: value for key, value in summary.items() if is_number(value)}
        last = {key: value for key, value in numbers.items() if key.startswith(("train/", "val/"))}
        test = {key: value for key, value in numbers.items() if key.startswith("test/")}
        others = {key: value for key, value in numbers.items() if not key.startswith(("_", "train/", "val/", "test/"))}
        told = {key: value for key, value in summary.items() if key in TOLD}
        summary = {**told, "last": {} if source else last, "test": test, "others": others}
        summary["seconds"] = numbers.get("seconds", numbers.get("_runtime"))
    status = "pruned" if summary.get("pruned") is True else str(summary.get("status", status))
    return {"name": printable(name), "status": printable(status), "board_id": board_id, "config": settings,
            "summary": summary, "given": words_of(config), "source": source, "code": code}  # fmt: skip


def _is_ours(summary: dict[str, Any]) -> bool:
    """Whether it has the numbers of best.ckpt, of the last epoch and of the test, as our summary.json has."""
    parts = [summary.get(key) for key in ("best", "last", "test")]
    return isinstance(parts[0], dict) and all(
        part is None or (isinstance(part, dict) and all(value is None or is_number(value) for value in part.values()))
        for part in parts
    )


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
    # of others' folders the place says which run it is
    return _run(
        known[1] if known else place.name, "unfinished", values, summary, None, f"/{known[1] if known else place}"
    )


def _read_file(path: Path) -> dict[str, Any]:
    name = board_id = path.stem.removeprefix("run-")
    project = ""
    status = "unfinished"
    config: Texts = {}
    summary: Texts = {}
    problems: list[str] = []
    for record in records(path, {"run", "config", "summary", "exit"}, joined=True, problems=problems):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            board_id = record.run.run_id or board_id
            name = record.run.display_name or board_id
            project = record.run.project or project
            _gather(config, record.run.config.update)
        elif kind == "config":
            _gather(config, record.config.update)
        elif kind == "summary":
            _gather(summary, record.summary.update)
        elif kind == "exit":
            status = "failed" if record.exit.exit_code else "finished"
    settings = _nested(config)
    settings.pop("_wandb", None)
    return {**_run(name, status, settings, _nested(summary), path, f"{project}/{board_id}"), "problems": problems}


def _gather(texts: Texts, items: Any) -> None:
    """The newest text of each key, in the order of the last updates. A run's summary is told anew with each row that it
    logs, so they are gone through from the end, and most are never looked at."""
    newest: Texts = {}
    for item in reversed(items):
        keys = (key,) if (key := item.key) else tuple(item.nested_key)
        if keys not in newest:
            newest[keys] = item.value_json
    for keys, text in reversed(newest.items()):
        texts.pop(keys, None)
        texts[keys] = text


def _nested(texts: Texts) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for keys, text in texts.items():
        if len(keys) > DEEPEST:
            raise ValueError("it is nested too deep")
        here = values
        for key in keys[:-1]:
            inner = here.get(key)
            here[key] = here = inner if isinstance(inner, dict) else {}
        here[keys[-1]] = _value(text)
    return values


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
        keys, texts = [], []
        for item in record.history.item:
            if (text := item.value_json)[:1] not in NO_NUMBERS:
                keys.append(item.key or ".".join(item.nested_key))
                texts.append(text)
        values = _value(f"[{','.join(texts)}]")  # at once: a call each takes longer than what it does
        if len(values) != len(keys):
            raise ValueError("a row of it is not W&B's")
        row = dict(zip(keys, values, strict=True))
        if any(isinstance(value, dict) for value in values):
            row = flat(row)
        numbers = {key: float(value) for key, value in row.items() if type(value) in (int, float)}
        numbers["step"] = numbers.get("trainer/global_step", numbers.get("_step", record.history.step.num))
        if math.isfinite(numbers["step"]):
            yield numbers


def joined(before: list[Row], after: list[Row]) -> list[Row]:
    """The curves of a run that was gone on with. By the trainer's step, those that come again were lost; W&B's own may
    begin anew, and goes on."""
    trained = [row["step"] for row in after if "trainer/global_step" in row]
    if trained and any("trainer/global_step" in row for row in before):
        kept, step = [row for row in before if row["step"] < min(trained)], min(trained)
        for row in after:  # what was logged without it, as pictures are, belongs to the step before
            step = row["step"] if "trainer/global_step" in row else step
            kept.append(row | {"step": step})
        return kept
    start, end = min((row["step"] for row in after), default=math.inf), max((row["step"] for row in before), default=-1)
    more = end + 1 - start if start <= end else 0
    return before + [row | {"step": row["step"] + more} for row in after]


def records(path: Path, kinds: set[str], joined: bool = False, problems: list[str] | None = None) -> Iterator[Any]:
    """The records of a .wandb file, up to its end or to the first that is torn, as a kill leaves it.

    Args:
        kinds: such as {"run", "history"}; of a run with long curves most of the time goes into parsing the others.
        joined: records of a kind that follow each other come as one, which has the items of all of them, in order: what
            protocol buffers make of messages that are written one behind the other, and much faster.
        problems: gets what is wrong with the file, but for an end that a kill has torn.

    Raises:
        ValueError: it is no such file, or larger than any.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    message = wandb_internal_pb2.Record.DESCRIPTOR  # type: ignore[attr-defined]
    every = {_bytes_of(field.number << 3 | 2): field.number for field in message.oneofs_by_name["record_type"].fields}
    wanted = {message.fields_by_name[kind].number for kind in kinds}
    found = ((kind, raw) for raw in _whole(path, problems) if (kind := _kind(raw, every)) in wanted)
    for _, same in itertools.groupby(found, key=operator.itemgetter(0)):
        raws = (raw for _, raw in same)
        for raw in [b"".join(raws)] if joined else raws:
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(raw)
            except DecodeError:
                return
            yield record


def _whole(path: Path, problems: list[str] | None = None) -> Iterator[bytes]:
    """What lies in a file in LevelDB's log format, each whole, with sums (of kind and content) that are checked."""
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path.name} has more than {LONGEST} bytes")
    with path.open("rb") as file:
        if not file.read(FILE_HEAD).startswith(b":W&B"):
            raise ValueError(f"{path.name} is no run of W&B")
        place, held = FILE_HEAD, b""
        while block := file.read(asked := BLOCK - place % BLOCK):
            start, place = 0, place + len(block)
            while len(block) - start >= HEAD.size:  # what is left behind the last is filled up with zeros
                told, length, kind = HEAD.unpack_from(block, start)
                piece = block[start + HEAD.size : start + HEAD.size + length]
                start += HEAD.size + length
                if told != zlib.crc32(piece, KINDS.get(kind, 0)):
                    torn = len(piece) < length and len(block) < asked
                    if problems is not None and not torn:
                        problems.append(
                            f"{path} from byte {place - len(block) + start - HEAD.size - length} on (damaged)"
                        )
                    return
                held = piece if kind in (FULL, FIRST) else held + piece
                if kind in (FULL, LAST):
                    yield held


def _kind(raw: bytes, kinds: dict[bytes, int]) -> int | None:
    """Of which kind a record is, by protocol buffers' wire format, with nothing parsed: its first field that is one of
    these, given by their tags. It mostly stands first, or behind the record's number, which is field 1."""
    found = START.match(raw)
    if found and found[1] in kinds:
        return kinds[found[1]]
    place, size = 0, len(raw)
    while place < size:
        start = place
        tag, place = _varint(raw, place)
        if raw[start:place] in kinds:
            return kinds[raw[start:place]]
        if tag & 7 == 0:
            _, place = _varint(raw, place)
        elif tag & 7 == 2:
            length, place = _varint(raw, place)
            place += length
        else:
            place += {1: 8, 5: 4}.get(tag & 7, size)
    return None


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place behind it."""
    value = shift = 0
    while place < len(raw) and shift < 70:
        byte = raw[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, place


def _bytes_of(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _bytes_of(value >> 7)
