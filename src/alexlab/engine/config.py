"""Configs as plain values: composed by Hydra, and written to or read from the config.yaml of a run."""

import os
import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alexlab.engine.errors import UserError
from alexlab.engine.files import atomic_write

if TYPE_CHECKING:
    from omegaconf import DictConfig

Plain = dict[str, Any]

ROOT = Path(__file__).resolve().parents[3]  # the project's folder
CONF = ROOT / "conf"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# A value that is nothing but a reference to an environment variable: ${oc.env:WANDB_NOTES}
REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")
SHORTEST_SECRET = 4  # characters: replacing a shorter value would damage unrelated words
# In these sections such a value stays a reference: it may be a secret, which no file of the run should hold.
KEEPS_REFERENCES = ("logger", "callbacks")

PACKAGE = __name__.partition(".")[0]
FORMER_NAMES: tuple[str, ...] = ()  # of this package, see docs/rename.py: runs of these names can be read
# Modules that older runs name in a `_target_`, and the modules that replaced them.
MOVED_MODULES = {
    "alexlab.models.zoo": "alexlab.models.pretrained",
    "alexlab.models.parts": "alexlab.models.introspection",
    "alexlab.callbacks.on_nan": "alexlab.callbacks.nan_guard",
    "alexlab.callbacks.snapshots": "alexlab.callbacks.checkpointing",
    "alexlab.callbacks.checkpoints": "alexlab.callbacks.checkpointing",
}


# -- composed by Hydra


def resolve(composed: "DictConfig") -> Plain:
    """Return a composed config as plain values, with every interpolation resolved.

    A bare `${oc.env:X}` within `logger` and `callbacks` stays as it is; `look_up` resolves it when it is used.

    Raises:
        OmegaConfBaseException: an interpolation cannot be resolved.
    """
    from omegaconf import OmegaConf

    raw: Any = OmegaConf.to_container(composed, resolve=False)
    for section in KEEPS_REFERENCES:
        if section in raw:
            raw[section] = each_text(raw[section], lambda text: f"\\{text}" if REFERENCE.fullmatch(text) else text)
    return OmegaConf.to_container(OmegaConf.create(raw), resolve=True)  # type: ignore[return-value]


def look_up(node: Any) -> Any:
    """Return a copy in which each bare `${oc.env:X}` is the environment variable X; UserError if that is not set."""

    def value_of(text: str) -> str:
        reference = REFERENCE.fullmatch(text)
        if reference is not None and reference[1] not in os.environ:
            raise UserError(f"`{text}` needs the environment variable {reference[1]}, which is not set: set it.")
        return text if reference is None else os.environ[reference[1]]

    return each_text(node, value_of)


def masker(plain: Plain) -> Callable[[str], str]:
    """Return a function that replaces, in a text, the values of the variables that the config keeps as references."""
    kept = repr([plain.get(section) for section in KEEPS_REFERENCES])
    secrets = {os.environ.get(reference[1], ""): reference[0] for reference in REFERENCE.finditer(kept)}

    def mask(text: str) -> str:
        for value in sorted(secrets, key=len, reverse=True):
            text = text.replace(value, secrets[value]) if len(value) >= SHORTEST_SECRET else text
        return text

    return mask


