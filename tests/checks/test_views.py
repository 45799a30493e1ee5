"""The values of tensors that do not lie in C order: channels_last, transposed, every other column."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpttools.checks import verify
from ckpttools.checks.contents import tasks_of
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.findings import ERROR
from ckpttools.formats import Checked, locate
from ckpttools.operations.verify_spread import share
from ckpttools.passes.read import load
from ckpttools.passes.run import run
from ckpttools.passes.tasks import NonFinite
from ckpttools.stores.files import bytes_of
from ckpttools.tensors import FLOAT32, ByteRange, Strided, TensorRef

NAN = float("nan")


def conv() -> torch.Tensor:
    return torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)


def holed(beside: float = 0.5) -> torch.Tensor:
    """Every other column of a matrix, with one value in all others."""
    base = torch.full((40, 30), beside)
    base[:, ::2] = torch.randn(40, 15)
    return base[:, ::2]


VIEWS = {
    "channels_last": conv,
    "transposed": lambda: torch.randn(6, 9).t(),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "columns": holed,
    "large columns": lambda: torch.randn(700, 1000)[:, 100:900],
    "steps of both": lambda: torch.randn(40, 30)[::3, 1::2].t(),
    "repeated": lambda: torch.randn(9).expand(5, 9),
    "windows": lambda: torch.randn(64).unfold(0, 4, 1),
}


def problems(path: Path) -> list[tuple[str, str, str]]:
    return [(f.severity, f.id, f.where) for f in verify(path).findings if f.severity != "info"]


def first_bad(path: Path) -> int:
    """The byte that the finding names."""
    (finding,) = (f for f in verify(path).findings if f.id == "nonfinite")
    return int(finding.message.split("the first at byte ")[1].split()[0])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_nan_in_a_view(name: str, legacy: bool, tmp_path: Path) -> None:
    view = VIEWS[name]()
    state = {"a.weight": torch.randn(4, 4), "w.weight": view}
    torch.save(state, tmp_path / "good.pt", _use_new_zipfile_serialization=not legacy)
    assert problems(tmp_path / "good.pt") == []
    view[-1, -1] = NAN
    path = tmp_path / "bad.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert problems(path) == [(ERROR, "nonfinite", "w.weight")]
    assert np.isnan(np.frombuffer(path.read_bytes()[first_bad(path) :][:4], "<f4"))[0]


@pytest.mark.parametrize("beside", [NAN, float("inf"), 1e-40, 1e30])
def test_what_lies_around_a_view_is_no_part_of_it(beside: float, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(4, 4), "w.weight": holed(beside)}, tmp_path / "a.pt")
    assert problems(tmp_path / "a.pt") == []


def test_a_view_of_another_tensor_is_looked_at_once(tmp_path: Path) -> None:
    whole = torch.randn(40, 30)
    whole[3, 4] = NAN
    torch.save({"model": {"w.weight": whole, "v.weight": whole[:, ::2]}, "epoch": 1}, tmp_path / "a.pt")
    assert problems(tmp_path / "a.pt") == [(ERROR, "nonfinite", "w.weight")]
    torch.save({"model": {"v.weight": whole[:, ::2]}, "epoch": 1}, tmp_path / "b.pt")
    assert problems(tmp_path / "b.pt") == [(ERROR, "nonfinite", "v.weight")]


def trained(path: Path, **changes: float) -> Path:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        model(torch.randn(2, 4, 6, 6)).sum().backward()
        optimizer.step()
    for kind, value in changes.items():
        moment = optimizer.state[model[0].weight][kind]
        assert not moment.is_contiguous()
        moment[2, 1, 0, 2] = value
    state: dict[str, Any] = {"model_state_dict": model.state_dict(), "global_step": 3}
    torch.save(state | {"optimizer_state_dict": optimizer.state_dict()}, path)
    return path


def test_moments_of_a_weight_in_channels_last(tmp_path: Path) -> None:
    assert problems(trained(tmp_path / "good.pt")) == []
    assert problems(trained(tmp_path / "nan.pt", exp_avg=NAN)) == [(ERROR, "nonfinite", "0.weight (exp_avg)")]
    assert problems(trained(tmp_path / "below.pt", exp_avg_sq=-1.0)) == [
        (ERROR, "negative-square", "0.weight (exp_avg_sq)")
    ]


def test_a_damaged_record_names_the_view_in_it(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(4, 4), "w.weight": torch.randn(6, 9).t()}, tmp_path / "a.pt")
    view = next(view for view in _views(tmp_path / "a.pt") if view.shape == (9, 6))
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[view.start + 3] = 0x7F
    data[view.start + 2] = 0xC0  # NaN: what the checksum says is enough
    (tmp_path / "a.pt").write_bytes(data)
    (finding,) = (f for f in verify(tmp_path / "a.pt").findings if f.severity == ERROR)
    assert finding.id == "checksum" and "w.weight" in finding.message


def _views(path: Path) -> list[Strided]:
    found = locate(path).format.read(locate(path))
    return [c for ref in found.tensors.values() for c in ref.chunks if isinstance(c, Strided)]


def test_workers_that_share_a_file_with_a_view(tmp_path: Path) -> None:
    view = torch.randn(400, 1000)[:, 10:900]
    view[-1, -1] = NAN
    torch.save({"a.weight": torch.randn(300, 300), "w.weight": view}, tmp_path / "a.pt")
    source = locate(tmp_path / "a.pt")
    found = source.format.read(source)
    tasks = tasks_of(Checked([], found, [read_torch_file(tmp_path / "a.pt")]))
    results = [
        result
        for rank in range(3)
        for mine, checks, hashes in [share(tasks, found.checks, {}, rank, 3)]
        for result in run(mine, checks, hashes=hashes).results
    ]
    assert [type(result) for result in results] == [NonFinite]


def test_a_view_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Against torch: the same elements, and no more of them than the view has."""
    chance = random.Random(3)
    base = torch.arange(5000, dtype=torch.float32)
    path = tmp_path / "a"
    path.write_bytes(base.numpy().tobytes())
    for _ in range(400):
        dims = chance.randint(1, 4)
        shape = tuple(chance.randint(1, 5) for _ in range(dims))
        strides = tuple(chance.choice([0, 1, 1, 2, 3, 4, 5, 10, 25, 60, 125]) for _ in range(dims))
        wanted = base.as_strided(shape, strides, 7)
        view = Strided(
            path=path,
            start=28,
            itemsize=4,
            shape=shape,
            strides=strides,
            first=0,
            numel=wanted.numel(),
        )
        assert [view.byte_of(i) for i in range(view.numel)] == [int(x) * 4 for x in wanted.reshape(-1)]
        where = view.in_file_order()
        got = _elements(where)
        assert set(got) == {int(x) for x in wanted.reshape(-1)}
        assert len(got) <= wanted.numel()


