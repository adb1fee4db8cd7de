"""Runs in a bucket: paths.logs=s3://BUCKET/PATH.

A run is written to a folder of this machine, as any other, and copied from there by a thread of rank 0. So training
waits for no upload. Commands that read runs download what they need to the same folder first.

The checkpoints in the bucket are replaced as those on a disk are, see `checkpoint_io`: at each moment SHA256SUMS lists
the hash of each file, old or new, and previous.ckpt is whole while last.ckpt is replaced.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from alexlab.engine.checkpoint_io import LAST, PREVIOUS, SUMS, link, read_sums, sums_of, text_of
from alexlab.engine.config import is_address
from alexlab.engine.errors import UserError
from alexlab.engine.files import atomic_write, is_training, locked_inodes
from alexlab.engine.schema import PathsConfig
from alexlab.engine.storage import PART, Bucket, Entry

OWNER, SUMMARY = "owner.json", "summary.json"  # which process trains a run; how it ended
CLOCK = ".time-"  # objects that are written to learn the time of the server
EVERY = 60.0  # seconds between two signs of life of that process
SILENT = 180.0  # seconds without one, after which it counts as killed
SENT = ".sent"  # the hashes of each last.ckpt of this run that this machine has uploaded or downloaded
SEEN = ".seen"  # the hashes that the bucket listed for last.ckpt when the run was downloaded
TRIES = 3
CHECKPOINTS = (LAST, PREVIOUS, "best.ckpt")
SKIPPED = {"wandb", "mlruns"}  # folders of loggers, which have servers of their own
RESULT = re.compile(r"(eval|report|predictions|model|temperature)[\w.-]*")  # what commands write after the training


class Mirror:
    """Copies a run to the bucket `paths.logs` while it trains: `hold`, then `start`, then `finish`.

    A server that does not answer is waited for `patience` seconds.

    Raises:
        UserError: the run's directory is not in the folder of this machine that belongs to `logs`.
    """

    def __init__(self, paths: PathsConfig, run_dir: Path, patience: float | None) -> None:
        self.bucket, self.run_dir = Bucket(address_of(paths, run_dir), patience), run_dir
        self.error: UserError | None = None  # of a thread
        self.owner: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
        self._tag: str | None = None  # of the object `OWNER`, as this process wrote it
        # size and time of each file that this process has copied; a resumed run has no summary until it ends
        self._sent: dict[str, tuple[int, int]] = {SUMMARY: (0, 0)}
        self._ends = False
        self._listed: dict[str, list[str]] = {}  # SHA256SUMS in the bucket
        self._pending: dict[str, str] = {}  # the hash of each checkpoint that is to be copied
        self._due, self._changing, self._over = threading.Event(), threading.Lock(), threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(task,), name="alexlab mirror", daemon=True)
            for task in (self._copy_all, self._live)
        ]

    # -- the lock

    def hold(self, job: str | None, breaks: bool, is_new: bool) -> None:
        """Hold the run against other machines.

        A process of the same machine or the same job, which starts again, takes the run over at once. Any other one
        waits until the owner has been silent for `SILENT` seconds.

        Args:
            job: name of the scheduler's job, see `launcher.job`.
            breaks: take the run over from any machine.
            is_new: whether the bucket must not have the run yet.

        Raises:
            UserError: another machine trains the run; or a new one exists already; or a resumed one was continued on
                another machine after it was downloaded.
        """
        if "config.yaml" in self.bucket.list() and is_new:  # a list finds a bucket that does not exist
            raise UserError(
                f"{self.bucket.address} holds a run already: choose another hydra.run.dir, or continue that run with "
                "resume=auto."
            )
        mine, has_said, seen = json.dumps(self.owner | {"job": job}).encode(), False, None
        while True:
            entry = self.bucket.entry(OWNER)
            owner = {}
            if entry is not None:
                with contextlib.suppress(FileNotFoundError, ValueError):  # it has just ended
                    owner = json.loads(self.bucket.read(OWNER))
                again = owner.get("host") == self.owner["host"] or (job is not None and owner.get("job") == job)
                if not (again or breaks or self._now() - entry.time > SILENT):
                    if seen is not None and entry.tag != seen:
                        raise UserError(
                            f"{self.bucket.address} is still training on {owner.get('host')} (process "
                            f"{owner.get('process')}): wait for it, or stop it on that machine. If that process is "
                            "gone, add resume.break_lock=true."
                        )
                    seen = entry.tag
                    if not has_said:
                        has_said = True
                        say(
                            f"{self.bucket.address} was trained on {owner.get('host')}: waiting up to {SILENT:.0f} "
                            "seconds to see whether it still is ..."
                        )
                    time.sleep(SILENT / 60)
                    continue
            self._tag = self.bucket.replace(OWNER, mine, entry.tag if entry is not None else None)
            if self._tag is not None:  # otherwise another process was faster
                break
        self.owner |= {"job": job}
        self._listed = sums_in(self.bucket)
        listed = self._listed.get(LAST, [])
        is_known = listed == hashes_in(self.run_dir, SEEN) or {*listed} & {*hashes_in(self.run_dir, SENT)}
        if not is_new and listed and not is_known:
            self._release()
            raise UserError(
                f"{self.bucket.address} was continued on another machine while this one waited: give the same command "
                "again."
            )

    def _now(self) -> float:
        """Return the time of the server, in seconds since 1970."""
        name = f"{CLOCK}{self.owner['host']}-{os.getpid()}"
        self.bucket.write(name, b"")
        entry = self.bucket.entry(name)
        self.bucket.delete(name)
        return entry.time if entry is not None else 0.0

    def _live(self) -> None:
        """Write a sign of life again and again. Raises UserError if another process has taken the run over."""
        while not self._over.wait(EVERY):
            content = json.dumps(self.owner | {"alive": time.time()}).encode()
            tag = self.bucket.replace(OWNER, content, self._tag)
            if tag is None and not self._over.is_set():
                raise UserError(f"{self.bucket.address} was taken over by another machine: this one stops.")
            self._tag = tag

    def _release(self) -> None:
        self._over.set()
        if self._threads[1].is_alive():
            self._threads[1].join()
        self.bucket.delete(OWNER)

    # -- copying

    def start(self) -> None:
        """Copy the files, and from now on each checkpoint that is written."""
        folder = self.run_dir / "checkpoints"
        for left in folder.glob(".*.ckpt.*"):  # by a process that was killed
            left.unlink()
        for name in ("best.ckpt", LAST):
            hashes = read_sums(folder).get(name)
            if not hashes or not (folder / name).is_file():
                continue
            # a process that was killed while it sent a file has listed the hash, perhaps after the one before
            has_arrived = self._listed.get(name) == hashes[-1:] and self.bucket.entry(f"checkpoints/{name}") is not None
            if not has_arrived:
                self._keep(folder / name)
        for thread in self._threads:
            thread.start()

    def _keep(self, path: Path) -> None:
        with self._changing:
            link(path, path.with_name(f".{path.name}.mirror"))  # the file itself may be replaced meanwhile
            self._pending[path.name] = read_sums(path.parent)[path.name][-1]

    def checkpoint_written(self, path: Path) -> None:
        """Copy a checkpoint that was just written, in the background. Raises UserError if copying has failed."""
        if self.error is not None:
            raise self.error
        if path.name in ("best.ckpt", LAST) and path.parent == self.run_dir / "checkpoints":
            self._keep(path)
            self._due.set()

    def finish(self) -> None:
        """Copy the rest, and release the run. Raises UserError if that fails."""
        if self._threads[0].ident is None and self._tag is not None:  # the run ended before anything was copied
            self._release()
        elif self._threads[0].is_alive():
            self._ends = True
            self._due.set()
            self._threads[0].join()
        if self.error is not None:
            self._over.set()
            raise self.error

    def _guarded(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}."
            self.error = UserError(
                f"The copy of the run in {self.bucket.address} is incomplete: {what} This machine has it all: "
                f"{self.run_dir}"
            )

    def _copy_all(self) -> None:
        while self.error is None:
            ends = self._ends
            self._due.clear()
            self._copy()
            if ends and not self._pending:
                self._release()
                return
            if not ends:
                self._due.wait(EVERY)

    def _copy(self) -> None:
        taken: dict[str, str] = {}
        with self._changing:  # what is written from now on comes with the next copy, after the metrics
            for name in ("best.ckpt", LAST):
                if name in self._pending:
                    taken[name] = self._pending.pop(name)
                    kept = self.run_dir / f"checkpoints/.{name}.mirror"
                    kept.replace(kept.with_name(f".{name}.sending"))
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
        for name, digest in taken.items():
            path = self.run_dir / f"checkpoints/.{name}.sending"
            self._send(name, path, digest)
            path.unlink(missing_ok=True)

    def _send(self, name: str, path: Path, digest: str) -> None:
        """Replace a checkpoint in the bucket. Until it has arrived, all hashes that were listed before stay listed."""
        before = self._listed
        moved = {PREVIOUS: before[LAST]} if name == LAST and before.get(LAST) else {}
        if name == LAST:
            note_sent(self.run_dir, digest)
        both = {key: [*before.get(key, ()), *new] for key, new in {**moved, name: [digest]}.items()}
        self._listed = {**before, **both}
        self.bucket.write(f"checkpoints/{SUMS}", text_of(self._listed).encode())
        if moved:
            with contextlib.suppress(FileNotFoundError):  # it never arrived
                self.bucket.copy(f"checkpoints/{LAST}", f"checkpoints/{PREVIOUS}")
        self.bucket.write(f"checkpoints/{name}", path)
        self._listed = {**before, **moved, name: [digest]}
        self.bucket.write(f"checkpoints/{SUMS}", text_of(self._listed).encode())


def files_of(run_dir: Path) -> Iterable[Path]:
    """Yield the files of a run except the checkpoints, config.yaml first."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in sorted(files, key=lambda path: (path.name != "config.yaml", path)):
        if is_copied(path.relative_to(run_dir)):
            yield path


