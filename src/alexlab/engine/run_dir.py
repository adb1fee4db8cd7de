"""The directory of a run: claimed once, written by rank 0 alone, its summary telling how the run ended."""

import contextlib
import difflib
import json
import logging
import math
import os
import shutil
import sys
import warnings
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig

from alexlab.engine import config as configs
from alexlab.engine import launcher as launch
from alexlab.engine import secrecy
from alexlab.engine.errors import SYSTEM, UserError
from alexlab.engine.files import atomic_write, open_no_link

LARGEST = 2**25  # bytes of a summary.json, which lists the images that were left out


def name_of(run_dir: PurePath) -> str:
    """A run's name for people: its directory's; a sweep's jobs are called 0, 1, ... and get the sweep's before it."""
    of_sweep = run_dir.name.isdigit() and run_dir.parent.name != "runs"
    return f"{run_dir.parent.name}/{run_dir.name}" if of_sweep else run_dir.name


def find_run(named: str, logs: Path, ckpt: str = "best", key: str = "run", besides: Path | None = None) -> Path:
    """A run's directory by its path or name, or for "latest" the newest that has the checkpoint; without links on the
    way to it, so that what lies in it is known for its own.

    Args:
        key: what a user gave `named` as.
        besides: no run below this folder is the latest.

    Raises:
        UserError: there is none.
    """
    if named == "latest":
        paths = [path for path in (logs / "train").glob("*runs/**/config.yaml") if "wandb" not in path.parts]
        paths = [path for path in paths if besides is None or not path.is_relative_to(besides)]
        found = sorted(paths, key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(
                f"{key}=latest: there is no run below {logs / 'train'} yet: train one with python train.py."
            )
        whole = [path for path in found if (path.parent / "checkpoints" / f"{ckpt}.ckpt").is_file()]
        if not whole and ckpt in ("best", "last"):
            error = read_summary(found[-1].parent).get("error", "it is running, or was killed")
            raise UserError(f"{key}=latest: no run has a {ckpt}.ckpt yet. The newest, {found[-1].parent}: {error}")
        return (whole or found)[-1].parent.resolve()
    # or the name that compare.py shows
    places = [logs / "train/runs" / named, logs / "train/multiruns" / named, Path(named).expanduser()]
    for path in places:
        if (path / "config.yaml").is_file():
            return path.resolve()
    for path in places:
        if (path / "0/config.yaml").is_file():
            raise UserError(f"{key}={named} is a sweep: take one of its jobs, as {key}={named}/0.")
    names = [path.name for kind in ("runs", "multiruns") for path in (logs / "train" / kind).glob("*")]
    near = difflib.get_close_matches(named, [name for name in names if name != named], n=2, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"{key}={named} is not a run's directory (it holds no config.yaml): give one, or latest.{hint}")


def ckpt_of(run_dir: Path, ckpt: str) -> Path:
    """The file that `ckpt` means: "best" or "last" of a run, or a file itself."""
    return run_dir / "checkpoints" / f"{ckpt}.ckpt" if ckpt in ("best", "last") else Path(ckpt).expanduser()


def shown(path: Path) -> str:
    """`path` as it is printed: from the working directory, where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def claim(config: DictConfig) -> None:
    """Write config.yaml into the run's directory, which must be a new one.

    Raises:
        UserError: it holds a run.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "config.yaml").exists():
        raise UserError(
            f"{run_dir} holds a run already, and one that goes on gets a new directory too: leave hydra.run.dir out, "
            "choose another, or remove it."
        )
    configs.save(config, run_dir / "config.yaml")


def check_space(run_dir: Path, sizes: dict[str, int]) -> None:
    """Raises UserError where the checkpoints of these sizes (bytes) will not fit, the last written beside the old."""
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    needed, free = sum(sizes.values()) + max(sizes.values()), shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{run_dir} has {free / 1e6:.0f} MB of free space, and the run's checkpoints need about "
            f"{needed / 1e6:.0f} MB: free some, or write elsewhere with paths.logs=PATH."
        )


def quiet_libraries() -> None:
    """What Lightning tells of devices, ranks and its own affairs is told by ourselves, or is nobody's concern."""
    logging.captureWarnings(True)
    for noisy in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for message in (
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*but have passed in a Trainer configured with.*",
        ".*overridden `.*transfer_batch_to_device.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*your dataloader is not resumable.*",  # its sampler is
    ):
        warnings.filterwarnings("ignore", message=message)


class Console(logging.StreamHandler):
    """Standard output; nobody may read it any more: `train.py | head`, a terminal that has gone. The run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with contextlib.suppress(OSError):
                print("note: nobody reads the output any more; the run goes on, see its train.log.", file=sys.stderr)
        else:
            super().handleError(record)


class LogFile(logging.FileHandler):
    """No link, which a run from elsewhere might have to somebody's file. On a full disk the run has something better
    to tell than that its log could not be written."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=open_no_link)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not (isinstance(error, OSError) and error.errno in SYSTEM):
            super().handleError(record)


class Lines(logging.Formatter):
    """Without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return secrecy.masked(super().format(record))


def set_up_logging(run_dir: Path) -> None:
    """train.log on rank 0; its notes go to the console too, but those marked `file_only`."""
    quiet_libraries()
    logger = logging.getLogger("alexlab")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):  # of the job before, in a sweep
        logger.removeHandler(handler)
        handler.close()
    if launch.rank() > 0:
        logger.addHandler(logging.NullHandler())  # else Python prints warnings by itself
        return
    console = Console(sys.stdout)
    console.setFormatter(Lines("%(message)s"))
    console.addFilter(lambda record: not getattr(record, "file_only", False))
    file = LogFile(run_dir / "train.log")
    file.setFormatter(Lines("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(console)
    logger.addHandler(file)


def write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path, "x") as file:
        file.write(json.dumps(_finite(secrecy.hidden(values)), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, or {} before the run has ended, and where there is something else."""
    path = run_dir / "summary.json"
    try:
        told = json.loads(configs.content(path, LARGEST)) if path.is_file() else {}
    except (ValueError, RecursionError):  # of a disk that was full, or no run's
        return {}
    groups = [told.get(key, {}) for key in ("best", "last", "test")] if isinstance(told, dict) else [None]
    return told if all(isinstance(group, dict) for group in groups) else {}


def mark(run_dir: Path, status: str, why: str) -> None:
    """Say in summary.json how the run ended, where no rank knew, or one knew its own part alone."""
    summary = read_summary(run_dir)
    if summary.get("status") in (None, "finished", "failed"):
        write_json(run_dir / "summary.json", {**summary, "status": status, "error": why})
