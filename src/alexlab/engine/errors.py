"""The exceptions that a command shows on one screen, without a traceback."""

import errno
import re


class UserError(ValueError):
    """A user's mistake, exit code 2. Its text names the value, the rule and the fix."""


class RunFailedError(RuntimeError):
    """A run on several devices failed; its ranks' tracebacks are printed already.

    Attributes:
        code: what the command exits with.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class RankLostError(RunFailedError):
    """Another rank is gone, or does not answer: what this one meets is a consequence."""


# how gloo, NCCL and torch's store say so
GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|(read|write) error|remote process exited", re.I)
SILENT = re.compile(r"timed? ?out", re.I)
SAID_BY = re.compile(r"gloo|nccl|TCPStore|process group|socket|clients joined", re.I)


def lost_peer(error: BaseException, minutes: float) -> RankLostError | None:
    """What to tell of an error of torch's that comes from another rank; None for all others.

    Args:
        minutes: that ranks wait for each other.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not SAID_BY.search(text):
        return None
    if SILENT.search(text):
        return RankLostError(f"another rank did not answer within trainer.timeout={minutes:g} minutes.", 1)
    return RankLostError("another rank was lost.", 1) if GONE.search(text) else None


SYSTEM = {
    errno.ENOSPC: "no space is left there: free some, or write elsewhere with paths.logs=PATH.",
    errno.EDQUOT: "the disk quota is used up: free some, or write elsewhere with paths.logs=PATH.",
    errno.EACCES: "no permission there: choose another place with paths.logs=PATH or data.root=PATH.",
    errno.EROFS: "that file system is read-only: choose another place with paths.logs=PATH.",
    errno.ELOOP: "that is a link, through which nothing is written: remove it, or choose another place.",
    errno.EPERM: "that is not permitted: choose another place with paths.logs=PATH.",
}


def mistake(error: BaseException) -> str | None:
    """What to tell the user of `error`, or None where it is no mistake of theirs and the traceback is needed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return f"{error.filename or 'a file'}: {SYSTEM[error.errno]}"
    return None
