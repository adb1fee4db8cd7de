"""The options of conf/'s groups, as their files have them: what one of them sets, and what came later than a run."""

import contextlib
import re
from collections.abc import Collection, Container, Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexlab import config as configs
from alexlab.config import CONF
from alexlab.errors import UserError
from alexlab.kinds import shown

Plain = dict[str, Any]
_ABSENT = object()


def at(node: Plain, key: str) -> Any:
    """The value of "optimizer.lr"; None where there is none."""
    value = _at(node, key)
    return None if value is _ABSENT else value


def _at(node: Plain, key: str) -> Any:
    value: Any = node
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def has(node: Plain, key: str) -> bool:
    return _at(node, key) is not _ABSENT


def put(node: Plain, key: str, value: Any) -> None:
    *folders, leaf = key.split(".")
    for part in folders:
        inner = node.get(part)
        node[part] = node = inner if isinstance(inner, dict) else {}
    node[leaf] = value


def take(node: Plain, key: str) -> None:
    """Take a key out, and what is left empty of it below its group."""
    *folders, leaf = key.split(".")
    path = [node]
    for part in folders:
        inner = path[-1].get(part)
        if not isinstance(inner, dict):
            return
        path.append(inner)
    path[-1].pop(leaf, None)
    for depth in range(len(path) - 1, 1, -1):
        if path[depth] == {}:
            del path[depth - 1][folders[depth - 1]]


def read(group: str, option: Any, context: Plain) -> Plain:
    """What an option sets, as it stands in its file; {} where there is no such option any more.

    Args:
        option: a name, or several of them in a list.
        context: what its values may refer to.
    """
    parts = [_raw(group, name) for name in _names(option)]
    made = configs.create({key: value for key, value in context.items() if key != group})
    made[group] = OmegaConf.merge(*parts) if parts else {}
    return OmegaConf.to_container(made[group], resolve=True)  # type: ignore[return-value]


def exchange(changed: Plain, today: Plain, group: str, word: str) -> None:
    """Take today's option of a group in the place of the one that `changed` has: the keys in which the two differ. What
    both set alike stays, as a run may have been given it.

    Args:
        changed: a run's config; changed here.
        today: the config that the command line makes, whose values are taken.

    Raises:
        UserError: the option is a recipe over several groups, which cannot be told apart from what it was put on.
    """
    new, there = today["choices"].get(group), changed["choices"].get(group)
    if new == there:
        return
    for option in (new, there):
        if option is not None and not all((CONF / group / f"{name}.yaml").is_file() for name in _names(option)):
            raise UserError(
                f"{word}: conf/{group}/ has no {option}, and what another folder's option sets is not known here: give "
                "its keys one by one, or put its file there."
            )
    if _is_recipe(group, new) or _is_recipe(group, there):
        if there is not None:
            raise UserError(f"{word}: what {group}={there} had set is in the run's config: change its keys one by one.")
        if "defaults" in _load(group, new):
            raise UserError(f"{word} exchanges other groups' options: give those, and its keys, one by one.")
        for key in _texts(group, new):
            put(changed, key, at(today, key))
    else:
        old, ours = (_texts(group, option) for option in (there, new))
        if not old:
            changed[group] = today[group]
        for key, value in ours.items():
            if value != "???" and (key not in old or old[key] != value):
                put(changed, key, at(today, key))
        for key in old.keys() - ours.keys():
            take(changed, key)
    changed["choices"][group] = new


def add_newer(there: Plain, today: Plain, removed: Collection[str], own: Collection[str]) -> list[str]:
    """Give a run's config today's defaults for keys that it is too old to have; these, in words.

    Args:
        there: the run's config; changed here.
        removed: keys that the run's command line took out.
        own: keys at the top that are not the run's.
    """
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} | {"choices"}
    known = {key: value for key, value in configs.flat(today).items() if key.split(".")[0] not in {*groups, *own}}
    for group, option in there["choices"].items():
        if group in groups and isinstance(there.get(group), dict):
            known |= configs.flat(read(group, option, {**today, **there}), f"{group}.")
    newer = []
    for key, value in known.items():
        if _at(there, key) is _ABSENT and value != "???" and not any(f"{key}.".startswith(f"{r}.") for r in removed):
            put(there, key, value)
            newer.append(f"{key}={shown(value)}")
    return newer


def default(choices: Plain, key: str) -> Any:
    """The value that the options, or train.yaml, give a key; None where they give none."""
    found = _all_texts(choices)
    return found[key] if key in found else at(_train(), key)


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


def derived(choices: Plain, words: Iterable[str], ours: Container[str] = ()) -> dict[str, str]:
    """The keys whose value conf/, or a word, has as a reference to other keys, and that reference: of model=torchvision
    `model.net.name` and "${model.name}".

    Args:
        choices: the option of each group.
        words: of the command line, which take a key out, or set it to a value or another reference.
        ours: those of them that may refer to the environment: a run from elsewhere may not.
    """
    found = _all_texts(choices)
    for word in words:
        key, sign, text = word.lstrip("+~").partition("=")
        if (CONF / key).is_dir():
            continue
        text = text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text
        given = configs.flat(_mapping(text), f"{key}.") or {key: text}
        for other in [*found]:
            if any(f"{other}.".startswith(f"{name}.") for name in given):
                del found[other]
        safe = word in ours or re.fullmatch(r"(?:[^$]|\$\{[\w.]+\})*", text)
        if sign and not word.startswith("~") and text[:1] not in ("[", "{") and safe:
            found[key] = text
    return {key: text for key, text in found.items() if isinstance(text, str) and "${" in text}


def derive(plain: Plain, references: dict[str, str], paths: Plain) -> Plain:
    """The values of such keys in a config; of those alone that refer to what it has.

    Args:
        references: as `derived` tells them.
        paths: of this machine.
    """
    made = configs.create({**plain, "paths": paths})
    for key, text in references.items():
        OmegaConf.update(made, key, text, force_add=True)
    found = {}
    for key in references:
        with contextlib.suppress(OmegaConfBaseException):
            value = OmegaConf.select(made, key, throw_on_missing=True)
            found[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found


def _mapping(text: str) -> Plain:
    """A word's value that is a mapping; else {}."""
    if not text.startswith("{"):
        return {}
    try:
        value = configs.parsed(re.sub(r":(?=\S)", ": ", text).encode())  # Hydra needs no space
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


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
    """As `_texts`, of all groups: a recipe's keys take the place of theirs."""
    found: Plain = {}
    for group, option in sorted(choices.items(), key=lambda item: _is_recipe(*item)):
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
