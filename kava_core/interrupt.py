"""SIGINT and SIGTERM end a program in good order, even where a library swallows their exception.

Python raises what a signal's handler raises wherever the main thread is: in a finaliser, where it
is only reported, or below a library's `except BaseException`, where it is lost. The program would
go on as if nothing had been said.
"""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

AGAIN = 0.05  # seconds until an exception that a finaliser swallowed is raised once more


@dataclass
class _End:
    """received: the first signal; settled: it has arrived where the program ends."""

    received: int | None = None
    settled: bool = False


_end = _End()


def receive_signals() -> None:
    """From now on they end this program, unless whoever started it wants it to ignore them, as a
    shell does for its background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _receive)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _receive)


def settle() -> int | None:
    """The first of them that has arrived; from now on nothing is raised again."""
    _end.settled = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    return _end.received


def check() -> None:
    """Raise once more what has arrived: to be called where work goes on."""
    main = threading.current_thread() is threading.main_thread()
    if main and _end.received is not None and not _end.settled:
        _raise(_end.received)


def _receive(number: int, _: FrameType | None) -> None:
    _end.received = _end.received or number
    # What other threads and finalisers make of the end is not worth a word.
    sys.unraisablehook = _swallowed
    threading.excepthook = _say_nothing
    _raise(number)


def _raise(number: int) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, 0)  # what is cleaned up on the way out is left alone
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _swallowed(found: Any) -> None:
    """A finaliser's exception; if it was the end of the program, that comes a moment later."""
    end = isinstance(found.exc_value, KeyboardInterrupt | SystemExit) and not _end.settled
    if end and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, lambda *_: check())
        signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _say_nothing(_: object) -> None:
    pass
