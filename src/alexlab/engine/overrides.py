"""Parse the overrides of a command line, and change nested dicts by keys such as "optimizer.lr"."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alexlab.engine.config import CONF, ROOT, Plain, flat, value_at
from alexlab.engine.errors import UserError


@dataclass(frozen=True)
class Override:
    """One override of a command line."""

    text: str  # the whole override: "optimizer.lr=0.1"
    key: str  # "optimizer.lr", or a group: "optimizer"
    value: Any  # the parsed value: 0.1. A reference to another key stays text: "${seed}"
    leaves: Mapping[str, Any]  # value by key, without mappings: {"trainer.max_epochs": 2} for trainer={max_epochs:2}
    deletes: bool  # the text begins with ~
    adds: bool  # the text begins with + or ++
    chooses: bool  # an option of a group in conf/ is chosen, or a list of several


def parse(overrides: Iterable[str]) -> list[Override]:
    """Read overrides with Hydra's own grammar.

    Raises:
        UserError: one cannot be read, as in the config.yaml of a damaged run.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            each = parser.parse_override(text)
            value = each.value()
        except HydraException as error:
            raise UserError(f"{text}: cannot be read as key=value ({str(error).splitlines()[0]}).") from None
        key, deletes = each.key_or_group, each.is_delete()
        chooses = not isinstance(value, dict) and not deletes and (CONF / key).is_dir()
        value = value[0] if chooses and isinstance(value, list) and len(value) == 1 else value
        leaves = flat(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
        parsed.append(Override(text, key, value, leaves, deletes, each.is_add() or each.is_force_add(), chooses))
    return parsed


def key_of(text: str) -> str:
    """Return the key of an override without parsing the value: "optimizer.lr" of "++optimizer.lr=0.1"."""
    return text.lstrip("+~").partition("=")[0]


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Return overrides by key. If several have the same key, the last one is used."""
    return {key_of(str(text)): str(text) for text in overrides}


def in_quotes(text: str) -> str:
    """Return a text in quotes of Hydra's grammar, in which backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (m[2] and "\\'"), text) + "'"


def split_list(text: str) -> list[str]:
    """Split at each comma that is outside of quotes and brackets. Text without such a comma stays whole."""
    parts, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not quote and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()] if parts else [text]


def command_line(verb: str, *overrides: str) -> str:
    """Return a command that can be pasted into the user's shell as it is."""
    script = f"{verb}.py"
    is_here = verb in ("train", "eval") and os.path.realpath(script) == str(ROOT / script)
    return shlex.join([*(["python", script] if is_here else ["alexlab", verb]), *overrides])


LIKE_ANOTHER_TYPE = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|true|false|null|yes|no|on|off", re.IGNORECASE)


def shown(value: Any) -> str:
    """Return a value as yaml and the command line write it: true, null, [0.5, 1.0], {a: 1}, '32' for a text."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) or "''" for item in value) + "]"
    if isinstance(value, str):
        return f"'{value}'" if LIKE_ANOTHER_TYPE.fullmatch(value) else value
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


# -- nested dicts


def has(node: Plain, key: str) -> bool:
    *above, last = key.split(".")
    parent = value_at(node, above)
    return isinstance(parent, dict) and last in parent


def get(node: Plain, key: str) -> Any:
    """Return the value of a key, or None if it is absent."""
    return value_at(node, key.split("."))


def put(node: Plain, key: str, value: Any) -> None:
    """Set a key, and create the dicts above it that are missing."""
    *above, last = key.split(".")
    for part in above:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value


def remove(node: Plain, key: str) -> None:
    """Delete a key if it exists."""
    *above, last = key.split(".")
    parent = value_at(node, above)
    if isinstance(parent, dict):
        parent.pop(last, None)
