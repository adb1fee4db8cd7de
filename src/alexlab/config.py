"""A composed config as plain values; config.yaml, written and read."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from alexlab import secrecy
from alexlab.errors import UserError, naming

ROOT = Path(__file__).resolve().parents[2]  # the project's folder
CONF = ROOT / "conf"
LARGEST = 2**20  # bytes of a config.yaml
DOLLAR = re.compile(r"(\\*)\$\{([^}]*\}?)")


def create(plain: dict[str, Any]) -> DictConfig:
    """A config of these very values: what looks like an interpolation in them is none, now and when it is copied."""
    made = OmegaConf.create(_each_text(plain, lambda text, _: _escaped(text)))
    assert isinstance(made, DictConfig)
    return made


def _each_text(node: Any, change: Callable[[str, str], str], top: str = "") -> Any:
    """A copy whose texts are `change(text, the key at the top that they are below)`."""
    if isinstance(node, dict):
        return {key: _each_text(value, change, top or str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_each_text(value, change, top) for value in node]
    return change(node, top) if isinstance(node, str) else node


def _escaped(text: str) -> str:
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def resolved(config: DictConfig) -> DictConfig:
    """A copy without interpolations, its data root and file of class names absolute: relative ones are seen from the
    working directory."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["data"]["root"] = os.path.abspath(os.path.expanduser(str(plain["data"]["root"])))  # noqa: PTH100, PTH111
    names = plain["data"].get("class_names")
    if names is not None and os.path.isfile(os.path.expanduser(names)):  # noqa: PTH113, PTH111
        plain["data"]["class_names"] = os.path.abspath(os.path.expanduser(names))  # noqa: PTH100, PTH111
    return create(plain)


def plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def told(config: DictConfig) -> dict[str, Any]:
    """As plain values without secrets, for others to read."""
    return secrecy.hidden(plain(config))


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as "optimizer.lr"."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def save(config: DictConfig, path: Path) -> None:
    """In one go: another rank, or a kill, meets the file before or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    with naming(path), beside.open("x") as file:
        file.write(OmegaConf.to_yaml(told(config)))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read(path: Path) -> Any:
    """What is in a yaml file that may be anybody's.

    Raises:
        UserError: it is no yaml, too large, or would fill the memory.
    """
    with path.open("rb") as file:
        raw = file.read(LARGEST + 1)
    try:
        # a small file of aliases of aliases becomes a large one
        if len(raw) > LARGEST or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw, LOADER)):
            raise UserError(f"{path} is not a run's config: it is larger than {LARGEST} bytes, or has aliases.")
        return yaml.load(raw, LOADER)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a run's config: {str(error).splitlines()[0]}") from None


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(path: Path, secrets: Callable[[str], bool] = lambda key: False) -> DictConfig:
    """A config.yaml, with nothing resolved in it but references to the environment, and those where they are wanted:
    a run from elsewhere must not have the values of this machine's.

    Args:
        secrets: of a key at the top, whether those below it are.

    Raises:
        UserError: it needs an environment variable that is not set, or is not what `save` writes.
    """
    plain = read(path)
    if not isinstance(plain, dict):
        raise UserError(f"{path} is not a run's config.")
    secrecy.note(plain)

    def reveal(text: str, top: str) -> str:
        def replace(found: re.Match[str]) -> str:
            slashes, inside = found.groups()
            if len(slashes) % 2:  # it is text
                return "\\" * (len(slashes) // 2) + "${" + inside
            name = re.fullmatch(r"oc\.env:([A-Za-z_]\w*)\}", inside)
            if name is None:
                raise UserError(f"{path} is not a run's config: ${{{inside} is nothing that one refers to.")
            if not secrets(top):
                return found[0]
            if name[1] not in os.environ:
                raise UserError(
                    f"{path} needs the environment variable {name[1]}, a secret that the run was given: set it."
                )
            return "\\" * (len(slashes) // 2) + os.environ[name[1]]

        return DOLLAR.sub(replace, text)

    return create(_each_text(plain, reveal))
