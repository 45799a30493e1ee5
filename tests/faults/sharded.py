"""The faults of any file and any archive, on the formats of many files: ZeRO-3, distributed and universal."""

from __future__ import annotations

from . import files, zips
from .core import DCP, FAULTS, HF, PT, UNIVERSAL, ZERO, ZERO3, Fault, fault

EVERY = frozenset((ZERO, PT, HF))


def _also(name: str, level: str, damage: Fault) -> None:
    kinds = (ZERO3, UNIVERSAL) if level == zips.LEVEL else (ZERO3, UNIVERSAL, DCP)

    def same(copy, rng):  # type: ignore[no-untyped-def]
        return damage(copy, rng)

    same.__name__ = f"shards_{name}"
    fault(level, *kinds)(same)


for _name, (_kinds, _level, _damage) in list(FAULTS.items()):
    if _kinds == EVERY and _level in (files.LEVEL, zips.LEVEL):
        _also(_name, _level, _damage)
