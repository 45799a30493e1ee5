"""That what was written holds what was to be written: their digests are compared.

Those of the result are taken from the bytes that are read back in any case; only tensors that lie in several
pieces, as ZeRO cuts them at the end of a rank's share, are read once more. A tensor that is a copy of the
very bytes of one of the source, as the plan and the result's own headers say, has its digest, where these
bytes were held against a checksum of the source as they were copied; what was read back was held against what
was written. Whatever is not copied so (what is cast, views, sources without checksums) is read from the
source, and compared.

The digests are those of the Checkpoint that the plan was made from, so a change that was asked for is in
them. Named are kinds of state that the target has no place for, and 16-bit weights that are not their rounded
masters, where it keeps the master alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks import check_before_use
from ckpttools.compare.content import MASTER, WEIGHT
from ckpttools.compare.digests import Job, Jobs, Passing, Results, digests, jobs_of, nbytes_of, place_key
from ckpttools.errors import escape
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.digest import Difference, Digested, by_digests
from ckpttools.operations.origins import Origins
from ckpttools.operations.sidecar import written_wrong
from ckpttools.operations.source import find
from ckpttools.operations.stated import described
from ckpttools.operations.writing import Check, Writing
from ckpttools.passes.hashes import Sinks
from ckpttools.plan import Plan
from ckpttools.stores.links import within
from ckpttools.tensors import ByteRange, DType, join_chunks


def check(source: Source, checkpoint: Checkpoint, plan: Plan, how: Writing, *, whole: bool = False) -> Check:
    """A check for `carry_out`: that the files of `plan` hold what `checkpoint`, made from `source`, does.

    `whole`: they have a place for settings and counters. It raises CkptError "written-wrong" where they do
    not hold it, a defect of ckpttools; the manifest gets the digests.
    """
    return _Kept(source, checkpoint, plan, how, whole)


class _Kept:
    """`sinks` are called with the headers of what was written, before its bytes are read back."""

    def __init__(self, source: Source, checkpoint: Checkpoint, plan: Plan, how: Writing, whole: bool) -> None:
        self.source, self.checkpoint, self.plan, self.how, self.whole = source, checkpoint, plan, how, whole
        self.made: Checkpoint | None = None
        self.jobs: Jobs | None = None  # of the result
        self.wanted = jobs_of(checkpoint)
        self.same: dict[Job, Job] = {}  # a tensor to be written -> that of the result with the same bytes
        self.passing: dict[Job, Passing] = {}

    def sinks(self, staged: Location, made: Checkpoint) -> Sinks:
        self.made, self.jobs = made, jobs_of(made)
        self.same = _same(self.wanted, self.jobs, Origins(self.plan, staged))
        rounded = {job: wanted.rounded for wanted, job in self.same.items() if wanted.rounded}
        out: dict[Location, list[Passing]] = {}
        for job in dict.fromkeys(self.jobs.values()):
            match job.ref.chunks:
                case (ByteRange() as source,):
                    sink = Passing(job.rounding_to(job.rounded or rounded.get(job)), source)
                    out.setdefault(source.path, []).append(sink)
                    self.passing[job] = sink
        return out

    def __call__(self, staged: Location, contents: bytes, place: Location) -> tuple[str, bytes]:
        source = find(staged, None)
        made = self.made or check_before_use(source)
        jobs = self.jobs if self.jobs is not None else jobs_of(made)
        known = {job: sink.result for job, sink in self.passing.items() if sink.result is not None}
        # what was read back was held against what was written
        result = _digested(source, replace(made, checks=()), self.how, jobs, known)
        taken = {
            wanted: known[job]
            for wanted, job in self.same.items()
            if job in known and wanted.rounded in (None, self._rounded(job))
        }
        wanted = _digested(self.source, self.checkpoint, self.how, self.wanted, taken)
        return _compared(wanted, result, whole=self.whole), described(contents, place, made, result.digests)

    def _rounded(self, job: Job) -> DType | None:
        """The other type that the digest of a tensor of the result was taken in."""
        return (self.passing[job].job if job in self.passing else job).rounded


def asked(asked: bool | None, source: Source, dst: Location, how: Writing) -> bool:
    """Whether to check: unless said otherwise, where reading twice costs no requests and nobody waits."""
    if asked is not None:
        return asked
    return isinstance(source.target, Path) and isinstance(dst, Path) and how.spread is None


def _same(wanted: Jobs, made: Jobs, origins: Origins) -> dict[Job, Job]:
    """The tensors that are to be written, and those of the result that were made from the same bytes.

    One that is missed is read.
    """
    of = {
        (job.ref.dtype, job.ref.shape, place_key(chunks)): job
        for job in dict.fromkeys(made.values())
        if not job.number and (chunks := origins.of(job.ref)) is not None
    }
    found = {
        job: of.get((job.ref.dtype, job.ref.shape, place_key(join_chunks(job.ref.chunks))))
        for job in dict.fromkeys(wanted.values())
        if not job.number
    }
    return {job: other for job, other in found.items() if other is not None}


def _digested(source: Source, checkpoint: Checkpoint, how: Writing, jobs: Jobs, known: Results) -> Digested:
    """The digests of a checkpoint; what is `known` is not read."""
    with within(source.root):
        left = nbytes_of(jobs, known) if how.bar is not None else 0
        bar = how.bar(left, "digest") if how.bar is not None and left else nullcontext()
        with bar as progress:
            found = digests(checkpoint, workers=how.workers, bar=progress, jobs=jobs, known=known)
    return Digested(path=source.target, source=source, checkpoint=checkpoint, digests=found)


def _compared(wanted: Digested, made: Digested, *, whole: bool) -> str:
    """What to tell. Raises CkptError "written-wrong"."""
    found = by_digests(wanted, made)
    lost = [each for each in found.different if _is_lost(wanted, made, each)]
    wrong = [each for each in found.different if each not in lost]
    left = [kind for kind in found.one_sided if kind not in (WEIGHT, MASTER)]
    problem = ""
    if wrong:
        problem = f"{wrong[0].kind} of {escape(wrong[0].name)} is another one"
    elif more := [kind for kind, is_left in found.one_sided.items() if not is_left]:
        problem = f"nobody asked for {escape(more[0])}"
    elif not lost and not left and wanted.digests.state != made.digests.state:
        problem = "the names are others"
    elif whole and not (found.settings and found.counters):
        problem = "its settings or counters are others"
    if problem:
        raise written_wrong(made.path, problem, "digest", str(made.path))
    told = f"digest {made.digests.state}, of what was to be written and of what was"
    if lost or left:
        weights = [f"{len(lost)} 16-bit weights that are not their rounded masters"] if lost else []
        told += f"; left out: {', '.join([*weights, *map(escape, left)])}"
    return told


def _is_lost(wanted: Digested, made: Digested, each: Difference) -> bool:
    """Whether it is a 16-bit weight of its own, and the target keeps the fp32 copy alone."""
    kept = made.content.held.get(MASTER, {})
    return each.kind == WEIGHT and each.name in wanted.digests.apart and each.name not in kept
