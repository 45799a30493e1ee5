"""Signals that end a process, as exceptions, so that what was begun is cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminating_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `SystemExit`, where they would end the process without any cleaning up."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP) if is_main else ()
    default = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in default:
            signal.signal(number, leave)
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)
