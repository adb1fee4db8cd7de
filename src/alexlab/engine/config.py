"""A composed config as plain values; config.yaml, written and read."""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from alexlab.engine import secrecy
from alexlab.engine.errors import UserError
from alexlab.engine.files import atomic_write

ROOT = Path(__file__).resolve().parents[3]  # the project's folder
CONF = ROOT / "conf"
REVEALED = ("logger", "data", "paths")  # where the config of a run that goes on may refer to the environment's secrets
REBUILT = ("model", "data", "optimizer", "scheduler", "augment")  # by eval.py and the like, which reveal no secret
LARGEST = 2**20  # bytes of a config.yaml
DEEPEST = 50  # mappings and lists in each other
LONGEST = 1000  # characters of a number: of more, it takes YAML minutes
NUMBER = re.compile(r"[-+.:_0-9a-fox]+", re.IGNORECASE)
SLASHES = r"(?<!\\)(\\*)"  # all that stand in a row, so that a million of them are looked at once
MASK = re.compile(SLASHES + r"\$\{(oc\.env:[A-Za-z_]\w*\})?")
DOLLAR = re.compile(SLASHES + r"\$\{([^}]*\}?)")


def create(plain: dict[str, Any]) -> DictConfig:
    """A config of these very values: what looks like an interpolation in them is none, now and when it is copied."""
    made = OmegaConf.create(_each_text(plain, lambda text, _: escaped(text)))
    assert isinstance(made, DictConfig)
    return made


