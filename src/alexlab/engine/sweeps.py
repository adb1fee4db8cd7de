"""Recognize a run that W&B's agent has started. The agent starts train.py once for each run of a W&B sweep."""

import os


def agent() -> tuple[str, str] | None:
    """Return the ids of the sweep and the run if W&B's agent has started this process, or None."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (sweep, run) if sweep and run else None
