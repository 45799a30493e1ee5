"""The pass over the bytes, by itself: pieces that are larger than a block, of types of every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpttools.passes import tasks as data
from ckpttools.passes.ranges import Claims
from ckpttools.passes.run import run
from ckpttools.tensors import DTYPES, ByteRange
from ckpttools.values import BLOCK_NBYTES

NUMEL = 3 * BLOCK_NBYTES // 4 + 17  # several blocks of either file, and a rest


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wrong", [None, 0, NUMEL // 2, NUMEL - 1])
def test_master_weights_against_copies_of_every_size(name: str, wrong: int | None, tmp_path: Path) -> None:
    from ckpttools.values import cast

    dtype = DTYPES[name]
    master = np.random.default_rng(1).standard_normal(NUMEL).astype(np.float32)
    model = np.array(cast(master, DTYPES["float32"], dtype))
    if wrong is not None:
        model[wrong] += 1
    ranges = []
    for file, values in (("master", master), ("model", model)):
        (tmp_path / file).write_bytes(b"head" + values.tobytes())
        ranges.append(ByteRange(tmp_path / file, 4, values.nbytes))
    task = data.Compare(master=ranges[0], model=ranges[1], dtype=dtype, name="w", first=1000)
    found = run([task], workers=2).results
    assert [(r.name, r.element) for r in found if isinstance(r, data.Mismatch)] == (
        [] if wrong is None else [("w", 1000 + wrong)]
    )
    assert len(found) == (wrong is not None)


def test_copies_that_lie_apart(tmp_path: Path) -> None:
    raw = np.random.default_rng(2).bytes(3 * BLOCK_NBYTES + 5)
    (tmp_path / "one").write_bytes(raw)
    (tmp_path / "other").write_bytes(b"xyz" + raw)
    twins = data.Twins(
        one=ByteRange(tmp_path / "one", 0, len(raw)),
        other=ByteRange(tmp_path / "other", 3, len(raw)),
        name="a",
        twin="b",
    )
    assert run([twins], workers=1).results == []
    (tmp_path / "other").write_bytes(b"xyz" + raw[:-1] + bytes([raw[-1] ^ 1]))
    assert run([twins], workers=1).results == [data.Unlike(path=tmp_path / "one", name="a", twin="b")]


def test_small_neighbours_are_looked_at_as_one_and_named_one_by_one(tmp_path: Path) -> None:
    """Parameters of a flat partition: joined where all is well, each by its name where something is not."""
    rng = np.random.default_rng(3)
    numels = [5, 1, 700, 12] * 100
    master = rng.standard_normal(sum(numels)).astype(np.float32)
    starts = np.cumsum([0, *numels])
    names = [f"p{i}" for i in range(len(numels))]

    def compared(model: np.ndarray) -> list[data.Task]:  # type: ignore[type-arg]
        for file, values in (("master", master), ("model", model)):
            (tmp_path / file).write_bytes(b"some" + values.tobytes())
        pairs = [
            data.Compare(
                master=ByteRange(tmp_path / "master", 4 + 4 * int(start), 4 * numel),
                model=ByteRange(tmp_path / "model", 4 + 4 * int(start), 4 * numel),
                dtype=DTYPES["float32"],
                name=name,
                first=0,
            )
            for name, start, numel in zip(names, starts, numels, strict=False)
        ]
        return list(data.join(pairs))

    joined = compared(master)
    assert len(joined) == 1 and data.parts(joined[0])[-1].name == names[-1]
    assert run(joined, workers=2).results == []
    wrong = master.copy()
    wrong[starts[7] + 3] += 1
    wrong[starts[10]] = np.nan
    found = run(compared(wrong), workers=2).results
    mismatches = [(r.name, r.element) for r in found if isinstance(r, data.Mismatch)]
    assert sorted(mismatches) == [("p10", 0), ("p7", 3)]
    odd = [(r.name, r.nan, r.byte) for r in found if isinstance(r, data.NonFinite)]
    assert odd == [("p10", 1, 4 + 4 * int(starts[10]))]
    assert len(found) == 3


def test_neighbours_of_other_kinds_and_large_ones_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "f"

    def scan(start: int, nbytes: int, dtype: str = "float32", *, squares: bool = False) -> data.Scan:
        return data.Scan(source=ByteRange(path, start, nbytes), dtype=DTYPES[dtype], name="", squares=squares)

    apart = [
        scan(0, 8),
        scan(12, 8),  # a hole before it
        scan(20, 8, "int32"),
        scan(28, 8),
        scan(36, 8, squares=True),
        scan(44, BLOCK_NBYTES),
        scan(44 + BLOCK_NBYTES, 8),
    ]
    assert list(data.join(apart)) == apart


def test_claims_that_touch() -> None:
    path, claims = Path("f"), Claims()

    def free(start: int, end: int) -> list[tuple[int, int]]:
        return [(part.start, part.end) for part in claims.claim(ByteRange(path, start, end - start))]

    assert free(10, 20) == [(10, 20)] and free(20, 30) == [(20, 30)] and free(40, 50) == [(40, 50)]
    assert claims.covers(ByteRange(path, 12, 18)) and not claims.covers(ByteRange(path, 12, 19))
    assert not claims.covers(ByteRange(path, 9, 2)) and not claims.covers(ByteRange(path, 60, 1))
    assert free(0, 60) == [(0, 10), (30, 40), (50, 60)] and free(0, 60) == []
    one, other = ByteRange(path, 60, 5), ByteRange(path, 65, 5)
    assert not claims.claim_all([one, ByteRange(path, 64, 2)]) and not claims.claim_all(
        [ByteRange(path, 59, 2)]
    )
    assert claims.claim_all([one, other]) and not claims.claim_all([one])
