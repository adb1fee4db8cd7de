"""Image classification experiments, for a notebook: `train(*overrides)` returns a run's directory, `load(run)` the
trained network, `runs()` a pandas DataFrame of all runs, and `curves(run)` one of a run's metrics."""

import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # before any import of fcntl and the like
    print("error: alexlab needs file locks and signals of Linux or macOS. On Windows, use WSL 2.", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from alexlab.analysis.compare import load_runs
    from alexlab.analysis.runs import curves as curves
    from alexlab.commands.cli import train as train
    from alexlab.tasks.load import load as load

    runs = load_runs


def __getattr__(name: str) -> Any:
    """Import these functions when they are first used: `--help` must not wait for torch or pandas."""
    if name == "train":
        from alexlab.commands.cli import train

        return train
    if name == "load":
        from alexlab.tasks.load import load

        return load
    if name == "runs":
        from alexlab.analysis.compare import load_runs

        return load_runs
    if name == "curves":
        from alexlab.analysis.runs import curves

        return curves
    raise AttributeError(f"module 'alexlab' has no attribute {name!r}")
