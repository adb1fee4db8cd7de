"""Find and create the directory of a run, log to it, and read and write summary.json. Only rank 0 writes."""

import contextlib
import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from alexlab.engine import config as configs
from alexlab.engine import launcher
from alexlab.engine.config import Plain
from alexlab.engine.errors import SYSTEM, UserError, did_you_mean
from alexlab.engine.files import atomic_write, open_no_link
from alexlab.engine.text import printable

WEIGHT_FILES = (".ckpt", ".pth", ".pt", ".safetensors")


def name_of(run_dir: PurePath) -> str:
    """Return the name of a run: that of the directory, or SWEEP/0, SWEEP/1, ... for the jobs of a sweep."""
    of_sweep = run_dir.name.isdigit() and run_dir.parent.name != "runs"
    return f"{run_dir.parent.name}/{run_dir.name}" if of_sweep else run_dir.name


def find_run(named: str, logs: Path, ckpt: str = "best", key: str = "run", starting: Path | None = None) -> Path:
    """Return the directory of a run, with symbolic links resolved; UserError if it does not exist.

    Args:
        named: the path or the name of the run, or "latest": the newest run that has the checkpoint `ckpt`.
        key: the key that has this value, for messages.
        starting: the directory of the run that starts. That run and jobs of the same sweep are not "latest", so that
            all jobs start from the same run.
    """
    if named == "latest":
        return _latest(logs, ckpt, key, starting)
    # a path, or the name that compare shows
    places = [logs / "train/runs" / named, logs / "train/multiruns" / named, Path(named).expanduser()]
    for path in places:
        if (path / "config.yaml").is_file():
            return path.resolve()
    for path in places:
        if (path / "0/config.yaml").is_file():
            raise UserError(f"`{key}={named}` is a sweep: choose a job, such as {key}={named}/0.")
    if (places[-1] / "model.safetensors").is_file():
        read = "init_from and alexlab.load read it if its config.json is complete."
        raise UserError(f"`{key}={named}` is a folder of format=hub, not a run. {read}")
    names = ["latest", *(path.name for kind in ("runs", "multiruns") for path in (logs / "train" / kind).glob("*"))]
    hint = did_you_mean(named, [name for name in names if name != named], most=2)
    raise UserError(f"`{key}={named}` is not a run's directory (it has no config.yaml): give one, or latest.{hint}")


def _latest(logs: Path, ckpt: str, key: str, starting: Path | None) -> Path:
    paths = [path for path in (logs / "train").glob("*runs/**/config.yaml") if "wandb" not in path.parts]
    if starting is not None:
        own = next((folder for folder in starting.parents if folder.parent.name == "multiruns"), starting)
        paths = [path for path in paths if not path.is_relative_to(own)]
    paths.sort(key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"`{key}=latest`: no run exists below {logs / 'train'} yet: train one with python train.py.")
    with_ckpt = [path for path in paths if (path.parent / "checkpoints" / f"{ckpt}.ckpt").is_file()]
    if not with_ckpt and ckpt in ("best", "last"):
        newest = paths[-1].parent
        why = read_summary(newest).get("error", "it is running, or was killed")
        raise UserError(f"`{key}=latest`: no run has a {ckpt}.ckpt yet. The newest, {newest}: {why}")
    return (with_ckpt or paths)[-1].parent.resolve()


def ckpt_of(run_dir: Path, ckpt: str) -> Path:
    """Return the file that `ckpt` means: "best" or "last" of a run, or a file itself."""
    return run_dir / "checkpoints" / f"{ckpt}.ckpt" if ckpt in ("best", "last") else Path(ckpt).expanduser()


def shown(path: Path) -> str:
    """Return `path` for a message: relative to the shell's working directory if it is below that folder."""
    # a program may have started this one in another folder than the shell's
    is_shells = os.path.realpath(os.environ.get("PWD", "")) == str(cwd := Path.cwd())
    return printable(str(path.relative_to(cwd) if is_shells and cwd in path.parents else path))


