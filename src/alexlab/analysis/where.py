"""where="optimizer.lr>0.01 and status=finished": which runs to look at."""

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from alexlab.analysis.runs import Run
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import is_number, shown

SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, "=": operator.eq, ">": operator.gt,
    "<": operator.lt, "~": lambda value, part: part in value,
}  # fmt: skip
CONDITION = re.compile(rf"\s*([\w./@-]+)\s*({'|'.join(SIGNS)})\s*(.*?)\s*")
ANOTHER = r"\s&\s|&&|\|\||[&|]\s*[\w./@-]+\s*(?:[=<>~]|!=)"  # conditions that are joined by another sign
WORDS = {"true": True, "false": False, "null": None, "none": None}

Condition = tuple[str, str, Any, str]  # key, sign, value, and the value as it was written


def chosen(runs: Sequence[Run], text: str) -> list[Run]:
    """Those of which `text` is true: conditions joined by `and` and `or`, of which `and` binds closer.

    Raises:
        UserError: it is no condition, of no key that a run has, or of a text where numbers are asked for.
    """
    ways = [[_condition(part, text) for part in _split(way, "and")] for way in _split(text.strip(), "or")]
    known = {key for run in runs for key in (*run.numbers, *run.config, *run.facts, "status", "name")}
    known |= {key.removeprefix("choices.") for key in known}
    for key, *_ in (condition for way in ways for condition in way):
        if runs and key not in known:
            near = sorted(one for one in known if one.endswith((f".{key}", f"/{key}")))[:3]  # lr of optimizer.lr
            near = near or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else " status, name, metrics and settings are known."
            raise UserError(f"where={text}: no run has {key}.{hint}")
    for key, sign, wanted, _ in (condition for way in ways for condition in way):
        values = [value for run in runs if (value := run.value(key)) is not None]
        words = wanted if not is_number(wanted) else next((v for v in values if not any(map(is_number, values))), None)
        if sign in (">", "<", ">=", "<=") and words is not None:
            raise UserError(f"where={text}: {shown(words)} is no number: with texts, = and != and ~ (holds) do.")
    return [run for run in runs if any(all(_holds(run, condition) for condition in way) for way in ways)]


def why_none(runs: Sequence[Run], text: str) -> str:
    """What to tell where `text` is true of none: which values there are."""
    keys = dict.fromkeys(_condition(part, text)[0] for way in _split(text.strip(), "or") for part in _split(way, "and"))
    there = "; ".join(_values(runs, key) for key in keys)
    return f"where={text}: it holds of none of the {len(runs)} runs: {there}."


def _values(runs: Sequence[Run], key: str) -> str:
    """Which there are, in words."""
    values = [value for run in runs if (value := run.value(key)) is not None]
    if len(values) > 1 and all(map(is_number, values)) and min(values) < max(values):
        return f"{key} is {min(values):g} to {max(values):g}"
    kinds = list(dict.fromkeys(shown(value) for value in values))
    more = f" and {len(kinds) - 5} more" if len(kinds) > 5 else ""
    return f"{key} is {', '.join(kinds[:5]) or 'null'}{more}"


def _condition(part: str, text: str) -> Condition:
    found = CONDITION.fullmatch(part)
    if found is None or not found[3] or found[3][0] in "=<>":
        raise UserError(
            f"where={text}: {part.strip() or 'nothing'} is no condition: write KEY SIGN VALUE, with one of "
            f"{' '.join(SIGNS)}, as in where='optimizer.lr>0.01 and status=finished', joined by and and or, without "
            "brackets; in quotes, or the shell takes > for itself."
        )
    if re.search(ANOTHER, found[3]) and found[3][0] not in "'\"":
        raise UserError(f"where={text}: conditions are joined by and and or: {part.strip()} has another sign.")
    return found[1], found[2], _value(found[3]), _unquoted(found[3])


def _unquoted(text: str) -> str:
    return text[1:-1] if text[0] in "'\"" and text[-1] == text[0] and len(text) > 1 else text


def _value(text: str) -> Any:
    if _unquoted(text) != text:
        return _unquoted(text)
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return text if "_" in text else float(text)  # Python reads 26_20 as a number
    except ValueError:
        return text


def _holds(run: Run, condition: Condition) -> bool:
    key, sign, wanted, written = condition
    value = run.value(key)
    if sign == "~":
        return SIGNS[sign](shown(value).lower(), written.lower())
    if sign in (">", "<", ">=", "<="):
        return is_number(value) and SIGNS[sign](value, wanted)
    same = value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
    same = same or _bare(value) in (_bare(written), _bare(_plain(wanted)))  # a name like 1e5, and lists
    return same == (sign != "!=")


def _split(text: str, word: str) -> list[str]:
    """At the word, in any case, but not within quotes."""
    pieces = re.split(rf"""('[^']*'|"[^"]*")|\s+{word}\s+""", text, flags=re.IGNORECASE)
    parts = [pieces[0]]
    for quoted, after in zip(pieces[1::2], pieces[2::2], strict=True):
        if quoted is None:
            parts.append(after)
        else:
            parts[-1] += quoted + after
    return parts


def _bare(value: Any) -> str:
    return re.sub(r"[\s'\"]", "", shown(value)).lower()


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
