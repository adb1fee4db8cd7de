"""Loggers of a run: metrics.csv and Weights & Biases."""
