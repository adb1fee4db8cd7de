"""Read, compare and plot runs. No training code."""
