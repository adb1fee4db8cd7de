"""Runs the project's commands in forks of one process that has torch and Lightning imported already.

Each is a process of its own, as a user's would be, but starts in 0.1 seconds instead of five. Nothing is computed here
before a fork: threads of OpenMP would not survive it. Requests and answers are lines of JSON on stdin and stdout.
"""

import atexit
import faulthandler
import gc
import json
import os
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

# not W&B, nor timm, which imports it: its folder for temporary files would go with the first fork
import torchmetrics.classification  # noqa: F401

import alexlab.commands.figures
import alexlab.commands.train  # noqa: F401


def become(request: dict[str, Any]) -> None:
    """Turn this process into `python <words>`."""
    for number, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    faulthandler.enable(sys.stderr)
    sys.argv = request["words"]
    code = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.path[0] = str(Path.cwd())
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH120, PTH100
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    # as the interpreter ends, but for taking torch's thousands of objects apart, which takes a second
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    gc.freeze()  # what is here is shared with the forks, not copied by their collections
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        print(json.dumps({"pid": child}), flush=True)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
    os._exit(0)


main()
