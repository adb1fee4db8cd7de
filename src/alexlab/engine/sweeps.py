"""Runs that belong together: the jobs of a sweep, and those that a `wandb agent` starts one by one. Light."""

import ast
import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexlab.engine import config as configs
from alexlab.engine.config import CONF
from alexlab.engine.errors import UserError
from alexlab.engine.secrecy import masked

# a text that Hydra reads as it stands; others are quoted
PLAIN = re.compile(r"[A-Za-z0-9_./:+\-]+")


# -- W&B's agent, which starts train.py once for each run of its sweep


given: dict[str, Any] = {}  # by the agent: the values of the sweep's parameters, flat


def agent() -> tuple[str, str] | None:
    """(sweep, run): W&B's names of both, where its agent has started this process; else None."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (sweep, run) if sweep and run else None


def agent_words(words: list[str]) -> list[str]:
    """The agent's words as Hydra's: `optimizer={'lr': 0.1}`, from a parameter with parameters below it, becomes
    `optimizer.lr=0.1`, and `choices={'model': 'vgg'}` becomes `model=vgg`. Others are left as they are. A group of no
    option is `~group` to Hydra, and no word where that is the default.

    W&B lays the parameters over the run's config as well. They are in that already, so that is switched off.

    Raises:
        UserError: -m, or a parameter that W&B's search would not find again in the run's config.
    """
    if agent() is None:
        return words
    if {"-m", "--multirun"} & set(words):
        raise UserError("-m: a run of W&B's agent is one run, and the sweep's file says what differs: leave -m out.")
    path = os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)
    if path is not None and Path(path).is_file():
        told = {str(key): node for key, node in configs.read(Path(path)).items() if key != "wandb_version"}
        _check_parameters(told)
        given.update(
            configs.flat(
                {key: node["value"] for key, node in told.items() if isinstance(node, dict) and "value" in node}
            )
        )
    found: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        value = _literal(text)
        if text == "None":
            found.append(f"{key}=null")
        elif not isinstance(value, dict):
            found.append(word)
        elif key == "choices":
            found += [f"~{group}" if option is None else f"{group}={option}"
                      for group, option in value.items() if option is not None or _has_default(group)]  # fmt: skip
        else:
            found += [f"{name}={_written(item)}" for name, item in configs.flat(value, f"{key}.").items()]
    return found


def _has_default(group: str) -> bool:
    """Whether train.yaml gives a group an option."""
    entries = configs.read(CONF / "train.yaml")["defaults"]
    return any(entry.get(group) is not None for entry in entries if isinstance(entry, dict))


def _check_parameters(given: dict[str, Any]) -> None:
    """W&B's search looks in a run's config for what it has given it, to know what is done: a name with dots is not in
    a nested config, where it would have to stand a second time, and a group's name there holds more than a choice."""
    for key, node in given.items():
        first, dot, rest = key.partition(".")
        if dot:
            nested = "".join(f"{{parameters: {{{part}: " for part in rest.split("."))
            raise UserError(
                f"{key}: in a sweep's file parameters are nested like the config, or W&B's search would not find them "
                f"there: write {first}: {nested}...{'}}' * len(rest.split('.'))}, as conf/sweep/wandb.yaml does."
            )
        if (CONF / key).is_dir() and not (isinstance(node, dict) and isinstance(node.get("value"), dict)):
            raise UserError(
                f"{key}: in a sweep's file the option of a group is one of choices, or W&B's search would not find it "
                f"in the config: write choices: {{parameters: {{{key}: ...}}}}."
            )


def check_agent(config: DictConfig) -> None:
    """Raises UserError where W&B's agent waits for a run that would tell W&B nothing."""
    if agent() is None or "logger" not in config:
        return
    board = OmegaConf.select(config, "logger.wandb")
    if board is None or board.get("mode") in ("offline", "disabled"):
        what = "without W&B" if board is None else f"with logger.wandb.mode={board.mode}"
        raise UserError(
            f"a run of W&B's agent {what}: the sweep would never hear of its {config.get('monitor')}: take "
            "logger=wandb logger.wandb.mode=auto, or python train.py -m sweep=grid, which needs no agent."
        )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _written(value: Any) -> str:
    """A value as Hydra's grammar has it."""
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        return f"'{escaped}'"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


