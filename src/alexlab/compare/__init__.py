"""Runs beside each other: read from their directories, filtered, grouped, and shown as a table or a page."""
