"""The task of compare.py."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from alexlab.analysis import formats
from alexlab.analysis.equal import say_equal
from alexlab.analysis.finding import find
from alexlab.analysis.groups import grouped, ranked
from alexlab.analysis.runs import Run, read
from alexlab.analysis.table import table
from alexlab.analysis.where import chosen, why_none
from alexlab.engine import run_dir as rundir
from alexlab.engine.config import ROOT
from alexlab.engine.errors import UserError

MOST = {"table": 30, "html": 200}  # rows, where most=null


def show(config: DictConfig) -> None:
    """Print the table, or write the page.

    Raises:
        UserError: no runs there, no such metric, or `where` is no condition.
    """
    named = OmegaConf.to_container(config.runs) if OmegaConf.is_list(config.runs) else [str(config.runs)]
    assert isinstance(named, list)
    if not all(str(name).strip() for name in named):
        raise UserError("runs=: give a folder of runs, a glob, a run's name, latest, or a list of them: runs=[A,B].")
    folders, nothing = find([str(name) for name in named], Path(config.paths.logs, "train"))
    runs, left_out = read(folders)
    if not runs:
        why = f" Left out: {'; '.join(left_out[:3])}." if left_out else ""
        none = "; ".join(nothing) or f"{', '.join(map(str, named))} (no run is there)"
        raise UserError(
            f"runs={_words(config.runs)}: {none}. A run is a folder with config.yaml, as python train.py makes them, "
            f"and names are looked for in {rundir.shown(Path(config.paths.logs, 'train'))}.{why}"
        )
    left_out += nothing
    if config.equal and nothing:
        raise UserError(f"equal=true: {'; '.join(nothing)}.")
    if config.equal:
        if not say_equal(runs):
            sys.exit(1)
        return
    kept = chosen(runs, config.where) if config.where is not None else runs
    if not kept:
        raise UserError(why_none(runs, config.where))
    sort = chosen_sort(kept, config.sort)
    groups = ranked(grouped(kept, config.seeds == "group"), sort)
    most = config.most or MOST.get(config.format, len(groups))
    rest = f"{len(groups) - most} more: most={len(groups)} shows all." if len(groups) > most else None
    shown = groups[:most]
    if config.format == "html":
        from alexlab.analysis import page  # and with it Plotly's library

        out = Path(config.out or Path(config.paths.logs, "compare.html")).expanduser()
        check_file(out)
        left_out += _problems([run for group in shown for run in group.runs if run.rows is not None])
        noted = [*([rest] if rest else []), *(f"left out: {line}" for line in left_out)]
        page.write(out, shown, sort, noted, asked(config, named, sort))
        count = sum(len(group.runs) for group in shown)
        of = f" of {len(kept)}" if count < len(kept) else ""
        notes = [f"{count}{of} run(s) on one page: {rundir.shown(out.resolve())}"]
    else:
        left_out += _problems(kept)
        if config.format == "table":
            known_width = Console().is_terminal or "COLUMNS" in os.environ
            text = "\n".join(table(shown, len(kept), sort, Console().width if known_width else 160)) + "\n"
        elif config.format == "markdown":
            text = formats.markdown(shown, sort)
        else:
            text = formats.as_csv(shown) if config.format == "csv" else formats.as_json(shown, left_out)
        notes = []
        if config.out is None:
            sys.stdout.write(text)
        else:
            out = Path(config.out).expanduser()
            check_file(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
            notes = [f"written to {rundir.shown(out.resolve())}"]
    notes += [rest] if rest else []
    images = list(dict.fromkeys(run.facts["images"] for run in kept if run.facts["images"]))
    if len(images) > 1:
        notes.append(f"on {len(images)} sets of images, in one list: where=images={images[0]} keeps one.")
    notes += [f"left out: {line}" for line in left_out]
    # what another program reads on standard output stays whole
    to = sys.stdout if config.format in ("table", "html") or config.out is not None else sys.stderr
    for line in notes:
        print(line, file=to, flush=True)


def asked(config: DictConfig, named: list[Any], sort: str) -> str:
    """The command that makes the page, as one types it."""
    runs = ",".join(name if re.fullmatch(r"[\w./*?+@~-]+", name) else f"'{name}'" for name in map(str, named))
    words = [f"runs=[{runs}]" if len(named) > 1 else f"runs={named[0]}"]
    words += [f"{key}={config[key]}" for key in ("where", "most") if config[key] is not None]
    words += [f"paths.logs={config.paths.logs}"] if Path(config.paths.logs) != ROOT / "logs" else []
    words += [f"sort={sort}", f"seeds={config.seeds}", "format=html"]
    # between " a shell changes nothing but these
    between = [bool(re.search(r"[^\w./=+@~,-]", word) and not re.search(r'["$`\\!]', word)) for word in words]
    quoted = [f'"{word}"' if whole else shlex.quote(word) for word, whole in zip(words, between, strict=True)]
    return " ".join(["python compare.py", *quoted])


def chosen_sort(runs: list[Run], sort: str | None) -> str:
    """The number to sort by: the one that was asked for, or the first of these that a run has.

    Raises:
        UserError: no run has it.
    """
    known = sorted({key for run in runs for key in run.numbers})
    if sort is None:
        usual = ("val/acc1", "last/val/acc1", "val/loss", "last/val/loss", "train/loss")
        return next((key for key in (*usual, *known) if key in known), usual[0])
    if sort not in known:
        near = difflib.get_close_matches(sort, known, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        there = f" There are: {', '.join(known)}." if known else " Nothing was measured yet."
        raise UserError(f"sort={sort}: no run has such a number.{hint}{there}")
    return sort


def _words(value: Any) -> str:
    """As the command line has it."""
    return f"[{','.join(map(str, value))}]" if OmegaConf.is_list(value) else str(value)


def _problems(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(problem for run in runs for problem in run.problems))


def check_file(out: Path) -> None:
    """Raises UserError where the file cannot be one."""
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give a file's name.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"out={out}: {above} is a file, and no folder: give another place.")
