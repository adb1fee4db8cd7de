"""Resume a run: find it, apply overrides, choose the newest undamaged checkpoint, reset the run's directory.

The order is: `resume_config` (reads only) -> build everything -> `files.lock` -> `reset_directory` (writes) -> train.
This module works on plain dicts. The caller validates the config that `resume_config` returns.
"""

import copy
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from alexlab.engine import checkpoint_io
from alexlab.engine import config as configs
from alexlab.engine.config import Plain
from alexlab.engine.errors import UserError, counted
from alexlab.engine.files import cut_csv, refuse_link, remove_temporary
from alexlab.engine.overrides import by_key, get, has, parse, put, remove, shown
from alexlab.engine.run_dir import WEIGHT_FILES, ckpt_of, find_run, read_summary
from alexlab.engine.run_dir import shown as shown_path

# Keys that may change: they decide how far the run goes and what is shown, but not what a step computes. The images
# at another data.root must have the run's fingerprint, which commands/checks.py compares.
FREE = re.compile(
    r"trainer\.(max_epochs|max_steps|max_time|timeout|master_port|lr_find|batch_size_find)"
    r"|data\.(root|num_workers|cache|disk_cache|disk_cache_gb|on_error|max_bad)|callbacks\.progress|on_nan|dry_run|allow|(checkpoint|resume|paths)\..*"
)
# Keys that may never change: the state of optimizer, schedule and image order in the checkpoint depends on them.
FIXED = re.compile(
    r"(optimizer|scheduler|ema|finetune)\..*|seed|data\.(batch_size|val_fraction|test_fraction|folds?|sampler)"
    r"|trainer\.accumulate_grad_batches|model\.(mean|std)"
)
ENDS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


@dataclass(frozen=True)
class Resumed:
    """The run that `resume=` names."""

    config: Plain  # of the run with the overrides, not yet validated; today's config if a new run starts
    run_dir: Path
    ckpt_path: Path | None = None  # the newest undamaged checkpoint; None if the run has none yet
    resumes: bool = True  # false if `resume=auto` starts a new run
    finished: bool = False  # whether `resume=auto` names a complete run, so that nothing is left to do
    notes: list[str] = field(default_factory=list)  # lines to print once


