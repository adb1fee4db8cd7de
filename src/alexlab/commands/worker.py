"""One rank of a run on several devices: `python -m alexlab.commands.worker RUN_DIR`, started by `launch.spawn`."""

import ctypes
import signal
import sys
import traceback
from pathlib import Path

from alexlab.engine import config
from alexlab.engine import launcher as launch
from alexlab.engine.errors import RankLostError, mistake
from alexlab.engine.process import importing, leave


def end_with_parent() -> None:
    """Get SIGTERM when the parent dies, even by kill -9: no rank trains on unseen. Linux alone can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main() -> int:
    """Train; the process's exit code."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `fit_rank` takes it: no tracebacks of imports
    try:
        path = Path(sys.argv[1]) / "config.yaml"
        goes_on = config.load(path).resume.run is not None  # and may be of a run from elsewhere
        job = config.load(path, secrets=lambda key: not goes_on or key in (*config.REVEALED, "callbacks"))
        with importing():
            from alexlab.commands import train as run

        run.fit_rank(job)
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        return error.code
    except RankLostError as error:
        launch.tell_parent(lost=str(error))
        return 1
    except Exception as error:
        told = mistake(error)
        if told is not None:
            launch.tell_parent(mistake=told)
            return 2
        launch.tell_parent(failure=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
