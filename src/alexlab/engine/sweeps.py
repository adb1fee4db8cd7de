"""W&B's agent, which starts train.py once for each run of a W&B sweep."""

import os


def agent() -> tuple[str, str] | None:
    """Return W&B's names of the sweep and of the run if W&B's agent has started this process; else None."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (sweep, run) if sweep and run else None