def resume_config(today: Plain) -> Resumed:
    """Return the config and the checkpoint to continue a run with. Writes nothing.

    Args:
        today: the config that Hydra has composed now. Used are `resume`, `run_dir`, `dry_run`, `overrides`,
            `paths.logs`, the values of the overridden keys, and keys that are newer than the run.

    Raises:
        UserError: the run or a usable checkpoint does not exist, or overrides would change what the run computes.
    """
    named, own, overrides = today["resume"]["run"], Path(today["run_dir"]), today["overrides"]
    if named == "auto" and not holds_run(own):
        note = f"resume=auto: {shown_path(own)} holds no run yet: a new one starts."
        return Resumed(today, own, resumes=False, notes=[note])
    # the latest run of all: an older one never resumes because the newest has no checkpoint
    run_dir = own if named == "auto" else find_run(named, configs.logs_of(today), "", "resume")
    asked, name = f"resume={named}", shown_path(run_dir)
    before = configs.load(run_dir / "config.yaml")
    refuse_link(run_dir / "figures")

    config, changes = _with_overrides(before, today)
    if changes and not today["resume"]["allow_changes"]:
        may_allow = "" if any(map(FIXED.fullmatch, changes)) else ", or add resume.allow_changes=true"
        raise UserError(
            f"{asked}: {name} was started with different settings: {', '.join(changes.values())}. Remove these "
            f"overrides{may_allow}. To start a new run with them, use the weights with "
            f"{shlex.quote(f'init_from={named}')}, or the config with {shlex.quote(f'from_run={named}')}."
        )
    _refuse_secrets(config, today, name)
    # folders of this machine, unless the run has other ones
    for key in ("data", "scratch"):
        if f"paths.{key}" not in by_key(before["overrides"]) and key in today["paths"]:
            config["paths"] = config["paths"] | {key: today["paths"][key]}
    configs.use_own_disk_cache(config, by_key([*before["overrides"], *overrides]))
    config |= {"resume": today["resume"], "run_dir": str(run_dir), "dry_run": today["dry_run"]}
    new = by_key(text for text in overrides if not text.startswith("resume."))
    # in one order, so that a rank that reads the config.yaml that rank 0 has just written gets the same config
    config["overrides"] = list((by_key(before["overrides"]) | new).values())

    ckpt_path, notes = newest_checkpoint(run_dir / "checkpoints")
    finished = read_summary(run_dir).get("status") == "finished"
    is_longer = any(get(config, key) != get(before, key) for key in ENDS)
    if ckpt_path is None:
        if finished and named == "auto" and not is_longer:
            return Resumed(config, run_dir, finished=True, notes=[f"resume=auto: {name} is finished."])
        if finished:
            raise UserError(
                f"{asked}: {name} is finished, and last.ckpt was deleted (checkpoint.keep=best, or alexlab clean): it "
                f"cannot be resumed. Start a new run with the weights: {shlex.quote(f'init_from={name}')}."
            )
        if named != "auto":
            raise UserError(
                f"{asked}: {name} has no checkpoint to resume from: start it again from scratch, or use resume=auto "
                f"{shlex.quote(f'hydra.run.dir={name}')}, which starts from scratch without a checkpoint."
            )
        notes.append(f"resume=auto: {name} has no checkpoint yet: it starts again from scratch.")
        return Resumed(config, run_dir, notes=notes)
    if (
        before.get("ckpt_path")
        and not is_own(before["ckpt_path"], run_dir)
        and "ckpt_path" not in by_key(config["overrides"])
    ):
        config["overrides"].append(f"ckpt_path={shown(before['ckpt_path'])}")  # of a yaml; from_run reads it here
    config["ckpt_path"] = str(ckpt_path)  # init_from stays, for from_run and compare
    finished = finished and not is_longer
    if finished and named != "auto":
        raise UserError(
            f"{asked}: {name} is finished. Give a trainer.max_epochs above {before['trainer'].get('max_epochs')} to "
            "train it longer."
        )
    notes += [f"resume=auto: {name} is finished."] if finished else []
    return Resumed(config, run_dir, ckpt_path, finished=finished, notes=notes)


def holds_run(run_dir: Path) -> bool:
    """Check whether a run was started in this directory."""
    return (run_dir / "config.yaml").is_file()


def _with_overrides(before: Plain, today: Plain) -> tuple[Plain, dict[str, str]]:
    """Return the run's config with the overrides, and the overrides that change the run, by their keys."""
    config, changes = copy.deepcopy(before), dict[str, str]()
    config |= {key: copy.deepcopy(today[key]) for key in today if key not in before}  # keys newer than the run
    previous = by_key(before["overrides"])
    for override in parse(by_key(today["overrides"]).values()):
        key, text = override.key, override.text
        is_repeated = previous.get(key) == text  # config.yaml may have the value in another form
        if override.chooses:
            choice = get(before, f"choices.{key}")
            if choice != override.value and not is_repeated:
                raise UserError(
                    f"{text}: a resumed run keeps its options ({key}={choice}). Give single keys instead, or start a "
                    "new run."
                )
            continue
        for leaf in override.leaves:
            old, new = get(before, leaf), get(today, leaf)
            secret = leaf.startswith(("callbacks.", "logger.")) and "${oc.env:" in str(old)
            if is_repeated and not secret:
                continue
            if leaf in ("ckpt_path", "init_from"):
                raise UserError(
                    f"{text}: a resumed run continues from the newest checkpoint: remove the key, or start a new run."
                )
            if not has(before, leaf) if override.deletes else old == new:
                continue
            if override.deletes:
                remove(config, leaf)
            else:
                put(config, leaf, copy.deepcopy(new))
            if not FREE.fullmatch(leaf) and not secret:
                changes[leaf] = f"{text} (the run has {shown(old) if has(before, leaf) else 'none'})"
    return config, changes


