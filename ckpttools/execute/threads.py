"""Threads that share their work, and interrupts, which may fall anywhere and must neither hang nor leak."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


def in_threads(count: int, work: Callable[[Iterable[T]], None], items: Iterable[T]) -> None:
    """Call `work` in `count` threads, each with an iterator over what no other has taken.

    Returns when every thread has ended. After an error or an interrupt the iterators end early; the
    first error is raised.
    """
    rest = iter(items)
    lock = threading.Lock()
    stop = False
    errors: list[BaseException] = []
    # An event stays set: no interrupt, wherever it falls, can lose it, as it can with Thread.join
    # (bpo-45274) or a count.
    ended = [threading.Event() for _ in range(count)]

    def take() -> T | None:
        with lock:
            return None if stop or errors else next(rest, None)

    def run(event: threading.Event) -> None:
        try:
            work(iter(take, None))
        except BaseException as error:
            errors.append(error)
        finally:
            event.set()

    threads = [threading.Thread(target=run, args=(event,)) for event in ended]
    try:
        for thread in threads:
            thread.start()
        for event in ended:
            event.wait()
    finally:
        stop = True
        for thread, event in zip(threads, ended, strict=True):
            if thread.ident is not None:
                event.wait()
    if errors:
        raise errors[0]


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
