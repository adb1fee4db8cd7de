"""A config's `_target_` and its other keys -> the object."""

from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from alexlab.errors import UserError
from alexlab.targets import locate


def build(settings: DictConfig, **more: Any) -> Any:
    """The object that `settings._target_` names, made with the other keys and `more`.

    Raises:
        UserError: a `_target_` in it is not allowed or does not exist, or its maker refuses the values.
    """
    plain: Any = OmegaConf.to_container(settings, resolve=True)
    _check_all(plain)
    try:
        return hydra.utils.instantiate(plain, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):  # says what it does not take
            raise UserError(f"{cause} ({plain['_target_']})") from error
        told = cause if isinstance(cause, TypeError) else str(error).splitlines()[0]
        hint = " (a network's constructor must take num_classes)" if "'num_classes'" in str(told) else ""
        raise UserError(f"{plain['_target_']} cannot be made from its settings: {told}{hint}") from error


def _check_all(node: Any) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            locate(str(node["_target_"]))
        for value in node.values():
            _check_all(value)
    elif isinstance(node, list):
        for value in node:
            _check_all(value)
