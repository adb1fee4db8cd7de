"""A run's config and summary, and a sweep's file, from W&B's server."""

import logging
from typing import Any

import wandb

from alexlab.engine.errors import UserError
from alexlab.loggers.wandb_key import key_at_hand, refused

log = logging.getLogger("alexlab")
TIMEOUT = 20  # seconds that the server gets for an answer,
SOON = 10  # and where a run does without


def fetch(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and summary of the run `path` (ENTITY/PROJECT/RUN), as its server has them: anybody's, to be checked.

    Raises:
        UserError: no key, no answer, or no such run.
    """
    if not key_at_hand():
        raise UserError(f"from_wandb={path} needs an API key: run `wandb login` or set WANDB_API_KEY.")
    try:
        run = wandb.Api(timeout=TIMEOUT).run(path)
        config, summary = dict(run.config), dict(run.summary_metrics)
    except wandb.errors.AuthenticationError as error:
        if not refused(error):
            raise UserError(
                f"from_wandb={path}: W&B's server did not answer ({_line(error)}): try again; a run's directory is "
                "repeated without it: from_run=DIRECTORY."
            ) from error
        raise UserError(f"from_wandb={path}: W&B refuses the API key ({_line(error)}): run `wandb login`.") from error
    except (wandb.errors.Error, ValueError, OSError, TypeError) as error:
        raise UserError(
            f"from_wandb={path}: W&B does not give that run ({_line(error)}): check the name, which its page's address "
            "has, and whether the server answers; a run's directory is repeated without it: from_run=DIRECTORY."
        ) from error
    return config, summary


def fetch_sweep(path: str) -> dict[str, Any] | None:
    """What the file of the sweep `path` (ENTITY/PROJECT/SWEEP) holds, at its server; None where that gives none."""
    if not key_at_hand():
        return None
    try:
        found = wandb.Api(timeout=SOON).sweep(path).config
    except Exception as error:  # of many kinds; it is one more question alone
        log.info("W&B: the sweep %s cannot be looked up (%s).", path, _line(error))
        return None
    return found if isinstance(found, dict) else None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
