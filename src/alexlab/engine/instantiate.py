"""A config's `_target_` and its other keys -> the object.

Not by Hydra, which reads texts as configs a second time: what looks like text when it is checked can be a `_target_`
then, and its own list of what it refuses leaves torch.load out.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from alexlab.engine.errors import UserError
from alexlab.engine.targets import locate

# words by which a network, or a part of it, fetches or reads weights, and what they are without
FETCHES = {
    "pretrained": False, "pretrained_backbone": False, "weights": None, "weights_backbone": None, "checkpoint_path": "",
    "online": False,
}  # fmt: skip
# Of keys and of modules: torch.fx and torch.compile write a module's name into programs.
NAME = re.compile(r"\w[\w.\-]*", re.ASCII)


def build(settings: "DictConfig | dict[str, Any]", **more: Any) -> Any:
    """The object that `settings._target_` names, made with the other keys and `more`.

    `_args_` are given by their place, and `_partial_: true` makes a function of what is still to be given.

    Raises:
        UserError: a `_target_` in it is not allowed or does not exist, or its maker refuses the values.
    """
    node = _plain(settings)
    _check_all(node)
    return _made(node, more)


def network(settings: Any, num_classes: int, fetch: bool = False) -> nn.Module:
    """The network of `model.net`.

    Args:
        fetch: weights, where its settings ask for them. Without, a config from elsewhere reaches no file and no server.

    Raises:
        UserError: as `build`, or it is no network.
    """
    node = _plain(settings)
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError("model.net: it must hold a _target_, the network's class, and its settings.")
    if node.get("_partial_"):
        raise UserError("model.net._partial_: the network itself must be made; its parts alone can be partial.")
    _check_all(node)
    net = _made(node if fetch else without_weights(node), {"num_classes": num_classes})
    if not isinstance(net, nn.Module):
        raise UserError(f"model.net._target_={node['_target_']} makes a {type(net).__name__}, and no network.")
    return net


def _plain(settings: Any) -> Any:
    return OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else settings


def _made(node: Any, more: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_made(value, {}) for value in node]
    if not isinstance(node, dict):
        return node
    words = {key: _made(value, {}) for key, value in node.items() if key not in ("_target_", *NOT_HERE)}
    if "_target_" not in node:
        return words
    args, partial = words.pop("_args_", []), words.pop("_partial_", False)
    target = locate(str(node["_target_"]))
    try:
        made = functools.partial(target, *args, **words, **more) if partial else target(*args, **{**words, **more})
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
    if isinstance(made, nn.Module):
        _check_names(made, node["_target_"])
    return made


def _check_names(net: nn.Module, target: str) -> None:
    for module in net.modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            if not NAME.fullmatch(name):
                raise UserError(f"{target}: a part is called {name[:40]!r}: letters, digits, _, - and . make a name.")


def without_weights(node: Any) -> Any:
    """A network's settings without what makes it, or a part of it, fetch or read weights, given by name or by place."""
    if isinstance(node, list):
        return [without_weights(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: _without(key, value, False) for key, value in node.items()}
    target = locate(str(node["_target_"]))
    torchvisions = str(getattr(target, "__module__", "")).startswith("torchvision.")
    args = list(zip(_names_of(target, node), node.get("_args_") or [], strict=True))
    cleaned = {key: _without(key, value, torchvisions) for key, value in node.items() if key != "_args_"}
    if args:
        cleaned["_args_"] = [_without(name, value, torchvisions) for name, value in args]
    taken = {name for name, _ in args} | {"weights"}
    mine = {key: value for key, value in FETCHES.items() if key in _parameters(target) and key not in taken}
    return {**cleaned, **mine}  # which its own defaults may say, too


def _without(name: str, value: Any, torchvisions: bool) -> Any:
    if name == "weights" and not torchvisions and not isinstance(value, str | bool):
        return without_weights(value)  # numbers, which are its own
    return FETCHES[name] if name in FETCHES else without_weights(value)


def _names_of(target: Callable[..., Any], node: dict[str, Any]) -> list[str]:
    """The parameters that `_args_` are given to; "" for what goes into *args.

    Raises:
        UserError: it takes fewer by their place.
    """
    count, names = len(node.get("_args_") or []), list[str]()
    for name, parameter in _parameters(target).items() if count else ():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [""] * (count - len(names))
    if len(names) < count:
        raise UserError(
            f"{node['_target_']} takes {len(names)} of its {count} _args_ by their place: give them by their names."
        )
    return names[:count]


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some written in C have none
        return {}


# Hydra's words that mean nothing here, with the values that ask for what is done anyway
NOT_HERE = {"_recursive_": (True,), "_convert_": ("all",)}


def _check_all(node: Any) -> None:
    if isinstance(node, list):
        for value in node:
            _check_all(value)
    if not isinstance(node, dict):
        return
    for key in node:
        if isinstance(key, str) and not NAME.fullmatch(key):
            raise UserError(f"a key below a _target_ is {key[:40]!r}: letters, digits, _, - and . make a key.")
    if "_target_" in node:
        name = str(node["_target_"])
        target = locate(name)
        for word, values in NOT_HERE.items():
            if word in node and node[word] not in values:
                raise UserError(f"{name}: {word}={node[word]} is Hydra's, and not done here: leave it out.")
        if not isinstance(node.get("_partial_", False), bool):
            raise UserError(f"{name}: _partial_={node['_partial_']}: must be true or false.")
        if not isinstance(node.get("_args_", []), list):
            raise UserError(f"{name}: _args_ must be a list.")
        first = dict(zip(_names_of(target, node), node.get("_args_", []), strict=True))
        called = str(node.get("model_name", first.get("model_name", "")))
        if getattr(target, "__qualname__", "") == "create_model" and ":" in called:
            raise UserError(f"{name}: {called} is an address: say model=timm model.name={called}.")
    for value in node.values():
        _check_all(value)
