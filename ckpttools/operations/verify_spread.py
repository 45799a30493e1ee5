"""One pass over the bytes of a checkpoint, shared by many processes: `ckpt verify --spread`.

    ckpt-verify-KEY.ckpt-spread/    in the working folder, which all workers see; KEY names what is verified
        begin.json                  of worker 0: a number of this time
        part-RANK-NUMBER.json       what worker RANK has found in its share

Every worker reads all headers, and so has the same tasks and checksums in the same order. Each takes those
that lie in its stretch of the files, by bytes; a checksum is computed by the worker that has most of its
bytes, which reads the rest of them once more. Worker 0 puts together what all have found: from there on it is
as if one process had read everything. The folder of a job that died is used again, what is in it is not:
`begin` says so.
"""

from __future__ import annotations

import secrets
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import xxhash

from ckpttools import __version__
from ckpttools.checks.verdict import Delivered
from ckpttools.errors import CkptError, UsageError, some
from ckpttools.execute.ledger import Ledger
from ckpttools.execute.shelves import errors_at
from ckpttools.launch import Worker
from ckpttools.location import Location
from ckpttools.passes import tasks as data
from ckpttools.passes.hashes import Ranges
from ckpttools.passes.ranges import Claims
from ckpttools.passes.run import Digest, Passed, run
from ckpttools.passes.tasks import Result, Task, sources
from ckpttools.plan import SourceCheck
from ckpttools.progress import Progress
from ckpttools.siblings import SPREAD
from ckpttools.stores.links import absolute
from ckpttools.tensors import DTYPES, ByteRange, DType

