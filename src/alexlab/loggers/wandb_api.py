"""Requests to W&B's server: the config and summary of a run, a checkpoint. Does not import Lightning."""

import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, TypeVar

import wandb
from requests.utils import get_netrc_auth

from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import WEIGHT_FILES

T = TypeVar("T")

RUN_TIMEOUT = 20  # seconds that the server gets to answer


def has_api_key() -> bool:
    """Check for an API key in the environment, or in the netrc file, where `wandb login` stores it."""
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    return bool(os.environ.get("WANDB_API_KEY")) or get_netrc_auth(server) is not None


def fetch(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fetch the config and the summary of the run `path` (ENTITY/PROJECT/RUN). Anybody may have written them.

    Raises:
        UserError: no API key was found, the server did not answer, or it has no such run.
    """

    def ask(api: wandb.Api) -> tuple[dict[str, Any], dict[str, Any]]:
        run = api.run(path)
        return dict(run.config), dict(run.summary_metrics)

    return _answer(f"from_wandb={path}", "run", "from_run=DIRECTORY needs no server.", ask)


def fetch_checkpoint(named: str, key: str, folder: Path) -> Path:
    """Download the checkpoint in the artifact `named`, as logger.wandb.log_model=true uploads one, unless it exists.

    Args:
        named: the value of `key`: "wandb:ENTITY/PROJECT/ARTIFACT", with ":ALIAS" for another version than the latest.
        folder: gets the file as ENTITY/PROJECT/ARTIFACT-VERSION/checkpoints/best.ckpt.

    Raises:
        UserError: no API key was found, the server did not answer, or it has no such artifact, or that has no
            checkpoint.
    """
    path, _, alias = named.removeprefix("wandb:").partition(":")

    def ask(api: wandb.Api) -> Path:
        artifact = api.artifact(f"{path}:{alias or 'latest'}")
        files = [str(name) for name in artifact.manifest.entries]
        weights = [name for name in files if PurePath(name).suffix in WEIGHT_FILES]
        if "best.ckpt" not in weights and len(weights) != 1:
            raise UserError(
                f"`{key}={named}` has no best.ckpt and not one single file of weights ({', '.join(WEIGHT_FILES)}), but "
                f"{', '.join(files[:5]) or 'no files'}: give an artifact that logger.wandb.log_model=true has uploaded."
            )
        name = "best.ckpt" if "best.ckpt" in weights else weights[0]
        root = folder / f"{path}-{artifact.version}" / "checkpoints"
        artifact.download(str(root), path_prefix=name, skip_cache=True)  # W&B's cache would hold it a second time
        return root / name

    return _answer(f"{key}={named}", "artifact", f"{key}=PATH needs no server.", ask)


def _answer(setting: str, what: str, instead: str, ask: Callable[[wandb.Api], T]) -> T:
    """Return what `ask` gets from W&B's API; UserError without an API key or an answer."""
    if not has_api_key():
        raise UserError(f"`{setting}` needs an API key: run `wandb login` or set WANDB_API_KEY.")
    try:
        return ask(wandb.Api(timeout=RUN_TIMEOUT))
    except UserError:
        raise
    except Exception as error:  # W&B raises many types
        why, fix = f"the server did not return that {what}", f"check the name, which is part of the {what}'s address"
        if isinstance(error, wandb.errors.AuthenticationError):
            why, fix = "the server did not answer or refused the API key", "run `wandb login`, or try again"
        raise UserError(f"`{setting}`: {why} ({first_line(error)}): {fix}. {instead}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the type of the error without a message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
