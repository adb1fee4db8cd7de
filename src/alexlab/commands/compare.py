"""`alexlab compare`: print a table of runs, write a page with curves, or check whether two runs are equal."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from alexlab.analysis import compare
from alexlab.analysis import runs as reading
from alexlab.analysis.runs import printable
from alexlab.engine.config import ROOT
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import shown

MAX_ROWS = {"table": 30, "html": 200}  # unless `most` says how many


def show(config: Any) -> None:
    """Print the table or write the page; with equal=true exit with 1 if the two runs are not equal."""
    asked = [config.runs] if isinstance(config.runs, str | int | float) else config.runs
    names = [str(name).strip() for name in asked]
    if not all(names):
        raise UserError("runs=: give a folder of runs, a glob, the name of a run, latest, or a list: runs=[A,B].")
    logs = Path(config.paths.logs, "train")
    folders, missing = reading.find(names, logs)
    runs, skipped = reading.read(folders)
    if not runs:
        named = f"[{','.join(names)}]" if len(names) > 1 else names[0]
        raise UserError(
            f"runs={named}: {' '.join([*missing, *skipped[:3]])} A run is a folder with a config.yaml, and names are "
            f"looked up in {shown(logs)}."
        )
    if config.equal:
        if missing or len(runs) != 2:
            raise UserError(
                f"equal=true compares two runs, and {len(runs)} were found: give runs=[A,B]. {' '.join(missing)}"
            )
        equal, sentence = compare.equality(*runs)
        print(sentence, flush=True)
        if not equal:
            sys.exit(1)
        return

    skipped += missing
    if config.where is not None:
        runs = [runs[number] for number in compare.select(runs, config.where)]
    sort = compare.sort_metric(runs, config.sort)
    groups = compare.ranked(compare.grouped(runs, config.seeds == "group"), sort)
    rows = groups[: config.most or MAX_ROWS.get(config.format)]
    notes = [f"{len(groups) - len(rows)} more: most={len(groups)} shows all."] if len(rows) < len(groups) else []
    out = Path(config.out).expanduser() if config.out is not None else None
    if config.format == "html":
        out = out or Path(config.paths.logs, "compare.html")
    if out is not None and out.is_dir():
        raise UserError(f"out={out} is a folder: give the name of a file.")
    parent = next(folder for folder in out.absolute().parents if folder.exists()) if out is not None else ROOT
    if not parent.is_dir():
        raise UserError(f"out={out}: {parent} is a file and not a folder: choose another path.")

    if out is not None and config.format == "html":
        from alexlab.analysis import page  # imports Pillow

        command = command_of(config, names, sort)
        page.write(out, rows, sort, [*notes, *(f"skipped: {line}" for line in skipped)], command)
        skipped += problems_of(runs)  # the page has read the curves
        count = sum(len(group.runs) for group in rows)
        of_all = f" of {len(runs)}" if count < len(runs) else ""
        notes.insert(0, f"{count}{of_all} run(s) on one page: {shown(out.resolve())}")
    else:
        skipped += problems_of(runs)
        if config.format == "table":
            # a file or another program gets wide lines
            width = Console().width if Console().is_terminal or "COLUMNS" in os.environ else 160
            text = "\n".join(compare.table(rows, len(runs), sort, width)) + "\n"
        elif config.format == "markdown":
            text = compare.as_markdown(rows, sort)
        else:
            text = compare.as_csv(rows) if config.format == "csv" else compare.as_json(rows, skipped)
        if out is None:
            sys.stdout.write(text)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
            notes.insert(0, f"written to {shown(out.resolve())}")
    images = list(dict.fromkeys(run.facts["images"] for run in runs if run.facts["images"]))
    if len(images) > 1:
        notes.append(f"The list contains {len(images)} sets of images: where=images={images[0]} selects one.")
    # standard output gets nothing else if another program reads it
    stream = sys.stdout if config.format in ("table", "html") or out is not None else sys.stderr
    for line in [*notes, *(f"skipped: {line}" for line in skipped)]:
        print(printable(line), file=stream, flush=True)


def problems_of(runs: list[reading.Run]) -> list[str]:
    """Return what could not be read of these runs, such as a damaged metrics.csv."""
    return list(dict.fromkeys(problem for run in runs for problem in run.problems))


def command_of(config: Any, names: list[str], sort: str) -> str:
    """Return the shell command that writes the page."""
    runs = ",".join(name if re.fullmatch(r"[\w./*?+@~-]+", name) else f"'{name}'" for name in names)
    overrides = [f"runs=[{runs}]" if len(names) > 1 else f"runs={names[0]}"]
    optional = {"where": config.where, "most": config.most}
    overrides += [f"{key}={value}" for key, value in optional.items() if value is not None]
    overrides += [f"paths.logs={config.paths.logs}"] if Path(config.paths.logs) != ROOT / "logs" else []
    overrides += [f"sort={sort}", f"seeds={config.seeds}", "format=html"]

    def quoted(text: str) -> str:  # in double quotes if possible, as texts often contain single ones
        special, active = re.search(r"[^\w./=+@~,-]", text), re.search(r'["$`\\!]', text)
        return f'"{text}"' if special and not active else shlex.quote(text)

    return " ".join(["alexlab compare", *map(quoted, overrides)])
