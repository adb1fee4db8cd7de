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

# Of names in words ("api_key", "apiKey", "PGPASSWORD"): last words that are a secret's whatever its value is, and those
# that mean other things as well, a secret's where the value looks like one. In the plural, too.
SURE = re.compile(
    r"(password|passwd|passphrase|passcode|secret|credential|apikey|accesskey|secretkey|privatekey|authorization)s?$"
)
SURE_PAIRS = re.compile(r"\b(api|access|secret|private|encryption|signing) keys?$")
MAYBE = re.compile(r"(\b(tokens?|auth|bearer|pat|keys?|signature|sig)|(access|api) ?key ?id)$")
ENDS = re.compile(r"(PASSWORD|PASSWD|PASSPHRASE|PASSCODE|PASS|TOKEN|SECRET|KEY|CREDENTIAL)S?$")  # of a variable's words
WORDS = {"PWD", "PAT", "AUTH"}  # whole ones
WEAK = re.compile(
    r"^(?!.*(API|ACCESS|SECRET|PRIVATE)_?KEYS?$).*(KEYS?|AUTH|PASS|PAT)$"
)  # names of other things as well
PREFIXES = re.compile(r"(hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|AIza)\w{12}")

NAMED = re.compile(r"oc\.env:\s*\\?[\"']?\s*([A-Za-z_]\w*)")  # however it is quoted and nested
OTHER_KEYS = re.compile(r"\$\{\s*(?:[\w.]+:\s*)?(\.*[\w.\-@/]+)")
ADDRESS = re.compile(r"(?<=://)(?:(?!,\w+://)[^\s\"'<>])+")
QUERY = re.compile(r"(?<=[?&])([\w\-.]+)=([^&\s#\"']+)")
PAIR = re.compile(r"([\w.\-/@]+|'[^']*'|\"[^\"]*\")\s*:\s*\[?\s*('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^,{}\[\]]+)")
SHORTEST = 8  # characters: what is shorter would be found in other words
# what says how a run computes and where it lies: names of a network or folder may be equal to a variable by chance
SETTINGS = {"model", "data", "optimizer", "scheduler", "augment", "trainer", "choices", "paths", "run_dir", "classes",
            "readable_classes", "dataset", "ema", "finetune"}  # fmt: skip

used: set[str] = set()  # the variables that the config refers to
places: dict[str, set[str]] = {}  # of them, the keys that do, by themselves or by way of another key


def note(unresolved: Any) -> None:
    """Remember what a config refers to."""
    texts = {key: value for key, value in _leaves(unresolved) if isinstance(value, str) and "${" in value}
    direct = {key: set(NAMED.findall(value)) for key, value in texts.items()}
    to = {key: {_absolute(other, key) for other in OTHER_KEYS.findall(value)} for key, value in texts.items()}
    for key in texts:
        seen, ahead = set[str](), {key}
        while ahead:
            seen |= ahead
            ahead = {other for one in ahead for other in to.get(one, ())} - seen
        for name in set().union(*(direct.get(one, set()) for one in seen)):
            used.add(name)
            places.setdefault(name, set()).add(key)


def _absolute(other: str, key: str) -> str:
    """The key that `${other}` means below `key`."""
    dots = len(other) - len(other.lstrip("."))
    if not dots:
        return other
    parents = key.split(".")
    return ".".join([*parents[: max(0, len(parents) - dots)], other[dots:]])


def masked(text: str) -> str:
    """A text for people without any secret of the environment, however it is written there."""
    for value, name in _longest_first(_variables()):
        forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe="")}
        for form in sorted(forms | set(value.splitlines()), key=len, reverse=True):
            if len(form) >= min(SHORTEST, len(value)):
                text = text.replace(form, f"${{oc.env:{name}}}")
    return text


def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody took, as Python shows it, but without secrets: a `sys.excepthook`."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


