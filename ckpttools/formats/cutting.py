"""What keeps optimizer state from being cut over ranks: the refusals of ZeRO's writers, and which values are
equal.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.pickles import plain
from ckpttools.errors import CkptError, Unsupported, escape, some
from ckpttools.stores.files import bytes_of
from ckpttools.tensors import ByteRange, TensorRef, Zeros, cut_chunks
from ckpttools.tree import Opaque, Value, same

_BLOCK = 1 << 20


def no_groups(checkpoint: Checkpoint, made: str = "a ZeRO folder") -> CkptError:
    if checkpoint.unnamed:
        return Unsupported(
            "no-groups",
            f"which parameters the optimizers under {some(checkpoint.unnamed)} have is not known",
            where=checkpoint.path,
            why=f"{made} is made of the parameter groups of one optimizer, by name",
            hint="--reset-optimizer --like CHECKPOINT leaves their state out and takes the groups of a run",
        )
    return Unsupported(
        "no-groups",
        f"the checkpoint has no parameter groups, and {made} is made of them",
        where=checkpoint.path,
        why="master weights and optimizer state are saved for the parameters of the optimizer",
        hint="name a training checkpoint, one that holds its optimizer",
    )


def not_flat(checkpoint: Checkpoint, kind: str, problem: str, unit: str = "group") -> CkptError:
    """State that has no place where a whole `unit` has one flat vector."""
    return Unsupported(
        "state-not-flat",
        f"optimizer state '{escape(kind)}' {escape(problem)}",
        where=checkpoint.path,
        why=f"ZeRO keeps one flat vector and one set of values for a whole {unit}",
        hint="convert the weights alone, or to a format that keeps state per parameter (pt, dcp)",
    )


def equal(a: Value, b: Value) -> bool:
    """Whether values that stand for one are equal: tensors by their bytes, opaque objects by what is shown of
    them.
    """
    if isinstance(a, TensorRef) and isinstance(b, TensorRef):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _same_bytes(a, b)
    if isinstance(a, Opaque) and isinstance(b, Opaque):
        return plain(a.node) == plain(b.node)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return same(a, b)


def _same_bytes(a: TensorRef, b: TensorRef) -> bool:
    """Read a block at a time, up to the first difference."""
    if a.chunks == b.chunks:
        return True
    blocks = ((_block(a, at), _block(b, at)) for at in range(0, a.nbytes, _BLOCK))
    return all(mine is not None and mine == yours for mine, yours in blocks)


def _block(ref: TensorRef, at: int) -> bytes | None:
    """A block of a tensor; None where it is a view with holes."""
    parts = cut_chunks(ref.chunks, at, min(_BLOCK, ref.nbytes - at))
    if not all(isinstance(part, ByteRange | Zeros) for part in parts):
        return None
    return b"".join(_bytes(part) for part in parts if isinstance(part, ByteRange | Zeros))


def _bytes(part: ByteRange | Zeros) -> bytes:
    return bytes(part.nbytes) if isinstance(part, Zeros) else bytes_of(part)
