"""The task of compare.py."""

import difflib
import os
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from alexlab import rundir
from alexlab.compare import formats
from alexlab.compare.equal import say_equal
from alexlab.compare.groups import grouped, ranked
from alexlab.compare.runs import Run, find, read
from alexlab.compare.table import table
from alexlab.compare.where import chosen
from alexlab.errors import UserError

MOST = {"table": 30, "html": 200}  # rows, where most=null


def show(config: DictConfig) -> None:
    """Print the table, or write the page.

    Raises:
        UserError: no runs there, no such metric, or `where` is no condition.
    """
    named = OmegaConf.to_container(config.runs) if OmegaConf.is_list(config.runs) else [str(config.runs)]
    assert isinstance(named, list)
    runs, left_out = read(find([str(name) for name in named], Path(config.paths.logs, "train")))
    if not runs:
        why = f" Left out: {'; '.join(left_out[:3])}." if left_out else ""
        raise UserError(
            f"runs={config.runs}: no run is there (a folder with config.yaml): python train.py makes one.{why}"
        )
    if config.equal:
        if not say_equal(runs):
            sys.exit(1)
        return
    kept = chosen(runs, config.where) if config.where is not None else runs
    if not kept:
        raise UserError(f"where={config.where}: it holds of none of the {len(runs)} runs.")
    check_sort(runs, config.sort)
    groups = ranked(grouped(kept, config.seeds == "group"), config.sort)
    most = config.most or MOST.get(config.format, len(groups))
    rest = f"{len(groups) - most} more: most={len(groups)} shows all." if len(groups) > most else None
    shown = groups[:most]
    if config.format == "html":
        from alexlab.compare import page  # and with it Plotly's library

        out = Path(config.out or Path(config.paths.logs, "compare.html")).expanduser()
        page.write(out, shown, config.sort, left_out)
        notes = [f"{len(kept)} run(s) on one page: {rundir.shown(out.resolve())}"]
    else:
        if config.format == "table":
            known_width = Console().is_terminal or "COLUMNS" in os.environ
            text = "\n".join(table(shown, len(kept), config.sort, Console().width if known_width else 160)) + "\n"
        elif config.format == "markdown":
            text = formats.markdown(shown, config.sort)
        else:
            text = formats.as_csv(shown) if config.format == "csv" else formats.as_json(shown, left_out)
        notes = []
        if config.out is None:
            sys.stdout.write(text)
        else:
            out = Path(config.out).expanduser()
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
            notes = [f"written to {rundir.shown(out.resolve())}"]
    notes += [rest] if rest else []
    notes += [f"left out: {line}" for line in left_out]
    # what another program reads on standard output stays whole
    to = sys.stdout if config.format in ("table", "html") or config.out is not None else sys.stderr
    for line in notes:
        print(line, file=to, flush=True)


def check_sort(runs: list[Run], sort: str) -> None:
    known = sorted({key for run in runs for key in run.numbers})
    if sort not in known:
        if not known and sort.startswith(("val/", "test/")):  # nothing was measured yet
            return
        near = difflib.get_close_matches(sort, known, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"sort={sort}: no run has such a number.{hint} There are: {', '.join(known)}.")
