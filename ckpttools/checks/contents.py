"""What the pass over the bytes looks at, and what its results mean."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks.causes import TENSORS
from ckpttools.checks.patterns import check_patterns
from ckpttools.containers.torch_file import TorchFile, labelled
from ckpttools.errors import CkptError, some
from ckpttools.findings import ERROR, INFO, WARNING, Finding, of_error
from ckpttools.formats.format import OPTIMIZER_STATE, Checked, Copy
from ckpttools.location import Location
from ckpttools.passes import tasks as data
from ckpttools.passes.hashes import Ranges
from ckpttools.passes.ranges import Claims
from ckpttools.passes.run import Digest, Passed, run
from ckpttools.plan import Segment, SourceCheck
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange, Strided, TensorRef, Tiles, spans

# optimizer state that is a running mean (or sum) of squares
SQUARES = ("(exp_avg_sq)", "(max_exp_avg_sq)", "(square_avg)", ".exp_avg_sq", ".max_exp_avg_sq")
SHOWN = 20  # findings of one kind and file, before the rest is only counted
# of data.Odd: id, severity, what its elements are, hint
ODD = {
    "wild": (
        "wild-value",
        WARNING,
        "are larger than 1e10",
        "no network trains with such values: damage, or a run that diverged",
    ),
    "negative": (
        "negative-square",
        ERROR,
        "of a mean of squares are below zero",
        "the optimizer state was damaged or exchanged: use another copy",
    ),
    "hole": (
        "moments-disagree",
        WARNING,
        "are 0 where exp_avg is not: no gradients give that",
        "a block of zeros lies in the file, or the optimizer state was edited",
    ),
}


class Passing(Protocol):
    """`passes.run`, or another one that comes to the same."""

    def __call__(
        self,
        tasks: Sequence[data.Task],
        checks: Sequence[SourceCheck],
        *,
        hashes: Mapping[Location, Ranges],
        workers: int,
        progress: Progress | None,
    ) -> Passed: ...


def tasks_of(checked: Checked, copies: Sequence[Copy] = ()) -> list[data.Task]:
    """Work that reads every byte of every record, once; of `copies` in other files, what can be compared."""
    found = checked.checkpoint
    if found is None:
        return []
    claims = Claims()
    tasks: list[data.Task] = []
    for joined in data.join(_pairs(found)):
        if claims.claim_all(list(data.sources(joined))):
            tasks.append(joined)
        elif isinstance(joined, data.Joined):
            tasks += [pair for pair in joined.tasks if claims.claim_all(list(data.sources(pair)))]
    for twins in _twins(found, (*checked.copies, *copies)):
        tasks.append(replace(twins, apart=claims.claim_all([twins.one, twins.other])))
    views: list[data.ScanView] = []
    for joined in data.join(_scans(found, checked, claims)):
        whole = data.plain(joined)
        if isinstance(whole, data.ScanView):
            views.append(whole)  # what lies around its elements is left to others
            continue
        assert isinstance(whole, data.Scan)
        free = claims.claim(whole.source)
        if free == [whole.source]:
            tasks.append(joined)
        elif free:
            tasks += _free_of(joined, free)
    tasks += (view for view in views if not all(map(claims.covers, data.sources(view))))
    for record in _records(found):
        tasks += [data.Scan(source=part, dtype=None, name="") for part in claims.claim(record)]
    return tasks


def _pairs(found: Checkpoint) -> Iterator[data.Pair]:
    """What is held against each other: masters and weights, then the moments."""
    for name, master in found.master.items():
        # where the weights are the masters themselves, cast or not, there is nothing to hold against them
        if name in found.tensors and found.tensors[name].chunks != master.chunks:
            yield from data.pair(name, master, found.tensors[name])
    for group in found.groups:
        second = group.state.get("exp_avg_sq", {}) if "exp_avg_sq" not in group.idle else {}
        for name, mean in group.state.get("exp_avg", {}).items():
            if name in second:
                yield from data.moments(name, mean, second[name])


def _scans(found: Checkpoint, checked: Checked, claims: Claims) -> Iterator[data.Scan | data.ScanView]:
    """Every tensor of floats; what is left of files by their labels."""
    views: set[Strided] = set()
    for name, ref in _tensors(found, [*checked.files, *checked.optimizers], claims):
        if not ref.dtype.is_float and not ref.dtype.name.startswith("complex"):
            continue
        padding = name.startswith(checked.padded)
        dtype, squares = None if padding else ref.dtype, name.endswith(SQUARES)
        for chunk in ref.chunks:
            where = chunk.in_file_order() if isinstance(chunk, Strided) else chunk
            if isinstance(where, Strided) and where.nbytes > where.end - where.start:
                (where,) = spans(where)  # it overlaps itself: its elements are more than there are bytes
            if not isinstance(where, (ByteRange, Tiles, Strided)):
                continue
            free = [span for span in spans(where) if not claims.covers(span)]
            if not isinstance(where, Strided):
                for span in free:
                    yield data.Scan(source=span, dtype=dtype, name=name, squares=squares)
            elif free and dtype is not None and where not in views:
                views.add(where)
                yield data.ScanView(source=where, dtype=dtype, name=name, squares=squares)


def _free_of(task: data.Task, free: Sequence[ByteRange]) -> Iterator[data.Scan]:
    """The parts of scans that lie in these ranges, which are in order."""
    for scan in data.parts(task):
        assert isinstance(scan, data.Scan)
        for part in free:
            low, high = max(part.start, scan.source.start), min(part.end, scan.source.end)
            if low < high:
                source = ByteRange(part.path, low, high - low)
                whole = scan.dtype is None or (low - scan.source.start) % scan.dtype.itemsize == 0
                yield replace(scan, source=source, dtype=scan.dtype if whole else None)


def _twins(found: Checkpoint, copies: Sequence[Copy]) -> Iterator[data.Twins]:
    """Copies of a tensor that lie apart: tied weights saved twice, and what a format or others save twice."""
    pairs = [
        (a, found.tensors[a], o, found.tensors[o])
        for a, o in found.shared.items()
        if {a, o} <= found.tensors.keys()
    ]
    pairs += [(copy.name, copy.tensor, copy.twin, copy.copy) for copy in copies]
    for name, one, twin, other in pairs:
        match one.chunks, other.chunks:
            case (ByteRange() as a,), (ByteRange() as b,) if a != b and a.nbytes == b.nbytes:
                if one.dtype is not other.dtype:
                    continue  # as many bytes of fp16 and bf16: looked at by themselves
                yield data.Twins(one=a, other=b, name=name, twin=twin)


def _tensors(
    found: Checkpoint, files: list[TorchFile], claims: Claims | None = None
) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor under the name that says most about it; later ones may lie in the same bytes. With
    `claims`, those of which some bytes may not be claimed yet.
    """

    def is_read(chunks: Iterable[Segment]) -> bool:
        return claims is not None and all(isinstance(c, ByteRange) and claims.covers(c) for c in chunks)

    for group in found.groups:
        for kind, refs in group.state.items():
            for name, ref in refs.items():
                if not is_read(ref.chunks):
                    yield f"{name} ({kind})", ref
    yield from ((name, ref) for name, ref in found.tensors.items() if not is_read(ref.chunks))
    for file in files:
        if not is_read(chunk for storage in file.storages.values() for chunk in storage.chunks):
            yield from ((label, view.ref) for label, view in labelled(file))


