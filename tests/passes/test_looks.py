"""The pass over the bytes, by itself: pieces that are larger than a block, of types of every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpttools.passes import tasks as data
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
