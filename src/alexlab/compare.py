"""A table of runs: what they were set to where they differ, and what came of it. Reads run directories alone."""

import glob
import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from alexlab.errors import UserError
from alexlab.rundir import name_of

IGNORED = ("run_dir", "overrides", "paths", "task", "dry_run", "ckpt_path")  # differ without making a difference
NESTED = (("best", "val/acc1"), ("last", "val/acc1"), ("best", "val/loss"), ("test", "test/acc1"))

Run = dict[str, Any]  # name, status, config (flat), summary


def compare(config: DictConfig) -> None:
    """Print the table; the task of compare.py.

    Raises:
        UserError: no runs there, or no such metric.
    """
    named = OmegaConf.to_container(config.runs) if OmegaConf.is_list(config.runs) else [str(config.runs)]
    assert isinstance(named, list)
    runs, left_out = read(find([str(name) for name in named]))
    if not runs:
        raise UserError(f"runs={config.runs}: no run is there (a folder with config.yaml): python train.py makes one.")
    stage = "test" if config.sort.startswith("test/") else "best"
    known = {metric for _, metric in NESTED}
    if config.sort not in known:
        raise UserError(f"sort={config.sort}: must be one of {', '.join(sorted(known))}.")
    sign = 1 if config.sort.endswith("loss") else -1
    runs.sort(key=lambda run: sign * run["summary"].get(stage, {}).get(config.sort, float("inf") * sign))
    Console(width=None if Console().is_terminal else 200).print(table(runs[: config.most], differing(runs)))
    if len(runs) > config.most:
        print(f"{len(runs) - config.most} more: most={len(runs)} shows all.")
    for line in left_out:
        print(f"left out: {line}")


def find(named: list[str]) -> list[Path]:
    """The run directories (those with a config.yaml) at or below folders or globs."""
    found: dict[Path, None] = {}
    for name in named:
        for match in sorted(glob.glob(str(Path(name).expanduser()))):  # noqa: PTH207 (absolute patterns)
            for path in sorted(Path(match).glob("**/config.yaml")):
                if "wandb" not in path.parts:
                    found[path.parent.resolve()] = None
    return list(found)


def read(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and why others could not be read."""
    runs, left_out = [], []
    for folder in folders:
        try:
            config = yaml.load((folder / "config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            summary_file = folder / "summary.json"
            summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            left_out.append(f"{folder} ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
            continue
        if not isinstance(config, dict) or "model" not in config:
            left_out.append(f"{folder} (its config.yaml is not a run's)")
            continue
        runs.append({"name": name_of(folder),
                     "status": summary.get("status", "running or killed"), "config": flat(config),
                     "summary": summary})  # fmt: skip
    return runs, left_out


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as "optimizer.lr"."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if not prefix and key in IGNORED:
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(runs: list[Run]) -> list[str]:
    """The keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run["config"])
    absent = object()
    return [
        key for key in keys if any(run["config"].get(key, absent) != runs[0]["config"].get(key, absent) for run in runs)
    ]


def table(runs: list[Run], keys: list[str]) -> Table:
    shown = Table(title=f"{len(runs)} runs")
    for name in ("run", "status", *keys):
        shown.add_column(name, overflow="fold")
    for stage, metric in NESTED:
        shown.add_column(metric if stage == "test" else f"{stage} {metric}", justify="right")
    shown.add_column("images/s", justify="right")
    shown.add_column("seconds", justify="right")
    for run in runs:
        summary = run["summary"]
        values = [summary.get(stage, {}).get(metric) for stage, metric in NESTED]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        settings = [str(run["config"].get(key, "")) for key in keys]
        rest = [str(summary.get(key) or "") for key in ("images_per_second", "seconds")]
        shown.add_row(run["name"], run["status"], *settings, *cells, *rest)
    return shown
