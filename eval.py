"""Evaluate a run: python eval.py run=latest  (or a run's directory; --help lists every key)."""

import sys

try:
    from alexlab.commands.cli import run
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.")

if __name__ == "__main__":
    run("eval")
