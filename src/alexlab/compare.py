"""A table of runs: what they were set to where they differ, and what came of it. Reads run directories alone."""

import glob
import json
import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from alexlab.config import flat
from alexlab.errors import UserError
from alexlab.rules import shown as plainly
from alexlab.rundir import name_of

# differ without making a difference
IGNORED = (
    "run_dir", "overrides", "paths", "task", "dry_run", "ckpt_path", "test", "logger", "callbacks.progress",
    "callbacks.figures", "callbacks.lr_monitor", "callbacks.model_summary", "callbacks.device_stats",
    "data.num_workers", "trainer.log_every_n_steps", "trainer.profiler", "trainer.timeout", "trainer.master_port",
)  # fmt: skip
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
    apart = differing(runs)
    narrow = Console().is_terminal or "COLUMNS" in os.environ
    Console(width=None if narrow else 160).print(table(runs[: config.most], apart[: config.most], len(runs)))
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
                     "status": summary.get("status", "running or killed"), "config": settings_of(config),
                     "summary": summary})  # fmt: skip
    return runs, left_out


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    ignored = {*IGNORED}
    return {key: value for key, value in flat(config).items() if not {key, key.split(".")[0]} & ignored}


def differing(runs: list[Run]) -> list[dict[str, Any]]:
    """Of each run the settings that set it apart.

    What a group's choice brings with it (data=folder another root, model=timm another net) is told by the choice: other
    keys of the group count where runs with the same choice differ.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run["config"]))
    absent = object()
    found: list[dict[str, Any]] = [{} for _ in runs]
    for key in keys:
        group = key.split(".")[0]
        name = next((f"{group}.{part}" for part in ("name", "_target_") if f"{group}.{part}" in keys), None)
        peers: dict[Any, list[int]] = {}
        for number, run in enumerate(runs):
            same = None if name in (key, None) else run["config"].get(name)
            peers.setdefault(same, []).append(number)
        for members in peers.values():
            values = [runs[number]["config"].get(key, absent) for number in members]
            if any(value != values[0] for value in values):
                for number in members:
                    if key in runs[number]["config"]:
                        found[number][key] = runs[number]["config"][key]
    return found


def told(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={plainly(value)}" for key, value in settings.items())


def table(runs: list[Run], settings: list[dict[str, Any]], count: int) -> Table:
    shown = Table(title=f"{count} run{'s' if count > 1 else ''}")
    shown.add_column("run", overflow="fold", min_width=10)
    shown.add_column("status")
    for stage, metric in NESTED:
        shown.add_column(
            f"{'' if stage == 'test' else stage + ' '}{metric}".replace(" ", "\n"), justify="right", no_wrap=True
        )
    shown.add_column("images/s", justify="right", no_wrap=True)
    shown.add_column("seconds", justify="right", no_wrap=True)
    shown.add_column("set apart by", overflow="fold", min_width=20)
    for run, apart in zip(runs, settings, strict=True):
        summary = run["summary"]
        values = [summary.get(stage, {}).get(metric) for stage, metric in NESTED]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        rest = ["" if not summary.get(key) else f"{summary[key]:.0f}" for key in ("images_per_second", "seconds")]
        shown.add_row(run["name"], run["status"], *cells, *rest, told(apart))
    return shown
