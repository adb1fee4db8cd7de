"""Find which run starts: a new one, the one that `resume=` names, or one like that of `from_run=`. Writes nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alexlab.commands import from_run, sweep
from alexlab.engine import mirror, resume, run_dir
from alexlab.engine.config import flat
from alexlab.engine.overrides import by_key, get, put
from alexlab.engine.ranks import MACHINE, Ranks
from alexlab.engine.schema import TrainConfig
from alexlab.engine.targets import Trusted, check_targets, packages_of
from alexlab.engine.validation import validate
from alexlab.tasks import hub


@dataclass(frozen=True)
class Start:
    """How a run starts: the final config, and what follows from it."""

    config: TrainConfig
    notes: list[str] = field(default_factory=list)  # printed once, and written to train.log
    # packages that `_target_` may name; None: any, for the config of your own command line
    trusted: Trusted = None
    is_finished: bool = False  # the run that `resume=auto` names is complete: nothing to do
    # images, as `ImageFolders.describe` returns them -> how images and code differ from those of the run that from_run
    # names
    compare: Callable[[dict[str, Any]], list[str]] = lambda dataset: []

    def plain(self) -> dict[str, Any]:
        """Return plain values for the remaining ranks, without `compare`, which only rank 0 calls."""
        config = self.config.model_dump(exclude_unset=True)
        return {"config": config, "notes": self.notes, "trusted": self.trusted, "is_finished": self.is_finished}

    @staticmethod
    def of(plain: dict[str, Any]) -> "Start":
        return Start(**{**plain, "config": TrainConfig.model_validate(plain["config"])})


def find_start(config: TrainConfig) -> Start:
    """Return how the run starts, with the final config.

    Raises:
        UserError: the run does not exist, or the overrides do not fit it.
    """
    plain, notes, compare = config.model_dump(exclude_unset=True), [], Start.compare
    # of a run's config, only what this command allows or names itself
    allowed, trusted = sorted({*config.allow, *packages_of(plain)}), None
    path, logs = Path(config.run_dir), config.paths.local

    # runs in a bucket
    if config.resume.run == "auto":
        mirror.download_run(config.paths, path)
    else:
        mirror.download_named(config.paths, config.resume.run)
    for named, ckpt in ((config.from_run, "best"), (config.init_from, "best"), (config.ckpt_path, "last")):
        mirror.download_named(config.paths, named, ckpt)

    # from_run=, from_wandb=: the config of that run
    repeated = from_run.repeat(plain)
    if repeated is not None:
        plain, compare = repeated.config, repeated.compare
        notes += repeated.notes
        trusted = allowed

    # resume=: the config, the directory and the newest checkpoint of that run
    if config.resume.run is not None:
        resumed = resume.resume_config(plain)
        plain = resumed.config
        notes += resumed.notes
        if resumed.finished:
            return Start(validate(TrainConfig, plain), notes, trusted, is_finished=True)
        if resumed.resumes:  # the run may be somebody else's
            trusted = allowed
            check_targets([plain["callbacks"], plain["logger"]], trusted)
        path = resumed.run_dir

    plain["allow"] = allowed  # not what the config of a run says

    # init_from=, ckpt_path=: a file
    is_own = resume.is_own(plain.get("ckpt_path"), path)
    if plain.get("init_from") and plain.get("ckpt_path") and not is_own:
        notes.append(f"note: init_from is ignored: ckpt_path={plain['ckpt_path']} has the weights to continue with.")
        plain["init_from"] = None
    teacher = plain.get("task", {}).get("teacher")
    if isinstance(teacher, str):
        plain["task"]["teacher"] = str(find_ckpt(teacher, "task.teacher", "best", logs, path))
    for key, ckpt in (("init_from", "best"), ("ckpt_path", "last")):
        if plain.get(key) is not None and not is_own:
            plain[key] = str(find_ckpt(plain[key], key, ckpt, logs, path))
    if not (plain["resume"]["run"] and resume.holds_run(path)):
        run_dir.check_new(path)
    return Start(validate(TrainConfig, plain), notes, trusted, compare=compare)


def agree(ranks: Ranks, config: TrainConfig) -> Start:
    """Let rank 0 find how the run starts, for all ranks.

    Raises:
        UserError: see `find_start`; or the ranks were started with different settings.
    """
    if ranks.size == 1:
        return find_start(config)
    today = config.model_dump(exclude_unset=True)
    ranks.check_same(today, "Start all ranks with the same command line and the same yaml files.")
    found: list[Start] = []

    def find() -> list[dict[str, Any]]:
        found.append(find_start(config))
        return [found[0].plain(), flat(today)]

    plain, first = ranks.first(find)
    if found:
        return replace(Start.of(plain), compare=found[0].compare)
    given = by_key(config.overrides)
    for key, value in flat(today).items():  # paths of this machine, unless the run's config has another one
        is_todays = key.startswith("paths.") or key in given or get(plain["config"], key) == first.get(key)
        if MACHINE.fullmatch(key) and key not in ("run_dir", "overrides") and value != first.get(key) and is_todays:
            put(plain["config"], key, value)
    if plain["config"]["run_dir"] != config.run_dir:
        sweep.remove_empty(Path(config.run_dir), Path(config.run_dir).parent)
    return Start.of(plain)


def find_ckpt(named: str, key: str, ckpt: str, logs: Path, path: Path) -> Path:
    """Find the checkpoint that the value of `key` names, see `resume.find_ckpt`; download that of a W&B artifact."""
    if named.startswith("wandb:"):
        from alexlab.loggers.wandb_api import fetch_checkpoint

        return fetch_checkpoint(named, key, logs / ".artifacts")
    if key == "init_from" and (folder := hub.folder_of(named)) is not None:
        return folder / hub.WEIGHTS
    return resume.find_ckpt(named, key, ckpt, logs, path)
