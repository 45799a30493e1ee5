"""From the pieces of a tensor to the tensor: they must be disjoint and fill it.

torch does not look: a part that no piece covers keeps whatever value the model had before it was loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats.dcp.items import Data
from ckpttools.formats.dcp.metadata import Item, Piece, Tensor
from ckpttools.tensors import Box, ByteRange, Source, TensorRef, Tiles, join_chunks

MAX_COMPARISONS = 20_000_000


def check_pieces(key: str, tensor: Tensor) -> None:
    """Raises CkptError where pieces overlap, leave a hole, or have no entry that says where they lie."""
    pieces = sorted((p for p in tensor.pieces if p.numel), key=lambda p: p.offsets)
    lost = next((p for p in pieces if p.item is None), None)
    if lost is not None:
        raise _bad("entry-missing", key, f"no entry says where its part at {list(lost.offsets)} lies")
    comparisons = 0
    active: list[Piece] = []
    for piece in pieces:
        active = [other for other in active if other.offsets[0] + other.shape[0] > piece.offsets[0]]
        comparisons += len(active)
        if comparisons > MAX_COMPARISONS:
            raise Unsupported(
                "chunks-irregular",
                f"'{escape(key)}' is cut into too many crossing pieces",
                why="the parts lie across each other: each element would have a place of its own",
            )
        for other in active:
            if _meet(piece, other):
                places = f"{list(other.offsets)} and {list(piece.offsets)}"
                raise _bad("chunks-overlap", key, f"its parts at {places} overlap")
        if piece.offsets:
            active.append(piece)
    held, numel = sum(p.numel for p in pieces), math.prod(tensor.shape)
    if held > numel:  # of a tensor without dimensions, which all have the same place
        raise _bad("chunks-overlap", key, f"{len(pieces)} parts hold its one element")
    if held < numel:
        raise _bad("chunk-missing", key, f"{numel - held} of {numel} elements are in no part")


def _meet(a: Piece, b: Piece) -> bool:
    return all(
        p < q + m and q < p + n for p, n, q, m in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    )


def _bad(id: str, key: str, problem: str) -> CkptError:
    return CkptError(
        id,
        f"'{escape(key)}': {problem}",
        why="torch does not notice: that part of the tensor would keep the value it had before loading",
        hint="copy .metadata and all data files again, from one save",
    )


def assembled(key: str, tensor: Tensor, data: Mapping[Item, object]) -> TensorRef:
    """The tensor from pieces that fill it: rows one after another, and tiles where columns are cut too."""
    pieces = sorted((p for p in tensor.pieces if p.numel), key=lambda p: p.offsets)
    chunks = [_chunk(piece, data) for piece in pieces]
    if not tensor.shape or len(pieces) < 2:
        return TensorRef(tensor.dtype, tensor.shape, tuple(chunks))
    out: list[Source] = []
    band: list[int] = []  # pieces whose rows meet: none begins or ends within another's
    end = 0
    for i, piece in enumerate(pieces):
        if piece.offsets[0] >= end:
            out += _band(key, tensor, [(pieces[k], chunks[k]) for k in band])
            band = []
        band.append(i)
        end = max(end, piece.offsets[0] + piece.shape[0])
    out += _band(key, tensor, [(pieces[k], chunks[k]) for k in band])
    return TensorRef(tensor.dtype, tensor.shape, join_chunks(out))


def _chunk(piece: Piece, data: Mapping[Item, object]) -> Source:
    found = data[piece.item] if piece.item is not None else None
    assert isinstance(found, Data)
    return found.chunk


def _band(key: str, tensor: Tensor, members: list[tuple[Piece, Source]]) -> list[Source]:
    if len(members) < 2:
        return [chunk for _, chunk in members]
    top = min(piece.offsets[0] for piece, _ in members)
    rows = max(piece.offsets[0] + piece.shape[0] for piece, _ in members) - top
    boxes = []
    for piece, chunk in members:
        if not isinstance(chunk, ByteRange):
            raise Unsupported(
                "chunks-irregular",
                f"'{escape(key)}' is cut along two dimensions, and one part is not contiguous",
                why="torch's writers never lay it out like this",
                hint="load it with torch and save it again",
            )
        origin = (piece.offsets[0] - top, *piece.offsets[1:])
        boxes.append(Box(chunk.path, chunk.start, origin, piece.shape))
    shape = (rows, *tensor.shape[1:])
    numel = math.prod(shape)
    return [Tiles(itemsize=tensor.dtype.itemsize, shape=shape, boxes=tuple(boxes), first=0, numel=numel)]


# --- writing ------------------------------------------------------------------------------------------


def rows(ref: TensorRef, mesh: Sequence[int]) -> Iterator[tuple[int, int, TensorRef]]:
    """(rank, first row, part) for each rank of a mesh whose part has elements, by their rows.

    Along each dimension of the mesh rows are cut as torch.chunk does, ceil(rows / ranks) each; along the
    last one first, as FSDP2 shards what tensor parallelism has cut. What has no rows is rank 0's.
    """
    if not ref.shape or not ref.numel:
        yield 0, 0, ref
        return
    inner = ref.numel // ref.shape[0]
    for rank, low, high in _cut(tuple(mesh), 0, ref.shape[0]):
        yield rank, low, ref.flat(low * inner, (high - low) * inner).view((high - low, *ref.shape[1:]))


def _cut(mesh: tuple[int, ...], low: int, high: int) -> Iterator[tuple[int, int, int]]:
    if not mesh:
        yield 0, low, high
        return
    *outer, last = mesh
    step = -(-(high - low) // last)
    for i, start in enumerate(range(low, high, step)):
        for rank, first, end in _cut(tuple(outer), start, min(start + step, high)):
            yield rank * last + i, first, end
