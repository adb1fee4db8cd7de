"""`alexlab clean`: delete checkpoints of finished runs; without dry_run=false it only says which."""

from alexlab.analysis import compare
from alexlab.analysis import runs as reading
from alexlab.engine import checkpoint_io
from alexlab.engine.errors import UserError, counted
from alexlab.engine.files import RANK_LOCK, lock
from alexlab.engine.run_dir import shown
from alexlab.engine.schema import CleanConfig


def clean(config: CleanConfig) -> None:
    """Delete the checkpoints that `config.keep` does not keep, of finished runs that nobody trains further.

    Raises:
        UserError: no run was found, or `where` is not a condition.
    """
    names = [config.runs] if isinstance(config.runs, str) else config.runs
    folders, missing = reading.find(names, config.paths.local / "train")
    runs, skipped = reading.read(folders)
    if not runs:
        raise UserError(f"`runs={config.runs}`: {' '.join([*missing, *skipped[:3]])} Give a folder with runs.")
    if config.where is not None:
        runs = [runs[number] for number in compare.select(runs, config.where)]
    finished = [run for run in runs if run.status == "finished"]  # a run that trains is "running"
    total, cleaned = 0, 0
    for run in finished:
        folder = run.path / "checkpoints"
        names, why = checkpoint_io.not_kept(folder, config.keep)
        if why is not None:
            print(f"skipped: {shown(folder)}, because {why}", flush=True)
        if names:
            size = sum((folder / name).stat().st_size for name in names)
            print(f"{shown(folder)}: {', '.join(names)} ({size / 1e6:,.0f} MB)", flush=True)
            total, cleaned = total + size, cleaned + 1
        if names and not config.dry_run:
            with lock(run.path, RANK_LOCK):  # a run that is resumed just now has it
                checkpoint_io.remove(folder, names)
    for line in (*missing, *skipped):
        print(f"skipped: {line}")
    if len(finished) < len(runs):
        print(f"skipped: {counted(len(runs) - len(finished), 'run')} that did not finish, or that still train")
    end = "; to delete it: dry_run=false" if config.dry_run and total else ""
    done = "would be deleted" if config.dry_run else "deleted"
    print(f"{total / 1e9:,.2f} GB of {counted(cleaned, 'run')} {done}{end}")