def _elements(where: ByteRange | Strided) -> list[int]:
    if isinstance(where, ByteRange):
        return [int(x) for x in np.frombuffer(bytes_of(where), "<f4")]
    return [int(x) for x in load(TensorRef(FLOAT32, (where.numel,), (where,)))]


def test_a_view_of_any_size_that_repeats_one_element(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(4, 4), "w": torch.ones(1).expand(10**9, 10**9)}, tmp_path / "a.pt")
    assert problems(tmp_path / "a.pt") == []


def test_a_view_that_overlaps_itself_is_read_no_more_than_once(tmp_path: Path) -> None:
    """Of a hostile file a view has a million times as many elements as there are."""
    side = 2**14
    base = torch.zeros(5 * side + 1)
    torch.save({"w": torch.as_strided(base, (side, side), (2, 3))}, tmp_path / "a.pt")
    source = locate(tmp_path / "a.pt")
    tasks = tasks_of(Checked([], source.format.read(source), [read_torch_file(tmp_path / "a.pt")]))
    assert sum(task.nbytes for task in tasks) < 2 * base.nbytes
    assert problems(tmp_path / "a.pt") == []
    base[2] = NAN
    torch.save({"w": torch.as_strided(base, (side, side), (2, 3))}, tmp_path / "a.pt")
    assert [(id, where) for _, id, where in problems(tmp_path / "a.pt")] == [("nonfinite", "w")]
