"""Test a run anew and draw all its figures: the task of figures.py."""

from pathlib import Path

from omegaconf import DictConfig

from alexlab.analysis import gallery
from alexlab.callbacks.media import Media
from alexlab.commands import evaluate
from alexlab.engine import run_dir as rundir
from alexlab.engine.files import refuse_link


def redraw(config: DictConfig) -> None:
    """Draw the figures of a run from one of its checkpoints, and print their files.

    Raises:
        UserError: no such run, checkpoint or images.
    """
    run_dir = rundir.find_run(str(config.run), Path(config.paths.logs), str(config.ckpt))
    refuse_link(run_dir / "figures")
    media = Media(run_dir / "figures", weights=rundir.ckpt_of(run_dir, str(config.ckpt)).name)
    tested = evaluate.score(config, run_dir, [media])
    drawn = gallery.draw(run_dir, tested.data, tested.config.monitor, str(config.ckpt), config.among, tested.device)
    for path in [*media.written, *drawn]:
        print(rundir.shown(path), flush=True)
