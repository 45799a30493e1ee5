"""What was probably meant, where a name is not known."""

from __future__ import annotations

from collections.abc import Iterable

from ckpttools.errors import escape


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the nearest of the known names, or ""."""
    from difflib import get_close_matches

    names = list(known)
    near = [name for name in names if len(word) > 2 and (word in name or name in word)]
    near = list(dict.fromkeys([*get_close_matches(word, names, n=3, cutoff=0.6), *near]))[:3]
    return f"did you mean {' or '.join(map(escape, near))}?" if near else ""
