"""Where a copy goes that was given no DST: beside its source, under a name that no framework takes."""

from __future__ import annotations

import re
from pathlib import Path

from ckpttools.errors import UsageError
from ckpttools.location import Location, Stored
from ckpttools.siblings import THEIRS
from ckpttools.stores.links import resolved


def default_dst(src: Location, kind: str, suffix: str | None = None) -> Path:
    """Where a copy of SRC goes that has no DST; `kind` is "ws4", "bs64" or "weights".

    An older copy's own kind is replaced: `ws4-of-a` becomes `ws2-of-a`. `suffix` takes the place of SRC's,
    where what is written is no file of its kind; "" makes a folder of it.
    """
    if isinstance(src, Stored):
        raise UsageError(
            "bad-usage",
            "nothing is written beside what is in a store",
            where=src,
            why="without DST the result lies beside its source, under a name of its own",
            hint="name a DST",
        )
    whole = resolved(src)
    if not whole.name:
        raise UsageError(
            "bad-usage",
            "there is no place beside the root folder",
            where=src,
            why="without DST the result lies beside its source, under a name of its own",
            hint="name a DST",
        )
    same = re.match(r"[a-z]+", kind)
    assert same is not None
    name = re.sub(rf"^{same[0]}\d*-of-|\.{same[0]}\d*$", "", whole.name)
    if suffix is not None:
        name = re.sub(r"(\.(pt|pth|bin|ckpt|tar|safetensors))+$", "", name) + suffix
    parent = src.parent if src.name not in ("", ".", "..") else whole.parent
    if whole.parent.name in THEIRS:
        parent = parent.parent if parent.name in THEIRS else whole.parent.parent
    return parent / f"{kind}-of-{name}"
