"""Headers read by several processes: the same results, in the same order, whatever happens to a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_folders import saved

import ckpttools
from ckpttools.errors import CkptError, Unsupported
from ckpttools.runs.cores import FEW, each

MANY = 3 * FEW
ALONE = len(os.sched_getaffinity(0)) < 2
needs_cores = pytest.mark.skipif(ALONE, reason="one core")


@contextmanager
def another_thread() -> Iterator[None]:
    """With one, nothing is forked."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@needs_cores
def test_results_are_in_order_and_of_several_processes() -> None:
    code = (  # in a process of its own: threads of the test runner or of a library would keep it from forking
        "import os\n"
        "from ckpttools.runs.cores import each\n"
        f"found = each(lambda n: (n, os.getpid()), range({MANY}))\n"
        f"assert [n for n, _ in found] == list(range({MANY}))\n"
        "assert 1 < len({pid for _, pid in found}) <= len(os.sched_getaffinity(0))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_few_items_and_a_process_with_threads_are_not_forked() -> None:
    own = {os.getpid()}
    assert {*each(lambda _: os.getpid(), range(FEW))} == own
    assert each(lambda n: n, []) == []
    with another_thread():
        assert {*each(lambda _: os.getpid(), range(MANY))} == own


def _killed(n: int) -> int:
    if os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def _not_sent(n: int) -> Callable[[], int]:
    return lambda: n


PARENT = os.getpid()


@needs_cores
def test_what_a_child_does_not_deliver_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PARENT", os.getpid())
    assert each(_killed, range(MANY)) == list(range(MANY))
    assert [made() for made in each(_not_sent, range(MANY))] == list(range(MANY))


@needs_cores
def test_errors_come_back_whole() -> None:
    def error(n: int) -> CkptError:
        if n % 2:
            return Unsupported("a", "m", where="w", why="y", hint="h", layout="moe")
        return CkptError("b", "n", where="v")

    for n, found in enumerate(each(error, range(MANY))):
        assert type(found) is type(error(n)) and vars(found) == vars(error(n)) and str(found) == str(error(n))


def test_a_listing_is_the_same(tmp_path: Path) -> None:
    data = [saved(step) for step in range(1, 13)]
    for n in range(MANY):
        file = tmp_path / f"iter_{n}.pth"
        file.write_bytes(data[n % 12][: 700 if n % 7 == 0 else None])
    (found,) = ckpttools.ls(tmp_path)
    with another_thread():
        (alone,) = ckpttools.ls(tmp_path)
    assert len(found.checkpoints) == MANY and found.notes == alone.notes and found.latest == alone.latest
    for one, two in zip(found.checkpoints, alone.checkpoints, strict=True):
        assert (one.kind, one.marks, one.why) == (two.kind, two.marks, two.why)
        ours, theirs = one.entry, two.entry
        assert (ours.path, ours.state, ours.metrics, ours.model) == (
            theirs.path,
            theirs.state,
            theirs.metrics,
            theirs.model,
        )
        assert str(ours.problem) == str(theirs.problem)
