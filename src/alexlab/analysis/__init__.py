"""Runs as data: read, compared, plotted. No training code."""
