"""A table of runs: what they were set to where they differ, and what came of it. Reads run directories alone."""

import glob
import json
import os
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from alexlab import config as configs
from alexlab.config import LARGEST, flat
from alexlab.errors import UserError
from alexlab.kinds import shown as plainly
from alexlab.rundir import name_of

# differ without making a difference, or say again what another key says
IGNORED = (
    "run_dir", "overrides", "paths", "task", "dry_run", "ckpt_path", "test", "logger", "callbacks.progress",
    "callbacks.figures", "callbacks.lr_monitor", "callbacks.model_summary", "callbacks.device_stats",
    "data.num_workers", "data.num_classes", "model.net.name", "model.net.pretrained", "trainer.log_every_n_steps",
    "trainer.profiler", "trainer.timeout", "trainer.master_port", "choices.logger", "choices.callbacks",
)  # fmt: skip
NESTED = (("best", "val/acc1"), ("last", "val/acc1"), ("best", "val/loss"), ("test", "test/acc1"))

Run = dict[str, Any]  # name, status, config (flat), given (keys of its command line), summary


def _metric(stage: str, metric: str, run: Run) -> float | None:
    return run["summary"].get(stage, {}).get(metric)


def compare(config: DictConfig) -> None:
    """Print the table; the task of compare.py.

    Raises:
        UserError: no runs there, or no such metric.
    """
    named = OmegaConf.to_container(config.runs) if OmegaConf.is_list(config.runs) else [str(config.runs)]
    assert isinstance(named, list)
    runs, left_out = read(find([str(name) for name in named], Path(config.paths.logs, "train")))
    if not runs:
        raise UserError(f"runs={config.runs}: no run is there (a folder with config.yaml): python train.py makes one.")
    stage = "test" if config.sort.startswith("test/") else "best"
    known = {metric for _, metric in NESTED}
    if config.sort not in known:
        raise UserError(f"sort={config.sort}: must be one of {', '.join(sorted(known))}.")
    sign = 1 if config.sort.endswith("loss") else -1
    runs.sort(key=lambda run: sign * run["summary"].get(stage, {}).get(config.sort, float("inf") * sign))
    apart = differing(runs)
    known_width = Console().is_terminal or "COLUMNS" in os.environ
    width = Console().width if known_width else 160
    print("\n".join(table(runs[: config.most], apart[: config.most], len(runs), width)))
    if len(runs) > config.most:
        print(f"{len(runs) - config.most} more: most={len(runs)} shows all.")
    for line in left_out:
        print(f"left out: {line}")


def find(named: list[str], logs: Path) -> list[Path]:
    """The run directories (those with a config.yaml) at or below folders or globs, or of the table's names."""
    found: dict[Path, None] = {}
    for name in named:
        places = [Path(name).expanduser(), logs / "runs" / name, logs / "multiruns" / name]
        place = next((place for place in places if glob.glob(str(place))), places[0])  # noqa: PTH207
        for match in sorted(glob.glob(str(place))):  # noqa: PTH207 (absolute patterns)
            for path in sorted(Path(match).glob("**/config.yaml")):
                if "wandb" not in path.parts:
                    found[path.parent.resolve()] = None
    return list(found)