def each_text(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        return {key: each_text(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [each_text(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def is_address(text: object) -> bool:
    """Return whether a text is an address, as s3://BUCKET/PATH, and not a path."""
    return isinstance(text, str) and "://" in text


def local_logs(logs: str, scratch: str) -> str:
    """Return the folder of this machine for `paths.logs`; for a bucket, the one in `scratch` that is copied there."""
    return f"{scratch}/{logs.rstrip('/').replace('://', '/')}" if is_address(logs) else logs


def logs_of(config: Plain) -> Path:
    """Return the folder of this machine that has the runs."""
    return Path(local_logs(config["paths"]["logs"], config["paths"].get("scratch", f"{ROOT}/logs")))


def use_own_disk_cache(config: Plain, overridden: Container[str]) -> None:
    """Let a config that may be of another machine use the disk cache of this one, unless that key is overridden."""
    if "disk_cache" in config["data"] and "data.disk_cache" not in overridden:
        config["data"]["disk_cache"] = f"{config['paths']['data']}/cache"


def absolute(path: str) -> str:
    """Make a path absolute, and expand ~; symbolic links are not resolved."""
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111


# -- as files


def save(plain: Plain, path: Path) -> None:
    """Write a config in one step, so that the file is never incomplete, not even after a kill."""
    with atomic_write(path, "x", sync=True) as file:
        yaml.safe_dump(plain, file, sort_keys=False, allow_unicode=True, width=10_000)


def read(path: Path) -> Any:
    """Return the content of a yaml file, with references as they are; UserError if it is missing or is not yaml."""
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    try:
        return parsed(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be read as yaml: {error}.") from None


def parsed(raw: bytes) -> Any:
    """Return the content of a yaml text; ValueError if it is not yaml."""
    try:
        # libyaml refuses the bytes in no encoding that a path may have
        return yaml.load(raw, yaml.SafeLoader if b"\\uDC" in raw else LOADER)
    except yaml.YAMLError as error:
        raise ValueError(yaml_mistake(error)) from None


def yaml_mistake(error: yaml.YAMLError) -> str:
    """Return what is wrong in a yaml, with the file, if it is known, and the line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).splitlines()[0]
    file = error.problem_mark.name
    return f"{'' if file.startswith('<') else f'{file}, '}line {error.problem_mark.line + 1}: {error.problem}"


def load(path: Path) -> Plain:
    """Return a run's config.yaml in today's form (see `upgrade`); UserError if the file is not a run's config."""
    plain = read(path)
    if not isinstance(plain, dict) or "model" not in plain:
        raise UserError(f"{path} is not a run's config: it has no `model`.")
    return upgrade(plain)


def upgrade(plain: Plain) -> Plain:
    """Return the config of a run of any age in today's form: moved targets are renamed, removed values replaced."""
    config = with_current_targets(plain)
    fill_in(config)
    if config.get("on_nan") == "rollback":
        config["on_nan"] = "stop"
    data = config.get("data")
    if isinstance(data, dict) and data.get("cache") == "ram":
        data["cache"] = None
    return config


def fill_in(config: Plain) -> None:
    """Add the groups that configs of older runs lack, with what these runs did."""
    if isinstance(config.get("task"), str):  # was the name of the command
        config["command"] = config.pop("task")
    if "loss" in config:
        return
    config["task"] = {"_target_": "alexlab.tasks.classification.ImageClassifier"}
    config["loss"] = {"_target_": "alexlab.tasks.losses.CrossEntropy"}
    config["metrics"] = {}
    if isinstance(choices := config.get("choices"), dict) and choices:
        choices |= {"task": "classification", "loss": "cross_entropy", "metrics": "default"}


def with_current_targets(node: Any) -> Any:
    """Return a copy of a config in which each `_target_` of an older run names the module that holds it today."""
    if isinstance(node, list):
        return [with_current_targets(value) for value in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: with_current_targets(value) for key, value in node.items()}
    if isinstance(target := renamed.get("_target_"), str):
        package, _, rest = target.partition(".")
        target = f"{PACKAGE}.{rest}" if package in FORMER_NAMES else target
        module, dot, name = target.rpartition(".")
        renamed["_target_"] = f"{MOVED_MODULES.get(module, module)}{dot}{name}"
    return renamed


# -- nested keys


def value_at(node: Any, path: Iterable[Any]) -> Any:
    """Return the value of a nested key such as ("optimizer", "lr"), or None if it is absent."""
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def flat(node: Plain, prefix: str = "") -> Plain:
    """Return nested keys as dotted ones: {"optimizer": {"lr": 0.1}} -> {"optimizer.lr": 0.1}."""
    flattened: Plain = {}
    for key, value in node.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened
