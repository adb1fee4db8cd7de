"""Record signals that stop a run, so that it can end in order and say how it stopped."""

import bdb
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def of_submitit() -> signal.Signals | None:
    """Return the signal with which submitit stops this process before it is preempted or the time is over: SIGUSR2, or
    what SUBMITIT_PREEMPT_SIGNAL names. None if submitit has not started this process."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def stopping() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a run."""
    more = of_submitit()
    return SIGNALS if more is None or more in SIGNALS else (*SIGNALS, more)


def of_stacks() -> signal.Signals:
    """Return the signal after which a process prints where the threads are: SIGUSR2, or SIGQUIT under submitit."""
    return signal.SIGQUIT if of_submitit() == signal.SIGUSR2 else signal.SIGUSR2


class Preempted(BaseException):
    """A signal stopped the run; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def _in_debugger(frame: FrameType | None) -> bool:
    """Check whether a debugger such as pdb waits for a command, or executes one, at `frame`."""
    while frame is not None:
        if frame.f_code.co_name == "interaction" and isinstance(frame.f_locals.get("self"), bdb.Bdb):
            return True
        frame = frame.f_back
    return False


class SignalRecorder:
    """Record the first signal.

    Attributes:
        number: of the signal, or 0.
        is_polled: whether the training loop will read `number`. If not, the handler raises Preempted at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.is_polled = False

    def record(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C raises Preempted at once, and a debugger's prompt gets KeyboardInterrupt."""
        if number == signal.SIGINT and _in_debugger(frame):
            raise KeyboardInterrupt
        second = self.number and number == signal.SIGINT
        self.number = self.number or number
        if second or not self.is_polled:
            raise Preempted(number)

    @contextlib.contextmanager
    def recording(self, signals: Sequence[signal.Signals] | None = None) -> Iterator["SignalRecorder"]:
        """Handle signals, by default all that stop a run, while the block runs."""
        previous = {number: signal.signal(number, self.record) for number in signals or stopping()}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let signals wait until the block has ended, because the code in it may swallow exceptions."""
        self.is_polled = True
        try:
            yield
        finally:
            self.is_polled = False
        if self.number:
            raise Preempted(self.number)
