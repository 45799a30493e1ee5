"""JSON files of a checkpoint, read strictly: size and depth capped, duplicate keys refused."""

from __future__ import annotations

import json
import re

from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.stores.files import opened

MAX_BYTES = 100 << 20
MAX_DEPTH = 32
MAX_VALUES = 4_000_000
_BRACKET = re.compile(rb"[\[\]{}]")  # those within strings only make the depth limit stricter
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def damaged(path: Location, problem: str) -> CkptError:
    return CkptError(
        "json-damaged",
        problem,
        where=path,
        why="what it says about the other files cannot be trusted",
        hint="copy the file again from where it was saved",
    )


def parse(
    path: Location, raw: bytes, what: str = "the file", *, allow_nan: bool = False
) -> dict[str, object]:
    """A JSON object. Raises CkptError for anything else, for duplicate keys and, unless allowed, for NaN.

    With `allow_nan` it is what Python writes: text, too, may hold bytes of a file name that are not UTF-8, as
    os.fsdecode gives them.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        out = dict(items)
        if len(out) != len(items):
            raise damaged(path, f"{what} repeats a key")
        return out

    def constant(name: str) -> object:
        if allow_nan:
            return float(name)
        raise damaged(path, f"{what} holds {name}, which is not JSON")

    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise damaged(path, f"{what} holds more than {MAX_VALUES} values")
    depth = 0
    for bracket in _BRACKET.finditer(raw):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            raise damaged(path, f"{what} is nested more than {MAX_DEPTH} deep")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise damaged(path, f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise damaged(path, f"{what} is not a JSON object")
    if _SURROGATE.search(raw):
        try:
            names = "surrogateescape" if allow_nan else "strict"
            json.dumps(value, ensure_ascii=False).encode(errors=names)
        except UnicodeEncodeError:
            raise damaged(path, f"{what} holds half of a surrogate pair, which is no text") from None
    return value


def read(path: Location, limit: int = MAX_BYTES, *, allow_nan: bool = False) -> dict[str, object]:
    """A JSON object from a file of at most `limit` bytes."""
    with opened(path) as file:
        if file.size > limit:
            raise damaged(path, f"{file.size} bytes of JSON, over the limit of {limit}")
        return parse(path, file.head(limit), allow_nan=allow_nan)
