"""Where runs are: at or below folders and globs, or by the names that the table shows."""

import difflib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

KNOWN_BY = {"config.yaml", "summary.json", "wandb-summary.json"}  # reading says what is missing, or is no file


def find(named: list[str], logs: Path) -> tuple[list[Path], list[str]]:
    """The directories of runs at or below folders or globs, or of the names that the table shows, or of "latest"; and
    what could not be looked into, and the names at which there is none.

    Args:
        logs: the folder of runs/ and multiruns/.
    """
    found: dict[Path, None] = {}
    problems: list[str] = []
    for name in named:
        before = len(found)
        again = False
        for place in (Path(name).expanduser(), logs / "runs" / name, logs / "multiruns" / name):
            # a name may hold brackets
            matches = [str(place)] if place.exists() else sorted(glob.glob(str(place)))  # noqa: PTH207
            for match in filter(os.path.isdir, matches):
                for path in below(match, problems):
                    again |= Path(path).resolve() in found
                    found[Path(path).resolve()] = None
            if len(found) > before or again:
                break
        else:
            newest = max(map(Path, below(str(logs), [])), key=changed, default=None) if name == "latest" else None
            if newest is not None:
                found[newest.resolve()] = again = True  # type: ignore[assignment]
        if len(found) == before and not again:
            problems.append(f"{name} (no run is there{_nearest(name, logs)})")
    return list(found), problems


def changed(folder: Path) -> float:
    """When its config was written; 0 where it has none."""
    try:
        return (folder / "config.yaml").stat().st_mtime
    except OSError:
        return 0.0


def _nearest(name: str, logs: Path) -> str:
    """Of the names of runs and sweeps."""
    names = {path.name for kind in ("runs", "multiruns") for path in logs.glob(f"{kind}/*")}
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f": did you mean {' or '.join(near)}?" if near else ""


def below(folder: str, problems: list[str]) -> Iterator[str]:
    """Runs at `folder` and below it, without a look into them: no run lies in another. Hidden folders are passed over.

    Args:
        problems: gets what cannot be looked into, and why.
    """
    seen: set[tuple[int, int]] = set()  # links may lead to a folder again
    left = [folder]
    while left:
        here = left.pop()
        try:
            known = Path(here).stat()
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            problems.append(f"{here} ({error.strerror})")
            continue
        if (known.st_dev, known.st_ino) in seen:
            continue
        seen.add((known.st_dev, known.st_ino))
        names = {entry.name for entry in entries}
        if names & KNOWN_BY or any(name.endswith(".wandb") for name in names):
            yield here
            continue
        folders = []
        for entry in entries:
            try:
                if entry.is_dir() and not entry.name.startswith("."):
                    folders.append(entry.path)
            except OSError as error:  # a link to itself
                problems.append(f"{entry.path} ({error.strerror})")
        left += reversed(folders)
