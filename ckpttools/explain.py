"""What each error and finding means and how to mend it: `problems.md`, as data.

The file is a heading of level 2 for each kind of problem, below it one of level 3 for each id, a paragraph
that says what is wrong and why, and one that begins with "What to do:". A new id gets its section there.
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from ckpttools.stores.files import small_text

TEXT = Path(__file__).with_name("problems.md")
MEND = "What to do: "
_SENTENCE = re.compile(r"(.+?[.:!?])(\s|$)")


class Explanation(Struct, frozen=True, kw_only=True):
    """`kind` is where the id appears; `meaning` what is wrong and why; `mend` what to do."""

    kind: str
    meaning: str
    mend: str

    @property
    def line(self) -> str:
        """The meaning's first sentence."""
        match = _SENTENCE.match(self.meaning)
        return match[1].rstrip(":") if match else self.meaning


def _read() -> dict[str, Explanation]:
    """Every id's explanation, in the file's order. Raises ValueError where the file is not in its form."""
    found: dict[str, Explanation] = {}
    kind = ""
    for section in re.split(r"\n(?=##)", small_text(TEXT, 1 << 20)):
        heading, *paragraphs = (" ".join(part.split()) for part in section.strip().split("\n\n"))
        level, _, title = heading.partition(" ")
        if level == "##":
            kind = title
        elif level == "###":
            match paragraphs:
                case [meaning, mend] if kind and mend.startswith(MEND) and title not in found:
                    found[title] = Explanation(kind=kind, meaning=meaning, mend=mend.removeprefix(MEND))
                case _:
                    raise ValueError(f"{TEXT.name}: {title} needs a meaning and '{MEND}', once")
    return found


EXPLANATIONS = _read()