_REMIND = 300  # polls
_KINDS = {kind.__name__: kind for union in (data.Problem, data.Pattern) for kind in get_args(union)}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Shared:
    """`passes.run` for one of many workers: worker 0 gets what all have found, the others end with it."""

    def __init__(
        self,
        worker: Worker,
        folder: Location | None = None,
        told: Callable[[str], None] = say,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`look` is called by those who wait, and may raise. Raises UsageError for workers that do not run at
        the same time.
        """
        if not worker.waits:
            raise UsageError(
                "no-launcher",
                "verify --spread puts together what all workers find, and those of an array may never meet",
                hint="start them with torchrun or srun; in an array: --subset N/T",
            )
        self.worker, self.folder, self.told = worker, folder or absolute(Path()), told
        self.look = look

    def __call__(
        self,
        tasks: Sequence[Task],
        checks: Sequence[SourceCheck],
        *,
        hashes: Mapping[Location, Ranges],
        workers: int,
        progress: Progress | None,
    ) -> Passed:
        """Raises Delivered in all workers but the first."""
        ledger = Ledger(self.folder / f"ckpt-verify-{_key(self.worker.world, tasks, checks, hashes)}{SPREAD}")
        with errors_at(ledger.folder):
            number = self._begin(ledger)
        try:
            mine = share(tasks, checks, hashes, self.worker.rank, self.worker.world)
            passed = run(mine[0], mine[1], hashes=mine[2], workers=workers, progress=progress)
        except CkptError as error:
            if self.worker.rank == 0:
                raise
            found: dict[str, Any] = {"error": error.problem.document() | {"exit_code": error.exit_code}}
        else:
            if self.worker.rank == 0:
                return self._joined(ledger, number, passed, tasks, checks)
            found = _encoded(passed, checks)
        with errors_at(ledger.folder):
            self._deliver(ledger, number, found)
        raise Delivered

    def _begin(self, ledger: Ledger) -> str:
        if self.worker.rank == 0:
            ledger.make()
            number = secrets.token_hex(8)
            ledger.put("begin", {"number": number})
            return number
        polls = 0
        while "begin" not in ledger.names():
            self._wait(ledger, polls := polls + 1, "worker 0 to begin")
        return str(ledger.get("begin")["number"])

    def _deliver(self, ledger: Ledger, number: str, found: Mapping[str, Any]) -> None:
        """Until worker 0 has removed the folder: a number that was an older job's changes meanwhile."""
        ledger.put(f"part-{self.worker.rank}-{number}", found)
        polls = 0
        while "begin" in ledger.names():
            try:
                now = str(ledger.get("begin")["number"])
                if now != number:
                    ledger.put(f"part-{self.worker.rank}-{now}", found)
                    number = now
            except FileNotFoundError:
                return
            self._wait(ledger, polls := polls + 1, "worker 0 to put the parts together")

    def _joined(
        self, ledger: Ledger, number: str, own: Passed, tasks: Iterable[Task], checks: Sequence[SourceCheck]
    ) -> Passed:
        """All parts. Raises CkptError where a worker could not read its share."""
        places: dict[str, Location] = {str(c.source.path): c.source.path for c in checks}
        places |= {str(s.path): s.path for task in tasks for part in data.parts(task) for s in sources(part)}
        results, digests = list(own.results), dict(own.digests)
        names = {rank: f"part-{rank}-{number}" for rank in range(1, self.worker.world)}
        polls = 0
        while missing := [rank for rank, name in names.items() if name not in ledger.names()]:
            self._wait(ledger, polls := polls + 1, f"worker {some(missing)}")
        try:
            for name in names.values():
                found = ledger.get(name)
                if error := found.get("error"):
                    kind = UsageError if error.pop("exit_code") == 2 else CkptError
                    raise kind(**error)
                results += (_decoded(result, checks, places) for result in found["results"])
                digests |= {places[path]: Digest(*entry) for path, entry in found["digests"]}
        finally:
            ledger.remove()
        return Passed(results=results, digests=digests)

    def _wait(self, ledger: Ledger, polls: int, what: str) -> None:
        if polls % _REMIND == 0:
            self.told(
                f"worker {self.worker.rank} waits for {what}: each needs the same command in the same folder"
            )
        self.look()
        time.sleep(ledger.pause)


def share(
    tasks: Sequence[Task],
    checks: Sequence[SourceCheck],
    hashes: Mapping[Location, Ranges],
    rank: int,
    world: int,
) -> tuple[list[Task], list[SourceCheck], dict[Location, Ranges]]:
    """What worker `rank` of `world` does. Files whose digests are taken are not cut."""
    order = sorted(tasks, key=lambda task: (str(sources(task)[0].path), sources(task)[0].start))
    total, at = sum(task.nbytes for task in order), 0
    whole: dict[Location, int] = {}
    most: dict[SourceCheck, dict[int, int]] = {check: {} for check in checks}
    inside: dict[Location, tuple[list[int], list[SourceCheck]]] = {}
    for check in sorted(checks, key=lambda check: check.source.start):
        ends, found = inside.setdefault(check.source.path, ([], []))
        ends.append(check.source.end)
        found.append(check)
    mine: list[Task] = []
    loads = [0] * world
    for task in order:
        owner = min(at * world // max(total, 1), world - 1)
        first = sources(task)[0].path
        if first in hashes:
            owner = whole.setdefault(first, owner)
        at += task.nbytes
        loads[owner] += task.nbytes
        for source in sources(task):
            for check in _meeting(inside.get(source.path, ([], [])), source):
                counts = most[check]
                counts[owner] = counts.get(owner, 0) + _common(check.source, source)
        if owner == rank:
            mine.append(task)
    for path in sorted(hashes.keys() - whole.keys(), key=lambda p: (-_nbytes(inside.get(p)), str(p))):
        whole[path] = owner = loads.index(min(loads))  # of which no task reads a byte
        loads[owner] += _nbytes(inside.get(path))
    chosen = []
    for k, check in enumerate(checks):
        owner = whole.get(check.source.path, k % world)
        if max(most[check], key=lambda r: (most[check][r], -r), default=owner) == rank:
            chosen.append(check)
    claims = Claims()
    for task in mine:
        if not isinstance(task, data.ScanView):  # it may leave some of these bytes unread
            claims.claim_all(list(sources(task)))
    for check in chosen:
        mine += [data.Scan(source=part, dtype=None, name="") for part in claims.claim(check.source)]
    files = {path: ranges for path, ranges in hashes.items() if whole[path] == rank}
    return mine, chosen, files


def _nbytes(found: tuple[list[int], list[SourceCheck]] | None) -> int:
    """Of the checks of a file; 1 where there are none."""
    return sum(check.source.nbytes for check in found[1]) if found else 1


def _meeting(inside: tuple[list[int], list[SourceCheck]], source: ByteRange) -> Iterator[SourceCheck]:
    """Of disjoint checks of one file, in order, with their ends: those that share bytes with a range."""
    ends, checks = inside
    for k in range(bisect_right(ends, source.start), len(checks)):
        if checks[k].source.start >= source.end:
            return
        yield checks[k]


def _common(one: ByteRange, other: ByteRange) -> int:
    return min(one.end, other.end) - max(one.start, other.start)


def _key(
    world: int, tasks: Iterable[Task], checks: Iterable[SourceCheck], hashes: Mapping[Location, Ranges]
) -> str:
    """The same for all workers that are to do the same."""
    state = xxhash.xxh3_64(f"{__version__} {world} {sorted(map(str, hashes))}".encode())
    for each in (*tasks, *checks):
        state.update(repr(each).encode())
    return state.hexdigest()


def _encoded(passed: Passed, checks: Sequence[SourceCheck]) -> dict[str, Any]:
    numbers = {check: k for k, check in enumerate(checks)}

    def plain(value: Any) -> Any:
        match value:
            case SourceCheck():
                return numbers[value]
            case DType():
                return value.name
            case int() | float() | str():
                return value
        return str(value)  # where it lies

    results = [
        {"kind": type(result).__name__}
        | {name: plain(getattr(result, name)) for name in result.__struct_fields__}
        for result in passed.results
    ]
    return {"results": results, "digests": [[str(path), list(d)] for path, d in passed.digests.items()]}


def _decoded(said: dict[str, Any], checks: Sequence[SourceCheck], places: Mapping[str, Location]) -> Result:
    kind = _KINDS[said.pop("kind")]
    for name, value in said.items():
        match name:
            case "check":
                said[name] = checks[value]
            case "dtype":
                said[name] = DTYPES[value]
            case "path" | "master" | "model":
                said[name] = places[value]
    result: Result = kind(**said)
    return result