def _records(found: Checkpoint) -> Iterator[ByteRange]:
    """What has a checksum, and files without any as a whole."""
    checked = {check.source.path for check in found.checks}
    yield from (check.source for check in found.checks)
    for role in found.files:
        if role.path not in checked and role.nbytes:
            yield ByteRange(role.path, 0, role.nbytes)


def check_contents(
    checked: Checked,
    tasks: list[data.Task],
    hashes: Mapping[Location, Ranges],
    workers: int,
    progress: Progress | None,
    passing: Passing | None = None,
) -> tuple[list[Finding], dict[Location, Digest]]:
    """Carry out the pass, which takes the digests of the files in `hashes` too, by `passing`. A file that
    cannot be read to its end is a finding, and then there are no digests.
    """
    found = checked.checkpoint
    checks = found.checks if found and tasks else ()
    try:
        passed = (passing or run)(tasks, checks, hashes=hashes, workers=workers, progress=progress)
    except CkptError as error:
        return [of_error(error)], {}
    if found is None:
        return [], passed.digests
    problems = [result for result in passed.results if not isinstance(result, data.Constant | data.Denormal)]
    seen = [result for result in passed.results if isinstance(result, data.Constant | data.Denormal)]
    return [*_data_findings(found, checked, problems), *check_patterns(found, seen)], passed.digests


def _data_findings(found: Checkpoint, checked: Checked, results: list[data.Problem]) -> list[Finding]:
    """Results as findings: per tensor rather than per block, and the first few of each kind and file.

    What else is wrong with a tensor whose checksum is wrong follows from that.
    """
    findings: dict[tuple[str, str, str], Finding] = {}
    bad = [result.check.source for result in results if isinstance(result, data.BadChecksum)]
    within = _within(found, [*checked.files, *checked.optimizers], bad)
    damaged = {name for names in within.values() for name in names}
    for result in results:
        if not isinstance(result, data.BadChecksum) and result.name in damaged:
            continue
        finding = _of_result(found, checked, result)
        if isinstance(result, data.BadChecksum) and (names := within[result.check.source]):
            message = f"{finding.message}; tensors in them: {some(names)}"
            finding = replace(finding, message=message)
        findings.setdefault((finding.id, finding.file, finding.where), finding)
    kept: list[Finding] = []
    more: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings.values(), key=lambda f: (f.id, f.file, f.where)):
        same = more.setdefault((finding.id, finding.file), [])
        same.append(finding)
        if len(same) <= SHOWN or finding.id in TENSORS:  # those become one finding
            kept.append(finding)
    for same in more.values():
        if len(same) > SHOWN and same[0].id not in TENSORS:
            message = f"and {len(same) - SHOWN} more tensors of this file"
            kept.append(replace(same[-1], where="", message=message))
    return kept


