"""A run's config with other words: what follows from them, and how it differs then."""

from collections.abc import Collection
from typing import Any

from alexlab.engine import config as configs
from alexlab.engine import options
from alexlab.engine.kinds import shown
from alexlab.engine.options import at, put

# what is a command's own, whatever the run's was
OWN = ("run_dir", "overrides", "paths", "sweep", "resume", "dry_run", "from_run", "from_wandb", "repeats", "task")

Plain = dict[str, Any]


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def stays(key: str, there: Plain, changed: Plain, exchanged: set[str]) -> bool:
    """Whether a word of the run still says what the config has: not one of an option that was exchanged."""
    return key.split(".")[0] not in exchanged or at(there, key) == at(changed, key)


def follow(
    there: Plain,
    changed: Plain,
    renewed: set[str],
    words: tuple[list[str], list[str]],
    ours: Collection[str],
    paths: Plain,
) -> None:
    """Let what conf/ derives from other keys, as model.net.name from model.name, follow those that are others now.

    A run's config has such values worked out. What it was given itself stays.

    Args:
        renewed: keys that have today's value now, of another option.
        words: that the run was started with, and those that count now.
        ours: those of the latter that were given now.
        paths: that the run had, where words give others now.
    """
    then = options.derive(there, options.derived(there["choices"], words[0]), {**changed["paths"], **paths})
    now = options.derive(changed, options.derived(changed["choices"], words[1], ours), changed["paths"])
    for key, value in now.items():
        other = key in renewed or key not in then or then[key] != value
        if other and key.split(".")[0] not in OWN and options.has(changed, key):
            put(changed, key, value)


def differences(there: Plain, changed: Plain, original: Plain) -> list[str]:
    """The settings that are other now, in words; of another logger its name alone.

    Args:
        there: the run's config without what was filled in when it ran; that is told only where a value is given for it.
        original: the run's config as it was.
    """
    old, new = configs.flat(there), configs.flat({key: value for key, value in changed.items() if key not in OWN})
    filled = {key: value for key, value in configs.flat(original).items() if key in old and old[key] != value}
    old |= {key: value for key, value in filled.items() if key not in new or new[key] != old[key]}
    untold = ("logger.",) if old.get("choices.logger") != new.get("choices.logger") else ()
    found = [
        f"{key}={shown(value)} (there {shown(old[key]) if key in old else 'not set'})"
        for key, value in new.items()
        if key not in old or old[key] != value
    ]
    gone = [f"~{key} (there {shown(value)})" for key, value in old.items() if key not in new]
    told = [line for line in [*found, *gone] if not line.lstrip("~").startswith(untold)] if untold else [*found, *gone]
    told.sort(key=lambda line: not line.startswith("choices."))
    return [line.removeprefix("choices.") for line in told]
