"""The exceptions that a command prints on one screen, and how it prints them."""

import bdb
import difflib
import errno
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A user's mistake: exit code 2, no traceback. The message names the value, the rule and the fix."""


class RunFailedError(RuntimeError):
    """A run on several devices, or a sweep, failed; the tracebacks are printed already. `code` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class RankLostError(RunFailedError):
    """This rank failed because another rank is gone, or does not answer."""


# Messages of gloo, NCCL and torch's store about a rank that is gone, or that does not answer.
GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|(read|write) error|remote process exited", re.I)
PEER = re.compile(r"\[(?:::ffff:)?(\d+\.\d+\.\d+\.\d+)\]")  # gloo's address of that rank's machine
SILENT = re.compile(r"timed? ?out", re.I)
SAID_BY = re.compile(r"gloo|nccl|TCPStore|process group|socket|clients joined", re.I)


def lost_peer(error: BaseException, minutes: float) -> RankLostError | None:
    """Return the error to raise if torch failed because of another rank, for which ranks wait `minutes`, else None."""
    text = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if type(error).__module__ != "torch.distributed" and not SAID_BY.search(text):
        return None
    if SILENT.search(text):
        return RankLostError(f"another rank did not answer within trainer.timeout={minutes:g} minutes.", 1)
    if not GONE.search(text):
        return None
    peer = PEER.search(text)
    where = f" on {peer[1]}" if peer and not peer[1].startswith("127.") else ""
    return RankLostError(f"another rank{where} was lost.", 1)


# Errors of the system that the user can fix: what is wrong, and what to do.
SYSTEM = {
    errno.ENOSPC: "no space is left on that disk: free some, or write elsewhere with paths.logs=PATH.",
    errno.EDQUOT: "the disk quota is used up: free some, or write elsewhere with paths.logs=PATH.",
    errno.EACCES: "permission denied: choose another place with paths.logs=PATH or data.root=PATH.",
    errno.EROFS: "that file system is read-only: choose another place with paths.logs=PATH.",
    errno.ELOOP: "that is a link, through which nothing is written: remove it, or choose another place.",
    errno.ENAMETOOLONG: "that name is too long: choose a shorter one with hydra.run.dir=PATH.",
    errno.EEXIST: "that is a file or a broken link, and a folder is needed: choose another place, or remove the file.",
    errno.ENOTDIR: "that is below a file, and a folder is needed: choose another place, or remove the file.",
    errno.EPERM: "that is not permitted: choose another place with paths.logs=PATH.",
}


def mistake(error: BaseException) -> str | None:
    """Return the message for a user's mistake; None for an error that needs a traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, bdb.BdbQuit):
        return "the debugger ended the run: q was entered, or standard input is not a terminal (remove breakpoint())."
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith("/proc/") and _is_of_mkdir(error):
        return f"{error.filename}: nothing can be created in /proc: choose another place."
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return f"{error.filename or 'a file or the output'}: {SYSTEM[error.errno]}"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        return "a path begins with ~, and the home folder of that user is not known: write the whole path."
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # of tempfile
        return "no folder for temporary files can be written: set the environment variable TMPDIR to one."
    if isinstance(error, FileNotFoundError) and error.errno and not error.filename:  # of os.getcwd
        return "the working directory was removed: cd to another one."
    return None


def _is_of_mkdir(error: BaseException) -> bool:
    return any(frame.name == "mkdir" for frame in traceback.extract_tb(error.__traceback__))


def did_you_mean(name: str, known: Iterable[str], form: str = "{}", most: int = 1, least: float = 0.6) -> str:
    """Return " Did you mean X or Y?" with at most `most` names of similarity `least` (difflib), in `form`, or ""."""
    near = [form.format(each) for each in difflib.get_close_matches(name, known, most, least)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def counted(number: int, noun: str) -> str:
    """Return a number with a noun: "1 image", "1,200 images", "2 batches"."""
    plural = "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


# Folders and files whose frames are skipped in a traceback on the screen.
PACKAGE = Path(__file__).resolve().parents[1]
ENGINE = (*(f"{PACKAGE / folder}{os.sep}" for folder in ("commands", "engine")), *(str(PACKAGE / "__main__.py"),))
STDLIB = f"{sysconfig.get_path('stdlib')}{os.sep}"


def short_traceback(error: BaseException, most: int = 40) -> str:
    """Return at most `most` lines of the traceback: the user's code, and the frames that this code called.

    If none of the user's code was called, the end of the traceback is shown. train.log has all of it.
    """
    stack = traceback.extract_tb(error.__traceback__)
    own = [number for number, frame in enumerate(stack) if not is_library(frame.filename) and not _is_engine(frame)]
    frames = [frame for number, frame in enumerate(stack) if number in own or not own or number > own[-1]]
    head, message = "Traceback (most recent call last):\n", traceback.format_exception_only(error)
    message = "".join(message).splitlines(keepends=True)[: most // 2]
    calls = "".join(traceback.format_list(frames)).splitlines(keepends=True)
    room = most - len(message) - 1
    if len(calls) > room:
        calls = ["  ...\n", *calls[1 - room :]]
    return "".join([head, *calls, *message]).rstrip()


def is_library(file: str) -> bool:
    """Check whether a source file belongs to Python itself or to an installed package."""
    return file.startswith((STDLIB, "<")) or bool({"site-packages", "dist-packages"} & {*Path(file).parts})


def _is_engine(frame: traceback.FrameSummary) -> bool:
    scripts = (PACKAGE.parents[1] / "train.py", PACKAGE.parents[1] / "eval.py")
    return frame.filename.startswith(ENGINE) or Path(frame.filename) in scripts
