"""Runs `ckpt` commands in forked children that are killed, or whose n-th system call fails.

Reads one JSON request per line, answers with one line. Everything is imported once, so that a run costs no
more than the command itself:

    {"argv": [...], "log": path}                      runs to the end
    {..., "kill_after": seconds}                      SIGKILL then
    {..., "nth": n, "action": "kill" | errno}         at the n-th call that changes the file system
    -> {"code": exit code or -signal, "seconds": s, "fired": name of the call or ""}

With `nth` 0 nothing fails, and `fired` names every call of the run, one per line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import ckpttools
from ckpttools.cli import main
from ckpttools.execute import system

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMES = (
    "write", "pwrite", "pwritev", "writev", "fsync", "fdatasync", "ftruncate", "truncate", "rename",
    "replace", "mkdir", "link", "symlink", "utime", "chmod",
)  # fmt: skip
LIBC = ("renameat2", "fallocate")


class Fault:
    """At the n-th call: an error of the system, or the end of the process."""

    def __init__(self, nth: int, action: str | int, tell: int) -> None:
        self._nth, self._action, self._tell, self._count = nth, action, tell, 0
        self._write = os.write

    def is_due(self, name: str) -> bool:
        self._count += 1
        if not self._nth:
            self._write(self._tell, f"{name}\n".encode())
        if self._count != self._nth:
            return False
        self._write(self._tell, name.encode())
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    @property
    def error(self) -> OSError:
        assert isinstance(self._action, int)
        return OSError(self._action, os.strerror(self._action))

    def arm(self) -> None:
        """Put the fault between this process and its system."""
        for name in NAMES:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        opening, closing = os.open, os.close
        written: set[int] = set()

        def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & WRITING and self.is_due("open"):
                raise self.error
            if flags & os.O_DIRECTORY and self.is_due("open folder"):
                raise self.error
            fd = opening(path, flags, *args, **kwargs)
            if flags & WRITING:
                written.add(fd)
            return fd

        def close(fd: int) -> None:
            due = fd in written and self.is_due("close")
            written.discard(fd)
            closing(fd)
            if due:
                raise self.error

        os.open, os.close = open_, close  # type: ignore[assignment]
        opens = io.open

        def file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return opens(path, mode, *args, **kwargs)
            if self.is_due("open file"):
                raise self.error
            return FaultyFile(opens(path, mode, *args, **kwargs), self)

        io.open = file  # type: ignore[assignment]
        system._libc = FaultyLibc(system._libc, self)  # type: ignore[assignment]

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_due(name):
                raise self.error
            return real(*args, **kwargs)

        return call


class FaultyFile:
    """A file object whose writes reach the system when it is flushed."""

    def __init__(self, real: Any, fault: Fault) -> None:
        self._real, self._fault = real, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def flush(self) -> None:
        if self._fault.is_due("flush"):
            raise self._fault.error
        self._real.flush()

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *args: object) -> None:
        self._real.close()


class FaultyLibc:
    def __init__(self, real: Any, fault: Fault) -> None:
        self._real, self._fault = real, fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in LIBC:
            return real

        def call(*args: Any) -> int:
            if self._fault.is_due(name):
                ctypes.set_errno(self._fault.error.errno or 0)
                return -1
            done: int = real(*args)
            return done

        return call


def run(request: dict[str, Any], tell: int) -> NoReturn:
    """The command, in the child."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for fd in (1, 2):
        os.dup2(log, fd)
    code: Any = 99
    try:
        if "nth" in request:
            Fault(request["nth"], request["action"], tell).arm()
        main(request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 99)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    get, tell = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        os.close(get)
        run(request, tell)
    os.close(tell)
    if "kill_after" in request:  # nobody else waits for the child: its number cannot mean another process
        time.sleep(request["kill_after"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - started
    with open(get, "rb") as pipe:  # noqa: PTH123
        fired = pipe.read().decode()
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "fired": fired}


# what has to be launched, or belongs to a framework
APART = ("ckpttools.trainer", "ckpttools.integrations", "ckpttools.cli.__main__")


def serve() -> None:
    for module in pkgutil.walk_packages(ckpttools.__path__, "ckpttools."):
        if not module.name.startswith(APART):
            importlib.import_module(module.name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
