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
            if self._is_of_this(said):
                self.finished, self.is_ours = dict(said["finished"]), True
                self.old = _inside(said.get("replaces", ()))
                return
            names = _inside((*said["files"], *said.get("replaces", ())))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if not force:
            raise self.another()
        self.old = names

    def is_there(self) -> bool | None:
        """Whether the marker of this plan is there now; None for none at all. Raises OSError."""
        try:
            return self._is_of_this(json.loads(sending.get(self.place)[0]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return False

    def refuse_another(self) -> None:
        """Raises UsageError where something else has taken the place meanwhile, OSError."""
        if self.is_there() is False:
            raise self.another()

    def _is_of_this(self, said: Any) -> bool:
        return bool(said["plan"] == self.digest and bool(said.get("shared")) == self.shared)

    def another(self) -> UsageError:
        return UsageError(
            "destination-exists",
            "an upload of something else, or by another number of programs, was not finished there",
            where=self.dst,
            why="another program may still be writing it",
            hint="choose another destination; or, if nothing writes it any more, --force replaces it",
        )

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

    def release(self) -> None:
        """Delete it, unless another program has taken the place."""
        if sending.version_of(self.place) == self._version:
            self.delete()

    def delete(self) -> None:
        sending.delete(self.place)


def sent(dst: Stored) -> set[Stored] | None:
    """What an upload to DST that was not finished has put there, as it noted, and nobody has changed since;
    None where there is no such upload. Raises OSError.
    """
    try:
        said = json.loads(sending.get(dst / UNFINISHED)[0])
    except FileNotFoundError:
        return None
    except ValueError:
        return set()
    noted = said.get("finished") if isinstance(said, dict) else None
    records = noted if isinstance(noted, dict) else {}
    return {
        dst / name
        for name in _inside(records)
        if isinstance(records[name], dict) and sending.version_of(dst / name) == records[name].get("version")
    }


def _inside(names: Iterable[Any]) -> list[str]:
    """Those that lie below DST: what anybody has put there is not believed."""
    return [name for name in map(str, names) if name[:1] not in ("", "/") and ".." not in name.split("/")]
