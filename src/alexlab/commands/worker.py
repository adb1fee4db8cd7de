"""One rank of a run on several devices: `python -m alexlab.commands.worker` reads the config from standard input."""

import ctypes
import json
import signal
import sys

from alexlab.engine import launcher, schema
from alexlab.engine.config import masker
from alexlab.engine.errors import RankLostError, mistake, short_traceback
from alexlab.engine.process import complete_environment, importing, leave


def stop_with_parent() -> None:
    """Get SIGTERM when the parent dies, even by kill -9, so that no rank trains on alone. Works on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main() -> int:
    """Train as one rank; return the exit code."""
    stop_with_parent()
    complete_environment()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run handles it: no tracebacks of imports
    payload = json.load(sys.stdin)
    config = schema.TrainConfig.model_validate(payload["config"])
    mask = masker(payload["config"])
    try:
        with importing():
            from alexlab.commands import train
            from alexlab.commands.start import Start
            from alexlab.engine.ranks import meet

        with train.stopping_on_signals(config) as recorder:
            train.train_rank(Start.of(payload), recorder, meet(config.trainer.timeout))
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        return error.code
    except RankLostError as error:
        launcher.report_to_parent(lost=mask(str(error)))
        return 1
    except Exception as error:
        text = mistake(error)
        if text is not None:
            launcher.report_to_parent(mistake=mask(text))
            return 2
        failure = f"{type(error).__name__}: {error}"
        launcher.report_to_parent(failure=mask(failure), traceback=mask(short_traceback(error)))
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
