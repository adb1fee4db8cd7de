"""Build the objects that a config names by `_target_`.

The config of your own command line may name anything. A run directory may come from somebody else, and eval, predict,
export, `alexlab.load`, from_run and resume build what the run's config names. So only the packages of a list are
allowed, to which `allow=[mypkg]` adds yours. Two things must be on the list: the path of the target, and the module
that defines the object at that path, because an allowed module may import anything.

Each function takes `trusted`: the packages of `allow`, or None for the config of your own command line.

`hydra.utils.instantiate` is not used: it resolves references in texts once more after the check, and checks each call
of a `_partial_` object (a call of an activation function takes 250 microseconds instead of 1).
"""

import contextlib
import functools
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from alexlab.engine.errors import UserError, did_you_mean

Trusted = Sequence[str] | None

# The folders of src/alexlab/ for code of your own. Other packages are allowed by `allow=[mypkg]`.
OWN = ("alexlab.models", "alexlab.tasks", "alexlab.callbacks", "alexlab.optimizers")
TASKS = ("alexlab.tasks",)  # of which only modules are allowed: some functions build what they are given
# Parts of libraries that only `allow` allows: they may send files to any server, or read any file.
PARTS = ("pytorch_lightning.loggers", "torchvision.datasets")
# Of these libraries only networks, layers, losses, metrics, optimizers, schedulers, transforms and callbacks are
# allowed: some functions load pickles.
VISION = ("torchvision.models", "torchvision.transforms.v2")
LIBRARIES = ("torch.nn", "torch.optim", *VISION, "timm", "torchmetrics", "pytorch_lightning.callbacks")
ALLOWED = OWN + LIBRARIES
MODULE, OPTIMIZER = "torch.nn.modules.module.Module", "torch.optim.optimizer.Optimizer"
CALLBACK = "pytorch_lightning.callbacks.callback.Callback"
SCHEDULERS = ("torch.optim.lr_scheduler.LRScheduler", "timm.scheduler.scheduler.Scheduler")
# The modules of the libraries that define networks for classification, layers, losses, and metrics that are computed
# from predictions: other metrics load models. Of private modules, only those of torchvision's transforms are allowed.
MODULES = re.compile(
    r"torch\.nn\.modules\.[a-z]\w*|torchvision\.models\.[a-z]\w*|timm\.(layers|loss|models)(\.[a-z]\w*)*"
    r"|torchvision\.transforms\.v2\._\w+"
    r"|torchmetrics\.(classification|regression|aggregation|collections)(\.[a-z]\w*)*|torchmetrics\.wrappers\.classwise"
)
# Classes of these packages turn text into a program.
WRITES_CODE = ("torch.fx.", "torch.jit.")
# Functions of the libraries that may be arguments of a network: activations, initializers, timm's layers by name.
FUNCTIONS = re.compile(
    r"torch\.nn\.functional\.(relu6?|leaky_relu|elu|selu|celu|gelu|silu|mish|glu|hardswish|hardsigmoid|hardtanh|sigmoid"
    r"|logsigmoid|tanh|softplus|softsign|softmax|log_softmax|normalize)"
    r"|torch\.nn\.init\.(uniform|normal|trunc_normal|constant|ones|zeros|eye|dirac|xavier_uniform|xavier_normal"
    r"|kaiming_uniform|kaiming_normal|orthogonal|sparse)_"
    r"|timm\.layers\.(get_norm_layer|get_act_layer|get_act_fn|get_attn)"
)
# Names of keys and of submodules: torch.fx and torch.compile write them into programs.
NAME = re.compile(r"\w[\w.\-]*", re.ASCII)
# Keys of Hydra's builder that are not supported, with the values that are accepted because they change nothing.
UNUSED = {"_recursive_": (True,), "_convert_": ("all",)}
# Arguments with which a network, or a part of it, downloads or reads weights; and the values with which it does not.
FETCHES: dict[str, Any] = {"pretrained": False, "pretrained_backbone": False, "online": False}
FETCHES |= {"weights": None, "weights_backbone": None, "checkpoint_path": ""}


# -- the allow-list


