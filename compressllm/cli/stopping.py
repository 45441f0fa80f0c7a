"""What a signal that asks the program to stop does: it ends cleanly, with one line that says how to go on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

#: Ctrl-C, what `kill` and batch systems send, and what a closed terminal sends.
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The program was asked to stop. No error that a library might catch: everything is left as after a failure.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.kept = "nothing half-written is left"

    @property
    def code(self) -> int:
        """The exit code, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        command = shlex.join(["compressllm", *sys.argv[1:]])
        return f"interrupted by {signal.Signals(self.number).name}; {self.kept}; go on with: {command}"


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Have the signals raise `Stopped` in this thread, the main one, for as long as the context lasts.

    A signal that is ignored, as SIGHUP is under nohup, stays so; processes of a launcher die of them at once, as what
    they wait for in a library would not be interrupted.
    """
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in heard:
            signal.signal(number, _stop)
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number] or signal.SIG_DFL)


@contextlib.contextmanager
def keeping(kept: str) -> Iterator[None]:
    """Say what is kept, should the work in this context be stopped."""
    try:
        yield
    except Stopped as stopped:
        stopped.kept = kept
        raise


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
