"""The options of conf/'s groups, as their files have them: what one of them sets, and what came later than a run."""

import contextlib
import json
import re
from collections.abc import Collection, Container, Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexlab.engine import config as configs
from alexlab.engine.config import CONF
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import shown

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


def exchange(changed: Plain, today: Plain, group: str, word: str, before: Iterable[str]) -> set[str]:
    """Take today's option of a group in the place of the one that `changed` has: the keys in which the two differ. What
    both set alike stays, as a run may have been given it; and so does what stands above an option on a command line: a
    recipe's keys, and of a recipe those that a word gives.

    Args:
        changed: a run's config; changed here.
        today: the config that the command line makes, whose values are taken.
        before: words that the run was started with.

    Returns:
        The keys that have today's value.

    Raises:
        UserError: the option is a recipe over several groups, which cannot be told apart from what it was put on.
    """
    new, there = today["choices"].get(group), changed["choices"].get(group)
    if new == there:
        return set()
    for option in (new, there):
        if option is not None and not all((CONF / group / f"{name}.yaml").is_file() for name in _names(option)):
            raise UserError(
                f"{word}: conf/{group}/ has no {option}, and what another folder's option sets is not known here: give "
                "its keys one by one, or put its file there."
            )
    recipe = _is_recipe(group, new) or _is_recipe(group, there)
    if recipe and there is not None:
        raise UserError(f"{word}: what {group}={there} had set is in the run's config: change its keys one by one.")
    if recipe and "defaults" in _load(group, new):
        raise UserError(f"{word} exchanges other groups' options: give those, and its keys, one by one.")
    old, ours = (_all_texts({**changed["choices"], group: option}) for option in (there, new))
    kept = [key for each in before for key in given(each)[0]] if recipe else []
    if not recipe and not _texts(group, there):
        changed[group] = json.loads(json.dumps(today[group]))
        kept, option = [group], _texts(group, new)
        for key, value in ours.items():
            if _below(key, kept) and value != option.get(key) and "${" not in str(value):  # a recipe's
                put(changed, key, value)
    other = {key for key, value in ours.items() if value != "???" and (key not in old or old[key] != value)}
    for key in (key for key in ours if key in other and not _below(key, kept)):
        put(changed, key, at(today, key))
    for key in old.keys() - ours.keys():
        take(changed, key)
    changed["choices"][group] = new
    return other


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
        if _at(there, key) is _ABSENT and value != "???" and not _below(key, removed):
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
        keys, text = given(word)
        for other in [*found]:
            if _below(other, keys):
                del found[other]
        listed = text.startswith("[") and "{" not in re.sub(r"\$\{[\w.]+\}", "", text)
        safe = word in ours or re.fullmatch(r"(?:[^$]|\$\{[\w.]+\})*", text)
        if "=" in word and not word.startswith("~") and (listed or text[:1] not in ("[", "{")) and safe:
            found |= dict.fromkeys(keys, text)
    return {key: text for key, text in found.items() if isinstance(text, str) and "${" in text}


def derive(plain: Plain, references: dict[str, str], paths: Plain) -> Plain:
    """The values of such keys in a config; of those alone that refer to what it has.

    Args:
        references: as `derived` tells them.
        paths: of this machine.
    """
    made = configs.create({**plain, "paths": paths})
    for key, text in references.items():
        with contextlib.suppress(ValueError):
            OmegaConf.update(made, key, _items(text), force_add=True)
    found = {}
    for key in references:
        with contextlib.suppress(OmegaConfBaseException):
            value = OmegaConf.select(made, key, throw_on_missing=True)
            found[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found


def given(word: str) -> tuple[list[str], str]:
    """The keys that a word sets or takes out, and its value without quotes; none where it chooses an option."""
    key, _, text = word.lstrip("+~").partition("=")
    text = text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text
    return [*configs.flat(_mapping(text), f"{key}.")] or ([] if (CONF / key).is_dir() else [key]), text


def _below(key: str, others: Iterable[str]) -> bool:
    """Whether a key is one of the others, or below it."""
    return any(f"{key}.".startswith(f"{other}.") for other in others)


def _items(text: str) -> Any:
    """A word's value that is a list with references in it, as that; others as they are.

    Raises:
        ValueError: YAML cannot read it.
    """
    if not text.startswith("["):
        return text
    parts = r"""'[^']*'|"[^"]*"|[^\s\[\],'"]+"""
    quoted = re.sub(parts, lambda m: f'"{m[0]}"' if "${" in m[0] and m[0][0] not in "'\"" else m[0], text)
    return _numbers(configs.parsed(quoted.encode()))


def _numbers(item: Any) -> Any:
    """1e-3 as Hydra reads it: it is a text of YAML's."""
    if isinstance(item, list):
        return [_numbers(each) for each in item]
    return float(item) if isinstance(item, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", item) else item


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