def locate(target: str, trusted: Trusted = ()) -> Callable[..., Any]:
    """Return the class or function at the dotted path `target`; UserError if it does not exist or is not allowed."""
    allowed, own = (*ALLOWED, *(trusted or ())), (*OWN, *(trusted or ()))
    if trusted is not None and not _is_in(target, allowed):
        raise UserError(_refusal(target))
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"_target_={target} must be a dotted path, such as torch.nn.Linear.")
    if trusted is not None and any(part.startswith("_") for part in parts):
        raise UserError(f"_target_={target} is not allowed: names that begin with _ are private to their package.")

    # import the longest part of the path that is a module
    obj: Any = None
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            obj = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not _is_in(module, (error.name,)):
                raise UserError(f"_target_={target}: {error}; install what it needs.") from error
    if obj is None:
        hint = " Install it, or put the folder that contains it on PYTHONPATH."
        hint = " It is installed as pytorch_lightning: write that." if parts[0] == "lightning" else hint
        raise UserError(f"_target_={target}: the package {parts[0]} is not installed.{hint}")
    for part in parts[length:]:
        if not hasattr(obj, part):
            raise UserError(f"_target_={target}: {getattr(obj, '__name__', obj)} contains no {part}: check the name.")
        obj = getattr(obj, part)

    # check what it is, and where it is defined
    if FUNCTIONS.fullmatch(target) or (trusted is None and callable(obj)):
        return obj
    made = obj.func if isinstance(obj, functools.partial) and _is_in(module, own) else obj
    home = getattr(made, "__module__", None)
    if home is not None and trusted is not None and not _is_in(home, allowed):
        raise UserError(_refusal(target, home))
    # a classmethod of a library's class may load pickles
    constructs = inspect.ismethod(made) and inspect.isclass(made.__self__) and _is_in(made.__self__.__module__, own)
    if not (inspect.isclass(made) or inspect.isfunction(made) or constructs):
        raise UserError(f"_target_={target} is a {type(obj).__name__}, and a class or a function is needed.")
    if home is not None and _is_in(home, own):
        is_of_tasks = _is_in(home, TASKS) and trusted is not None
        if is_of_tasks and not (inspect.isclass(made) and _is_one_of(made, MODULE)):
            raise UserError(f"_target_={target} is not allowed: of alexlab.tasks, only tasks and losses are.")
        if _is_in(home, OWN) and inspect.isfunction(made) and not _may_return_a_part(made):
            raise UserError(f"_target_={target} is not allowed: the return type is not a network, layer or function.")
    elif home is not None and not _is_a_librarys_part(made):
        raise UserError(
            f"_target_={target} is not allowed: of {parts[0]}, only networks for classification, layers, losses, "
            "metrics, optimizers, schedulers, transforms and callbacks are. A function of your own in "
            "src/alexlab/models/ may use anything else."
        )
    return obj


def check_targets(config: Any, trusted: Trusted = (), inside: bool = False) -> None:
    """Check each `_target_` of plain values, and the keys below it, before anything is built.

    Raises:
        UserError: a target is not allowed, does not exist, or has keys that the builder does not support.
    """
    if isinstance(config, list):
        for value in config:
            check_targets(value, trusted, inside)
    if not isinstance(config, dict):
        return
    inside = inside or "_target_" in config
    for key in config if inside and trusted is not None else ():
        if isinstance(key, str) and not NAME.fullmatch(key):
            raise UserError(f"a key below a _target_ is {key[:40]!r}: use letters, digits, _, - and . alone.")
    if "_target_" in config:
        _check_node(config, trusted)
    for value in config.values():
        check_targets(value, trusted, inside)


