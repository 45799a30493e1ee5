"""Threads that share their work; an interrupt may fall anywhere and must neither hang nor leak."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
WIDTH = 8  # files by turns; the same for every writer, so that all of them see the same order


def count(workers: int) -> int:
    """How many threads: what was asked for, or, for 0, one per processor and at most 8."""
    return workers or min(os.cpu_count() or 1, 8)


def by_turns(files: Iterable[Iterator[T]]) -> Iterator[T]:
    """One of each of a few files, again and again: the kernel lets one thread at a time write to a file."""
    waiting = iter(files)
    active = deque(islice(waiting, WIDTH))
    while active:
        units = active.popleft()
        unit = next(units, None)
        if unit is None:
            active.extend(islice(waiting, 1))
        else:
            active.append(units)
            yield unit


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

    # each in a copy of the caller's context: which links may be followed holds in threads too
    threads = [threading.Thread(target=copy_context().run, args=(run, event)) for event in ended]
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
