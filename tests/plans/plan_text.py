"""Plans as text, which a review can read: what a change of a layout moves, shows in tests/plans/golden/.

python tests/plans/plan_text.py          write them again
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from ckpttools import convert, extract, reshard
from ckpttools.operations.writing import Writing
from ckpttools.plan import Literal, OutputFile, Plan, Sealed, Segment, reads
from ckpttools.tensors import ByteRange, Cast, Mean, Strided, Tiles, Zeros, spans

ROOT = Path(__file__).parents[2]
FIXTURES, GOLDEN = ROOT / "fixtures", Path(__file__).parent / "golden"
DRY = Writing(dry_run=True)
GROUPS, ZERO3 = "deepspeed-0.19.8/z2_groups_ws2", "deepspeed-0.19.8/z3_groups_ws2"
FULL, FSDP = "monolithic/full/epoch_2_step_40.pt", "dcp/fsdp2_ws2"


def _made() -> Iterator[tuple[str, str, object, dict[str, object]]]:
    """Name, source, operation and its options."""
    yield "zero2-extract", GROUPS, extract, {}
    yield "zero2-extract-bf16", GROUPS, extract, {"dtype": "bf16", "max_shard_size": 4096}
    yield "zero2-reshard-4", GROUPS, reshard, {"world_size": 4}
    yield "zero2-to-pt", GROUPS, convert, {"to": "pt"}
    yield "zero2-to-dcp", GROUPS, convert, {"to": "dcp", "world_size": 2}
    yield "zero2-to-zero1", GROUPS, convert, {"to": "zero1", "world_size": 1}
    yield "zero2-to-zero0", GROUPS, convert, {"to": "zero0"}
    yield "zero2-to-hf", GROUPS, convert, {"to": "hf"}
    yield "zero3-extract", ZERO3, extract, {}
    yield "zero3-reshard-4", ZERO3, reshard, {"world_size": 4}
    yield "pt-extract", FULL, extract, {}
    yield "pt-to-zero2", FULL, convert, {"to": "zero2", "world_size": 2}
    yield "pt-to-dcp", FULL, convert, {"to": "dcp"}
    yield "dcp-extract", FSDP, extract, {}
    yield "dcp-reshard-4", FSDP, reshard, {"world_size": 4}
    yield "dcp-to-pt", FSDP, convert, {"to": "pt"}
    yield "tied-frozen-reshard-4", "deepspeed-0.19.8/z2_tied_frozen_ws2", reshard, {"world_size": 4}
    yield "hf-extract-fp16", "hf/sharded", extract, {"dtype": "fp16"}


CASES = {name: (source, make, options) for name, source, make, options in _made()}


def made(name: str, place: Path) -> str:
    """The plan of one of CASES, as text; `place` is a folder in which nothing is written."""
    source, make, options = CASES[name]
    assert callable(make)
    plan = make(FIXTURES / source, place / "out", how=DRY, **options).plan
    asked = " ".join(f"{key}={value}" for key, value in options.items())
    return "\n".join([f"{make.__name__} {source} {asked}".rstrip(), *_plan(plan)]) + "\n"


def _plan(plan: Plan) -> Iterator[str]:
    for note in plan.notes:
        yield f"note: {note.replace(f'{FIXTURES}/', '')}"
    yield f"{len(plan.files)} files, {plan.nbytes} bytes, {len(plan.checks)} checksums of the source"
    sources = {span.path for file in plan.files for each in file.segments for span in _spans(each)}
    letters = {path: f"S{i}" for i, path in enumerate(sorted(sources))}
    for path, letter in letters.items():
        yield f"{letter} is {path.relative_to(FIXTURES).as_posix()}"
    for file in plan.files:
        yield ""
        yield f"{file.path or '(the destination)'}: {file.nbytes} bytes"
        yield from _file(file, letters)


def _spans(segment: Segment) -> Iterator[ByteRange]:
    for chunk in reads(segment):
        yield from spans(chunk)


def _file(file: OutputFile, letters: Mapping[Path, str]) -> Iterator[str]:
    """A line for each place that bytes come from; what lies in between is the file's own."""
    at = 0
    for own, segments in groupby(file.segments, key=lambda segment: isinstance(segment, Literal | Sealed)):
        part = list(segments)
        nbytes = sum(segment.nbytes for segment in part)
        if own:
            yield f"  {at:>8} {nbytes:>8}  own, {_digest(part)}"
        else:
            here = at
            for segment in part:
                yield f"  {here:>8} {segment.nbytes:>8}  {_source(segment, letters)}"
                here += segment.nbytes
        at += nbytes


def _digest(segments: list[Segment]) -> str:
    """Of literal bytes; of a checksum, which is not known yet, what it covers."""
    value = 0
    for segment in segments:
        assert isinstance(segment, Literal | Sealed)
        value = zlib.crc32(segment.data, value)
        for hole in segment.holes if isinstance(segment, Sealed) else ():
            value = zlib.crc32(struct.pack("<III", *hole), value)
    return f"{value:08x}"


def _source(segment: Segment, letters: Mapping[Path, str]) -> str:
    match segment:
        case ByteRange(path, start, nbytes):
            whole = (start, nbytes) == (0, path.stat().st_size)
            return f"{letters[path]} " + ("whole" if whole else f"from {start}")
        case Zeros():
            return "zeros"
        case Cast(chunks, source, target):
            parts = (f"{chunk.nbytes} {_source(chunk, letters)}" for chunk in chunks)
            return f"{target.short} of {source.short}: " + "; ".join(parts)
        case Strided() as view:
            box = f"{list(view.shape)} by {list(view.strides)}"
            return f"{letters[view.path]} from {view.start}, {box}, {view.numel} from {view.first}"
        case Tiles() as tiles:
            boxes = "; ".join(f"{letters[b.path]} from {b.start} {list(b.shape)}" for b in tiles.boxes)
            return f"of {list(tiles.shape)}, {tiles.numel} from {tiles.first}: {boxes}"
        case Mean() | Literal() | Sealed():
            raise AssertionError(segment)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        if path.stem not in CASES:
            path.unlink()
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(made(name, GOLDEN))


if __name__ == "__main__":
    sys.exit(main())
