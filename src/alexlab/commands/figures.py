"""`alexlab figures`: test a run again and draw all figures."""

from alexlab.analysis import gallery
from alexlab.callbacks.media import Media
from alexlab.commands import evaluate
from alexlab.engine import mirror
from alexlab.engine import run_dir as run_dirs
from alexlab.engine.files import refuse_link
from alexlab.engine.schema import FiguresConfig


def redraw(config: FiguresConfig) -> None:
    """Draw the figures of a run from a checkpoint, and print the paths."""
    mirror.download_named(config.paths, config.run, config.ckpt)
    run_dir = run_dirs.find_run(config.run, config.paths.local, config.ckpt)
    refuse_link(run_dir / "figures")
    media = Media(run_dir / "figures", weights=run_dirs.ckpt_of(run_dir, config.ckpt).name, kind=config.format)
    tested = evaluate.score(config, run_dir, callbacks=[media])
    monitor, device = tested.config.monitor, tested.device
    drawn = gallery.draw(run_dir, tested.data, monitor, config.ckpt, config.among, device, config.allow, config.format)
    for path in [*media.written, *drawn]:
        print(run_dirs.shown(path), flush=True)
