"""Optimizer files that training cannot have left so: moments of zero, master weights without fp32 digits.

Each file that holds a rank's part of the optimizer is looked at by itself. Both are found in the first block
of almost every good one, so hardly a byte is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.errors import CkptError
from ckpttools.findings import WARNING, Finding
from ckpttools.location import Location
from ckpttools.passes.read import Reader, blocks
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, ByteRange, DType
from ckpttools.values import Array, is_rounded, is_zero

LEAST_NUMEL = 8  # of a file: fewer elements may be so by chance
LEAST_STEPS = 2
# DeepSpeed's warmups make two updates with a learning rate of zero: the one before the schedule's first step,
# and the one after it (log(1) and 0 / N)
WARMED = 3
FIRST_NBYTES = 64 * 1024
_SHORT = {dtype.short: dtype for dtype in (BFLOAT16, FLOAT16)}

Part = dict[Location, list[tuple[ByteRange, DType]]]  # by file: where its elements lie


def check_untouched(found: Checkpoint) -> Iterator[Finding]:
    """Warnings; nothing where no update was made, or a file cannot be read (the pass says so)."""
    done = (found.training.step or 0) - (found.training.skipped_steps or 0)
    if found.layout.zero_stage is None or done < LEAST_STEPS:
        return
    try:
        with Reader() as reader:
            yield from _check(found, done, reader)
    except CkptError:
        return


def _check(found: Checkpoint, done: int, reader: Reader) -> Iterator[Finding]:
    kinds = {kind for group in found.groups for kind in group.state} - {FP32}
    moments, masters = _parts(found, kinds), _parts(found, {FP32})
    zero = [path for path, part in moments.items() if _all(part, is_zero, reader)]
    for path in zero:
        others = "no rank has others" if len(zero) == len(moments) else "the other ranks' are not"
        yield Finding(
            id="moments-zero",
            severity=WARNING,
            file=str(path),
            message=f"all of its {', '.join(sorted(kinds))} are zero after {done} steps, and {others}",
            hint="a resume begins the moments anew there: use another copy, unless they were reset",
        )
    dtype = _SHORT.get(found.layout.dtype or "")
    if dtype is None or done < WARMED:
        return
    for path, part in masters.items():
        if path in zero or not _all(part, partial(is_rounded, dtype=dtype), reader):
            continue  # without an update of its own a rank's master weights are what they were made from
        yield Finding(
            id="masters-rounded",
            severity=WARNING,
            file=str(path),
            message=f"every master weight is exactly a {dtype.short} number, which {done} steps do not make",
            hint="they were made from the 16-bit weights, and their digits are lost: use another copy",
        )


def _parts(found: Checkpoint, kinds: set[str]) -> Part:
    """The elements of these kinds of state by file, without files that hold too few."""
    parts: Part = {}
    numel: dict[Location, int] = {}
    for group in found.groups:
        for kind in kinds & group.state.keys():
            for ref in group.state[kind].values():
                if not ref.dtype.is_float or (kind == FP32 and ref.dtype is not FLOAT32):
                    continue
                for chunk in ref.chunks:
                    if isinstance(chunk, ByteRange):
                        parts.setdefault(chunk.path, []).append((chunk, ref.dtype))
                        numel[chunk.path] = numel.get(chunk.path, 0) + chunk.nbytes // ref.dtype.itemsize
    return {path: part for path, part in parts.items() if numel[path] >= LEAST_NUMEL}


def _all(part: Iterable[tuple[ByteRange, DType]], holds: Callable[[Array], bool], reader: Reader) -> bool:
    """Whether it holds of every element; stops at the first block where it does not."""
    return all(
        holds(block) for chunk, dtype in part for block in blocks([chunk], dtype, FIRST_NBYTES, reader)
    )