def _each_text(node: Any, change: Callable[[str, str], str], top: str = "") -> Any:
    """A copy whose texts are `change(text, the key at the top that they are below)`."""
    if isinstance(node, dict):
        return {key: _each_text(value, change, top or str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_each_text(value, change, top) for value in node]
    return change(node, top) if isinstance(node, str) else node


def escaped(text: str) -> str:
    """`text` as a config must hold it, so that nothing in it is resolved."""
    return re.sub(SLASHES + r"\$\{", r"\1\1\\${", text)


def _unresolved(text: str) -> str:
    """As `escaped`, but for the names of secrets, which are to be looked up."""
    return MASK.sub(lambda found: 2 * found[1] + ("" if found[2] else "\\") + found[0][len(found[1]) :], text)


def resolved(config: DictConfig) -> DictConfig:
    """A copy without interpolations, its data root and file of class names absolute: relative ones are seen from the
    working directory."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["data"]["root"] = os.path.abspath(os.path.expanduser(str(plain["data"]["root"])))  # noqa: PTH100, PTH111
    names = plain["data"].get("class_names")
    if isinstance(names, str) and os.path.isfile(os.path.expanduser(names)):  # noqa: PTH113, PTH111
        plain["data"]["class_names"] = os.path.abspath(os.path.expanduser(names))  # noqa: PTH100, PTH111
    return create(plain)


def plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def told(config: DictConfig) -> dict[str, Any]:
    """As plain values without secrets, for others to read; of a part of the config, too."""
    return secrecy.hidden(plain(config), str(config._get_full_key(None) or ""))


def withheld(config: DictConfig) -> list[str]:
    """The settings that others do not get, as they hold secrets: what rebuilds the run would need them."""
    ours, theirs = flat(plain(config)), flat(told(config))
    return [f"{key}={theirs[key]}" for key in ours if key.split(".")[0] in REBUILT and ours[key] != theirs.get(key)]


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as "optimizer.lr"."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def save(config: DictConfig, path: Path) -> None:
    """In one go: another rank, or a kill, meets the file before or the new one."""
    with atomic_write(path, "x", sync=True) as file:
        file.write(OmegaConf.to_yaml(_each_text(told(config), lambda text, _: _unresolved(text))))


def read(path: Path) -> Any:
    """What is in a yaml file that may be anybody's.

    Raises:
        UserError: it is no file, no yaml, too large, or would fill the memory.
    """
    try:
        return parsed(content(path, LARGEST))
    except ValueError as error:
        raise UserError(f"{path} is not a run's config: {error}.") from None


def content(path: Path, most: int) -> bytes:
    """
    Raises:
        ValueError: it is no file, as a pipe nobody writes to, or has more than `most` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return raw


def parsed(raw: bytes) -> Any:
    """What a yaml text holds, which may be anybody's.

    Raises:
        ValueError: it is none, or would take long or fill the memory.
    """
    try:
        depth = 0
        for event in yaml.parse(raw, LOADER):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
                raise ValueError("it has tags or has aliases")  # of which a small file becomes a large one
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it has more than {DEEPEST} mappings and lists in each other")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST and NUMBER.fullmatch(event.value):
                raise ValueError(f"it has a number of more than {LONGEST} characters")
        return yaml.load(raw, LOADER)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _check_kinds(node: Any) -> None:
    """Raises ValueError where there is something else than mappings, lists, texts, numbers, true, false and null."""
    if isinstance(node, dict):
        _check_kinds([*node, *node.values()])
    elif isinstance(node, list):
        for value in node:
            _check_kinds(value)
    elif node is not None and not isinstance(node, str | int | float):
        raise ValueError(f"it holds a {type(node).__name__}, {str(node)[:40]}; texts that look like one need quotes")
    elif isinstance(node, int) and abs(node) >= 2**64:
        raise ValueError("it holds a whole number of more than 64 bits")


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Modules that older runs name in a `_target_`, and where their contents are now.
MOVED_MODULES = {
    "alexlab.models.zoo": "alexlab.models.pretrained",
    "alexlab.models.parts": "alexlab.models.introspection",
    "alexlab.callbacks.on_nan": "alexlab.callbacks.nan_guard",
    "alexlab.callbacks.snapshots": "alexlab.callbacks.checkpointing",
    "alexlab.callbacks.checkpoints": "alexlab.callbacks.best_checkpoint",
    "alexlab.callbacks.agreement": "alexlab.callbacks.same_config",
    "alexlab.callbacks.rates": "alexlab.callbacks.lr_monitor",
}


def with_current_targets(node: Any) -> Any:
    """Return a copy of a config in which each `_target_` of an older run names the module that holds it today."""
    if isinstance(node, list):
        return [with_current_targets(value) for value in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: with_current_targets(value) for key, value in node.items()}
    target = renamed.get("_target_")
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        renamed["_target_"] = f"{MOVED_MODULES.get(module, module)}.{name}" if module else name
    return renamed


def load(path: Path, secrets: Callable[[str], bool] = lambda key: False) -> DictConfig:
    """A config.yaml, with nothing resolved in it but references to the environment, and those where they are wanted:
    a run from elsewhere must not have the values of this machine's.

    Args:
        secrets: of a key at the top, whether those below it are.

    Raises:
        UserError: it needs an environment variable that is not set, or is not what `save` writes.
    """
    plain = with_current_targets(read(path))
    if not isinstance(plain, dict):
        raise UserError(f"{path} is not a run's config.")
    try:
        _check_kinds(plain)
    except ValueError as error:
        raise UserError(f"{path} is not a run's config: {error}.") from None
    secrecy.note(plain)

    def reveal(text: str, top: str) -> str:
        def replace(found: re.Match[str]) -> str:
            slashes, inside = found.groups()
            if len(slashes) % 2:  # it is text
                return "\\" * (len(slashes) // 2) + "${" + inside
            name = re.fullmatch(r"oc\.env:([A-Za-z_]\w*)\}", inside)
            if name is None:
                raise UserError(f"{path} is not a run's config: ${{{inside[:60]} is nothing that one refers to.")
            if not secrets(top):
                return found[0]
            if name[1] not in os.environ:
                raise UserError(
                    f"{path} needs the environment variable {name[1]}, a secret that the run was given: set it."
                )
            return "\\" * (len(slashes) // 2) + os.environ[name[1]]

        return DOLLAR.sub(replace, text)

    return create(_each_text(plain, reveal))
