"""`DST/ckpt-unfinished.json`: while it is there, no command takes the objects beside it for a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ckpttools import __version__
from ckpttools.errors import UsageError
from ckpttools.execute import sending
from ckpttools.execute.sending import Version
from ckpttools.location import Stored
from ckpttools.plan import Plan
from ckpttools.siblings import UNFINISHED


class Marker:
    """The marker of one plan. `old` are the objects that are replaced, by their names below DST; `shared`: it
    is written by many workers, who note elsewhere what is finished. `found`: one was there; `is_ours`: of
    this plan.
    """

    def __init__(self, dst: Stored, plan: Plan, digest: str, *, shared: bool = False) -> None:
        self.dst, self.place, self.plan, self.digest = dst, dst / UNFINISHED, plan, digest
        self.shared = shared
        self.old: list[str] = []
        self.finished: dict[str, dict[str, Any]] = {}
        self.found = self.is_ours = False
        self._version: Version | None = None

    def read(self, force: bool) -> None:
        """What is there: `finished` of this plan; or, with `force`, what another one left becomes `old`.

        Raises UsageError where something else was not finished, OSError.
        """
        try:
            data, self._version = sending.get(self.place)
        except FileNotFoundError:
            return
        self.found, names = True, list[str]()
        try:
            said = json.loads(data)
            if said["plan"] == self.digest and bool(said.get("shared")) == self.shared:
                self.finished, self.is_ours = dict(said["finished"]), True
                self.old = [str(name) for name in said.get("replaces", ())]
                return
            names = [str(name) for name in (*said["files"], *said.get("replaces", ()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if not force:
            raise UsageError(
                "destination-exists",
                "an upload of something else, or by another number of programs, was not finished there",
                where=self.dst,
                why="another program may still be writing it",
                hint="choose another destination; or, if nothing writes it any more, --force replaces it",
            )
        self.old = names

    def replaces(self, old: Iterable[Stored]) -> None:
        """These objects, below DST, are to be replaced, too."""
        inside = f"{str(self.dst.key).rstrip('/')}/"
        self.old += [str(place.key).removeprefix(inside) for place in old]

    def put(self, finished: Mapping[str, Any]) -> None:
        """Raises OSError, EEXIST or ESTALE where another program has taken the place."""
        record = {
            "ckpttools": __version__,
            "what": "an upload that is not finished: the files beside this one are no checkpoint yet",
            "plan": self.digest,
            "shared": self.shared,
            "files": [file.path for file in self.plan.files],
            "replaces": self.old,
            "finished": dict(finished),
        }
        self._version = sending.put(self.place, json.dumps(record).encode(), over=self._version)

    def clear(self) -> None:
        """Of what is replaced, delete what was not written over."""
        kept = {UNFINISHED, *(file.path for file in self.plan.files)}
        for name in self.old:
            if name not in kept:
                sending.delete(self.dst / name)

    def delete(self) -> None:
        sending.delete(self.place)
