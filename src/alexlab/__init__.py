"""Image classification experiments. `load(run)` returns a trained network, `runs()` a pandas DataFrame of all runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexlab.analysis.compare import load_runs
    from alexlab.tasks.load import load as load

    runs = load_runs


def __getattr__(name: str) -> Any:
    """Import `alexlab.load` and `alexlab.runs` when they are first used: `--help` must not wait for torch or pandas."""
    if name == "load":
        from alexlab.tasks.load import load

        return load
    if name == "runs":
        from alexlab.analysis.compare import load_runs

        return load_runs
    raise AttributeError(f"module 'alexlab' has no attribute {name!r}")
