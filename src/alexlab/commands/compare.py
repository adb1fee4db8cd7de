"""`alexlab compare`: print a table of runs, write a page with curves, or check whether two runs are equal."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from alexlab.analysis import compare
from alexlab.analysis import runs as reading
from alexlab.engine import mirror
from alexlab.engine.errors import UserError, counted
from alexlab.engine.overrides import command_line
from alexlab.engine.run_dir import shown
from alexlab.engine.text import printable

MAX_ROWS = {"table": 30, "html": 200}  # unless `most` says how many


def show(config: Any) -> None:
    """Print the table or write the page; with equal=true exit with 1 if the two runs are not equal."""
    asked = [config.runs] if isinstance(config.runs, str | int | float) else config.runs
    names = [str(name).strip() for name in asked]
    logs = config.paths.local / "train"
    mirror.download_tables(config.paths, config.format == "html")
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
    default = config.paths.local / "compare.html" if config.format == "html" else None
    out = Path(config.out).expanduser() if config.out is not None else default
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
        except OSError as error:
            raise UserError(f"out={out} cannot be written ({error.strerror}): give another file.") from error

    if config.format == "html":
        from alexlab.analysis import page  # imports Pillow

        typed = [re.sub(r"^([\w.+]+=)'([^'\\]*)'$", r"\1\2", word) for word in sys.argv[1:]]  # without Hydra's quotes
        command = command_line("compare", *typed)
        text = page.render(rows, sort, [*notes, *(f"skipped: {line}" for line in skipped)], command)
    elif config.format == "table":
        # a file or another program gets wide lines
        width = Console().width if Console().is_terminal or "COLUMNS" in os.environ else 160
        text = "\n".join(compare.table(rows, len(runs), sort, width)) + "\n"
    elif config.format == "markdown":
        text = compare.as_markdown(rows, sort)
    else:
        text = compare.as_csv(rows, sort) if config.format == "csv" else compare.as_json(rows, skipped, sort)
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
        notes.insert(
            0, f"{sum(len(group.runs) for group in rows)} of {counted(len(runs), 'run')}: {shown(out.resolve())}"
        )
    skipped += dict.fromkeys(problem for run in runs for problem in run.problems)  # such as a damaged metrics.csv
    images = list(dict.fromkeys(run.facts["images"] for run in runs if run.facts["images"]))
    if len(images) > 1:
        named = ", ".join(images[:8]) + (" ..." if len(images) > 8 else "")
        notes.append(f"The list contains {len(images)} sets of images, {named}: where=images={images[0]} selects one.")
    # standard output gets nothing else if another program reads it
    stream = sys.stdout if config.format in ("table", "html") or out is not None else sys.stderr
    for line in [*notes, *(f"skipped: {line}" for line in skipped)]:
        print(printable(line), file=stream, flush=True)
