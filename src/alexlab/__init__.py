"""Image classification experiments; `load(run)` gives a trained network for use elsewhere."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexlab.tasks.load import load as load


def __getattr__(name: str) -> Any:
    """`alexlab.load`, imported when it is asked for: the commands' --help must not wait for torch."""
    if name == "load":
        from alexlab.tasks.load import load

        return load
    raise AttributeError(f"module 'alexlab' has no attribute {name!r}")