def nodes_in(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield each mapping of plain values that has a `_target_`, with the path of keys, such as ("model", "net")."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from nodes_in(value, (*path, str(key)))
    for number, value in enumerate(config if isinstance(config, list) else ()):
        yield from nodes_in(value, (*path, str(number)))


def packages_to_allow(config: Any, allow: Sequence[str] = ()) -> set[str]:
    """Return the packages in a run's config that another command takes only with `allow=[PACKAGE]`."""
    if not isinstance(config, dict | list):
        return set()
    values = config.values() if isinstance(config, dict) else config
    packages = set().union(*(packages_to_allow(value, allow) for value in values))
    package = package_of(str(config.get("_target_", ""))) if isinstance(config, dict) else ""
    known = {name.partition(".")[0] for name in ALLOWED}
    return packages | ({package} - {"", *known, *allow, *(name.partition(".")[0] for name in allow)})


def package_of(target: str) -> str:
    """Return what `allow` must have for a target: the package, or one of `PARTS`."""
    return next((part for part in PARTS if _is_in(target, (part,))), target.partition(".")[0])


def _check_node(node: dict[str, Any], trusted: Trusted) -> None:
    name = str(node["_target_"])
    target = locate(name, trusted)
    for key, values in UNUSED.items():
        if key in node and node[key] not in values:
            raise UserError(f"{name}: {key}={node[key]} is Hydra's and is not supported here: remove it.")
    if not isinstance(node.get("_partial_", False), bool):
        raise UserError(f"{name}: _partial_={node['_partial_']} must be true or false.")
    if not isinstance(node.get("_args_", []), list):
        raise UserError(f"{name}: _args_ must be a list.")
    by_position = dict(zip(_names_of_args(target, node), node.get("_args_", []), strict=True))
    model_name = str(node.get("model_name", by_position.get("model_name", "")))
    if getattr(target, "__qualname__", "") == "create_model" and ":" in model_name:
        raise UserError(f"{name}: {model_name} is an address: use model=timm model.name={model_name}.")


def _may_return_a_part(function: Any) -> bool:
    """Check that the return type of a function in `OWN` is a network, optimizer, callback or function, or unknown."""
    returns: Any = None
    with contextlib.suppress(Exception):  # names that exist for type checkers only
        returns = typing.get_type_hints(function).get("return")
    returns = typing.get_origin(returns) or returns
    is_unknown = returns in (Any, Callable) or not inspect.isclass(returns)
    return is_unknown or _is_one_of(returns, MODULE, OPTIMIZER, CALLBACK)


def _is_a_librarys_part(obj: Any) -> bool:
    """Check for a class of a layer, optimizer or callback, or for a function that the library lists as a network."""
    if inspect.isclass(obj):
        if _is_one_of(obj, MODULE):
            writes = any(f"{base.__module__}.".startswith(WRITES_CODE) for base in obj.__mro__)
            return not writes and MODULES.fullmatch(obj.__module__) is not None
        return _is_one_of(obj, OPTIMIZER, CALLBACK, *SCHEDULERS)
    name = obj.__qualname__  # has a dot if it is a method
    package = sys.modules[obj.__module__.partition(".")[0]]
    if package.__name__ == "timm":
        return name == "create_model" or (package.is_model(name) and package.model_entrypoint(name) is obj)
    return package.__name__ == "torchvision" and name in package.models.list_models(module=package.models)


def _is_one_of(cls: type, *kinds: str) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" in kinds for base in cls.__mro__)


def _is_in(path: str, packages: tuple[str, ...]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _refusal(target: str, module: str | None = None) -> str:
    defined = f" (it is defined in {module})" if module else ""
    package = package_of(target)
    is_library = package in sys.stdlib_module_names or any(_is_in(name, (package,)) for name in ALLOWED)
    hint = f" If you trust this run and {package}, add allow=[{package}], here or in conf/allow.yaml."
    return (
        f"_target_={target} is not allowed{defined}: in a config that is loaded from a run, it must be from "
        f"{', '.join(ALLOWED)} (src/alexlab/engine/targets.py holds the list).{'' if is_library else hint}"
    )


def packages_of(config: Any) -> list[str]:
    """Return the packages of all targets in a config, but for Python's own and those that are allowed anyway."""
    return sorted(packages_to_allow(config) - sys.stdlib_module_names)


# -- building


def build(settings: Any, trusted: Trusted = (), known: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """Build the object that `settings._target_` names, with the remaining keys and `more` as arguments.

    `_args_` are arguments by position; `_partial_: true` gives a `functools.partial` instead. Of `known`,
    such as num_classes, the constructor gets what it names and the settings do not have.

    Raises:
        UserError: a target is not allowed, or the constructor refuses the values.
    """
    check_targets(settings, trusted)
    if known:
        named = names_of(str(settings["_target_"]), trusted)
        more |= {key: value for key, value in known.items() if key in named and key not in settings}
    return _build(settings, more, trusted)


def build_part(
    key: str, settings: Any, kind: Any, words: str, trusted: Trusted = (), known: Mapping[str, Any] | None = None
) -> Any:
    """Build what the setting `key` names; UserError as in `build`, or if it is not an instance of `kind`.

    `words` is the end of the message "builds a dict, which is no ...": what it must be, and what to give instead.
    """
    part = build(settings, trusted, known)
    if not isinstance(part, kind):
        name = settings["_target_"]
        raise UserError(f"{key}._target_={name} builds a {type(part).__name__}, which is no {words}.")
    return part


def build_network(settings: Any, num_classes: int, fetch: bool = False, trusted: Trusted = ()) -> nn.Module:
    """Build the network of `model.net`; UserError as in `build`.

    Args:
        fetch: download or read published weights if the settings ask for them. Set to false for a config from
            somebody else, which must not reach any file or server.
    """
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise UserError("model.net must have a _target_, the class of the network, and the settings.")
    check_targets(settings, trusted)
    settings_of_net = settings if fetch else without_weights(settings, trusted)
    net = _build(settings_of_net, {"num_classes": num_classes}, trusted)
    if not isinstance(net, nn.Module):
        raise UserError(
            f"model.net._target_={settings['_target_']} builds a {type(net).__name__}, which is no network."
        )
    return net


def _build(node: Any, more: dict[str, Any], trusted: Trusted) -> Any:
    if isinstance(node, list):
        return [_build(value, {}, trusted) for value in node]
    if not isinstance(node, dict):
        return node
    kwargs = {key: _build(value, {}, trusted) for key, value in node.items() if key not in ("_target_", *UNUSED)}
    if "_target_" not in node:
        return kwargs
    args, partial = kwargs.pop("_args_", []), kwargs.pop("_partial_", False)
    name = str(node["_target_"])
    target = locate(name, trusted)
    try:
        made = functools.partial(target, *args, **kwargs, **more) if partial else target(*args, **{**kwargs, **more})
    except UserError:
        raise
    except ValueError as error:  # the constructor explains the wrong value itself
        raise UserError(f"{error} ({name})") from error
    except Exception as error:
        kind = "" if isinstance(error, TypeError) else f"{type(error).__name__}: "
        hint = " (the constructor of a network must take num_classes)" if "'num_classes'" in str(error) else ""
        unknown = next((key for key in kwargs if not takes(target, key)), "")
        near = did_you_mean(unknown, names_of(name, trusted))
        hint = f".{near}" if near else hint
        raise UserError(f"{name} cannot be built from its settings: {kind}{error}{hint}") from error
    for module in made.modules() if isinstance(made, nn.Module) and trusted is not None else ():
        for part in (*module._modules, *module._parameters, *module._buffers):
            if not NAME.fullmatch(part):
                raise UserError(f"{name}: a submodule is named {part[:40]!r}: use letters, digits, _, - and . alone.")
    return made


def without_weights(node: Any, trusted: Trusted = ()) -> Any:
    """Copy settings without the arguments, at any depth, by name or by position, that download or read weights."""
    if isinstance(node, list):
        return [without_weights(value, trusted) for value in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: _without(key, value, False, trusted) for key, value in node.items()}
    target = locate(str(node["_target_"]), trusted)
    torchvisions = str(getattr(target, "__module__", "")).startswith("torchvision.")
    args = list(zip(_names_of_args(target, node), node.get("_args_") or [], strict=True))
    cleaned = {key: _without(key, value, torchvisions, trusted) for key, value in node.items() if key != "_args_"}
    if args:
        cleaned["_args_"] = [_without(name, value, torchvisions, trusted) for name, value in args]
    handled = {name for name, _ in args} | {"weights"}
    defaults = {key: value for key, value in FETCHES.items() if key in _parameters(target) and key not in handled}
    return {**cleaned, **defaults}  # the defaults of the target may ask for weights, too


def _without(name: str, value: Any, torchvisions: bool, trusted: Trusted) -> Any:
    if name == "weights" and not torchvisions and not isinstance(value, str | bool):
        return without_weights(value, trusted)  # another argument of this name, such as a list of numbers
    return FETCHES[name] if name in FETCHES else without_weights(value, trusted)


def _names_of_args(target: Callable[..., Any], node: dict[str, Any]) -> list[str]:
    """Return the names of the parameters that `_args_` fill; "" for values that go into *args."""
    count, names = len(node.get("_args_") or []), list[str]()
    for name, parameter in _parameters(target).items() if count else ():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [""] * (count - len(names))
    if len(names) < count:
        raise UserError(
            f"{node['_target_']} takes {len(names)} of the {count} _args_ by position: give the rest by name."
        )
    return names[:count]


def takes(target: Callable[..., Any], name: str) -> bool:
    """Check whether a target may be called with this argument, as far as the signature says."""
    try:
        inspect.signature(target).bind_partial(**{name: None})
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        pass
    return True


def may_take(target: Callable[..., Any], name: str) -> bool:
    """Check whether a target may take this argument, also if a decorator handles it."""
    if takes(target, name) or getattr(target, "__signature__", None) is not None:
        return True
    made = target.__init__ if inspect.isclass(target) else target
    with contextlib.suppress(TypeError, ValueError):
        parameters = inspect.signature(made, follow_wrapped=False).parameters.values()
        return any(each.kind is each.VAR_KEYWORD for each in parameters) and hasattr(made, "__wrapped__")
    return False


def names_of(name: str, trusted: Trusted = ()) -> set[str]:
    """Return the names of a target's parameters; if a class takes **kwargs, also those of the base classes."""
    target, names = locate(name, trusted), set[str]()
    for cls in inspect.getmro(target) if inspect.isclass(target) else ():
        if "__init__" in vars(cls):
            parameters = _parameters(vars(cls)["__init__"])
            names |= _named(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                return names
    return names | _named(_parameters(target))


def _named(parameters: dict[str, inspect.Parameter]) -> set[str]:
    """Return the names of parameters without those of *args and **kwargs."""
    return {name for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some that are written in C have no signature
        return {}
