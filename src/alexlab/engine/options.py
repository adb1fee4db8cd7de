"""The options of conf/'s groups, as their files have them: what one of them sets. Light."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexlab.engine import config as configs
from alexlab.engine.config import CONF
from alexlab.engine.overrides import get

Plain = dict[str, Any]


def default(choices: Plain, key: str) -> Any:
    """The value that the options, or train.yaml, give a key; None where they give none."""
    found = _all_texts(choices)
    return found[key] if key in found else get(_train(), key)


def default_option(choices: Plain, group: str) -> Any:
    """The option that a group has without a word for it: a recipe's, or train.yaml's."""
    found = None
    recipes = [_load(other, name) for other, option in choices.items() if _is_recipe(other, option)
               for name in _names(option)]  # fmt: skip
    for part in [_train(), *(configs.plain(recipe) for recipe in recipes)]:
        for entry in part.get("defaults", []):
            for key, option in entry.items() if isinstance(entry, dict) else ():
                if key.removeprefix("override ").lstrip("/") == group:
                    found = option
    return found


def _train() -> Plain:
    return configs.read(CONF / "train.yaml")


def _names(option: Any) -> list[str]:
    """Those of options that there are."""
    names = option if isinstance(option, list) else re.split(r"[\[\], ]+", str(option)) if option is not None else []
    return [str(name) for name in names if re.fullmatch(r"[\w-]+", str(name))]


def _texts(group: str, option: Any) -> Plain:
    """What an option sets, flat and as its file has it, unresolved; of a recipe keys of other groups."""
    prefix = "" if _is_recipe(group, option) else f"{group}."
    found: Plain = {}
    for name in _names(option):
        found |= configs.flat(OmegaConf.to_container(_raw(group, name)), prefix)  # type: ignore[arg-type]
    return found


def _all_texts(choices: Plain) -> Plain:
    """As `_texts`, of all groups, in train.yaml's order: a recipe's keys take the place of theirs."""
    order = [key for entry in _train()["defaults"] if isinstance(entry, dict) for key in entry]
    found: Plain = {}
    for group, option in sorted(choices.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99):
        if (CONF / group).is_dir():
            found |= _texts(group, option)
    return found


def _load(group: str, name: str) -> DictConfig:
    path = CONF / group / f"{name}.yaml"
    loaded = OmegaConf.load(path) if path.is_file() else OmegaConf.create({})
    assert isinstance(loaded, DictConfig)
    return loaded


def _raw(group: str, name: str) -> DictConfig:
    """An option's file over those of the same group that it begins from."""
    own = _load(group, name)
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return OmegaConf.merge(*(_raw(group, base) for base in bases), own)  # type: ignore[return-value]


def _is_recipe(group: str, option: Any) -> bool:
    """Whether it sets keys of other groups."""
    paths = [CONF / group / f"{name}.yaml" for name in _names(option)]
    return any("@package _global_" in path.read_text().partition("\n")[0] for path in paths if path.is_file())
