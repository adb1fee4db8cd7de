"""A composed config as plain values; config.yaml, written and read."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]  # the project's folder
CONF = ROOT / "conf"


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


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as "optimizer.lr"."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def save(config: DictConfig, path: Path) -> None:
    """In one go: another rank, or a kill, meets the file before or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w") as file:
        file.write(OmegaConf.to_yaml(config, resolve=True))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path) -> DictConfig:
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return loaded
