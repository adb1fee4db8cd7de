#!/usr/bin/env bash
# All that this project promises about GPUs, in at most eight minutes: benchmarks/gpu.sh [--minutes 8]
# It needs the checkout and a Python with torch. What needs a package that is missing is skipped by name.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
PYTHONPATH="src:${PYTHONPATH:-}" exec "$python" benchmarks/gpu.py "$@"
