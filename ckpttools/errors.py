"""The one family of errors that ckpttools raises for bad input.

An error says what is wrong, where, why it matters and what to do:

    error[shard-missing]: no optimizer states for dp rank 3 of 4
      in runs/a/global_step6
      without them the parameters that rank 3 owned cannot be restored
    hint: copy bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt from the node that ran rank 3

The id is stable: `ckpt explain ID` tells more about it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

from msgspec import Struct

from ckpttools.location import Location


class Problem(Struct, frozen=True, kw_only=True):
    """What an error and a finding have in common. `ckpt explain ID` tells what the id means."""

    id: str
    message: str
    where: str = ""
    why: str = ""
    hint: str = ""

    def shown(self, kind: str = "error") -> str:
        """For people: what, where, why it matters, what to do. Text from files is escaped."""
        lines = [f"{kind}[{self.id}]: {escape(self.message, 2000)}"]
        if self.where:
            lines.append(f"  in {escape(self.where, 1000)}")
        lines += [f"  {escape(line, 1000)}" for line in self.why.splitlines()]
        lines += [f"hint: {escape(line, 1000)}" for line in self.hint.splitlines()]
        return "\n".join(lines)

    def document(self) -> dict[str, str | None]:
        """For programs: what is not known is null."""
        parts = {"where": self.where, "why": self.why, "hint": self.hint}
        return {"id": self.id, "message": self.message, **{key: said or None for key, said in parts.items()}}


class CkptError(Exception):
    """The checkpoint has a problem: exit code 1."""

    exit_code = 1

    def __init__(
        self, id: str, message: str, *, where: str | Location = "", why: str = "", hint: str = ""
    ) -> None:
        super().__init__(id, message)  # what it is made anew from, when it passes between processes
        self.id = id
        self.message = message
        self.where = str(where)
        self.why = why
        self.hint = hint

    @property
    def problem(self) -> Problem:
        return Problem(id=self.id, message=self.message, where=self.where, why=self.why, hint=self.hint)

    def __str__(self) -> str:
        return f"{self.message} [{self.id}]" + (f" in {self.where}" if self.where else "")


class UsageError(CkptError):
    """The command could not run (bad usage, not a checkpoint, no permission, no space): exit code 2."""

    exit_code = 2


class NotAsWritten(UsageError):
    """What was read back is not what was written, at `places`."""

    def __init__(self, places: Sequence[Location]) -> None:
        super().__init__(
            "write-failed",
            "what was read back is not what was written",
            where=places[0],
            why="bytes changed on their way; what was written is not taken for a checkpoint",
            hint="check this machine's memory, and the disk or network; or choose another destination",
        )
        self.places = places


class Unsupported(UsageError):
    """A checkpoint that is recognised but that this operation cannot handle: exit code 2.

    `layout` names what was recognised ("pipeline", "moe" ...), where that is known.
    """

    def __init__(
        self,
        id: str,
        message: str,
        *,
        where: str | Location = "",
        why: str = "",
        hint: str = "",
        layout: str = "",
    ) -> None:
        super().__init__(id, message, where=where, why=why, hint=hint)
        self.layout = layout


def escape(text: object, limit: int = 200) -> str:
    """Text that came out of a file, safe to print: no control, bidirectional or invalid characters.

    >>> escape("a\\x1b[31m\\n")
    'a\\\\x1b[31m\\\\n'
    """
    s = str(text)
    cut = s if len(s) <= limit else s[: limit - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def counted(count: int, noun: str) -> str:
    """A number of things in words: `1 file`, `2 files`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def some(items: Collection[object], most: int = 8) -> str:
    """The first of them, escaped, and how many more there are: for a message.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(escape(item) for item in islice(items, most))
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
