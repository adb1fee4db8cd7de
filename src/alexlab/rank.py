"""One rank of a run on several devices: `python -m alexlab.rank RUN_DIR`, started by `launch.spawn`."""

import sys
from pathlib import Path

from alexlab import config, run
from alexlab.errors import UserError


def main() -> None:
    try:
        run.fit_rank(config.load(Path(sys.argv[1]) / "config.yaml"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
