"""`_target_` of a config -> a class or function, from allowed places only: a config must not run anything else."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from alexlab.errors import UserError

# Your own package goes here, if its networks do not live in src/alexlab/models/.
ALLOWED = (
    "alexlab.models",
    "alexlab.callbacks",
    "alexlab.optimizers",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "timm",
    "pytorch_lightning.callbacks",
)


def locate(target: str) -> Callable[..., Any]:
    """The class or function at the dotted path `target`.

    Where it is defined counts, not the path alone: `alexlab.models.zoo.torch.hub.load` begins well and is torch.hub's.

    Raises:
        UserError: it is outside `ALLOWED`, does not exist, or is neither a class nor a function.
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
    return found


def _allowed(path: str) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in ALLOWED)


def _refusal(target: str, module: str | None = None) -> str:
    comes = f" (it is {module}'s)" if module else ""
    return (
        f"_target_={target} is not allowed{comes}: it must be of {', '.join(ALLOWED)} "
        "(src/alexlab/targets.py holds the list)."
    )
