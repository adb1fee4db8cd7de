"""The kinds of values that a key may have: each in words, and as a test. Light."""

import itertools
import unicodedata
from collections.abc import Callable
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]  # in words, and as a test


def shown(value: Any) -> str:
    """As it stands in a yaml or on the command line."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


def printable(text: str) -> str:
    """Without what moves a terminal's cursor or turns a line around; a run from elsewhere may have it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(words: str, test: Callable[[float], bool]) -> Rule:
    return words, lambda v: is_number(v) and test(v)


def whole(words: str, least: int, most: float = float("inf")) -> Rule:
    return words, lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


def or_auto(rule: Rule) -> Rule:
    return f"{rule[0]}, or auto", lambda v: v == "auto" or rule[1](v)


def one_of(*options: Any) -> Rule:
    return f"one of {', '.join(dict.fromkeys(map(shown, options)))}", lambda v: any(
        v == o and type(v) is type(o) for o in options
    )


def numbers(words: str, count: int | None, test: Callable[[list[float]], bool]) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(map(is_number, value)) and test(value)

    return words, holds


SWITCH: Rule = ("true or false", lambda v: isinstance(v, bool))
TEXT: Rule = ("a text", lambda v: isinstance(v, str) and v != "")
TEXTS: Rule = ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v))
# of W&B's projects and entities
NAME: Rule = (
    "a name without spaces around it, and without / \\ # ? % :",
    lambda v: isinstance(v, str) and v != "" and v == v.strip() and not set(v) & set("/\\#?%:"),
)
# wandb-workspaces takes symbols for emojis
LETTERS: Rule = (
    "a text without symbols, such as + < = > | ~ ^ $ and emojis",
    lambda v: isinstance(v, str) and v.strip() != "" and not any(unicodedata.category(c)[0] in "SC" for c in v),
)
# Lightning would fetch what an address gives, and run what is in it
PATH: Rule = ("a run or a file here, and no address", lambda v: isinstance(v, str) and v != "" and "://" not in v)
BOARD_RUN: Rule = (
    "ENTITY/PROJECT/RUN, where RUN is the last part of its page's address",
    lambda v: isinstance(v, str) and len(parts := v.split("/")) == 3 and all(NAME[1](part) for part in parts),
)
SHARE = number("a number from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_1 = number("a number from 0 to below 1", lambda v: 0 <= v < 1)
INSIDE_0_1 = number("a number above 0 and below 1", lambda v: 0 < v < 1)
ABOVE_0 = number("a number above 0", lambda v: 0 < v < float("inf"))
FROM_0 = number("a number, at least 0", lambda v: 0 <= v < float("inf"))
COUNT = whole("a whole number, at least 1", 1)
FROM_0_WHOLE = whole("a whole number, at least 0", 0)
METRIC = one_of("val/loss", "val/acc1", "val/acc5")
PRECISIONS = ("auto", "32", "32-true", "bf16", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 32, 64, 16)
LIMIT: Rule = (
    "a share from 0.0 to 1.0, or a whole number of batches, or null",
    lambda v: v is None or (is_number(v) and v >= 0 and (isinstance(v, int) or v <= 1)),
)
TRAIN_LIMIT: Rule = (
    "a share above 0.0 up to 1.0, or a whole number of batches above 0, or null",
    lambda v: v is None or (is_number(v) and v > 0 and (isinstance(v, int) or v <= 1)),
)
SIZES: Rule = (
    "pairs of the epoch from which on, growing from 1, and pixels, at least 8: [[1, 128], [31, 176]]",
    lambda v: (
        isinstance(v, list) and len(v) > 0
        and all(isinstance(pair, list) and len(pair) == 2 and all(COUNT[1](n) for n in pair) for pair in v)
        and v[0][0] == 1 and all(a[0] < b[0] for a, b in itertools.pairwise(v)) and min(n for _, n in v) >= 8
    ),
)  # fmt: skip
DEVICES: Rule = (
    "auto, a whole number above 0, or a list of different GPU numbers",
    lambda v: (
        len(v) > 0 and all(FROM_0_WHOLE[1](n) for n in v) and len(set(v)) == len(v)
        if isinstance(v, list)
        else v == "auto" or COUNT[1](v)
    ),
)  # fmt: skip