# -- a new directory


def check_new(run_dir: Path) -> None:
    """Raise UserError if the directory holds a run already."""
    if (run_dir / "config.yaml").exists():
        raise UserError(
            f"{run_dir} holds a run already: remove hydra.run.dir, choose another directory, or resume the run with "
            f"{shlex.quote(f'resume={shown(run_dir)}')}."
        )


def create(run_dir: Path, config: Plain) -> None:
    """Create the directory of a new run, with the config.yaml; UserError if it holds a run already."""
    run_dir.mkdir(parents=True, exist_ok=True)
    check_new(run_dir)
    configs.save(config, run_dir / "config.yaml")


# -- the log


def quiet_libraries() -> None:
    """Silence messages of Lightning that the run prints in another form, or that do not apply here."""
    logging.captureWarnings(True)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*but have passed in a Trainer configured with.*",
        ".*overridden `.*transfer_batch_to_device.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*your dataloader is not resumable.*",  # the sampler is
        ".*a `validation_step` but have no `val_dataloader`.*",  # of what trains a few steps only
        "Glyph .* missing from font",  # the start of a run names the letters
    ):
        warnings.filterwarnings("ignore", message=message)


class Console(logging.StreamHandler):
    """Log to standard output. The run continues if nobody reads it any more, as with `train.py | head`."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with contextlib.suppress(OSError):
                print("note: the output was closed; the run continues, and train.log has the rest.", file=sys.stderr)
        else:
            super().handleError(record)


class LogFile(logging.FileHandler):
    """Log to train.log, but not through a link. A full disk is ignored here, because the run reports it itself."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=open_no_link)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not (isinstance(error, OSError) and error.errno in SYSTEM):
            super().handleError(record)


class MaskedFormatter(logging.Formatter):
    """A formatter of printable lines that hides the values of secrets."""

    def __init__(self, pattern: str, mask: Callable[[str], str]) -> None:
        super().__init__(pattern)
        self.mask = mask

    def format(self, record: logging.LogRecord) -> str:
        return printable(self.mask(super().format(record)), "\n\t")


def close_log() -> None:
    """Log no longer to the previous run of this process, such as the job before in a sweep."""
    logger = logging.getLogger("alexlab")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def set_up_logging(run_dir: Path, mask: Callable[[str], str]) -> None:
    """Log to train.log on rank 0, and to the console except for records marked `file_only`."""
    close_log()
    logger = logging.getLogger("alexlab")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if launcher.rank() > 0:
        logger.addHandler(logging.NullHandler())  # otherwise Python prints warnings itself
        return
    console = Console(sys.stdout)
    console.setFormatter(MaskedFormatter("%(message)s", mask))
    console.addFilter(lambda record: not getattr(record, "file_only", False))
    file = LogFile(run_dir / "train.log", encoding="utf-8")
    file.setFormatter(MaskedFormatter("%(asctime)s %(levelname)s %(message)s", mask))
    logger.addHandler(console)
    logger.addHandler(file)


# -- summary.json


def write_json(path: Path, values: Plain) -> None:
    with atomic_write(path, "x") as file:
        file.write(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_summary(run_dir: Path) -> Plain:
    """Return the content of summary.json, or {} if the run has not ended or the file is no summary."""
    path = run_dir / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # it does not exist, or is not JSON
        return {}
    groups = [summary.get(key, {}) for key in ("best", "last", "test")] if isinstance(summary, dict) else [None]
    return summary if all(isinstance(group, dict) for group in groups) else {}


def mark(run_dir: Path, status: str, why: str) -> None:
    """Write the status of the whole run to summary.json, unless a rank has recorded that a signal stopped it."""
    summary = read_summary(run_dir)
    if (run_dir / "config.yaml").is_file() and summary.get("status") in (None, "finished", "failed"):
        write_json(run_dir / "summary.json", {**summary, "status": status, "error": why})
