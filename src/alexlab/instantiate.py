"""`_target_` of a config -> object, from allowed places only: a config must not be able to run anything else."""

from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from alexlab.errors import UserError

# Your own package goes here, if its networks do not live in alexlab/models.
ALLOWED = ("alexlab.", "torch.nn.", "torch.optim.", "torchvision.models.", "timm.", "pytorch_lightning.callbacks.")


def check_target(target: str) -> None:
    if not target.startswith(ALLOWED):
        raise UserError(
            f"_target_={target} is not allowed: it must begin with one of {', '.join(ALLOWED)} "
            "(src/alexlab/instantiate.py holds the list)."
        )


def build(settings: DictConfig, **more: Any) -> Any:
    """The object that `settings._target_` names, made with the other keys and `more`."""
    plain: Any = OmegaConf.to_container(settings, resolve=True)
    _check_all(plain)
    try:
        return hydra.utils.instantiate(plain, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, TypeError)):
            raise UserError(f"{plain['_target_']}: {cause}") from error
        raise UserError(f"{plain['_target_']} cannot be made: {str(error).splitlines()[0]}") from error


def _check_all(node: Any) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            check_target(node["_target_"])
        for value in node.values():
            _check_all(value)
    elif isinstance(node, list):
        for value in node:
            _check_all(value)
