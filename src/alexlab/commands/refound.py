"""Whether W&B's search will find the values that its agent has given a run, in what W&B is told of the run's config. A
grid would give out others again without an end. Light."""

import json
import os
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from alexlab.commands.beforehand import RULES_OF
from alexlab.engine import config as configs
from alexlab.engine import rules, sweeps
from alexlab.engine.config import CONF
from alexlab.engine.errors import UserError
from alexlab.engine.naming import for_others, without_paths

# by the time W&B is told, a run that they name has become a checkpoint of its, or null
PLACES = ("init_from", "ckpt_path", "from_run", "from_wandb")
COUNTED = "data.num_classes"  # null becomes the number of those that there are


def check(config: DictConfig, command: str) -> None:
    """
    Args:
        config: of the run, whose values are checked by `command`'s rules first.

    Raises:
        UserError: a value is wrong, or told as another where it is one of a grid's.
    """
    for its in RULES_OF[command]:
        rules.check(config, its)
    check_told(for_others(configs.told(configs.resolved(config))), _sweep)


def check_told(told: dict[str, Any], ask: Callable[[], dict[str, Any] | None]) -> None:
    """
    Args:
        told: the config as W&B is told.
        ask: for the sweep's file, or None where nobody knows it: when there is a difference.

    Raises:
        UserError: a value is told as another.
    """
    seen = configs.flat(told)
    lost = [key for key in sweeps.given if not _is_found(key, seen)]
    file = ask() if lost else None
    for key in lost:
        if file is None or (file.get("method") == "grid" and not _constant(file, key)):
            raise UserError(_refusal(key, seen.get(key), "" if file else ", where it is one of several of a grid"))


def _is_found(key: str, seen: dict[str, Any]) -> bool:
    value, known = sweeps.given[key], seen.get(key)
    if key.split(".")[0] == "resume":  # no setting of what is learned, and the same in all runs
        return True
    if key in PLACES or (key == COUNTED and value is None):
        return value is None and key in PLACES
    return _searched(value) == _searched(known, whole=True)


def _refusal(key: str, known: Any, where: str) -> str:
    value = sweeps.given[key]
    known = "of a checkpoint, or nothing" if key in PLACES else known
    known = "how many there are" if key == COUNTED and value is None else known
    lost = f"{key}={value}: W&B is told {known}, and its search would not find again what it has given{where}: "
    if key == COUNTED and value is None:
        return f"{lost}null stands for that number: give numbers alone, or leave the key out."
    if isinstance(value, list) and _searched(value, whole=True) == _searched(known, whole=True):
        return f"{lost}in the sweep's file write whole numbers in lists without a point, 1 for 1.0."
    if isinstance(value, str) and isinstance(known, int | float):
        return f"{lost}it is a text in the sweep's file: write {known} there."
    if key not in PLACES and without_paths(value) == value:
        return f"{lost}another word of the command sets it: leave one of them out."
    group = key.split(".")[0]
    group = group if (CONF / group).is_dir() else "experiment"
    return (
        f"{lost}of a path it is the last part. One that all runs share goes to the end of the sweep's command, as "
        f"- {key}=PATH; others into options of a group, choices: {{parameters: {{{group}: {{values: [A, B]}}}}}} "
        f"with conf/{group}/A.yaml."
    )


def _sweep() -> dict[str, Any] | None:
    """The sweep's file, as W&B's server has it; None where that cannot be asked."""
    path = [os.environ.get(f"WANDB_{name}") for name in ("ENTITY", "PROJECT", "SWEEP_ID")]
    if not all(path):
        return None
    from alexlab.loggers.wandb_api import fetch_sweep

    return fetch_sweep("/".join(map(str, path)))


def _constant(file: dict[str, Any], key: str) -> bool:
    """Whether all runs of the sweep have the same value of a key, which a grid does not look for."""
    node: Any = file
    for part in key.split("."):
        below = node.get("parameters")
        node = below.get(part) if isinstance(below, dict) else None
        if not isinstance(node, dict):
            return False
        if "value" in node:
            return True
    return False


def _searched(value: Any, whole: bool = False) -> str:
    """A value as W&B's search compares them: 1.0 is 1, but within lists.

    Args:
        whole: within lists, too, as in what it has of a run.
    """

    def changed(item: Any, top: bool) -> Any:
        if isinstance(item, list):
            return [changed(each, whole) for each in item]
        return int(item) if top and isinstance(item, float) and item.is_integer() else item

    return json.dumps(changed(value, True), sort_keys=True, default=str)