def is_copied(name: PurePath) -> bool:
    """Return whether a file of a run is copied, besides the checkpoints."""
    hidden = not name.parts or any(part.startswith(".") for part in name.parts)
    return not hidden and name.parts[0] not in {"checkpoints", OWNER, *SKIPPED} and str(name).isprintable()


def address_of(paths: PathsConfig, run_dir: Path) -> str:
    """Return where a run is in the bucket."""
    logs, local, run_dir = paths.logs, paths.local.resolve(), run_dir.resolve()
    if not run_dir.is_relative_to(local):
        raise UserError(
            f"`hydra.run.dir={run_dir}` must be below {local}, from where runs are copied to paths.logs={logs}: remove "
            f"it, or choose {local}/train/runs/NAME."
        )
    return f"{logs.rstrip('/')}/{run_dir.relative_to(local).as_posix()}"


def note_sent(run_dir: Path, digest: str) -> None:
    with (run_dir / "checkpoints" / SENT).open("a") as file:
        file.write(f"{digest}\n")


def hashes_in(run_dir: Path, name: str) -> list[str]:
    """Return the hashes in `SENT` or `SEEN`."""
    path = run_dir / "checkpoints" / name
    return path.read_text().split() if path.is_file() else []


# -- what commands download


def download_run(paths: PathsConfig, run_dir: Path, checkpoints: Iterable[str] = CHECKPOINTS) -> None:
    """Download a run to the run's directory, with these checkpoints, unless this machine has something newer.

    Raises:
        UserError: the checkpoints in the bucket are damaged, or the server does not answer.
    """
    if not is_address(paths.logs) or is_training(run_dir, locked_inodes()):
        return
    bucket, folder = Bucket(address_of(paths, run_dir)), run_dir / "checkpoints"
    objects = bucket.list()
    if "config.yaml" not in objects:
        return
    listed = sums_in(bucket).get(LAST, [])
    newest = listed[-1] if listed else ""
    own = newest in hashes_in(run_dir, SENT) or (not newest and (run_dir / "config.yaml").is_file())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SEEN).write_text("\n".join(listed))
    has_said = False
    wanted = [name for name in checkpoints if f"checkpoints/{name}" in objects]
    if own:
        wanted = [name for name in wanted if not (folder / name).is_file()]
    for name, entry in objects.items():
        path = run_dir / name
        needed = (
            is_newer_result(name, path, entry)
            if own or (path.is_file() and is_result(name))
            else is_copied(PurePosixPath(name))
        )
        if needed and not is_same(run_dir / name, entry):
            if not has_said:
                say(f"downloading {bucket.address} to {run_dir} ...")
                has_said = True
            download_file(bucket, name, run_dir / name, entry)
    damaged = []
    for name in wanted:
        sums = read_sums(folder)
        if (folder / name).is_file() and sums.get(name) == sums_in(bucket).get(name):
            continue
        digest = download_checkpoint(bucket, folder / name)
        if digest is None:
            damaged.append(bucket.path(f"checkpoints/{name}"))
            continue
        with atomic_write(folder / SUMS) as file:
            file.write(text_of({**sums, name: [digest]}).encode())
        if name == LAST:
            note_sent(run_dir, digest)
    if damaged and len(damaged) == len(wanted):
        raise UserError(f"{', '.join(damaged)}: the SHA-256 is not the one in {SUMS}, so the file is damaged.")
    for name in damaged:
        say(f"warning: {name} is damaged, and was not downloaded.")


