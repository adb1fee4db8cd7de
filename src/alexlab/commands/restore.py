"""`resume=`: the config, directory and newest whole checkpoint of a run, to go on as if it had not been ended."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from alexlab.commands.resume import KEPT_ON_RESUME
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import launcher as launch
from alexlab.engine import rules
from alexlab.engine import run_dir as rundir
from alexlab.engine.config import CONF
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import shown
from alexlab.loggers import csv_logger as metrics

# what changes nothing of what a run computes, but how far it goes and how it is seen
FREE = (
    "trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.timeout", "trainer.master_port",
    "data.num_workers", "data.cache", "callbacks.progress", "checkpoint.", "resume.", "dry_run", "paths.",
    "on_nan", "data.on_error", "data.max_bad",
)  # fmt: skip


def restore(config: DictConfig) -> DictConfig | None:
    """The config to go on with, whose `ckpt_path` is the checkpoint, if there is one.

    Args:
        config: as the command line composed it; its words that differ from the run's own config must be allowed.

    Returns:
        None where resume=auto finds a run that is finished, with nothing to add.

    Raises:
        UserError: no such run, one that has no whole checkpoint, or words that change it.
    """
    named = config.resume.run
    own = Path(config.run_dir)
    if named == "auto" and not (own / "config.yaml").is_file():
        tell(f"resume=auto: {rundir.shown(own)} holds no run yet: a new one starts.")
        return config
    run_dir = own if named == "auto" else find(named, Path(config.paths.logs))
    before = configs.load(run_dir / "config.yaml", secrets=lambda key: key in configs.REVEALED)
    if not {"overrides", "trainer", "model", "data"} <= set(before):
        raise UserError(f"{run_dir / 'config.yaml'} is not whole: start the run anew.")
    rundir.refuse_link(run_dir / "figures")
    changed, changes = changed_by(config, before)
    if changes and not config.resume.allow_changes:
        allowed = not any(key.startswith(KEPT_ON_RESUME) for key in changes)
        raise UserError(
            f"resume={named}: {rundir.shown(run_dir)} was started with other settings: {', '.join(changes.values())}. "
            f"Leave them out{', or say resume.allow_changes=true' if allowed else ''}; a new run with them begins with "
            f"its weights by init_from={named}, or anew by from_run={named}."
        )
    changed.resume = config.resume
    changed.run_dir, changed.dry_run = str(run_dir), config.dry_run
    new = by_key(word for word in config.overrides if not word.startswith("resume."))
    # in their order, as a rank that reads what the first one has just written must come to the same config
    changed.overrides = list((by_key(before.overrides) | new).values())
    changed.init_from = changed.ckpt_path = None
    rules.check(changed)
    check_callbacks(changed, run_dir)
    found = newest(run_dir / "checkpoints")
    if found is None and named != "auto":
        raise UserError(
            f"resume={named}: {rundir.shown(run_dir)} has no checkpoint to go on from: start it anew, or say "
            f"resume=auto hydra.run.dir={rundir.shown(run_dir)}, which begins where there is none."
        )
    if found is None:
        tell(f"resume=auto: {rundir.shown(run_dir)} has no checkpoint yet: its run begins anew.")
        changed.init_from, changed.ckpt_path = before.init_from, before.ckpt_path
        return changed
    changed.ckpt_path = str(found)
    if rundir.read_summary(run_dir).get("status") == "finished" and not adds(changed, before):
        if named == "auto":
            tell(f"resume=auto: {rundir.shown(run_dir)} is finished.")
            return None
        raise UserError(
            f"resume={named}: {rundir.shown(run_dir)} is finished: a larger trainer.max_epochs than its "
            f"{before.trainer.max_epochs} prolongs it."
        )
    return changed


def check_callbacks(config: DictConfig, run_dir: Path) -> None:
    """Raises UserError where the run's own callbacks, which may be anybody's, would be given a secret."""
    for key, value in configs.flat({"callbacks": configs.plain(config.callbacks)}).items():
        name = re.search(r"\$\{(oc\.env:\w+)\}", str(value))
        if name is not None:
            raise UserError(
                f"{key} of {rundir.shown(run_dir)} refers to the environment: a run that may come from elsewhere does "
                f"not get a secret for what it calls. If it is yours, give it again: '{key}=${{{name[1]}}}'."
            )


def find(named: str, logs: Path) -> Path:
    """The directory of a run to go on with; the latest of all must be one that can."""
    run_dir = rundir.find_run(named, logs, checkpoint.LAST.removesuffix(".ckpt"), "resume")
    newest_of_all = rundir.find_run(named, logs, "", "resume")
    if run_dir != newest_of_all:
        raise UserError(
            f"resume={named}: the latest run, {rundir.shown(newest_of_all)}, has no checkpoint yet: start it anew, or "
            f"name the one before it, resume={rundir.shown(run_dir)}."
        )
    return run_dir


def tell(text: str) -> None:
    if launch.tells():
        print(text, flush=True)


def adds(config: DictConfig, before: DictConfig) -> bool:
    """Whether the run is to go farther than before."""
    ends = ("max_epochs", "max_steps", "max_time")
    return any(config.trainer.get(end) != before.trainer.get(end) for end in ends)


def by_key(words: Iterable[str]) -> dict[str, str]:
    """A command line's words, the last one of each key."""
    return {word.lstrip("+~").partition("=")[0]: word for word in words}