def _within(
    found: Checkpoint, files: list[TorchFile], sources: list[ByteRange]
) -> dict[ByteRange, list[str]]:
    """The tensors that have bytes in each of these ranges."""
    names: dict[ByteRange, dict[str, None]] = {source: {} for source in sources}
    places: dict[Location, list[ByteRange]] = {}
    for source in sorted(names, key=lambda source: source.start):
        places.setdefault(source.path, []).append(source)
    longest = max((source.nbytes for source in sources), default=0)
    for name, ref in (*found.master.items(), *_tensors(found, files)) if sources else ():
        for part in ref.chunks:
            if not isinstance(part, (ByteRange, Strided)):
                continue
            (chunk,) = spans(part)
            near = places.get(chunk.path, [])
            for k in range(bisect_right(near, chunk.start - longest, key=_start), len(near)):
                if near[k].start >= _end(chunk):
                    break
                if _end(near[k]) > chunk.start and chunk.nbytes and near[k].nbytes:
                    names[near[k]].setdefault(name)
    return {source: list(found) for source, found in names.items()}


def _start(source: ByteRange) -> int:
    return source.start


def _end(source: ByteRange) -> int:
    return source.start + source.nbytes


def _of_result(found: Checkpoint, checked: Checked, result: data.Problem) -> Finding:
    match result:
        case data.BadChecksum(check=check):
            return Finding(
                id="checksum",
                severity=ERROR,
                file=str(check.source.path),
                where=check.what,
                message=f"the {check.source.nbytes} bytes from byte {check.source.start} do not match the "
                "checksum that they were saved with",
                hint="copy the file again from where it was saved, or use an older checkpoint",
            )
        case data.Mismatch():
            return Finding(
                id="master-mismatch",
                severity=ERROR,
                file=str(result.master),
                where=result.name,
                message=f"element {result.element}: the fp32 master weight, rounded to {result.dtype.short}, "
                f"is not the weight in {result.model.name}: files of different saves, or changed ones",
                hint="copy all files of the folder again from one save",
            )
        case data.Odd():
            id, severity, what, hint = ODD[result.what]
            if result.what == "wild" and not _is_state(found, checked, result.name):
                severity = INFO
            return Finding(
                id=id,
                severity=severity,
                file=str(result.path),
                where=result.name,
                message=f"{result.count} elements {what}",
                hint=hint,
            )
        case data.Unlike():
            return Finding(
                id="copies-differ",
                severity=ERROR,
                file=str(result.path),
                where=result.name,
                message=f"differs from its copy {result.twin}",
                hint="it was edited, or put together from two saves: use another copy",
            )
        case data.NonFinite():
            severity = _severity(found, checked, result)
            return Finding(
                id="nonfinite",
                severity=severity,
                file=str(result.path),
                where=result.name,
                message=f"holds {_counted(result)}, the first at byte {result.byte} of the file",
                hint="" if severity == INFO else "training has diverged here: use a checkpoint from before",
            )


def _severity(found: Checkpoint, checked: Checked, result: data.NonFinite) -> str:
    """An error in weights and optimizer state; buffers may hold masks of -Inf, client code anything."""
    if result.nan and result.name in found.buffers:
        return WARNING  # no mask is NaN, and whatever the buffer is added to becomes NaN
    if not _is_state(found, checked, result.name):
        return INFO
    # without groups, weights and buffers cannot be told apart
    return ERROR if result.nan or found.groups else WARNING


def _is_state(found: Checkpoint, checked: Checked, name: str) -> bool:
    """Weights and optimizer state, against buffers and whatever client code has saved beside them."""
    if name in found.buffers:
        return False
    if name in found.tensors:
        return True
    if not found.groups:
        return name.startswith((*checked.state, *(OPTIMIZER_STATE if checked.optimizers else ())))
    return any(name.endswith(f"({kind})") for group in found.groups for kind in group.state)


def _counted(result: data.NonFinite) -> str:
    parts = [f"{n} {what}" for n, what in ((result.nan, "NaN"), (result.inf, "Inf")) if n]
    return " and ".join(parts)