def sums_in(bucket: Bucket) -> dict[str, list[str]]:
    """Return the hashes in the SHA256SUMS of a run in a bucket."""
    try:
        return sums_of(bucket.read(f"checkpoints/{SUMS}").decode())
    except FileNotFoundError:
        return {}


def download_checkpoint(bucket: Bucket, path: Path) -> str | None:
    """Download a checkpoint, and return the hash; None, without a file, if that is not listed."""
    name = f"checkpoints/{path.name}"
    kept = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for _ in range(TRIES):  # it may be replaced meanwhile
            digest, entry = hashlib.sha256(), bucket.entry(name)
            with kept.open("wb") as file:
                for start in range(0, entry.bytes if entry is not None else 0, PART):
                    content = bucket.read_range(name, start, PART)
                    digest.update(content)
                    file.write(content)
            if digest.hexdigest() in sums_in(bucket).get(path.name, []):
                kept.replace(path)
                return digest.hexdigest()
    finally:
        kept.unlink(missing_ok=True)
    return None


def download_file(bucket: Bucket, name: str, path: Path, entry: Entry) -> None:
    """Download a file, with the time of the bucket: "latest" goes by the time of config.yaml."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(bucket.read(name))
    os.utime(path, (entry.time, entry.time))


def is_same(path: Path, entry: Entry) -> bool:
    """Check whether a file was downloaded before, and has not changed in the bucket."""
    return path.is_file() and path.stat().st_size == entry.bytes and abs(path.stat().st_mtime - entry.time) < 1e-3


def is_result(name: str) -> bool:
    """Check for a file that a command writes into a run after the training."""
    return RESULT.fullmatch(name) is not None or name.startswith("figures/")


def is_newer_result(name: str, path: Path, entry: Entry) -> bool:
    """Check for a result that a command of another machine has written, and that this machine lacks or has an older one
    of. A figure of the same size is the same one, which the training has drawn and copied."""
    if not is_result(name) or not path.is_file():
        return is_result(name)
    is_same_figure = name.startswith("figures/") and path.stat().st_size == entry.bytes
    return path.stat().st_mtime < entry.time and not is_same_figure


def upload(paths: PathsConfig, run_dir: Path, files: Iterable[Path]) -> None:
    """Copy files that a command has written into a run's directory to the bucket, if that has the run.

    A failure is a warning, because the command has done what it was asked for.
    """
    if not is_address(paths.logs) or not run_dir.resolve().is_relative_to(paths.local.resolve()):
        return
    bucket = Bucket(address_of(paths, run_dir))
    own = [path for path in files if path.is_relative_to(run_dir) and path.is_file()]
    try:
        if own and bucket.entry("config.yaml") is not None:
            for path in own:
                bucket.write(name := path.relative_to(run_dir).as_posix(), path)
                if (entry := bucket.entry(name)) is not None:
                    os.utime(path, (entry.time, entry.time))  # the file is not downloaded again, see `is_same`
            say(f"copied to {bucket.address}")
    except UserError as error:
        say(f"warning: what was written stays on this machine: {error}")


def download_named(paths: PathsConfig, named: str | None, ckpt: str = "") -> None:
    """Download the run of this name, or the newest one for "latest", if the bucket has it.

    `ckpt` is "best" or "last" if no other checkpoint is needed.
    """
    if named is None or not is_address(paths.logs):
        return
    local, checkpoints = paths.local, [f"{ckpt}.ckpt"] if ckpt in ("best", "last") else CHECKPOINTS
    if named == "latest":
        objects = Bucket(f"{paths.logs.rstrip('/')}/train").list()
        configs = {name: each for name, each in objects.items() if name.endswith("/config.yaml")}
        if configs:
            newest = max(configs, key=lambda name: configs[name].time)
            download_run(paths, local / "train" / newest.removesuffix("/config.yaml"), checkpoints)
        return
    path = Path(named).expanduser()
    places = [local / "train/runs" / named, local / "train/multiruns" / named, Path(os.path.abspath(path))]  # noqa: PTH100
    for place in places:
        if place.is_relative_to(local):
            download_run(paths, place, checkpoints)


def download_tables(paths: PathsConfig, has_figures: bool) -> None:
    """Download config.yaml, summary.json and metrics.csv of all runs, as far as they have changed."""
    if not is_address(paths.logs):
        return
    bucket, local = Bucket(paths.logs), paths.local
    locked = locked_inodes()
    for name, entry in bucket.list("train").items():
        is_table = PurePosixPath(name).name in ("config.yaml", "summary.json", "metrics.csv")
        if not (is_table or (has_figures and name.endswith(".png"))) or is_same(local / name, entry):
            continue
        folder = (local / name).parent
        run_dir = folder.parent if folder.name == "figures" else folder
        is_own = (
            (local / name).is_file() and (local / name).stat().st_mtime > entry.time and bool(hashes_in(run_dir, SENT))
        )
        if not is_own and not is_training(run_dir, locked):
            download_file(bucket, name, local / name, entry)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
