"""`resume=`: the config, directory and newest whole checkpoint of a run, to go on as if it had not been ended."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from alexlab import checkpoint, launch, rules, rundir
from alexlab import config as configs
from alexlab.config import CONF
from alexlab.errors import UserError
from alexlab.kinds import shown
from alexlab.loggers import metrics

# what changes nothing of what a run computes, but how far it goes and how it is seen
FREE = (
    "trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.timeout", "trainer.master_port",
    "data.num_workers", "data.cache", "callbacks.progress", "checkpoint.", "resume.", "dry_run", "hydra.",
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
    run_dir = own if named == "auto" else rundir.find_run(named, Path(config.paths.logs), "last", "resume")
    before = configs.load(run_dir / "config.yaml")
    changed, changes = changed_by(config, before)
    if changes and not config.resume.allow_changes:
        raise UserError(
            f"resume={named}: {rundir.shown(run_dir)} was started with other settings: {', '.join(changes)}. Leave "
            "them out, or say resume.allow_changes=true."
        )
    changed.resume = config.resume
    changed.run_dir, changed.dry_run = str(run_dir), config.dry_run
    changed.overrides = [*before.overrides, *(w for w in config.overrides if not w.startswith("resume."))]
    changed.init_from = changed.ckpt_path = None
    rules.check(changed)
    found = newest(run_dir / "checkpoints")
    if found is None and named != "auto":
        raise UserError(
            f"resume={named}: {rundir.shown(run_dir)} has no checkpoint to go on from: start it anew, or say "
            f"resume=auto hydra.run.dir={rundir.shown(run_dir)}, which begins where there is none."
        )
    if found is None:
        tell(f"resume=auto: {rundir.shown(run_dir)} has no checkpoint yet: its run begins anew.")
        changed.init_from = before.init_from
        return changed
    changed.ckpt_path = str(found)
    if named == "auto" and rundir.read_summary(run_dir).get("status") == "finished" and not adds(changed, before):
        tell(f"resume=auto: {rundir.shown(run_dir)} is finished.")
        return None
    return changed


def tell(text: str) -> None:
    if launch.tells():
        print(text, flush=True)


def adds(config: DictConfig, before: DictConfig) -> bool:
    """Whether the run is to go farther than before."""
    ends = ("max_epochs", "max_steps", "max_time")
    return any(config.trainer.get(end) != before.trainer.get(end) for end in ends)


def changed_by(config: DictConfig, before: DictConfig) -> tuple[DictConfig, list[str]]:
    """The run's config with the command line's words in it, and those of them that say something else than the run's
    own."""
    changed = OmegaConf.create(configs.plain(before))
    OmegaConf.set_struct(changed, False)
    for key in config:
        if key not in changed:  # came later than the run
            changed[key] = config[key]
    changes: list[str] = []
    words = {word.lstrip("+~").partition("=")[0]: word for word in config.overrides}  # the last one counts
    for key, word in words.items():
        if (CONF / key).is_dir():
            choice = word.partition("=")[2]
            if before.get("choices", {}).get(key) != choice:
                changes.append(f"{word} (there {before.get('choices', {}).get(key)})")
                changed[key] = config.get(key)
                changed.choices[key] = choice
            continue
        there, here = OmegaConf.select(before, key), OmegaConf.select(config, key)
        if there == here and not word.startswith("~"):
            continue
        OmegaConf.update(changed, key, here, force_add=True)
        if not key.startswith(FREE):
            changes.append(f"{word} (there {shown(there)})")
    return changed, changes


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; says what it passes over, and removes what a kill left.

    Raises:
        UserError: there are some, and none of them is whole.
    """
    if launch.rank() == 0 and folder.is_dir():
        checkpoint.sweep(folder)
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


def take_up(config: DictConfig) -> None:
    """Make the directory of a run that goes on what it was at its checkpoint; on the first rank alone."""
    run_dir = Path(config.run_dir)
    configs.save(config, run_dir / "config.yaml")
    summary = run_dir / "summary.json"
    if summary.is_file():  # of how it ended then
        summary.replace(run_dir / "summary.before.json")
    rows = 0
    if config.ckpt_path is not None:
        rows = checkpoint.load(Path(config.ckpt_path))["alexlab"]["place"]["rows"] or 0
    taken = metrics.cut_back(run_dir / "metrics.csv", rows)
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
    file = os.open(run_dir / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run_dir} is a run that is still going on: wait for it, or end it first.") from None
        yield
    finally:
        os.close(file)
