"""Runs in a bucket: paths.logs=s3://BUCKET/PATH.

A run is written to a folder of this machine, as any other, and copied from there by a thread of rank 0. So training
waits for no upload. Commands that read runs bring what they need from the bucket to the same folder first.

The checkpoints in the bucket are replaced as those on a disk are, see `checkpoint_io`: at each moment SHA256SUMS lists
the hash of each file, old or new, and previous.ckpt is whole while last.ckpt is replaced.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath

from alexlab.engine.checkpoint_io import LAST, PREVIOUS, SUMS, link, read_sums, sums_of, text_of
from alexlab.engine.config import is_address
from alexlab.engine.errors import UserError
from alexlab.engine.files import atomic_write
from alexlab.engine.schema import PathsConfig
from alexlab.engine.storage import PART, Bucket

OWNER = "owner.json"  # which process trains a run
EVERY = 60.0  # seconds between two signs of life of that process
SILENT = 180.0  # seconds without one, after which it counts as killed
SENT = ".sent"  # the hashes of each last.ckpt of this run that this machine has sent or received
TRIES = 3
CHECKPOINTS = (LAST, PREVIOUS, "best.ckpt")
SKIPPED = {"wandb", "mlruns"}  # folders of loggers, which have servers of their own


class Mirror:
    """Copies a run to a bucket while it trains.

    Args:
        paths: `paths.logs` is the address of a bucket.
        run_dir: the run's directory on this machine.
        patience: seconds to wait for a server that does not answer.

    Raises:
        UserError: the run's directory is not in the folder of this machine that belongs to `logs`.
    """

    def __init__(self, paths: PathsConfig, run_dir: Path, patience: float | None) -> None:
        self.bucket, self.run_dir = Bucket(address_of(paths, run_dir), patience), run_dir
        self.error: UserError | None = None  # of the thread
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of each file in the bucket
        self._there: dict[str, str] = {}  # the hash of each checkpoint in the bucket
        self._pending: dict[str, str] = {}  # of each checkpoint that is to be copied
        self._due, self._changing, self._ends = threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._copy_all, name="alexlab mirror", daemon=True)

    # -- the lock

    def start(self, job: str | None, breaks: bool, is_new: bool) -> None:
        """Hold the run against other machines, and copy what is there from now on.

        A process of the same machine or the same job, which starts again, takes the run over at once. Any other one
        waits until the owner has been silent for `SILENT` seconds.

        Args:
            job: name of the scheduler's job, see `launcher.job`.
            breaks: take the run over from any machine.
            is_new: whether the bucket must not have the run yet.

        Raises:
            UserError: another machine trains the run, or a new one exists already.
        """
        if is_new and self.bucket.size("config.yaml") is not None:
            raise UserError(
                f"{self.bucket.address} holds a run already: choose another hydra.run.dir, or continue that run with "
                "resume=auto."
            )
        for left in (self.run_dir / "checkpoints").glob(".*.ckpt.*"):  # by a process that was killed
            left.unlink()
        mine = {"host": socket.gethostname(), "process": os.getpid(), "job": job}
        told, seen = False, None
        while not self.bucket.create(OWNER, json.dumps(mine).encode()):
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                owner, written = json.loads(self.bucket.read(OWNER)), self.bucket.list().get(OWNER)
                again = owner["host"] == mine["host"] or (job is not None and owner["job"] == job)
                silent = written is not None and self._now() - written.time > SILENT
                self.bucket.delete(f"{OWNER}.time")
                if again or silent or breaks:
                    self.bucket.write(OWNER, json.dumps(mine).encode())
                    break
                if seen is not None and written is not None and written.time != seen:
                    raise UserError(
                        f"{self.bucket.address} is still training on {owner['host']} (process {owner['process']}): "
                        "wait for it, or stop it on that machine. If that process is gone, add resume.break_lock=true."
                    )
                seen = written.time if written is not None else None
                if not told:
                    told = True
                    say(
                        f"{self.bucket.address} was trained on {owner['host']}: waiting up to {SILENT:.0f} seconds to "
                        "see whether it still is ..."
                    )
            time.sleep(SILENT / 60)
        self._mine = json.dumps(mine).encode()
        self._sent = dict.fromkeys((name for name in self.bucket.list() if is_copied(PurePosixPath(name))), (0, 0))
        self._there = {name: hashes[-1] for name, hashes in self._sums().items() if hashes}
        self._thread.start()

    def _now(self) -> float:
        """Return the time of the server, in seconds since 1970."""
        self.bucket.write(f"{OWNER}.time", b"")
        return self.bucket.list()[f"{OWNER}.time"].time

    def _sums(self) -> dict[str, list[str]]:
        try:
            return sums_of(self.bucket.read(f"checkpoints/{SUMS}").decode())
        except FileNotFoundError:
            return {}

    # -- copying

    def checkpoint_written(self, path: Path) -> None:
        """Copy a checkpoint that was just written, in the background. Raises UserError if copying has failed."""
        if self.error is not None:
            raise self.error
        if path.name not in CHECKPOINTS or path.parent != self.run_dir / "checkpoints":
            return
        with self._changing:
            kept = path.with_name(f".{path.name}.mirror")  # the file itself may be replaced meanwhile
            link(path, kept)
            self._pending[path.name] = read_sums(path.parent)[path.name][-1]
        self._due.set()

    def finish(self) -> None:
        """Copy the rest, and release the run. Raises UserError if that fails."""
        if self._thread.is_alive():
            self._ends = True
            self._due.set()
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _copy_all(self) -> None:
        try:
            while True:
                ends = self._ends
                self._due.clear()
                self._copy()
                if ends and not self._pending:
                    self.bucket.delete(OWNER)
                    return
                if not ends:
                    self._due.wait(EVERY)
                    self.bucket.write(OWNER, self._mine)
        except UserError as error:
            self.error = UserError(f"{error} The run on this machine is whole: {self.run_dir}")
        except OSError as error:
            self.error = UserError(f"{self.run_dir} could not be copied to {self.bucket.address}: {error}")

    def _copy(self) -> None:
        # metrics before the checkpoint: a resumed run removes later rows, and cannot do without earlier ones
        here = {path.relative_to(self.run_dir).as_posix(): path for path in files_of(self.run_dir)}
        for name, path in here.items():
            with contextlib.suppress(FileNotFoundError):  # it was removed or renamed just now
                now = path.stat()
                if self._sent.get(name) != (now.st_size, now.st_mtime_ns):
                    self.bucket.write(name, path.read_bytes())
                    self._sent[name] = (now.st_size, now.st_mtime_ns)
        for name in [name for name in self._sent if name not in here]:
            self.bucket.delete(name)
            del self._sent[name]
        for name in ("best.ckpt", LAST):
            with self._changing:
                digest = self._pending.pop(name, None)
                kept = self.run_dir / f"checkpoints/.{name}.mirror"
                sending = kept.with_name(f".{name}.sending")
                if digest is not None:
                    kept.replace(sending)
            if digest is not None:
                self._send(name, sending, digest)
                sending.unlink()

    def _send(self, name: str, path: Path, digest: str) -> None:
        """Replace a checkpoint in the bucket."""
        after = self._there | {name: digest}
        if name == LAST:
            note_sent(self.run_dir, digest)
            if LAST in self._there:
                after[PREVIOUS] = self._there[LAST]
        both = {key: [*({self._there[key]} if key in self._there else ()), after[key]] for key in after}
        self.bucket.write(f"checkpoints/{SUMS}", text_of(both).encode())
        if name == LAST and LAST in self._there:
            self.bucket.copy(f"checkpoints/{LAST}", f"checkpoints/{PREVIOUS}")
        self.bucket.write(f"checkpoints/{name}", path)
        self.bucket.write(f"checkpoints/{SUMS}", text_of({key: [value] for key, value in after.items()}).encode())
        self._there = after


def files_of(run_dir: Path) -> Iterable[Path]:
    """Yield the files of a run but its checkpoints, config.yaml first."""
    found = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in sorted(found, key=lambda path: (path.name != "config.yaml", path)):
        if is_copied(path.relative_to(run_dir)):
            yield path


def is_copied(name: PurePath) -> bool:
    """Return whether a file of a run is copied, besides the checkpoints."""
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and name.parts[0] not in {"checkpoints", OWNER, f"{OWNER}.time", *SKIPPED}


def address_of(paths: PathsConfig, run_dir: Path) -> str:
    """Return where a run is in the bucket."""
    logs, local = paths.logs, paths.local
    if not run_dir.is_relative_to(local):
        raise UserError(
            f"`hydra.run.dir={run_dir}` must be below {local}, from where runs are copied to paths.logs={logs}: remove "
            f"it, or choose {local}/train/runs/NAME."
        )
    return f"{logs.rstrip('/')}/{run_dir.relative_to(local).as_posix()}"


def note_sent(run_dir: Path, digest: str) -> None:
    with (run_dir / "checkpoints" / SENT).open("a") as file:
        file.write(f"{digest}\n")


# -- what commands read


def bring_run(paths: PathsConfig, run_dir: Path, checkpoints: Iterable[str] = CHECKPOINTS) -> None:
    """Bring a run from the bucket to its directory on this machine, unless what is there is newer.

    Args:
        checkpoints: the files in checkpoints/ that are needed.

    Raises:
        UserError: a checkpoint in the bucket is damaged, or the server does not answer.
    """
    if not is_address(paths.logs):
        return
    bucket, folder = Bucket(address_of(paths, run_dir)), run_dir / "checkpoints"
    there = bucket.list()
    if "config.yaml" not in there:
        return
    sums = sums_of(bucket.read(f"checkpoints/{SUMS}").decode()) if f"checkpoints/{SUMS}" in there else {}
    newest = (sums.get(LAST) or [""])[-1]
    known = (folder / SENT).read_text().split() if (folder / SENT).is_file() else []
    own = newest in known or (not newest and (run_dir / "config.yaml").is_file())
    folder.mkdir(parents=True, exist_ok=True)
    if not own:
        say(f"bringing {bucket.address} to {run_dir} ...")
        for name in there:
            if is_copied(PurePosixPath(name)):
                (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(run_dir / name) as file:
                    file.write(bucket.read(name))
    wanted = [name for name in checkpoints if f"checkpoints/{name}" in there]
    held = read_sums(folder)
    for name in wanted:
        if own and (folder / name).is_file():
            continue
        digest = bring_checkpoint(bucket, folder / name, sums.get(name, []), there[f"checkpoints/{name}"].bytes)
        held[name] = [digest] if digest else sums.get(name, [])
    with atomic_write(folder / SUMS) as file:
        file.write(text_of(held).encode())
    if newest and not own and LAST in wanted:
        note_sent(run_dir, newest)


def bring_checkpoint(bucket: Bucket, path: Path, hashes: list[str], size: int) -> str | None:
    """Copy a checkpoint to this machine, and return its hash; None if it has none of `hashes`."""
    digest = None
    for _ in range(TRIES):
        found = hashlib.sha256()
        with atomic_write(path) as file:
            for start in range(0, size, PART):
                content = bucket.read_range(f"checkpoints/{path.name}", start, min(PART, size - start))
                found.update(content)
                file.write(content)
        digest = found.hexdigest()
        if digest in hashes:
            return digest
    return None


def bring_named(paths: PathsConfig, named: str | None, ckpt: str = "") -> None:
    """Bring the run of this name, or the newest one for "latest", if the bucket has it.

    Args:
        ckpt: "best" or "last" if no other checkpoint is needed.
    """
    if named is None or not is_address(paths.logs):
        return
    local, checkpoints = paths.local, [f"{ckpt}.ckpt"] if ckpt in ("best", "last") else CHECKPOINTS
    if named == "latest":
        there = Bucket(f"{paths.logs}/train").list()
        configs = {name: each for name, each in there.items() if name.endswith("/config.yaml")}
        if configs:
            newest = max(configs, key=lambda name: configs[name].time)
            bring_run(paths, local / "train" / newest.removesuffix("/config.yaml"), checkpoints)
        return
    path = Path(named).expanduser()
    places = [local / "train/runs" / named, local / "train/multiruns" / named, Path(os.path.abspath(path))]  # noqa: PTH100
    for place in places:
        if place.is_relative_to(local):
            bring_run(paths, place, checkpoints)


def bring_tables(paths: PathsConfig, has_figures: bool) -> None:
    """Bring config.yaml, summary.json and metrics.csv of all runs, as far as they have changed."""
    if not is_address(paths.logs):
        return
    bucket, local = Bucket(paths.logs), paths.local
    index = local / ".brought.json"
    before = json.loads(index.read_text()) if index.is_file() else {}
    for name, each in bucket.list("train").items():
        is_table = PurePosixPath(name).name in ("config.yaml", "summary.json", "metrics.csv")
        if (is_table or (has_figures and name.endswith(".png"))) and before.get(name) != each.tag:
            path = local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = bucket.read(name)
            if not (path.is_file() and path.stat().st_mtime > each.time):  # of a run that this machine trains
                with atomic_write(path) as file:
                    file.write(content)
                os.utime(path, (each.time, each.time))
            before[name] = each.tag
    local.mkdir(parents=True, exist_ok=True)
    with atomic_write(index) as file:
        file.write(json.dumps(before).encode())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