def changed_by(config: DictConfig, before: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """The run's config with the command line's words in it, and by their keys those of them that say something else
    than the run's own.

    Raises:
        UserError: a word that would exchange a whole group, or name another start.
    """
    changed = configs.create(configs.plain(before))
    OmegaConf.set_struct(changed, False)
    for key in config:
        if key not in changed:  # came later than the run
            changed[key] = config[key]
    changes: dict[str, str] = {}
    said = by_key(before.overrides)
    for key, word in by_key(config.overrides).items():
        if key.startswith("callbacks.") and "${oc.env:" in str(OmegaConf.select(before, key)):
            OmegaConf.update(changed, key, OmegaConf.select(config, key), force_add=True)
            continue
        if said.get(key) == word:  # what the run has, in the same words; it may show it in others
            continue
        if (CONF / key).is_dir():
            choice = before.get("choices", {}).get(key)
            if choice != word.partition("=")[2]:
                raise UserError(
                    f"{word}: a run that goes on keeps its options (there {key}={choice}), whose keys can be given one "
                    "by one; or start a new run."
                )
            continue
        if key in ("ckpt_path", "init_from"):
            raise UserError(f"{word}: a run that goes on has its own checkpoint: leave it out, or start a new run.")
        there, here = OmegaConf.select(before, key), OmegaConf.select(config, key)
        if there == here and not word.startswith("~"):
            continue
        if word.startswith("~"):
            parent, _, name = key.rpartition(".")
            OmegaConf.select(changed, parent).pop(name, None)
        else:
            OmegaConf.update(changed, key, here, force_add=True)
        if not key.startswith(FREE):
            changes[key] = f"{word} (there {shown(there)})"
    return changed, changes


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; says what it passes over.

    Raises:
        UserError: there are some, and none of them is whole.
    """
    passed: list[str] = []
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        why = checkpoint.why_damaged(path)
        if why is None:
            for line in passed:
                tell(f"passed over {line}; going on from {name}")
            return path
        passed.append(f"{rundir.shown(path)}, which is damaged ({why})")
    if passed:
        raise UserError(f"no whole checkpoint is left: {'; '.join(passed)}. Start anew.")
    return None


def goes_on(config: DictConfig) -> bool:
    """Whether the run's directory is one that it was in before."""
    return config.resume.run is not None and (Path(config.run_dir) / "config.yaml").is_file()


def own_ckpt(config: DictConfig) -> bool:
    """Whether `ckpt_path` is the run's own, and not that of another which it began with."""
    if config.ckpt_path is None:
        return False
    return Path(config.ckpt_path).parent.resolve() == Path(config.run_dir, "checkpoints").resolve()


def drop_later_best(path: Path, best: dict[str, float]) -> None:
    """Remove a best.ckpt of later steps than the checkpoint: they are done again, and make it again if they are
    better."""
    if path.is_file() and checkpoint.load(path)["alexlab"].get("best") != best:
        path.unlink()
        tell(f"{rundir.shown(path)} was of later steps than the checkpoint, and is removed: they are done again")


def take_up(config: DictConfig) -> None:
    """Make the directory of a run that goes on what it was at its checkpoint; on the first rank alone."""
    run_dir = Path(config.run_dir)
    checkpoint.sweep(run_dir / "checkpoints")
    configs.save(config, run_dir / "config.yaml")
    summary = run_dir / "summary.json"
    if summary.is_file():  # of how it ended then
        summary.replace(run_dir / "summary.before.json")
    rows = 0
    if own_ckpt(config):
        found = checkpoint.load(Path(config.ckpt_path))["alexlab"]
        rows = found["place"]["rows"]
        drop_later_best(run_dir / "checkpoints/best.ckpt", found["best"])
    taken = metrics.truncate(run_dir / "metrics.csv", rows)
    again = f" ({taken} rows of metrics.csv are worked out again)" if taken else ""
    print(f"run directory: {rundir.shown(run_dir)}, which goes on{again}", flush=True)


@contextlib.contextmanager
def locked(run_dir: Path, name: str = ".lock") -> Iterator[None]:
    """Keep other processes from writing to a run's directory; ends with the process, however that ends.

    Raises:
        UserError: another process does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    file = os.open(run_dir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run_dir} is a run that is still going on: wait for it, or end it first.") from None
        yield
    finally:
        os.close(file)
