"""ckpt average: bit for bit what numpy and torch take as the mean, whatever the layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import FIXTURES

import ckpttools
from ckpttools.errors import CkptError

TRAINER = FIXTURES / "hf-trainer"
A, B = TRAINER / "plain/checkpoint-2", TRAINER / "plain/checkpoint-4"


def numpy_mean(tensors: list[torch.Tensor], weights: list[float] | None = None) -> torch.Tensor:
    stack = np.stack([each.double().numpy() for each in tensors])
    return torch.from_numpy(np.average(stack, axis=0, weights=weights)).to(tensors[0].dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("name", ["mean", "mean.safetensors", "mean.pt"])
def test_the_mean_of_two_is_torchs(tmp_path: Path, name: str) -> None:
    ran = run("average", A, B, "-o", tmp_path / name)
    assert ran.code == 0 and "sums in float64" in ran.err, ran.err
    assert run("verify", tmp_path / name).code == 0
    if name.endswith(".pt"):
        found = torch.load(tmp_path / name, weights_only=True)
    else:
        found = load_file(tmp_path / name / "model.safetensors" if name == "mean" else tmp_path / name)
    one, two = (load_file(path / "model.safetensors") for path in (A, B))
    assert found.keys() >= one.keys()
    for key in one:
        assert same(found[key], torch.stack([one[key].double(), two[key].double()]).mean(0).float())
    assert any(not same(found[key], one[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_that_has_diverged_is_named_and_nothing_is_written(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    mask = torch.tensor([0.0, float("-inf")], dtype=dtype)  # infinite in all: its mean is
    for name, lost in (("a", 1.0), ("b", value), ("c", 2.0)):
        weight = torch.tensor([1.0, lost], dtype=dtype)
        save_file({"weight": weight, "mask": mask}, tmp_path / f"{name}.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    refused = run("average", a, b, c, "-o", tmp_path / "mean.safetensors")
    assert refused.code == 1 and "error[nonfinite]" in refused.err and f"in {b}" in refused.err
    assert not (tmp_path / "mean.safetensors").exists()
    assert run("average", a, c, "-o", tmp_path / "mean.safetensors").code == 0
    assert load_file(tmp_path / "mean.safetensors")["mask"].equal(mask)


def test_across_layouts_masters_are_taken_and_the_model_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    zero = TRAINER / "deepspeed/checkpoint-2"
    ckpttools.average(zero, B, dst=tmp_path / "mean", weights=(1, 3))
    ckpttools.extract(zero, tmp_path / "master.safetensors")
    one, two = load_file(tmp_path / "master.safetensors"), load_file(B / "model.safetensors")
    found = load_file(tmp_path / "mean/model.safetensors")
    for key in two:
        assert same(found[key], numpy_mean([one[key], two[key]], [1, 3])), key
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    state = model.state_dict()
    assert all(same(state[key], found[key]) for key in found)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
    count=st.integers(2, 5),
    seed=st.integers(0, 2**31),
    weights=st.booleans(),
    special=st.booleans(),
)
def test_any_floats_are_averaged_as_numpy_does(
    dtype: str, count: int, seed: int, weights: bool, special: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mean")
    draw = torch.Generator().manual_seed(seed)
    sides = []
    for i in range(count):
        powers = 10.0 ** torch.randint(-9, 9, (7, 11), generator=draw)
        wide = torch.randn(7, 11, generator=draw, dtype=torch.float64) * powers
        limit = torch.finfo(getattr(torch, dtype)).max
        wide.clamp_(-limit, limit)  # what one of them alone has as infinite is refused
        if special:
            wide[0, :5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e300, 5e-324])
        sides.append(wide.to(getattr(torch, dtype)))
        torch.save({"state_dict": {"a.weight": sides[-1], "b.bias": sides[-1][:, ::2]}}, folder / f"{i}.pt")
    shares = [float(x) for x in torch.rand(count, generator=draw) + 0.1] if weights else []
    ckpttools.average(*(folder / f"{i}.pt" for i in range(count)), dst=folder / "m.pt", weights=shares)
    found = torch.load(folder / "m.pt", weights_only=True)
    with np.errstate(all="ignore"):
        expected = numpy_mean(sides, shares or None)
    for mine, theirs in ((found["a.weight"], expected), (found["b.bias"], expected[:, ::2])):
        nan = torch.isnan(theirs)
        assert torch.equal(torch.isnan(mine), nan)
        clean = [torch.where(nan, torch.zeros((), dtype=mine.dtype), each) for each in (mine, theirs)]
        assert clean[0].contiguous().view(torch.uint8).equal(clean[1].contiguous().view(torch.uint8))
    shutil.rmtree(folder)


def test_what_is_not_averaged_is_named(tmp_path: Path) -> None:
    for i in range(2):
        held = {"w.weight": torch.ones(2), "c": torch.complex(torch.ones(2), torch.ones(2))}
        torch.save({"state_dict": held}, tmp_path / f"{i}.pt")
    made = ckpttools.average(tmp_path / "0.pt", tmp_path / "1.pt", dst=tmp_path / "m.pt")
    assert "1 tensors are not averaged (integers, float8, complex): the last one's; c" in made.notes


def test_large_tensors_go_through_small_buffers(tmp_path: Path) -> None:
    """Several units and blocks, views and a change of type within the pieces of a tensor, several threads."""
    sides = [torch.randn(3, 700_001) for _ in range(3)]
    for i, side in enumerate(sides):
        torch.save({"state_dict": {"a.weight": side, "t.weight": side.t()}}, tmp_path / f"{i}.pt")
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for workers in (1, 4):
        how = ckpttools.Writing(workers=workers)
        ckpttools.average(*paths, dst=tmp_path / f"m{workers}.pt", how=how)
    found = torch.load(tmp_path / "m4.pt", weights_only=True)
    assert same(found["a.weight"], numpy_mean(sides)) and torch.equal(
        found["t.weight"], found["a.weight"].t()
    )
    one, four = (torch.load(tmp_path / f"m{n}.pt", weights_only=True) for n in (1, 4))
    assert all(same(one[key].contiguous(), four[key].contiguous()) for key in one)
    plan = ckpttools.average(*paths, dst=tmp_path / "m.pt", how=ckpttools.Writing(dry_run=True)).plan
    assert abs(plan.nbytes - (tmp_path / "m1.pt").stat().st_size) < 64 and not (tmp_path / "m.pt").exists()


def test_a_flipped_byte_of_any_source_is_seen(tmp_path: Path) -> None:
    for i in range(2):
        torch.save({"state_dict": {"a.weight": torch.ones(1000)}}, tmp_path / f"{i}.pt")
    for i in range(2):
        good = (tmp_path / f"{i}.pt").read_bytes()
        data = bytearray(good)
        data[data.index(b"\x00\x00\x80?" * 9) + 2] ^= 1
        (tmp_path / f"{i}.pt").write_bytes(data)
        ran = run("average", tmp_path / "0.pt", tmp_path / "1.pt", "-o", tmp_path / "m.pt")
        assert ran.code == 1 and "error[checksum]" in ran.err and not (tmp_path / "m.pt").exists()
        (tmp_path / f"{i}.pt").write_bytes(good)


def test_integers_types_and_ties(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    for i in range(2):
        state = {
            "emb.weight": shared + i, "n.running_mean": torch.ones(2) * i, "n.running_var": torch.ones(2),
            "n.num_batches_tracked": torch.tensor(10 * i), "half.weight": torch.full((3,), 1.0 + i),
        }  # fmt: skip
        state["head.weight"] = state["emb.weight"]
        if i:
            state["half.weight"] = state["half.weight"].bfloat16()
        torch.save({"state_dict": state, "global_step": 5 * i}, tmp_path / f"{i}.pt")
    alone = torch.load(tmp_path / "1.pt", weights_only=True)["state_dict"]
    del alone["head.weight"]
    save_file(alone, tmp_path / "1.safetensors", {"format": "pt", "head.weight": "emb.weight"})
    zero, one = tmp_path / "0.pt", tmp_path / "1.pt"
    ran = run("average", zero, one, "-o", tmp_path / "m.pt", "--json")
    notes = " ".join(json.loads(ran.out)["notes"])
    assert "n.num_batches_tracked" in notes and "running statistics" in notes and "half.weight" in notes
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert found["n.num_batches_tracked"] == 10 and found["n.running_mean"].tolist() == [0.5, 0.5]
    assert found["half.weight"].dtype == torch.float32 and found["half.weight"].tolist() == [1.5] * 3
    assert found["head.weight"].data_ptr() == found["emb.weight"].data_ptr()
    assert run("average", zero, tmp_path / "1.safetensors", "-o", tmp_path / "n.pt").code == 0
    other = torch.load(tmp_path / "n.pt", weights_only=True)
    assert other.keys() == found.keys() and all(torch.equal(other[key], found[key]) for key in found)
    assert run("average", zero, one, "-o", tmp_path / "h.pt", "--dtype", "bf16").code == 0
    half = torch.load(tmp_path / "h.pt", weights_only=True)
    mean = torch.stack([shared.double(), (shared + 1).double()]).mean(0)
    assert torch.equal(half["emb.weight"], mean.bfloat16())


def test_what_is_refused(tmp_path: Path) -> None:
    def saved(name: str, **state: torch.Tensor) -> Path:
        named = {key.replace("_", "."): each for key, each in state.items()}
        torch.save({"state_dict": named}, tmp_path / name)
        return tmp_path / name

    one = saved("1.pt", a_weight=torch.ones(2))
    refused = [
        (saved("2.pt", b_weight=torch.ones(2)), "only here"),
        (saved("3.pt", a_weight=torch.ones(3)), "[2]"),
        (saved("4.pt", a_weight=torch.ones(2, dtype=torch.int64)), "int64"),
    ]
    for other, words in refused:
        ran = run("average", one, other, "-o", tmp_path / "m.pt")
        assert ran.code == 1 and "error[not-averaged]" in ran.err and words in ran.err, ran.err
    two = saved("5.pt", a_weight=torch.zeros(2))
    usage: list[tuple[object, ...]] = [
        (one,), (one, one), (one, two, "--weights", "1"), (one, two, "--weights", "1,-1"),
        (one, two, "--weights", "1,nan"), (one, two, "--weights", "a,b"), (one, two, "--last", "2"),
        (one, two, "--dtype", "int8"), (one, two, "-t", "a", "-t", "b", "-t", "c"),
        (one, tmp_path / "none.pt"), (tmp_path, "--last", "9"),
    ]  # fmt: skip
    for args in usage:
        ran = run("average", *args, "-o", tmp_path / "m.pt")
        assert ran.code == 2 and "Traceback" not in ran.err, (args, ran.err)
    assert not (tmp_path / "m.pt").exists()
    assert run("average", one, two, "-o", one, "--force").code == 2  # a source is never replaced
    with pytest.raises(CkptError):
        ckpttools.average(one, refused[0][0], dst=tmp_path / "m.pt")


def test_the_last_of_a_run_and_tags(tmp_path: Path) -> None:
    assert run("average", TRAINER / "plain", "--last", 2, "-o", tmp_path / "a.safetensors").code == 0
    assert run("average", A, B, "-o", tmp_path / "b.safetensors").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for name in ("z2_bf16_2", "z2_bf16_4"):
        shutil.copytree(FIXTURES / "trainer" / name, tmp_path / name)
        (tmp_path / name / "latest").write_text("gone")
    sides = [tmp_path / "z2_bf16_2", tmp_path / "z2_bf16_4"]
    for tags in (["-t", "iter_000003.pth"], ["-t", "iter_000003.pth"] * 2):
        assert run("average", *sides, *tags, "-o", tmp_path / "c.safetensors", "--force").code == 0
    assert run("average", *sides, "-o", tmp_path / "d.safetensors").code != 0


def test_half_precision_of_two_kinds_is_averaged_in_fp32(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([60000.0]).half()}, tmp_path / "half.safetensors")
    save_file({"a": torch.tensor([240000.0]).bfloat16()}, tmp_path / "bfloat.safetensors")
    for pair in (("half", "bfloat"), ("bfloat", "half")):
        sides = [tmp_path / f"{name}.safetensors" for name in pair]
        assert run("average", *sides, "-o", tmp_path / "mean.safetensors", "--force").code == 0
        mean = load_file(tmp_path / "mean.safetensors")["a"]
        assert mean.dtype == torch.float32
        assert mean.item() == (60000.0 + torch.tensor(240000.0).bfloat16().item()) / 2


def test_a_damaged_newest_is_named_not_passed_over_in_silence(tmp_path: Path) -> None:
    shutil.copytree(TRAINER / "plain", tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoint-4", tmp_path / "run/checkpoint-6")
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    (tmp_path / "run/checkpoint-6/trainer_state.json").write_text(json.dumps(state | {"global_step": 6}))
    weights = tmp_path / "run/checkpoint-6/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = run("average", tmp_path / "run", "--last", 2, "-o", tmp_path / "mean")
    assert ran.code == 0 and "passed over: checkpoint-6: " in ran.err, ran.err
    assert "the mean of checkpoint-4, checkpoint-2" in ran.err


def test_what_counts_nothing_changes_nothing(tmp_path: Path) -> None:
    """0 times NaN is NaN; and the mean of one is that one, to the sign of its zeros."""
    one = torch.tensor([1.5, -0.0, 3.0])
    save_file({"a.weight": one}, tmp_path / "a.safetensors")
    save_file({"a.weight": torch.tensor([float("nan")] * 3)}, tmp_path / "b.safetensors")
    save_file({"a.weight": -one}, tmp_path / "c.safetensors")
    names = [tmp_path / f"{name}.safetensors" for name in "abc"]
    ran = run("average", *names, "--weights", "2,0,0", "-o", tmp_path / "one.safetensors")
    assert ran.code == 0, ran.err
    assert same(load_file(tmp_path / "one.safetensors")["a.weight"], one)
    ran = run("average", *names, "--weights", "1,0,2", "-o", tmp_path / "two.safetensors")
    assert ran.code == 0, ran.err
    expected = numpy_mean([one, -one], [1, 2])
    assert same(load_file(tmp_path / "two.safetensors")["a.weight"], expected)
