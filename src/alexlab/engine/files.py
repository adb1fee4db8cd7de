"""Write files safely: atomic writes, no writing through links, the rows of metrics.csv, the lock of a run."""

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from alexlab.engine.errors import UserError


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add the file's path to any OSError raised in this block (Python omits it for files that are already open)."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "xb", sync: bool = False, **more: Any) -> Iterator[IO[Any]]:
    """Open a new file that replaces `path` at the end of the block. An error leaves `path` as it was.

    A link is replaced, and the file that it points to stays untouched: a run directory from somebody else may hold
    links to files of this machine.

    Args:
        mode: "xb", or "x" for text.
        sync: wait until the content is on the disk before the file is replaced.
    """
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp_path.unlink(missing_ok=True)
    try:
        with name_in_errors(path), tmp_path.open(mode, **more) as file:  # "x" does not follow a link either
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        tmp_path.replace(path)
    except BaseException as error:
        tmp_path.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise UserError(f"{path.parent} does not exist (any more), so {path.name} cannot be written.") from None
        raise


def remove_temporary(folder: Path) -> None:
    """Delete the unfinished files that killed processes left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# -- links


def open_no_link(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=open_no_link)`; a symbolic link raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def refuse_link(folder: Path) -> None:
    """Raise UserError if a folder is a link, through which files elsewhere would be overwritten."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and the files of a run are not written through one: remove it.")


def make_folder(run_dir: Path, name: str) -> Path:
    """Create a folder in a run directory if it is missing; UserError if it is a link."""
    refuse_link(run_dir / name)
    (run_dir / name).mkdir(exist_ok=True)
    return run_dir / name


# -- metrics.csv


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the columns and the complete rows of a metrics.csv; both are empty without a file."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        text = file.read()
    complete = text[: text.rfind("\n") + 1]  # a killed process may have left half a row at the end
    rows = csv.DictReader(io.StringIO(complete, newline=""))
    columns = list(rows.fieldnames or [])
    return columns, [row for row in rows if None not in row and None not in row.values()]


def write_csv(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Replace a metrics.csv by these rows."""
    with atomic_write(path, "x", sync=True, newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def cut_csv(path: Path, rows: int) -> int:
    """Keep the first `rows` rows of a metrics.csv. Returns how many were removed."""
    columns, all_rows = read_csv(path)
    if columns:
        write_csv(path, columns, all_rows[:rows])
    return max(0, len(all_rows) - rows)


# -- locks

RANK_LOCK = ".lock.rank"  # held by rank 0, also after the command that started it has died


@contextlib.contextmanager
def lock(run_dir: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of a run directory, which the system releases after kill -9 too; UserError if it is held."""
    file = os.open(run_dir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run_dir} is still training in another process: wait for it, or stop it first.") from None
        yield
    finally:
        os.close(file)


def locked_inodes() -> set[int] | None:
    """Return the inodes that processes of this machine have locked; None where the system does not list them.

    Locks are listed first because trying each lock could make a run that starts just then fail.
    """
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return {int(match[1]) for line in lines if (match := re.search(r"FLOCK .*:(\d+) \d+ \S+$", line))}


def is_training(run_dir: Path, locked: set[int] | None) -> bool:
    """Check whether a process of this machine trains a run. `locked` is what `locked_inodes` returns."""
    path = run_dir / RANK_LOCK
    if not path.is_file() or (locked is not None and path.stat().st_ino not in locked):
        return False
    with path.open("rb") as file:  # another file system may have locked a file of the same inode
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


OWNER = ".lock.owner"


@contextlib.contextmanager
def lock_against_machines(run_dir: Path, job: str | None, breaks: bool = False) -> Iterator[None]:
    """Hold a run directory on a network file system, where `lock` may hold on one machine only. Hold `lock` first.

    The file of a killed owner stays. A process of the same machine, which has the lock, replaces it, and so
    does a later start of the same job.

    Args:
        job: name of the scheduler's job, see `launcher.job`.
        breaks: replace the file of any machine.

    Raises:
        UserError: another machine holds the directory.
    """
    path, host = run_dir / OWNER, socket.gethostname()
    since = time.strftime("%Y-%m-%d %H:%M")
    mine = json.dumps({"host": host, "process": os.getpid(), "since": since, "job": job})
    if path.exists() or path.is_symlink():
        owner = _owner(path)
        is_past = owner.get("host") == host or (job is not None and owner.get("job") == job)
        if not is_past and not breaks:
            files = [path, run_dir / "metrics.csv", run_dir / "checkpoints/last.ckpt"]
            written = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
            minutes = max(0, time.time() - written) / 60
            who, process, since = (owner.get(key, "?") for key in ("host", "process", "since"))
            raise UserError(
                f"{run_dir} is still training on {who} (process {process} since {since}; it wrote something "
                f"{minutes:.0f} minutes ago): wait for it, or stop it on that machine. If that process is gone, add "
                "resume.break_lock=true."
            )
        path.unlink(missing_ok=True)
    try:
        with open(path, "x", opener=open_no_link) as file:
            file.write(mine)
    except FileExistsError:
        raise UserError(f"{run_dir} was just started by another machine too: wait for that run.") from None
    try:
        yield
    finally:
        if _owner(path) == json.loads(mine):
            path.unlink(missing_ok=True)


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):  # it is gone, or only half written
        return {}
    return owner if isinstance(owner, dict) else {}
