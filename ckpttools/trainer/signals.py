"""Being asked to stop: SIGTERM and SIGUSR1 end a run after its running update, with a checkpoint.

A batch system sends one of them before it takes the machine away. To the launcher: it leaves a file that
rank 0 looks at, and waits. To the ranks themselves, where torchrun was started by hand: each notes it, and
all agree after the update.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

ASKED = "stop.txt"
STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """Whether this rank was asked to stop."""

    def __init__(self, exchange: str | None) -> None:
        self._file = Path(exchange) / ASKED if exchange is not None else None
        self._by: str | None = None
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._by = signal.Signals(number).name

    @property
    def by(self) -> str | None:
        """The signal's name, None where nobody asked."""
        if self._by is None and self._file is not None:
            with contextlib.suppress(OSError):
                self._by = self._file.read_text("utf-8") or None
        return self._by


class Forwarded:
    """The launcher's side: the first signal asks the ranks, a second one ends them as Ctrl-C does."""

    def __init__(self, exchange: Path) -> None:
        self._exchange = exchange
        self.number: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        staged = self._exchange / f".{ASKED}"
        staged.write_text(signal.Signals(number).name, "utf-8")
        staged.replace(self._exchange / ASKED)


@contextlib.contextmanager
def forwarded(exchange: Path) -> Iterator[Forwarded]:
    """While the ranks run."""
    handler = Forwarded(exchange)
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
