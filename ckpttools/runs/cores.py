"""Work on many small files by all cores: headers are decoded in Python, which one core does at a time.

Children are forked and hand their results back through pipes. A library's process with threads is never
forked, and what a child does not deliver its parent does itself: only the time differs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

T = TypeVar("T")
R = TypeVar("R")

FEW = 32  # items that a child must have to be worth its start of 20 ms


def each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each item, in their order. The results of children are copies."""
    count = min(len(os.sched_getaffinity(0)), len(items) // FEW) if _may_fork() else 1
    out: dict[int, R] = {}
    children = [_start(work, items, range(at, len(items), count)) for at in range(1, count)]
    try:
        for at in range(0, len(items), max(count, 1)):
            out[at] = work(items[at])
        for _, pipe in children:
            try:
                out |= pipe.recv()
            except (EOFError, OSError):
                continue
    finally:
        for child, pipe in children:
            pipe.close()
            child.terminate()
            child.join()
    return [out[at] if at in out else work(item) for at, item in enumerate(items)]


def _may_fork() -> bool:
    return threading.active_count() == 1 and hasattr(os, "sched_getaffinity")


def _start(work: Callable[[T], R], items: Sequence[T], places: range) -> tuple[BaseProcess, Connection]:
    import multiprocessing  # which takes as long as the headers of a few checkpoints

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_deliver, args=(theirs, work, items, places), daemon=True)
    child.start()
    theirs.close()
    return child, ours


def _deliver(pipe: Connection, work: Callable[[T], R], items: Sequence[T], places: range) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        pipe.send({at: work(items[at]) for at in places})
    except Exception:
        pipe.close()  # something that cannot be sent, or went wrong: the parent meets it, too
