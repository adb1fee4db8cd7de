"""A run's config and summary, from W&B's server."""

from typing import Any

import wandb

from alexlab.errors import UserError
from alexlab.loggers.key import key_at_hand, refused

TIMEOUT = 20  # seconds that the server gets for an answer


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


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