def _refuse_secrets(config: Plain, today: Plain, name: str) -> None:
    """Raise UserError if a callback or a logger but W&B would get a secret that today's config does not give it.

    The run may be somebody else's, whose callbacks could send the secret anywhere.
    """
    overridden = {leaf for override in parse(today["overrides"]) for leaf in override.leaves}
    own = {"callbacks": dict(config["callbacks"]), "logger": {**config["logger"], "wandb": None}}
    for key, value in configs.flat(own).items():
        group, entry = key.split(".")[:2]
        settings = own[group][entry]
        if settings == get(today, f"{group}.{entry}") or key in overridden:
            continue
        if re.search(r"\$\{oc\.env:\w+\}", str(value)):
            raise UserError(
                f"{key} of {name} refers to the environment, and a run that may come from somebody else gets no "
                "secret for callbacks and loggers. If the run is your own, repeat the setting: "
                f"'+{group}.{entry}={shown(settings)}'."
            )


# -- checkpoints


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest undamaged checkpoint, last.ckpt or previous.ckpt, and a line to print if last.ckpt is damaged.

    Raises:
        UserError: all checkpoints are damaged.
    """
    damaged: list[str] = []
    for name in (checkpoint_io.LAST, checkpoint_io.PREVIOUS):
        path = folder / name
        if path.is_file():
            why = checkpoint_io.damage_of(path)
            if why is None:
                return path, [f"skipped {line}; resuming from {name}" for line in damaged]
            damaged.append(f"{shown_path(path)}, which is damaged ({why})")
    if damaged:
        raise UserError(f"no undamaged checkpoint is left: {'; '.join(damaged)}. Start again from scratch.")
    return None, []


def find_ckpt(named: str, key: str, ckpt: str, logs: Path, run_dir: Path) -> Path:
    """Find the checkpoint that `init_from=` or `ckpt_path=` names: a file, a run's directory or name, or "latest".

    Of a run, `ckpt` is used, "best" or "last". `run_dir` is the directory of the run that starts.

    Raises:
        UserError: the run does not exist.
    """
    path = Path(named).expanduser()
    path = path.parent.resolve() / path.name  # a checkpoint that is a link belongs to the run that holds the link
    if path.is_file() or path.suffix in WEIGHT_FILES:
        return path
    found = ckpt_of(find_run(named, logs, ckpt, key, run_dir), ckpt)
    if ckpt == "last" and not found.is_file() and found.with_name(checkpoint_io.BEST).is_file():
        raise UserError(
            f"`{key}={named}`: the run has no last.ckpt any more (checkpoint.keep=best, or alexlab clean): start from "
            f"the weights of best.ckpt with init_from={named}."
        )
    return found


def is_own(ckpt_path: Path | str | None, run_dir: Path) -> bool:
    """Check whether a checkpoint belongs to this run, and not to another run that it started from."""
    return ckpt_path is not None and Path(ckpt_path).parent.resolve() == (run_dir / "checkpoints").resolve()


# -- the run directory; rank 0 alone, with the lock held


def reset_directory(run_dir: Path, ckpt_path: Path | None) -> list[str]:
    """Reset a resumed run's directory to the state of a checkpoint. Returns lines to print.

    Later rows of metrics.csv and a best.ckpt of later steps are removed; summary.json becomes summary.before.json.

    Args:
        ckpt_path: the checkpoint to resume from. If it is None or another run's, all rows are removed.
    """
    remove_temporary(run_dir / "checkpoints")
    summary = run_dir / "summary.json"
    if summary.is_file():
        summary.replace(run_dir / "summary.before.json")
    rows, notes = 0, []
    if ckpt_path is not None and is_own(ckpt_path, run_dir):
        checkpoint = checkpoint_io.load(ckpt_path)
        position = checkpoint_io.position_of(checkpoint)
        assert position is not None, "commands/checks.py refuses a checkpoint without one"
        rows = position["rows"]
        best, best_path = checkpoint["alexlab"]["best"], run_dir / "checkpoints/best.ckpt"
        if best_path.is_file() and checkpoint_io.load(best_path)["alexlab"].get("best") != best:
            best_path.unlink()
            later = "it was of later steps than the checkpoint, and these are trained again"
            notes.append(f"removed {shown_path(best_path)}: {later}")
    removed = cut_csv(run_dir / "metrics.csv", rows)
    again = f" (computed again: {counted(removed, 'row')} of metrics.csv)" if removed else ""
    return [*notes, f"run directory: {shown_path(run_dir)}, resumed{again}"]
