"""LightningModules: what is trained, with loss, metrics and optimizer. Start with classification.py."""
