"""A config's `_target_` and its other keys -> the object.

Not by Hydra, which reads texts as configs a second time: what looks like text when it is checked can be a `_target_`
then, and its own list of what it refuses leaves torch.load out.
"""

import functools
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexlab.errors import UserError
from alexlab.targets import locate

# words by which a network, or a part of it, fetches or reads weights
FETCHES = {"pretrained": False, "weights": None, "weights_backbone": None, "checkpoint_path": ""}
NOT_HERE = ("_recursive_", "_convert_")  # Hydra's words that mean nothing here


def build(settings: "DictConfig | dict[str, Any]", **more: Any) -> Any:
    """The object that `settings._target_` names, made with the other keys and `more`.

    `_args_` are given by their place, and `_partial_: true` makes a function of what is still to be given.

    Raises:
        UserError: a `_target_` in it is not allowed or does not exist, or its maker refuses the values.
    """
    plain: Any = OmegaConf.to_container(settings, resolve=True) if isinstance(settings, DictConfig) else settings
    _check_all(plain)
    return _made(plain, more)


def _made(node: Any, more: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_made(value, {}) for value in node]
    if not isinstance(node, dict):
        return node
    words = {key: _made(value, {}) for key, value in node.items() if key != "_target_" and key not in NOT_HERE}
    if "_target_" not in node:
        return words
    args, partial = words.pop("_args_", []), words.pop("_partial_", False)
    target = locate(str(node["_target_"]))
    try:
        return functools.partial(target, *args, **words, **more) if partial else target(*args, **{**words, **more})
    except UserError:
        raise
    except ValueError as error:  # says what it does not take
        raise UserError(f"{error} ({node['_target_']})") from error
    except TypeError as error:
        hint = " (a network's constructor must take num_classes)" if "'num_classes'" in str(error) else ""
        raise UserError(f"{node['_target_']} cannot be made from its settings: {error}{hint}") from error
    except Exception as error:
        raise UserError(
            f"{node['_target_']} cannot be made from its settings: {type(error).__name__}: {error}"
        ) from error


def without_weights(net: Any) -> Any:
    """A network's settings without the words by which it, or a part of it, would fetch or read weights."""
    if isinstance(net, dict):
        return {key: FETCHES[key] if key in FETCHES else without_weights(value) for key, value in net.items()}
    return [without_weights(value) for value in net] if isinstance(net, list) else net


def _check_all(node: Any) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            locate(str(node["_target_"]))
        for value in node.values():
            _check_all(value)
    elif isinstance(node, list):
        for value in node:
            _check_all(value)
