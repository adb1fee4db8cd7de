"""`_target_` of a config -> a class or function, from allowed places only: a config must not run anything else."""

import contextlib
import functools
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

from alexlab.engine.errors import UserError

# Your own package goes here, if its networks do not live in src/alexlab/models/.
OWN = (
    "alexlab.models",
    "alexlab.callbacks",
    "alexlab.optimizers",
)
# Of these, networks and layers, optimizers and callbacks alone: among their functions are some that load pickles.
OTHERS = (
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "timm",
    "pytorch_lightning.callbacks",
)
ALLOWED = OWN + OTHERS
MODULE, OPTIMIZER, CALLBACK = (
    "torch.nn.modules.module.Module",
    "torch.optim.optimizer.Optimizer",
    "pytorch_lightning.callbacks.callback.Callback",
)
# Where others' networks and layers are defined: in no private module, and in none for other tasks than ours.
NETWORKS = re.compile(r"torch\.nn\.modules\.[a-z]\w*|torchvision\.models\.[a-z]\w*|timm\.(layers|models)(\.[a-z]\w*)*")
# These turn the text of a program that they have written into a program.
WRITES_CODE = ("torch.fx.", "torch.jit.")
# Functions of others that a network may be given: activations, ways to draw weights, timm's choices by name.
FUNCTIONS = {
    *(f"torch.nn.functional.{name}" for name in (
        "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "glu", "hardswish", "hardsigmoid",
        "hardtanh", "sigmoid", "logsigmoid", "tanh", "softplus", "softsign", "softmax", "log_softmax", "normalize",
    )),
    *(f"torch.nn.init.{name}_" for name in (
        "uniform", "normal", "trunc_normal", "constant", "ones", "zeros", "eye", "dirac", "xavier_uniform",
        "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal", "sparse",
    )),
    *(f"timm.layers.{name}" for name in ("get_norm_layer", "get_act_layer", "get_act_fn", "get_attn")),
}  # fmt: skip


def locate(target: str) -> Callable[..., Any]:
    """The class or function at the dotted path `target`.

    Where it is defined counts, not the path alone: `alexlab.models.pretrained.torch.hub.load` is torch.hub's.

    Raises:
        UserError: it is outside `ALLOWED`, does not exist, or is not a class or a function that makes something.
    """
    if not _allowed(target):
        raise UserError(_refusal(target))
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"_target_={target} is no dotted path, such as torch.nn.Linear: check its name.")
    if any(part.startswith("_") for part in parts):
        raise UserError(f"_target_={target} is not allowed: what begins with _ is its package's own affair.")
    place, found = _reached(target, parts)
    if target in FUNCTIONS:
        return found
    made = found.func if isinstance(found, functools.partial) and _among(place, OWN) else found
    home = getattr(made, "__module__", None)
    if home is not None and not _allowed(home):
        raise UserError(_refusal(target, home))
    if not (inspect.isclass(made) or inspect.isfunction(made) or _is_constructor(made)):
        raise UserError(f"_target_={target} is a {type(found).__name__}, and a class or a function is needed.")
    if home is not None and _among(home, OWN):
        if inspect.isfunction(made) and not _may_make_a_part(made):
            raise UserError(f"_target_={target} is not allowed: what it gives, as it says itself, is no network.")
    elif home is not None and not _makes_a_part(made):
        raise UserError(
            f"_target_={target} is not allowed: what is {parts[0]}'s must be a network for classification, a layer, an "
            "optimizer or a callback. A function of yours in src/alexlab/models/ may make anything of it."
        )
    return found


def _reached(target: str, parts: list[str]) -> tuple[str, Any]:
    """The module that the path leads to, and what it leads to there."""
    found: Any = None
    for length in range(len(parts) - 1, 0, -1):  # the longest part of it that is a module
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise UserError(f"_target_={target}: {error}; install what it needs.") from error
            continue
        break
    if found is None:
        raise UserError(f"_target_={target}: the package {parts[0]} is not installed.")
    for part in parts[length:]:
        if not hasattr(found, part):
            raise UserError(f"_target_={target}: {getattr(found, '__name__', found)} holds no {part}: check its name.")
        found = getattr(found, part)
    return name, found


def _is_constructor(found: Any) -> bool:
    """Whether it is a classmethod that a class of `OWN` has written itself; what it inherits may load pickles."""
    return inspect.ismethod(found) and inspect.isclass(found.__self__) and _among(found.__self__.__module__, OWN)


def _may_make_a_part(function: Any) -> bool:
    """Whether a function of `OWN` gives a part of `KINDS`, a function, or does not say what."""
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # names that exist for type checkers alone
        hints = typing.get_type_hints(function)
    gives = typing.get_origin(hints.get("return", Any)) or hints.get("return", Any)
    if gives is Any or gives is Callable or not inspect.isclass(gives):
        return True
    return _is_one_of(gives, MODULE, OPTIMIZER, CALLBACK)


def _makes_a_part(found: Any) -> bool:
    """Whether a class or function of others is a layer, an optimizer or a callback, or a network by its name."""
    if inspect.isclass(found):
        if _is_one_of(found, MODULE):
            writes = any(f"{base.__module__}.".startswith(WRITES_CODE) for base in found.__mro__)
            return not writes and NETWORKS.fullmatch(found.__module__) is not None
        return _is_one_of(found, OPTIMIZER, CALLBACK)
    name = found.__qualname__  # with a dot for a method
    package = sys.modules[found.__module__.partition(".")[0]]
    if package.__name__ == "timm":
        return name == "create_model" or (package.is_model(name) and package.model_entrypoint(name) is found)
    return package.__name__ == "torchvision" and name in package.models.list_models(module=package.models)


def _is_one_of(found: type, *kinds: str) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" in kinds for base in found.__mro__)


def _allowed(path: str) -> bool:
    return _among(path, ALLOWED)


def _among(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _refusal(target: str, module: str | None = None) -> str:
    comes = f" (it is {module}'s)" if module else ""
    return (
        f"_target_={target} is not allowed{comes}: it must be of {', '.join(ALLOWED)} "
        "(src/alexlab/targets.py holds the list)."
    )
