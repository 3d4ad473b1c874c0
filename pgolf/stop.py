"""Being asked to end: every signal that does so becomes an exception, so that code can tidy up.

Ctrl-C, `kill`, a terminal that is closed, and the warnings that schedulers send before they kill
(SIGUSR1, SIGUSR2, SIGXCPU).
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# By name: not every system has all of them.
_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """The process was asked to end by `number`, a signal; like Ctrl-C, it is no Exception."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> None:
    # The next ones must not end what tidies up: schedulers repeat themselves.
    for other in SIGNALS:
        if signal.getsignal(other) is _stop:
            signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *more: int) -> Iterator[None]:
    """Let `handler` take SIGNALS, but for those that are ignored, as under nohup, and `more`."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other one may
        for number in (*more, *SIGNALS):
            if number in more or signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the block for the first of SIGNALS that comes."""
    with handled(_stop):
        yield
