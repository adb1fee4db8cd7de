"""What the benchmarks share: their command lines, processes that take turns, and a line about the machine."""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def options(doc: str | None, *paths: str, **defaults: Any) -> Any:
    """Parse the command line.

    Args:
        doc: the script's docstring, for --help.
        paths: positional arguments.
        defaults: an option for each, of the type of its default. A list takes several values; those of a list of texts
            must be among its default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        parser.add_argument(name, type=Path)
    for name, default in defaults.items():
        flag, items = f"--{name.replace('_', '-')}", default if isinstance(default, list) else None
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        elif items is None:
            parser.add_argument(flag, type=type(default), default=default)
        else:
            kind = type(items[0]) if items else str
            choices = items if items and kind is str else None
            parser.add_argument(flag, nargs="*", type=kind, choices=choices, default=items)
    return parser.parse_args()


def run(words: list[str], **settings: Any) -> str:
    """Run `python WORDS` and return what it prints; end the benchmark if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **settings)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def in_turn(rounds: int, measures: Mapping[str, Callable[[], Any]], warm_up: bool = False) -> dict[str, list[Any]]:
    """Call each function once per round, and return the results of each.

    Args:
        warm_up: the first round does not count; one more is done.
    """
    results: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(rounds + warm_up):
        for name, measure in measures.items():
            result = measure()
            if number >= warm_up:
                results[name].append(result)
    return results


def about(*packages: str, **more: Any) -> str:
    """Return a line of JSON: `more`, the commit, the machine, and the versions of Python and of `packages`."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    machine = {"commit": git.stdout.strip(), "machine": platform.machine(), "python": platform.python_version()}
    return json.dumps({**more, **machine, **{name: version(name) for name in packages}})
