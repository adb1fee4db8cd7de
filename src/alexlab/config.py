"""A composed config as plain values; config.yaml, written and read."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from alexlab import secrecy
from alexlab.errors import UserError, naming

ROOT = Path(__file__).resolve().parents[2]  # the project's folder
CONF = ROOT / "conf"
LARGEST = 2**20  # bytes of a config.yaml


def resolved(config: DictConfig) -> DictConfig:
    """A copy without interpolations, its data root and file of class names absolute: relative ones are seen from the
    working directory."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["data"]["root"] = os.path.abspath(os.path.expanduser(str(plain["data"]["root"])))  # noqa: PTH100, PTH111
    names = plain["data"].get("class_names")
    if names is not None and os.path.isfile(os.path.expanduser(names)):  # noqa: PTH113, PTH111
        plain["data"]["class_names"] = os.path.abspath(os.path.expanduser(names))  # noqa: PTH100, PTH111
    return OmegaConf.create(plain)


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
    with naming(path), beside.open("w") as file:
        file.write(OmegaConf.to_yaml(told(config)))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path) -> DictConfig:
    """
    Raises:
        UserError: it needs an environment variable that is not set, or is not what `save` writes.
    """
    with path.open("rb") as file:
        raw = file.read(LARGEST + 1)
    # a small file of aliases of aliases fills the memory
    if len(raw) > LARGEST or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw)):
        raise UserError(f"{path} is not a run's config: it is larger than {LARGEST} bytes, or has aliases.")
    loaded = OmegaConf.create(raw.decode())
    assert isinstance(loaded, DictConfig)
    try:
        OmegaConf.resolve(loaded)
    except InterpolationResolutionError as error:
        name = re.search(r"Environment variable '(.*?)' not found", str(error))
        if name is None:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
        raise UserError(
            f"{path} needs the environment variable {name[1]}, a secret that the run was given: set it, to anything "
            "where it does not matter any more."
        ) from None
    return loaded
