"""Optimizer files that training cannot have left so: moments of zero, master weights without fp32 digits.

Both are found in the first block of almost every good file, so hardly a byte is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields
from ckpttools.errors import CkptError
from ckpttools.findings import WARNING, Finding
from ckpttools.formats.zero.decode import Rank
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.formats.zero.read import vector
from ckpttools.passes.read import Reader, blocks
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, ByteRange, DType, TensorRef
from ckpttools.values import Array, is_rounded, is_zero

LEAST_NUMEL = 8  # of a rank: fewer elements may be so by chance
LEAST_STEPS = 2  # a warmup may begin with a learning rate of zero
FIRST_NBYTES = 64 * 1024
_SHORT = {dtype.short: dtype for dtype in (BFLOAT16, FLOAT16)}


def check_untouched(found: Checkpoint) -> Iterator[Finding]:
    """Warnings; nothing where no update was made, or a file cannot be read (the pass says so)."""
    folder = found.template
    if not isinstance(folder, ZeroFolder):
        return
    done = fields.integer(folder.model.root.get("global_steps")) or 0
    done -= fields.integer(folder.model.root.get("skipped_steps")) or 0
    if done < LEAST_STEPS:
        return
    try:
        with Reader() as reader:
            yield from _check(folder, _SHORT.get(found.layout.dtype or ""), done, reader)
    except CkptError:
        return


def _check(folder: ZeroFolder, dtype: DType | None, done: int, reader: Reader) -> Iterator[Finding]:
    large = [rank for rank in folder.ranks if _numel(folder, rank) >= LEAST_NUMEL]
    kinds = {key for keys in folder.partitioned for key in keys}
    zero = [rank for rank in large if kinds and _all(_moments(folder, rank), is_zero, reader)]
    for rank in zero:
        others = "no rank has others" if len(zero) == len(folder.ranks) else "the other ranks' are not"
        yield Finding(
            id="moments-zero",
            severity=WARNING,
            file=str(rank.file.path),
            where=f"dp rank {rank.dp_rank}",
            message=f"all of its {', '.join(sorted(kinds))} are zero after {done} steps, and {others}",
            hint="a resume begins the moments anew there: use another copy, unless they were reset",
        )
    if dtype is None:
        return
    rounded = partial(is_rounded, dtype=dtype)
    for rank in large:
        if rank in zero or not _all(_masters(folder, rank), rounded, reader):
            continue  # without an update of its own a rank's master weights are what they were made from
        yield Finding(
            id="masters-rounded",
            severity=WARNING,
            file=str(rank.file.path),
            where=f"dp rank {rank.dp_rank}",
            message=f"every master weight is exactly a {dtype.short} number, which {done} steps do not make",
            hint="they were made from the 16-bit weights, and their digits are lost: use another copy",
        )


def _numel(folder: ZeroFolder, rank: Rank) -> int:
    """The elements of parameters that a rank holds, without padding."""
    return sum(group.part - group.padding(rank.dp_rank) for group in folder.groups)


def _moments(folder: ZeroFolder, rank: Rank) -> Iterator[TensorRef]:
    return (vector(folder, rank.dp_rank, g, key) for g, keys in enumerate(folder.partitioned) for key in keys)


def _masters(folder: ZeroFolder, rank: Rank) -> Iterator[TensorRef]:
    return (
        ref
        for g in range(len(folder.groups))
        if (ref := vector(folder, rank.dp_rank, g, "fp32")).dtype is FLOAT32
    )


def _all(refs: Iterator[TensorRef], holds: Callable[[Array], bool], reader: Reader) -> bool:
    """Whether it holds of every element, and there is one; stops at the first block where it does not."""
    some = False
    for ref in refs:
        stored = [chunk for chunk in ref.chunks if isinstance(chunk, ByteRange)]
        for block in blocks(stored, ref.dtype, FIRST_NBYTES, reader):
            some = some or len(block) > 0
            if not holds(block):
                return False
    return some