def hidden(plain: Any, within: str = "") -> Any:
    """Plain values, with the names of secrets in the place of their values, and *** for those that `mistakes` tells.

    Less than `masked` takes for one, as what else may be equal to a variable must stay what it is.

    Args:
        within: the key that they are below in the config.
    """
    secrets = _longest_first(_of_configs(plain, within))

    def text(key: str, value: str) -> str:
        for secret, name in secrets:
            if secret in value and _is_masked_at(key, name, value == secret):
                value = value.replace(secret, f"${{oc.env:{name}}}")
        if _is_secret(key, value):
            return "***"
        value = ADDRESS.sub(lambda found: _without_user(found[0]), value)
        return QUERY.sub(lambda found: f"{found[1]}=***" if _is_secret(found[1], found[2]) else found[0], value)

    def word(value: str) -> str:
        """One of the command line's."""
        key, _, given = value.partition("=")
        plain_key = key.lstrip("+~")
        secret = "oc.env:" not in given and _is_secret(plain_key, given.strip("'\"[]{} "))
        return f"{key}=***" if secret else text(plain_key, value)

    def walk(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                text("", name) if isinstance(name, str) else name: walk(f"{key}.{name}" if key else str(name), item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            of_line = key.rpartition(".")[2] == "overrides"
            return [word(item) if of_line and isinstance(item, str) else walk(key, item) for item in value]
        if isinstance(value, int | float) and _is_open(key, value):
            return "***"
        return text(key, value) if isinstance(value, str) else value

    return walk(within, plain)


def mistakes(plain: Any) -> list[str]:
    """What is said of each secret that stands in the config itself; never its value."""
    known = list(_of_configs(plain, "").values())
    found = [key for key, value in _leaves(plain) if _is_open(key, value) and not any(v in str(value) for v in known)]
    return [_refusal(key) for key in dict.fromkeys(found)]


def mistakes_in(words: list[str]) -> list[str]:
    """The same of the command line's words, before they are composed and Hydra keeps them."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, given = word.partition("=")
        key, given = key.lstrip("+~"), given.strip()
        if not equals or word.startswith("--"):
            continue
        pairs = [(key, given.strip("'\"[]{} "))]
        if given[:1] in ("{", "["):
            pairs += [(name.strip("'\""), value.strip("'\" ")) for name, value in PAIR.findall(given)]
        found |= {name: _refusal(name) for name, value in pairs if "oc.env:" not in value and _is_open(name, value)}
        for name, value in _variables().items():
            if WEAK.match(name.upper()) and not _is_random(value):
                continue
            whole = len(value) >= 12 and not _is_setting(key) and value in re.split(r"[\s'\",;]+", given)
            if whole or (_looks(value) and value in given):
                found[key] = _refusal(key, name)
    return list(found.values())


def _refusal(key: str, name: str = "ITS_NAME") -> str:
    known = f"it holds the value of the environment's {name}: " if name != "ITS_NAME" else ""
    put = "" if known else "put it into an environment variable, and "
    return (
        f"{key}: {known}a secret on the command line is seen by all on this machine, and kept in files: {put}"
        f"give {key}='${{oc.env:{name}}}'."
    )


def _variables() -> dict[str, str]:
    """The environment's secrets by their names. A file or folder is none."""
    return {
        name: value for name, value in os.environ.items()
        if _names_a_secret(name) and len(value) >= (4 if name in used else SHORTEST)
        and not os.path.exists(value)  # noqa: PTH110
        and (name in used or not WEAK.match(name.upper()) or _is_random(value) or " " in value or "\n" in value)
    }  # fmt: skip


def _names_a_secret(name: str) -> bool:
    return any(word in WORDS or ENDS.search(word) for word in name.upper().split("_"))


def _of_configs(plain: Any, within: str) -> dict[str, str]:
    """Those that a config refers to, or that are long and mixed enough not to be in one by chance."""
    leaves = [(key, value) for key, value in _leaves(plain, within) if isinstance(value, str)]
    settings = [value for key, value in leaves if _is_setting(key)]
    found = {
        name: value for name, value in _variables().items()
        if name in used or (_looks(value) and not any(value in one for one in settings))
    }  # fmt: skip
    for name in used & os.environ.keys():
        value = os.environ[name]
        at = [key for key, item in leaves if value and value in item]
        if any(_kind(key) for key in at) or _opens(value):
            found[name] = value
    return found


def _is_masked_at(key: str, name: str, whole: bool) -> bool:
    """Whether a secret that is found at `key` is put there by its name: where the config refers to it, and else where
    no setting is, of which it may be a part by chance."""
    key = key.removeprefix("config.")
    if name in used and (name not in places or any(key == at or at.startswith(f"{key}.") for at in places[name])):
        return whole or len(os.environ[name]) >= 4
    return not _is_setting(key) and (whole or len(os.environ[name]) >= SHORTEST)


def _is_setting(key: str) -> bool:
    return key.removeprefix("config.").partition(".")[0] in SETTINGS


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


def _kind(key: str) -> str | None:
    """Whether a key is a secret's: "sure", "maybe" or None. What is below a sure one is its own."""
    *above, last = [_in_words(part) for part in key.split(".")]
    if any(SURE.search(part) or SURE_PAIRS.search(part) for part in (*above, last)) or last in ("pass", "pwd"):
        return "sure"
    return "sure" if last.endswith(" pwd") else "maybe" if MAYBE.search(last) else None


def _in_words(name: str) -> str:
    """ "apiKey2" and "API-KEY" -> "api key"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)).lower()


def _looks(value: str) -> bool:
    """As keys are made: long, of letters and digits, in one word."""
    return len(value) >= 16 and bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value)) and " " not in value


def _is_random(value: str) -> bool:
    """No name that people give, of short words and numbers."""
    parts = re.findall(r"[A-Za-z0-9+/]{12,}", value)
    mixed = any(re.search(r"\d", part) and re.search(r"[A-Za-z]", part) for part in parts)
    return PREFIXES.match(value) is not None or (_looks(value) and mixed)


def _is_secret(key: str, value: str) -> bool:
    if "${oc.env:" in value or value in ("", "***"):
        return False
    kind = _kind(key)
    return (kind == "sure" and len(value) >= 4) or (kind == "maybe" and _is_random(value))


def _opens(value: str) -> bool:
    """Whether it is an address with a secret in it."""
    users = [_user(rest) for rest in ADDRESS.findall(value)]
    if any("***" not in user and "${" not in user and (":" in user or _looks(user)) for user in users):
        return True
    return any(_is_secret(name, given) for name, given in QUERY.findall(value))


def _is_open(key: str, value: Any) -> bool:
    if not isinstance(value, str | int | float) or (not isinstance(value, str) and abs(value) < 1000):
        return False  # an accuracy of a class that is called so
    return _is_secret(key, str(value)) or _opens(str(value))


def _user(rest: str) -> str:
    """What stands before the @ of an address after its ://, a password with signs of its own included."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        return host.rpartition("@")[0]
    _, colon, port = host.partition(":")
    ends_in = colon and port and not port.isdigit() and not host.startswith("[")
    return rest.rpartition("@")[0] if ends_in and "@" in rest else ""


def _without_user(rest: str) -> str:
    user = _user(rest)
    name, colon, _ = user.partition(":")
    shown = f"{name}:***" if colon else "***" if _looks(user) else user
    return shown + rest[len(user) :]