def read(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and why others could not be read."""
    runs, left_out = [], []
    for folder in folders:
        try:
            config = configs.read(folder / "config.yaml")
            summary = summary_of(folder)
        except (OSError, ValueError) as error:
            left_out.append(f"{folder} ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
            continue
        if not isinstance(config, dict) or "model" not in config:
            left_out.append(f"{folder} (its config.yaml is not a run's)")
            continue
        runs.append({"name": name_of(folder),
                     "status": summary.get("status", "running or killed"), "config": settings_of(config),
                     "given": words_of(config), "summary": summary})  # fmt: skip
    return runs, left_out


def summary_of(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is nothing that a run writes.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST:
        raise ValueError(f"its summary.json has more than {LARGEST} bytes")
    try:
        told = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("its summary.json is no summary") from None
    numbers = [told.get(key) or {} for key in ("best", "last", "test")] if isinstance(told, dict) else [None]
    whole = all(
        isinstance(part, dict) and all(isinstance(value, (int, float, type(None))) for value in part.values())
        for part in numbers
    )
    if not whole or not str(told.get("status", "")).isalpha():
        raise ValueError("its summary.json is no summary")
    return told


def words_of(config: dict[str, Any]) -> set[str]:
    """The keys that the run's command line gave."""
    return {str(word).lstrip("+~").partition("=")[0] for word in config.get("overrides") or []}


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    ignored = {*IGNORED}
    return {key: value for key, value in flat(config).items() if not {key, key.split(".")[0]} & ignored}


def differing(runs: list[Run]) -> list[dict[str, Any]]:
    """Of each run the settings that set it apart.

    What an option brings with it (augment=strong its erasing, model=timm another net) is told by the option: a group's
    other keys count where runs with the same option and name differ, or where a run's command line gave them.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run["config"]))
    given = {key for run in runs for key in run["given"]}
    absent = object()
    found: list[dict[str, Any]] = [{} for _ in runs]
    for key in keys:
        group = key.split(".")[0]
        names = [name for name in (f"choices.{group}", f"{group}.name", f"{group}._target_") if name in keys]
        names = [name for name in names if all(name in run["config"] for run in runs)]  # older runs lack `choices`
        if group == "choices" and key not in names and not all(key in run["config"] for run in runs):
            continue
        peers: dict[Any, list[int]] = {}
        for number, run in enumerate(runs):
            told_by = [] if key in given else names[: names.index(key) if key in names else None]
            peers.setdefault(tuple(run["config"].get(name) for name in told_by), []).append(number)
        for members in peers.values():
            values = [runs[number]["config"].get(key, absent) for number in members]
            if any(value != values[0] for value in values):
                for number in members:
                    if key in runs[number]["config"]:
                        found[number][key.removeprefix("choices.")] = runs[number]["config"][key]
    return found


def told(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={plainly(value)}" for key, value in settings.items())


# heading, width of its numbers, how they are written; the last ones go first where a terminal is narrow
Column = tuple[str, Callable[[Run], Any], str]
COLUMNS: list[Column] = [
    *((f"{'' if stage == 'test' else stage + ' '}{metric}".replace(" ", "\n"), partial(_metric, stage, metric), ".4f")
      for stage, metric in NESTED),
    ("images/s", lambda run: run["summary"].get("images_per_second") or None, ".0f"),
    ("seconds", lambda run: run["summary"].get("seconds") or None, ".0f"),
]  # fmt: skip
DROPPED = ("seconds", "images/s", "last\nval/acc1", "best\nval/loss")


def table(runs: list[Run], settings: list[dict[str, Any]], count: int, width: int) -> list[str]:
    """A line of numbers a run, and below it what sets it apart, where all of it does not fit beside them."""
    columns = list(COLUMNS)
    name = max(len(run["name"]) for run in runs)
    status = max(len(run["status"]) for run in runs)
    for dropped in DROPPED:
        if name + 2 + status + sum(10 for _ in columns) <= width:
            break
        columns = [column for column in columns if column[0] != dropped]
    used = name + 2 + status + sum(10 for _ in columns)
    beside = max((len(told(apart)) for apart in settings), default=0) + 2 <= width - used
    lines: list[str] = []
    for run, apart in zip(runs, settings, strict=True):
        cells = [f"{run['name']:{name}}  {run['status']:{status}}"]
        for _, value_of, how in columns:
            value = value_of(run)
            cells.append(f"{'' if value is None else format(value, how):>10}")
        lines.append("".join(cells) + (f"  {told(apart)}" if beside else ""))
        if not beside and apart:
            lines += textwrap.wrap(told(apart), width, initial_indent="    ", subsequent_indent="    ")
    heads = [" " * (name + 2 + status)] * 2
    for heading, _, _ in columns:
        above, _, below = heading.rpartition("\n")
        heads = [heads[0] + f"{above:>10}", heads[1] + f"{below:>10}"]
    heads[1] = f"{f'{count} run' + ('s' if count > 1 else ''):{name}}" + heads[1][name:]
    return [line.rstrip() for line in (*heads, *lines)]
