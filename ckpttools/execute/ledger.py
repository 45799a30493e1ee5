"""What many workers have finished, in a folder or a place of a store that all of them see: one small file for
each piece of work.

    plan.json          what is being written: a worker that has planned anything else is refused
    NAME.json          a finished piece; it is there when its bytes are on disk
    failed-RANK.json   what a worker died of

A file gets its name when it is complete, so a reader sees all of it or nothing (`shelves`). No clock, lock or
socket: any file system on which a rename is atomic will do, and any store that knows conditional puts.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from ckpttools.errors import UsageError, escape
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.shelves import shelf
from ckpttools.location import Location
from ckpttools.plan import Plan
from ckpttools.stores.links import plain_name

_PLAN, _NAME, _SUFFIX = "plan", "out", ".json"


def describe(plan: Plan, before: Mapping[Location, Fingerprint], version: str) -> dict[str, Any]:
    """A plan as all workers must have made it: its files and sources with a digest of each."""
    files = []
    for file in plan.files:
        state = xxhash.xxh3_128()
        for segment in file.segments:
            state.update(repr(segment).encode())
        files.append([file.path, file.nbytes, state.hexdigest()])
    checks = xxhash.xxh3_128()
    for check in plan.checks:
        checks.update(repr(check).encode())
    return {
        "ckpttools": version,
        # not the tag: an inode may differ from one machine's mount to another's
        "sources": sorted([str(path), stat.size, stat.mtime_ns] for path, stat in before.items()),
        "files": files,
        "checks": checks.hexdigest(),
    }


def digest(described: Mapping[str, Any]) -> str:
    """32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


class Ledger:
    """Every method raises OSError; `get` also UsageError "ledger-damaged"."""

    def __init__(self, folder: Location) -> None:
        self.folder, self._shelf = folder, shelf(folder)
        self.pause = self._shelf.pause  # seconds from one look to the next, of those who wait
        self.make, self.remove = self._shelf.make, self._shelf.remove

    def join(self, described: Mapping[str, Any], dst: Location) -> str:
        """Begin, or go on with, this plan: under which name. Each new ledger has a name of its own.

        Raises UsageError "other-plan" where another one is being written.
        """
        self.make()
        if _PLAN not in self.names():
            self._put(_PLAN, {**described, _NAME: f"out-{secrets.token_hex(8)}"}, replace=False)
        there = self.get(_PLAN)
        name = plain_name(str(there.pop(_NAME, "")), self.folder)
        if difference := _difference(there, described):
            raise UsageError(
                "other-plan",
                f"this worker and those before it do not write the same: {difference}",
                where=dst,
                why=f"what is in {self.folder.parent.name} would be mixed with something else",
                hint=f"use the same command and the same ckpttools on every machine; or, if no job writes "
                f"this any more: {self._tidy()}",
            )
        return name

    def _tidy(self) -> str:
        here = self.folder.parent
        return f"rm -r {here}" if isinstance(here, Path) else f"remove what lies below {here}"

    def is_of(self, described: Mapping[str, Any]) -> bool | None:
        """Whether what is under way is this plan; None where nothing is. What cannot be read is another's."""
        try:
            there = self.get(_PLAN)
        except FileNotFoundError:
            return None
        except UsageError:
            return False
        return not _difference({k: v for k, v in there.items() if k != _NAME}, described)

    def names(self) -> set[str]:
        """Of all pieces that are finished, and of failures. Empty where the ledger is gone."""
        return {name.removesuffix(_SUFFIX) for name in self._shelf.names()}

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Say that a piece is finished: its bytes must be on disk."""
        self._put(name, record, replace=True)

    def forget(self, name: str) -> None:
        self._shelf.delete(name + _SUFFIX)

    def _put(self, name: str, record: Mapping[str, Any], *, replace: bool) -> None:
        self._shelf.put(name + _SUFFIX, json.dumps(record).encode(), replace=replace)

    def get(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._shelf.get(name + _SUFFIX))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UsageError(
                "ledger-damaged",
                "the record of what is finished cannot be read",
                where=self.folder / (name + _SUFFIX),
                why="a disk that lost a finished file may have lost others",
                hint=f"if no job writes this any more: {self._tidy()}; then run it again",
            )
        return value


def _difference(there: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The first thing that differs, in words; "" for none."""
    if there.get("ckpttools") != mine["ckpttools"]:
        return f"ckpttools {escape(str(there.get('ckpttools')))} there, {mine['ckpttools']} here"
    for kind, what in (("sources", "the source"), ("files", "the file")):
        for one, other in _pairs(there.get(kind, []), mine[kind]):
            if one != other:
                name = (one or other)[0]
                if not one or not other:
                    return f"{what} {escape(str(name))} is only {'there' if one else 'here'}"
                return f"{what} {escape(str(name))} is another one"
    return "" if there == mine else "the checksums of the sources"


def _pairs(there: Iterable[list[Any]], mine: Iterable[list[Any]]) -> list[tuple[Any, Any]]:
    ours, theirs = {row[0]: row for row in mine}, {row[0]: row for row in there}
    return [(theirs.get(name), ours.get(name)) for name in sorted({*ours, *theirs})]
