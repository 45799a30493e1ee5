"""Which bytes: cutting sequences of chunks."""

from __future__ import annotations

from collections.abc import Iterable

from ckpttools.tensors import Source, Zeros


class Cutter:
    """Cuts a sequence of chunks from front to back, in time linear in their number."""

    def __init__(self, chunks: Iterable[Source]) -> None:
        self._rest = iter(chunks)
        self._chunk: Source = Zeros(0)

    def take(self, nbytes: int) -> tuple[Source, ...]:
        """The next `nbytes` bytes, fewer at the end."""
        out: list[Source] = []
        while nbytes:
            if not self._chunk.nbytes:
                following = next(self._rest, None)
                if following is None:
                    break
                self._chunk = following
                continue
            here = min(nbytes, self._chunk.nbytes)
            out.append(self._chunk.cut(0, here))
            self._chunk = self._chunk.cut(here, self._chunk.nbytes - here)
            nbytes -= here
        return tuple(out)
