"""ZeRO-2 folders of any size from the structure of a small real one: random values, or none at all.

    python tests/benchmarks/synthetic.py FOLDER --parameters 7.15e9 --ranks 64

writes the sparse folder of the benchmark of `inspect`: headers, pickles, checksums and zip64 directories as
DeepSpeed would write them, tensors as holes that need no space on disk.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ckpttools.checksums import crc32, crc32_combine
from ckpttools.containers import fields
from ckpttools.containers.pickles import Dict, Global, Node, Object
from ckpttools.containers.torch_file import (
    Storage,
    new_storage,
    read_torch_file,
    size_node,
    tensor_node,
    write_torch_file,
)
from ckpttools.execute import execute
from ckpttools.formats.zero.flat import FlatGroup
from ckpttools.formats.zero.optim_file import ADDRESS
from ckpttools.plan import Cast, Literal, OutputFile, Plan, Sealed, Segment
from ckpttools.tensors import BFLOAT16, FLOAT32, ByteRange, TensorRef, Zeros

SAMPLE = Path(__file__).parents[2] / "fixtures/deepspeed-0.19.8/z2_bf16_ws2/global_step3"
RANK = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
Fill = Callable[[int, int], Segment]  # first element and number of elements of the flat vector -> fp32 values


def write_random(folder: Path, parameters: int, ranks: int = 2) -> None:
    """A whole checkpoint of random values; the bf16 weights are the rounded master weights."""
    _write_random(folder, *_names_and_shapes(parameters), ranks)


def write_many(folder: Path, tensors: int, ranks: int = 2) -> None:
    """The same of many small parameters, 12 elements each: what costs is their number."""
    _write_random(folder, [f"layers.{i}.weight" for i in range(tensors)], [(4, 3)] * tensors, ranks)


def _write_random(folder: Path, names: list[str], shapes: list[tuple[int, ...]], ranks: int) -> None:
    import numpy as np

    group = _group(names, shapes, ranks)
    values = folder.with_name(folder.name + ".values")
    np.random.default_rng(0).random(group.total, np.float32).tofile(values)  # means of squares: not negative
    try:
        files = _files(group, shapes, lambda start, numel: ByteRange(values, start * 4, numel * 4))
        execute(Plan(files=tuple(files)), folder)
    finally:
        values.unlink()


def write_sparse(folder: Path, parameters: int, ranks: int) -> None:
    """A whole checkpoint whose tensors are zeros that take no space."""
    names, shapes = _names_and_shapes(parameters)
    for file in _files(_group(names, shapes, ranks), shapes, lambda _, numel: Zeros(numel * 4)):
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_sparse_file(file, path)


def _names_and_shapes(parameters: int) -> tuple[list[str], list[tuple[int, ...]]]:
    """An embedding of up to 30 % of the parameters (over 4 GiB in a big model), then square layers."""
    width = 4096 if parameters > 1e9 else 512
    rows = int(parameters * 0.3) // width
    depth = (parameters - rows * width) // (width * width)
    names = ["embedding.weight"] + [f"layers.{i}.weight" for i in range(depth)]
    return names, [(rows, width)] + [(width, width)] * depth


def _group(names: Sequence[str], shapes: Sequence[tuple[int, ...]], ranks: int) -> FlatGroup:
    numels = tuple(math.prod(shape) for shape in shapes)
    return FlatGroup(
        names=tuple(names), numels=numels, gaps=(0,) * len(names), ranks=ranks, alignment=2 * ranks
    )


def _view(ref: TensorRef, storage: Storage, offset: int) -> Object:
    """A tensor that begins at element `offset` of a storage that others share."""
    node = tensor_node(ref, storage)
    node.args = (storage, offset, *node.args[2:])
    return node


def _files(group: FlatGroup, shapes: Sequence[tuple[int, ...]], fill: Fill) -> list[OutputFile]:
    tag = SAMPLE.name
    model = fields.mapping(SAMPLE, read_torch_file(SAMPLE / "mp_rank_00_model_states.pt").value, "model")
    flat = fill(0, group.total)
    rounded: Segment = (
        Zeros(group.total * 2) if isinstance(flat, Zeros) else Cast((_chunk(flat),), FLOAT32, BFLOAT16)
    )
    storage = new_storage(BFLOAT16, group.total, (rounded,))
    starts = group.starts()
    weights = [
        (name, _view(TensorRef(BFLOAT16, shape, ()), storage, starts[name]))
        for name, shape in zip(group.names, shapes, strict=True)
    ]
    sizes = [(name, size_node(shape)) for name, shape in zip(group.names, shapes, strict=True)]
    root = model.replace(
        {"module": _ordered(weights), "param_shapes": [_ordered(sizes)], "dp_world_size": group.ranks}
    )
    files = [write_torch_file(f"{tag}/mp_rank_00_model_states.pt", root)]
    files += [_rank_file(group, rank, fill, f"{tag}/{RANK.format(rank)}") for rank in range(group.ranks)]
    return [*files, OutputFile(path="latest", segments=(Literal(tag.encode()),))]


def _chunk(segment: Segment) -> ByteRange:
    assert isinstance(segment, ByteRange)
    return segment


def _ordered(pairs: Sequence[tuple[Node, Node]]) -> Object:
    node = Object("reduce", Global("collections", "OrderedDict"), ())
    node.pairs = list(pairs)
    return node


def _rank_file(group: FlatGroup, rank: int, fill: Fill, path: str) -> OutputFile:
    root = fields.mapping(SAMPLE, read_torch_file(SAMPLE / RANK.format(0)).value, "root")
    state = fields.mapping(SAMPLE, root.get("optimizer_state_dict"), "optimizer_state_dict")
    base = fields.mapping(SAMPLE, state.get("base_optimizer_state"), "base_optimizer_state")
    adam = fields.mapping(SAMPLE, fields.mapping(SAMPLE, base.get("state"), "state").get(0), "state[0]")

    def part(numel: int) -> Node:
        storage = new_storage(FLOAT32, group.part, (fill(rank * group.part, group.part),))
        return tensor_node(TensorRef(FLOAT32, (numel,), ()), storage)

    addresses: list[tuple[Node, Node]] = []
    for name, (numel, start) in group.mapping(rank, group.in_order).items():
        address = Object("newobj", ADDRESS, ())
        address.state = Dict.of([("numel", numel), ("start", start)])
        addresses.append((name, address))
    moments = {"exp_avg": part(group.part), "exp_avg_sq": part(group.part)}
    new = state.replace(
        {
            "base_optimizer_state": base.replace({"state": Dict.of([(0, adam.replace(moments))])}),
            "single_partition_of_fp32_groups": [part(group.part - group.padding(rank))],
            "group_paddings": [group.padding(rank)],
            "param_alignment_paddings": [[0] * len(group.names)],
            "partition_count": [group.ranks],
            "param_slice_mappings": [_ordered(addresses)],
        }
    )
    return write_torch_file(path, root.replace({"optimizer_state_dict": new}))


def _write_sparse_file(file: OutputFile, path: Path) -> None:
    starts = [0]
    for segment in file.segments:
        starts.append(starts[-1] + segment.nbytes)
    holes = [
        (start + at, first, last)
        for start, segment in zip(starts, file.segments, strict=False)
        if isinstance(segment, Sealed)
        for at, first, last in segment.holes
    ]
    crcs = dict.fromkeys(((first, last) for _, first, last in holes), 0)
    with path.open("wb") as out:
        out.truncate(file.nbytes)
        for i, (start, segment) in enumerate(zip(starts, file.segments, strict=False)):
            if isinstance(segment, Zeros):
                crc = _crc32_of_zeros(segment.nbytes)
            else:
                data = _small(segment)
                os.pwrite(out.fileno(), data, start)
                crc = crc32(data)
            for first, last in crcs:
                if first <= i < last:
                    crcs[first, last] = crc32_combine(crcs[first, last], crc, segment.nbytes)
        for at, first, last in holes:
            os.pwrite(out.fileno(), crcs[first, last].to_bytes(4, "little"), at)


def _small(segment: Segment) -> bytes:
    """A header, or a scalar of the sample."""
    if isinstance(segment, Literal | Sealed):
        return segment.data
    assert isinstance(segment, ByteRange)
    with segment.path.open("rb") as file:
        return os.pread(file.fileno(), segment.nbytes, segment.start)


def _crc32_of_zeros(nbytes: int) -> int:
    if nbytes < 1024:
        return crc32(bytes(nbytes))
    half = _crc32_of_zeros(nbytes // 2)
    twice = crc32_combine(half, half, nbytes // 2)
    return crc32(b"\0", twice) if nbytes % 2 else twice


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), required=True)
    parser.add_argument("--ranks", type=int, default=64)
    options = parser.parse_args()
    write_sparse(options.folder, options.parameters, options.ranks)
