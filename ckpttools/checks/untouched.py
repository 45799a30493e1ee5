"""Optimizer files that training cannot have left so: moments of zero, master weights without fp32 digits.

Each file that holds a rank's part of the optimizer, or all of it without names, is looked at by itself. Both
are found in the first block of almost every good one, so hardly a byte is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.errors import CkptError
from ckpttools.findings import WARNING, Finding
from ckpttools.location import Location
from ckpttools.stores.files import bytes_of
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, ByteRange, DType, Strided, TensorRef
from ckpttools.training import Training

if TYPE_CHECKING:
    from ckpttools.passes.read import Reader
    from ckpttools.values import Array

LEAST_NUMEL = 8  # of a file: fewer elements may be so by chance
LEAST_STEPS = 2
# DeepSpeed's warmups make two updates with a learning rate of zero: the one before the schedule's first step,
# and the one after it (log(1) and 0 / N)
WARMED = 3
FIRST_NBYTES = 64 * 1024
LOOKED, ENDS = 1000, 512  # a glance: tensors, and bytes at either end of them
_SHORT = {dtype.short: dtype for dtype in (BFLOAT16, FLOAT16)}

Part = dict[Location, list[tuple[ByteRange, DType]]]  # by file: where its elements lie


def check_untouched(found: Checkpoint, training: Training) -> Iterator[Finding]:
    """Warnings; nothing where no update was made, or a file cannot be read (the pass says so)."""
    done = _done(found, training)
    if done < LEAST_STEPS or (found.layout.zero_stage is None and found.groups):
        return  # kinds by themselves are looked at in checks/patterns.py
    from ckpttools.passes.read import Reader

    try:
        with Reader() as reader:
            yield from _check(found, training, done, reader)
    except CkptError:
        return


def glance(found: Checkpoint, training: Training) -> Iterator[Finding]:
    """The same of moments, from a few bytes of each tensor: of a good file, of one."""
    done = _done(found, training)
    if done < LEAST_STEPS:
        return
    kinds, moments = _moments(found, training)
    try:
        parts = _parts(found, moments)
        zero = [path for path, part in parts.items() if not any(map(_shows, part[:LOOKED]))]
    except CkptError:
        return
    for path in zero:
        yield _zero(path, kinds, done, alone=len(zero) < len(parts))


def _shows(place: tuple[ByteRange, DType]) -> bool:
    """Whether some byte at the ends of a tensor is not zero."""
    chunk = place[0]
    ends = (
        chunk.cut(0, min(chunk.nbytes, ENDS)),
        chunk.cut(max(0, chunk.nbytes - ENDS), min(chunk.nbytes, ENDS)),
    )
    return any(any(bytes_of(end)) for end in ends)


def _done(found: Checkpoint, training: Training) -> int:
    """The updates that were made, by the counters or by what the optimizer has counted."""
    for each in (found.training, training):
        if each.step is not None:
            return each.step - (each.skipped_steps or 0)
    return max((each.steps or 0 for each in training.optimizers), default=0)


def _check(found: Checkpoint, training: Training, done: int, reader: Reader) -> Iterator[Finding]:
    from ckpttools.values import is_rounded, is_zero

    kinds, refs = _moments(found, training)
    moments = _parts(found, refs)
    zero = [path for path, part in moments.items() if _all(part, is_zero, reader)]
    for path in zero:
        yield _zero(path, kinds, done, alone=len(zero) < len(moments))
    dtype = _SHORT.get(found.layout.dtype or "")
    if dtype is None or done < WARMED:
        return
    masters = (ref for group in found.groups for ref in group.state.get(FP32, {}).values())
    for path, part in _parts(found, (ref for ref in masters if ref.dtype is FLOAT32)).items():
        if path in zero or not _all(part, partial(is_rounded, dtype=dtype), reader):
            continue  # without an update of its own a rank's master weights are what they were made from
        yield Finding(
            id="masters-rounded",
            severity=WARNING,
            file=str(path),
            message=f"every master weight is exactly a {dtype.short} number, which {done} steps do not make",
            hint="they were made from the 16-bit weights, and their digits are lost: use another copy",
        )


def _zero(path: Location, kinds: Collection[str], done: int, *, alone: bool) -> Finding:
    return Finding(
        id="moments-zero",
        severity=WARNING,
        file=str(path),
        message=f"all of its {', '.join(sorted(kinds))} are zero after {done} steps"
        + (", and the other ranks' are not" if alone else ""),
        hint="a resume begins the moments anew there: use another copy, unless they were reset",
    )


def _moments(found: Checkpoint, training: Training) -> tuple[Collection[str], Iterable[TensorRef]]:
    """Their kinds and their places, by names or, where the parameters have none, by numbers."""
    if found.groups:
        kinds = {kind for group in found.groups for kind in group.state} - {FP32}
        return kinds, (ref for g in found.groups for kind in kinds for ref in g.state.get(kind, {}).values())
    kept = [own for each in training.optimizers for own in each.held().state.values()]
    named = [(k, v) for own in kept for k, v in own.items() if isinstance(v, TensorRef) and v.shape]
    return {kind for kind, _ in named}, (ref for _, ref in named)


def _parts(found: Checkpoint, refs: Iterable[TensorRef]) -> Part:
    """The elements of these tensors by file, without files that hold too few.

    Where there are more files than ranks, each is of single parameters, and one that no gradient ever reached
    is zero in a good one: they count as one, which is named after the first.
    """
    parts: Part = {}
    for ref in refs:
        for chunk in ref.chunks if ref.dtype.is_float else ():
            where = chunk.in_file_order() if isinstance(chunk, Strided) else chunk
            if isinstance(where, ByteRange):
                parts.setdefault(where.path, []).append((where, ref.dtype))
    if len(parts) > (found.layout.ranks or found.layout.dp_degree):
        parts = {next(iter(parts)): [place for part in parts.values() for place in part]}
    return {
        path: part
        for path, part in parts.items()
        if sum(chunk.nbytes // dtype.itemsize for chunk, dtype in part) >= LEAST_NUMEL
    }


def _all(part: Iterable[tuple[ByteRange, DType]], holds: Callable[[Array], bool], reader: Reader) -> bool:
    """Whether it holds of every element; stops at the first block where it does not."""
    from ckpttools.passes.read import blocks

    return all(
        holds(block) for chunk, dtype in part for block in blocks([chunk], dtype, FIRST_NBYTES, reader)
    )
