"""Runs the project's commands in forks of one process that has torch and Lightning imported already.

Each is a process of its own, as a user's would be, but starts in 0.1 seconds instead of five. Nothing is computed here
before a fork: threads of OpenMP would not survive it. Requests and answers are lines of JSON on stdin and stdout.

The workers of a run on several devices are forks too, of their command.
"""

import atexit
import faulthandler
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# not W&B, nor timm, which imports it: its folder for temporary files would go with the first fork
import torchmetrics.classification  # noqa: F401

import alexlab.commands.figures
import alexlab.commands.train  # noqa: F401
from alexlab.engine import launcher


class ForkedWorker:
    """What `launcher` uses of subprocess.Popen, for `python -m alexlab.commands.worker` in a fork of this process."""

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        sys.stdout.flush()
        reading, writing = os.pipe()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, launcher.FORWARDED)
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.close(writing)
            os.dup2(reading, 0)  # sys.stdin has read nothing yet
            for number in launcher.FORWARDED:  # as after exec
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.environ.clear()
            os.environ.update(env)
            run(command[1:])
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(reading)
        self.stdin = open(writing, "wb", buffering=0)  # noqa: SIM115
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
    launcher.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedWorker})  # type: ignore[assignment]
    run(request["words"])


def run(words: list[str]) -> NoReturn:
    """Run `python <words>` and end this process."""
    sys.argv = list(words)
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