# -- Hydra's own sweeps


def check_words(words: list[str]) -> None:
    """Raises UserError where W&B's file is taken for an option."""
    if any(word.lstrip("+") == "sweep=wandb" for word in words):
        raise UserError(
            "sweep=wandb: conf/sweep/wandb.yaml is a file for W&B's own sweeps and no option here: "
            "`wandb sweep conf/sweep/wandb.yaml` makes one and prints the `wandb agent` that runs it; "
            "-m sweep=grid is the same without W&B's server."
        )


def record_failure(config: DictConfig, error: Exception) -> None:
    """A job of a sweep that failed before it could say so itself is a run that failed, too; unless it was to be shown
    alone."""
    if config.get("dry_run") is True:
        return
    run_dir = Path(config.run_dir)
    with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").exists():
            configs.save(config, run_dir / "config.yaml")
        if not (run_dir / "summary.json").exists():
            told = {"status": "failed", "error": masked(f"{type(error).__name__}: {error}")}
            (run_dir / "summary.json").write_text(json.dumps(told, indent=2) + "\n")


def remove_empty(run_dir: Path, sweep: Path | None) -> None:
    """Remove the folder of a job that left nothing in it, and those between it and its sweep's."""
    top = sweep.resolve() if sweep is not None else run_dir
    with contextlib.suppress(OSError):  # it holds something
        for folder in [run_dir, *(parent for parent in run_dir.parents if top in parent.parents)]:
            if folder != Path.cwd():
                folder.rmdir()


notes: dict[Path, bytes | None] = {}  # by a sweep's folder: the multirun.yaml that was there before Hydra wrote its own


def keep_note(folder: Path) -> None:
    path = folder / "multirun.yaml"
    notes[folder] = path.read_bytes() if path.is_file() else None


def leave_nothing(folder: Path) -> None:
    """Of a sweep that was only shown: put the note back that Hydra has written over, or remove Hydra's, and the folder
    if it is empty then."""
    note, before = folder / "multirun.yaml", notes.get(folder)
    with contextlib.suppress(OSError):
        if before is not None:
            note.write_bytes(before)
        elif folder in notes:
            note.unlink(missing_ok=True)
        folder.rmdir()


# -- Optuna's trials


TRIAL = "ALEXLAB_TRIAL"  # the variable that tells a job, and its ranks, which trial it is
PRUNED = "pruned"  # what a trial is marked with that was stopped early


@dataclass(frozen=True)
class Trial:
    """Where a job's trial is to be found: in which study of which storage; `id` is the storage's own."""

    storage: str | None
    study: str
    number: int
    id: int


current: Trial | None = None  # of the job that runs in this process


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tell the job that runs meanwhile, and the ranks that it starts, which trial it is."""
    if current is None or current.storage is None:
        yield
        return
    os.environ[TRIAL] = json.dumps(asdict(current))
    try:
        yield
    finally:
        del os.environ[TRIAL]


def trial() -> Trial | None:
    """The trial that this job is; None outside of Optuna's sweeps."""
    text = os.environ.get(TRIAL)
    return Trial(**json.loads(text)) if text else None


def make_pruner(settings: Any, max_epochs: int | None) -> Any:
    """Optuna's pruner for `sweep.pruner` and its keys.

    Args:
        settings: of the config's group `sweep`.
        max_epochs: of a trial that is not stopped.
    """
    from optuna import pruners

    kind = settings.get("pruner", "none")
    if kind == "median":
        return pruners.MedianPruner(settings.startup_trials, settings.warmup_epochs)
    if kind == "hyperband":
        return pruners.HyperbandPruner(max(1, settings.warmup_epochs), max_epochs or "auto")
    return pruners.NopPruner()
