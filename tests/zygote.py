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
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import torch

# not W&B, nor timm, which imports it: its folder for temporary files would go with the first fork
import torchmetrics.classification  # noqa: F401

import alexlab.commands.figures
import alexlab.commands.train  # noqa: F401


def become(request: dict[str, Any]) -> None:
    """Turn this process into `python <words>`."""
    if request["terminal"]:
        os.setsid()  # so that the terminal, which is opened next, sends Ctrl-C to this process
    for number, path in ((0, request["stdin"]), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    faulthandler.enable(sys.stderr)
    if "OMP_NUM_THREADS" in os.environ:  # OpenMP has read it already
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if request["before"]:
        runpy.run_path(request["before"])
    for _ in range(request["ranks"]):
        ForkedRank.fork_one()
    subprocess.Popen = ForkedRank  # type: ignore[misc]
    run(request["words"])


class ForkedRank(subprocess.Popen):
    """Starts `python -m alexlab.commands.worker` as a fork that was made before this process computed anything."""

    spares: ClassVar[list[tuple[int, socket.socket]]] = []

    @classmethod
    def fork_one(cls) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child:
            theirs.close()
            cls.spares.append((child, ours))
            return
        for _, channel in [(0, ours), *cls.spares]:
            channel.close()
        message, received, *_ = socket.recv_fds(theirs, 1 << 20, 16)
        if not message:  # the run has ended
            os._exit(0)
        request = json.loads(message)
        os.setpgid(0, 0)
        sys.stdin.close()
        for opened, number in zip(received, [0, *request["pass_fds"]], strict=True):
            os.dup2(opened, number)
        os.environ.clear()
        os.environ.update(request["env"])
        sys.stdin = open(0)  # noqa: SIM115
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run(["-m", "alexlab.commands.worker"])

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *more: Any) -> None:
        if "alexlab.commands.worker" not in args or not self.spares:
            super()._execute_child(args, executable, preexec_fn, close_fds, *more)  # type: ignore[misc]
            return
        pass_fds, _, env, _, _, _, stdin, *_ = more
        self.pid, channel = self.spares.pop(0)
        self._child_created = True
        request = json.dumps({"env": env, "pass_fds": list(pass_fds)}).encode()
        socket.send_fds(channel, [request], [stdin, *pass_fds])
        os.close(stdin)


def run(words: list[str]) -> None:
    """Run `python <words>` in this process, and end it."""
    sys.argv = words
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
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
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
