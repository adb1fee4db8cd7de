"""`_target_` of a config -> a class or function, from allowed places only: a config must not run anything else."""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from alexlab.errors import UserError

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
KINDS = {
    "torch.nn.modules.module.Module",
    "torch.optim.optimizer.Optimizer",
    "pytorch_lightning.callbacks.callback.Callback",
}


def locate(target: str) -> Callable[..., Any]:
    """The class or function at the dotted path `target`.

    Where it is defined counts, not the path alone: `alexlab.models.zoo.torch.hub.load` begins well and is torch.hub's.

    Raises:
        UserError: it is outside `ALLOWED`, does not exist, or is not a class or a function that makes something.
    """
    if not _allowed(target):
        raise UserError(_refusal(target))
    parts = target.split(".")
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
    home = getattr(found, "__module__", None)
    if home is not None and not _allowed(home):
        raise UserError(_refusal(target, home))
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise UserError(f"_target_={target} is a {type(found).__name__}, and a class or a function is needed.")
    if home is not None and not _among(home, OWN) and not _makes_a_part(found):
        raise UserError(
            f"_target_={target} is not allowed: what is {parts[0]}'s must be a network, a layer, an optimizer or a "
            "callback."
        )
    return found


def _makes_a_part(found: Any) -> bool:
    """Whether a class or function of others is one of `KINDS`, or a network by its name in torchvision or timm."""
    if inspect.isclass(found):
        return any(f"{base.__module__}.{base.__qualname__}" in KINDS for base in found.__mro__)
    name = found.__qualname__  # with a dot for a method
    package = sys.modules[found.__module__.partition(".")[0]]
    if package.__name__ == "timm":
        return name == "create_model" or package.is_model(name)
    return package.__name__ == "torchvision" and name in package.models.list_models()


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
