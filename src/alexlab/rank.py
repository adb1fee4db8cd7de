"""One rank of a run on several devices: `python -m alexlab.rank RUN_DIR`, started by `launch.spawn`."""

import ctypes
import signal
import sys
import traceback
from pathlib import Path

from alexlab import config, launch
from alexlab.data import workers
from alexlab.errors import mistake


def end_with_parent() -> None:
    """Get SIGTERM when the parent dies, even by kill -9: no rank trains on unseen. Linux alone can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `fit_rank` takes it: no tracebacks of imports
    try:
        job = config.load(Path(sys.argv[1]) / "config.yaml")
        if job.data.num_workers != 0 and sys.platform == "linux":
            workers.start_server()

        from alexlab import run

        run.fit_rank(job)
    except Exception as error:
        told = mistake(error)
        if told is not None:
            launch.tell_parent(mistake=told)
            sys.exit(2)
        launch.tell_parent(failure=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        sys.exit(1)


if __name__ == "__main__":
    main()
