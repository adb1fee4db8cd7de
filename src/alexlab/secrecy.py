"""Secrets stay out of what a run leaves behind: its config, its log, its summary, its checkpoints, and W&B. Light.

A secret comes from the environment: `logger.wandb.notes='${oc.env:TOKEN}'`. Wherever its value would be written, its
name is written instead, so that a run that goes on finds it in the environment again. One that stands on the command
line itself, where everybody on the machine can read it, is refused.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from urllib.parse import quote

# words of the names of environment variables, and ends of the names of keys without - and _
NAMES = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASS", "PASSWD", "PASSWORD", "PASSPHRASE", "PWD", "PAT", "CREDENTIAL",
         "CREDENTIALS", "AUTH"}  # fmt: skip
KEYS = re.compile(
    r"(apikeys?|accesskey|secretkey|privatekey|secrets?|passwd|password|passphrase|credentials?|authorization)\d*$"
)
MAYBE = re.compile(r"(tokens?|auth|pat)$")  # of keys that have other meanings, too
REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)[^}]*\}")
NAMED = re.compile(r"oc\.env:\s*([A-Za-z_]\w*)")
USER = re.compile(r"(?<=://)([^/\s@?#]*)(?=@)")  # of an address
QUERY = re.compile(r"(?<=[?&])(?:token|key|api_key|access_token|secret|password|sig)=([^&\s]+)", re.IGNORECASE)
PAIR = re.compile(r"([\w.\-/@]+)[\"']?\s*[:=]\s*\[?([^,{}\[\]]+)")  # on the command line
SHORTEST = 8  # characters: what is shorter would be found in other words

used: set[str] = set()  # the variables that the config refers to


def note(unresolved: Any) -> None:
    """Remember what a config refers to."""
    for _, value in _leaves(unresolved):
        if isinstance(value, str):
            used.update(NAMED.findall(value))


def masked(text: str) -> str:
    """A text for people without any secret of the environment, however it is written there."""
    for value, name in _longest_first(_variables()):
        forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe="")}
        for form in sorted(forms | set(value.splitlines()), key=len, reverse=True):
            if len(form) >= SHORTEST:
                text = text.replace(form, f"${{oc.env:{name}}}")
    return text


def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody took, as Python shows it, but without secrets: a `sys.excepthook`."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


def hidden(plain: Any) -> Any:
    """Plain values, with the names of secrets in the place of their values, and *** for those that `mistakes` tells.

    Less than `masked` takes for one, as what else may be equal to a variable must stay what it is.
    """
    secrets = _longest_first(_of_configs(plain))

    def text(key: str, value: str) -> str:
        for secret, name in secrets:
            if value == secret or len(secret) >= SHORTEST:
                value = value.replace(secret, f"${{oc.env:{name}}}")
        if _is_secret(key, value):
            return "***"
        value = USER.sub(lambda found: _without(found[1]), value)
        return QUERY.sub(lambda found: found[0].replace(found[1], "***") if _looks(found[1]) else found[0], value)

    def walk(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                text("", name) if isinstance(name, str) else name: walk(str(name), item) for name, item in value.items()
            }
        if isinstance(value, list):
            return [walk(key, item) for item in value]
        if isinstance(value, int) and not isinstance(value, bool) and _is_secret(key, str(value)):
            return "***"
        return text(key, value) if isinstance(value, str) else value

    return walk("", plain)


def mistakes(plain: Any) -> list[str]:
    """What is said of each secret that stands in the config itself; never its value."""
    known = list(_of_configs(plain).values())
    found = [key for key, value in _leaves(plain) if _is_open(key, value) and not any(v in str(value) for v in known)]
    return [_refusal(key) for key in dict.fromkeys(found)]


def mistakes_in(words: list[str]) -> list[str]:
    """The same of the command line's words, before they are composed."""
    marked = [REFERENCE.sub("\1", word) for word in words]
    pairs = [(key, value.strip("'\" ")) for word in marked for key, value in PAIR.findall(word)]
    found = [key for key, value in pairs if "\1" not in value and _is_open(key, value)]
    return [_refusal(key) for key in dict.fromkeys(found)]


def _refusal(key: str) -> str:
    return (
        f"{key}: a secret on the command line is seen by all on this machine, and would be kept with the run: put it "
        f"into an environment variable, and give {key}='${{oc.env:ITS_NAME}}'."
    )


def _variables() -> dict[str, str]:
    """The environment's secrets by their names. A file or folder is none."""
    return {
        name: value for name, value in os.environ.items()
        if NAMES & set(name.upper().split("_")) and len(value) >= SHORTEST and not os.path.exists(value)  # noqa: PTH110
    }  # fmt: skip


def _of_configs(plain: Any) -> dict[str, str]:
    """Those that a config refers to, or that are long and mixed enough not to be in one by chance."""
    found = {name: value for name, value in _variables().items() if name in used or _looks(value)}
    for name in used & os.environ.keys():
        value = os.environ[name]
        at = [key for key, item in _leaves(plain) if isinstance(item, str) and value and value in item]
        if any(KEYS.search(_end(key)) or MAYBE.search(_end(key)) for key in at) or _opens(value):
            found[name] = value
    return found


def _longest_first(secrets: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(((value, name) for name, value in secrets.items()), key=lambda item: -len(item[0]))


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value); those of lists have the list's key. The command line's own words are no values."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name != "overrides":
                yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node


def _end(key: str) -> str:
    return re.sub(r"[-_]", "", key.rpartition(".")[2].lower())


def _looks(value: str) -> bool:
    """As keys are made: long, of letters and digits, in one word."""
    return len(value) >= 16 and bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value)) and " " not in value


def _is_secret(key: str, value: str) -> bool:
    if "${oc.env:" in value or value in ("", "***"):
        return False
    return bool(KEYS.search(_end(key)) and len(value) >= 4) or bool(MAYBE.search(_end(key)) and _looks(value))


def _opens(value: str) -> bool:
    """Whether it is an address with a secret in it."""
    users = any(":" in user or _looks(user) for user in USER.findall(value) if "***" not in user)
    return users or any(_looks(found) for found in QUERY.findall(value))


def _is_open(key: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return False
    return _is_secret(key, str(value)) or _opens(str(value))


def _without(user: str) -> str:
    name, colon, _ = user.partition(":")
    return f"{name}:***" if colon else "***" if _looks(user) else user
