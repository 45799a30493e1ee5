"""A digest of what a checkpoint holds, equal for every layout of the same training state.

Of a tensor: xxh3_128 of `DTYPE N,M,...\\n` (torch's name of the type, the shape) and its bytes in C order,
little-endian. Of a number (a step as an int, a float or a 0-d tensor): the number itself, as JSON.
Of a kind: xxh3_128 of one JSON line [kind, name, digest] for each name, sorted by code points.

Of the whole, `state`: the same over all kinds, with one copy of each weight under "weight": the fp32 master
where there is one, else the weight as saved. So a `.pt` or a distributed checkpoint, which keep the fp32 copy
alone, agree with the ZeRO folder that they came from. A 16-bit copy that is not its rounded master (both are
read, so this is known) is content of its own: it has a line under "weight, apart". Every changed byte of a
weight, a master, a moment or a step therefore changes `state`; paddings and the order of ranks do not.

Apart from `state`: `settings` (the hyper-parameters of each set of parameters, without how an implementation
computes: foreach, fused, capturable, differentiable) and `counters` (counters, losses, schedule, global
batch, loss scale, class of the optimizer), both without what holds where nothing is said (content.UNSAID).
xxh3 guards against accidents, not against intent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii

import xxhash
from msgspec import Struct

from ckpttools.checkpoint import Checkpoint
from ckpttools.compare.content import (
    MASTER,
    WEIGHT,
    content,
    hyper,
    is_number,
    number,
    plain,
    progress,
    told,
)
from ckpttools.compare.stream import Stream, in_threads, place, refuse_links
from ckpttools.passes.read import Reader, load
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange, Chunk, DType, TensorRef
from ckpttools.tree import Value
from ckpttools.values import Array, cast, comparable, nonfinite, numpy_array

APART = "weight, apart"


class Digests(Struct, frozen=True, kw_only=True):
    """`tensors` has one digest per kind and name, `kinds` one per kind; `dtypes` the type of each tensor.

    `apart` are the 16-bit weights that are not their rounded masters. `checked` counts the checksums of the
    source that were compared and found right.
    """

    state: str
    settings: str
    counters: str
    kinds: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, str]]
    dtypes: Mapping[str, Mapping[str, str]]
    tied: Mapping[str, str]
    apart: tuple[str, ...] = ()
    checked: int = 0


class Job:
    """A tensor to be read once; `rounded` asks for the digest of its elements in another type too.

    Known by its identity: to hash what it says of each of many small tensors costs more than to read them.
    """

    __slots__ = ("number", "ref", "rounded")

    def __init__(self, ref: TensorRef, number: bool, rounded: DType | None = None) -> None:
        self.ref, self.number, self.rounded = ref, number, rounded

    def rounding_to(self, dtype: DType | None) -> Job:
        """The same tensor, with the digest in another type."""
        return self if dtype is self.rounded else Job(self.ref, self.number, dtype)


Jobs = Mapping[tuple[str, str], Job]  # by kind and name
Results = dict[Job, tuple[str, str]]  # the digest of a tensor, and of its rounded elements


def nbytes_of(jobs: Jobs, known: Collection[Job] = ()) -> int:
    """How many bytes `digests` goes through, each tensor once."""
    return sum(job.ref.nbytes for job in set(jobs.values()) if job not in known)


def jobs_of(checkpoint: Checkpoint) -> Jobs:
    """For every tensor its job, one for all names of the same bytes."""
    found = content(checkpoint)
    weights = found.held.get(WEIGHT, {})
    once: dict[object, Job] = {}
    jobs = {}
    for kind, held in found.held.items():
        counts = kind in found.counts
        for name, ref in held.items():
            if isinstance(ref, TensorRef):
                rounded = _rounds_to(ref, weights.get(name)) if kind == MASTER else None
                job = Job(ref, counts and is_number(ref), rounded)
                key = (place_key(ref.chunks), ref.dtype, ref.shape, job.number, rounded)
                jobs[kind, name] = once.setdefault(key, job)
    return jobs


def place_key(chunks: tuple[Chunk, ...]) -> object:
    """What chunks of the same bytes have in common; a path is one object in all refs of a file."""
    if len(chunks) == 1 and isinstance(chunk := chunks[0], ByteRange):
        return id(chunk.path), chunk.start, chunk.nbytes
    return chunks


def digests(
    checkpoint: Checkpoint,
    *,
    workers: int = 0,
    bar: Progress | None = None,
    jobs: Jobs | None = None,
    known: Results | None = None,
) -> Digests:
    """Read every tensor of a checkpoint once, but for those in `known`, to which the others are added. To be
    called inside `within` its root; `jobs` are those of the checkpoint, where the caller has them.

    Raises CkptError where a file ends too early or differs from a checksum that it states.
    """
    found = content(checkpoint)
    jobs = jobs_of(checkpoint) if jobs is None else jobs
    results = known if known is not None else {}
    todo = sorted(set(jobs.values()) - results.keys(), key=lambda job: place(job.ref))
    refuse_links(job.ref for job in todo)
    stream = Stream(checkpoint.checks)

    def work(job: Job, reader: Reader) -> int:
        results[job] = _digest(job, stream, reader)
        return job.ref.nbytes

    in_threads(workers, work, todo, bar)
    checked = stream.finish(workers)
    tensors: dict[str, dict[str, str]] = {}
    for kind, held in found.held.items():
        for name, value in held.items():
            job = jobs.get((kind, name))
            tensors.setdefault(kind, {})[name] = results[job][0] if job else _line(plain(value, shown))
    apart = tuple(
        name
        for name, own in tensors.get(WEIGHT, {}).items()
        if (job := jobs.get((MASTER, name))) and own not in results[job]
    )
    return of_tensors(checkpoint, tensors, apart, checked)


def of_tensors(
    checkpoint: Checkpoint, tensors: Mapping[str, Mapping[str, str]], apart: tuple[str, ...], checked: int
) -> Digests:
    """The digests of a checkpoint of which those of its tensors are known; its headers say the rest."""
    found, groups = content(checkpoint), hyper(checkpoint, shown)
    return Digests(
        state=_state(tensors, apart),
        settings=_hash(sorted(_line([sorted(names), told(each)]) for names, each in groups)),
        counters=_hash([_line({part: told(each) for part, each in progress(checkpoint, shown).items()})]),
        kinds={kind: _hash(_lines(kind, named)) for kind, named in tensors.items()},
        tensors=tensors,
        dtypes={
            kind: {name: ref.dtype.name for name, ref in held.items() if isinstance(ref, TensorRef)}
            for kind, held in found.held.items()
        },
        tied=found.tied,
        apart=apart,
        checked=checked,
    )


def shown(ref: TensorRef) -> object:
    """A tensor inside settings: its number, or its digest."""
    if is_number(ref):
        return _number(load(ref).reshape(-1), ref.dtype)
    with Reader() as reader:
        return _digest(Job(ref, number=False), Stream(()), reader)[0]


def _rounds_to(master: TensorRef, weight: TensorRef | Value) -> DType | None:
    if not isinstance(weight, TensorRef) or weight.dtype is master.dtype or weight.shape != master.shape:
        return None
    return weight.dtype if weight.dtype.is_float and master.dtype.is_float else None


def _digest(job: Job, stream: Stream, reader: Reader) -> tuple[str, str]:
    """Of a tensor, and of the same elements rounded where that is asked for."""
    running = _Running(job)
    for block in stream.blocks(job.ref, reader):
        running.add(block)
    return running.result()


class _Running:
    """The digests of a tensor of which a part has been read."""

    __slots__ = ("_job", "_number", "_other", "_own")

    def __init__(self, job: Job) -> None:
        self._job = job
        self._number = ""
        self._own = xxhash.xxh3_128(_head(job.ref.dtype, job.ref.shape))
        self._other = xxhash.xxh3_128(_head(job.rounded, job.ref.shape)) if job.rounded else None

    def add(self, block: Array) -> None:
        """The next elements."""
        if self._job.number:
            self._number = _line(_number(block, self._job.ref.dtype))
            return
        self._own.update(block.view("u1").data)
        if self._other is not None and self._job.rounded is not None:
            self._other.update(_rounded(block, self._job.ref.dtype, self._job.rounded).view("u1").data)

    def result(self) -> tuple[str, str]:
        if self._job.number:
            return self._number, ""
        return self._own.hexdigest(), self._other.hexdigest() if self._other is not None else ""


class Passing:
    """The digests of a tensor in one piece of a file, from its bytes as a pass comes by: a sink."""

    __slots__ = ("_rest", "_running", "end", "job", "result", "start")

    def __init__(self, job: Job, source: ByteRange) -> None:
        self.job, self.start, self.end = job, source.start, source.end
        self.result: tuple[str, str] | None = None  # until all of it came by
        self._running: _Running | None = None  # while some of it has
        self._rest = b""  # of an element that a block has cut

    def update(self, block: memoryview, /) -> None:
        if self._running is None:
            self._running = _Running(self.job)
        self.start += len(block)
        dtype = self.job.ref.dtype
        view = memoryview(self._rest + bytes(block)) if self._rest else block
        whole = len(view) // dtype.itemsize * dtype.itemsize
        self._rest = bytes(view[whole:])
        if whole:
            self._running.add(numpy_array(view[:whole], dtype))
        if self.start == self.end:
            self.result, self._running = self._running.result(), None


@lru_cache(maxsize=4096)  # of many tensors, most have one of a few shapes
def _head(dtype: DType, shape: tuple[int, ...]) -> bytes:
    return f"{dtype.name} {','.join(map(str, shape))}\n".encode()


def _rounded(block: Array, source: DType, target: DType) -> Array:
    if nonfinite(block, source) == (0, 0):
        return comparable(block, source, target, is_ordinary=True)  # twice as fast as the cast
    return cast(block, source, target)


def _number(block: Array, dtype: DType) -> object:
    if dtype.is_float:
        return number(float(block[0]))
    return str(block[0]) if dtype.name.startswith("complex") else int(block[0])


def _state(tensors: Mapping[str, Mapping[str, str]], apart: Iterable[str]) -> str:
    weights, masters = tensors.get(WEIGHT, {}), tensors.get(MASTER, {})
    lines = _lines(WEIGHT, {**weights, **masters})
    lines += _lines(APART, {name: weights[name] for name in apart})
    for kind in tensors.keys() - {WEIGHT, MASTER}:
        lines += _lines(kind, tensors[kind])
    return _hash(sorted(lines))


def _lines(kind: str, named: Mapping[str, str]) -> list[str]:
    text = encode_basestring_ascii  # three texts are written at once, as json.dumps writes them
    return [f"[{text(kind)}, {text(name)}, {text(named[name])}]" for name in sorted(named)]


def _line(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(lines: Iterable[str]) -> str:
    return xxhash.xxh3_128("".join(f"{line}\n" for line in lines).encode()).hexdigest()
