"""Loggers beside Lightning's own."""
