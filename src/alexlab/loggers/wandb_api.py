"""Requests to W&B's server: the config and summary of a run. Does not import Lightning."""

import logging
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from alexlab.engine.errors import UserError

log = logging.getLogger("alexlab")

RUN_TIMEOUT = 20  # seconds that the server gets to answer


def has_api_key() -> bool:
    """Check for an API key in the environment, or in the netrc file, where `wandb login` stores it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        file = Path(path).expanduser()
        if file.is_file():
            try:
                return netrc.netrc(str(file)).authenticators(host) is not None
            except netrc.NetrcParseError as error:
                log.warning("W&B: no API key was read from %s, which is not a valid netrc file (%s).", file, error)
                return False
    return False


def fetch(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fetch the config and the summary of the run `path` (ENTITY/PROJECT/RUN). Anybody may have written them.

    Raises:
        UserError: no API key was found, the server did not answer, or it has no such run.
    """
    if not has_api_key():
        raise UserError(f"`from_wandb={path}` needs an API key: run `wandb login` or set WANDB_API_KEY.")
    try:
        run = wandb.Api(timeout=RUN_TIMEOUT).run(path)
        return dict(run.config), dict(run.summary_metrics)
    except Exception as error:  # W&B raises many types
        refused = isinstance(error, wandb.errors.AuthenticationError)
        what = "the server did not answer or refused the API key" if refused else "the server did not return that run"
        fix = "run `wandb login`, or try again" if refused else "check the name, which is part of the run's address"
        raise UserError(
            f"`from_wandb={path}`: {what} ({first_line(error)}): {fix}. from_run=DIRECTORY needs no server."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the type of the error without a message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
