"""What keeps a run safe and repeatable; knows nothing of networks."""
