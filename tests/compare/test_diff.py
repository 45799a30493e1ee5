"""`ckpt diff` and `ckpt prove`, held against torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES, as_torch, resharded

import ckpttools
from ckpttools.compare.content import content
from ckpttools.compare.facts import Fact
from ckpttools.formats import locate, read

SAMPLES = FIXTURES / "deepspeed-0.19.8"
TIED, GROUPS = SAMPLES / "z2_tied_ws2", SAMPLES / "z2_groups_ws2"
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.complex64,
]


def _saved(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_torchs(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = (torch.randn(300, 500, dtype=torch.complex64 if dtype.is_complex else None) * 50).to(dtype)
    b = a.clone()
    b[7:60] += 1
    (found,) = ckpttools.diff(_saved(tmp_path / "a.pt", w=a), _saved(tmp_path / "b.pt", w=b)).tensors
    assert found.apart is not None and found.what == "changed"
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x, y = a.to(wide).flatten(), b.to(wide).flatten()
    assert found.apart.equal == int((a == b).sum()) and found.apart.numel == 150_000
    assert found.apart.largest == pytest.approx((x - y).abs().max().item(), rel=1e-12)
    assert found.apart.relative == pytest.approx((torch.norm(x - y) / torch.norm(x)).item(), rel=1e-9)
    cosine = torch.vdot(x, y).real / (torch.norm(x) * torch.norm(y))
    assert found.apart.cosine == pytest.approx(cosine.item(), rel=1e-9)


def test_special_values(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    a = _saved(tmp_path / "a.pt", w=torch.tensor([inf, nan, 0.0, 1.0]), v=torch.zeros(2), u=torch.ones(2))
    b = _saved(
        tmp_path / "b.pt", w=torch.tensor([inf, nan, -0.0, 1.0]), v=torch.ones(2), u=torch.tensor([1, nan])
    )
    found = {each.name: each.apart for each in ckpttools.diff(a, b).tensors}
    w, v, u = found["w"], found["v"], found["u"]
    assert w is not None and v is not None and u is not None
    assert (w.equal, w.largest) == (3, 0.0)  # -0 is not the same bits as 0
    assert (v.equal, v.largest, v.relative, v.cosine) == (0, 1.0, None, None)
    assert u.largest != u.largest and u.equal == 1
    ran = run("diff", a, b, "--json")
    assert ran.code == 1 and '"nan"' in ran.out


def test_added_removed_reshaped_retyped(tmp_path: Path) -> None:
    w = torch.arange(6.0)
    a = _saved(tmp_path / "a.pt", same=w, gone=w.clone(), shape=w.clone(), type=w.clone())
    b = _saved(tmp_path / "b.pt", same=w, new=w.clone(), shape=w.reshape(2, 3).clone(), type=w.half())
    found = ckpttools.diff(a, b)
    assert {each.name: each.what for each in found.tensors} == {
        "gone": "removed",
        "new": "added",
        "shape": "reshaped",
        "type": "retyped",
    }
    retyped = next(each for each in found.tensors if each.name == "type")
    assert retyped.apart is not None and retyped.apart.equal == 6 and retyped.apart.largest == 0
    assert (retyped.left, retyped.right) == ("fp32 [6]", "fp16 [6]")
    assert found.equal == {"weight": 1} and not found.same
    assert ckpttools.diff(a, b, only=["same"]).same


def test_optimizer_state_of_two_steps_is_torchs(tmp_path: Path) -> None:
    """Two rank counts and two saves at once, every kind."""
    other = resharded(SAMPLES / "z2_bf16_ws4", 3, tmp_path / "three")
    first = SAMPLES / "z2_bf16_ws2"
    found = ckpttools.diff(first, other)
    a, b = (content(read(locate(path))).held for path in (first, other))
    assert found.layout["ranks"] == (2, 3) and {"master", "exp_avg", "exp_avg_sq"} <= {
        each.kind for each in found.tensors
    }
    for each in found.tensors:
        x, y = (as_torch(held[each.kind][each.name]).double() for held in (a, b))
        assert each.apart is not None
        assert each.apart.largest == pytest.approx((x - y).abs().max().item(), rel=1e-12)
        assert each.apart.relative == pytest.approx((torch.norm(x - y) / torch.norm(x)).item(), rel=1e-9)
    relative = [each.apart.relative or 0 for each in found.tensors if each.apart is not None]
    assert relative == sorted(relative, reverse=True)


@pytest.mark.parametrize("path", [TIED, GROUPS], ids=lambda path: path.name)
def test_another_layout_is_no_difference(path: Path, tmp_path: Path) -> None:
    four = resharded(path, 4, tmp_path / "four")
    found = ckpttools.diff(path, four)
    assert found.same and found.checked > 0 and not found.facts
    assert run("diff", path, four).code == 0 == run("prove", path, four).code
    assert run("prove", path, four).out.startswith("the same training state\n")
    # against one file of fp32 copies and against safetensors: what both hold is equal
    for destination in (tmp_path / "weights.pt", tmp_path / "hf"):
        made = ckpttools.extract(path, destination).destination
        found = ckpttools.diff(path, made)
        assert {each.what for each in found.tensors} == {"removed"}
        assert {each.kind for each in found.tensors} == {"exp_avg", "exp_avg_sq", "step"}
        assert found.equal["weight"] == found.equal["master"] >= 11
        ran = run("prove", path, made)
        assert ran.code == 1 and ran.out.startswith("identical except exp_avg (only in ")


def test_counters_and_settings_are_named(tmp_path: Path) -> None:
    made = tmp_path / "rebased"
    assert run("rebase-schedule", GROUPS, made, "--new-bs", "30", "--counters-only", "-q").code == 0
    proof = ckpttools.prove(GROUPS, made)
    assert proof.verdict == "except" and not proof.compared.different
    assert Fact(part="counters", name="step", left=3, right=6) in proof.facts
    ran = run("prove", GROUPS, made)
    assert ran.code == 1 and ran.out.startswith("identical except counters (step")
    document = json.loads(run("diff", GROUPS, made, "--json").out)
    assert (
        document["tensors"] == []
        and {"part": "counters", "name": "step", "left": 3, "right": 6} in document["facts"]
    )
    document = json.loads(run("prove", GROUPS, made, "--json").out)
    assert document["verdict"] == "except" and document["digests"][0] == document["digests"][1]


@pytest.mark.parametrize("change", [None, ("amsgrad", True), ("bias_correction", False)])
def test_what_holds_unsaid_is_no_difference(change: tuple[str, bool] | None, tmp_path: Path) -> None:
    """DeepSpeed's classes ask for settings that torch's do not know, and it counts what it left out."""
    source, made = FIXTURES / "dcp/fsdp2_ws2", tmp_path / "made"
    ckpttools.convert(source, made, to="zero0")
    if change is not None:
        (path,) = made.glob("*/mp_rank_00_model_states.pt")
        saved = torch.load(path, weights_only=False)
        saved["optimizer"]["param_groups"][0][change[0]] = change[1]
        torch.save(saved, path)
    ran = run("prove", source, made)
    if change is None:
        assert ran.code == 0 and ran.out.startswith("the same training state\n"), ran
        assert run("diff", source, made).code == 0
        compared = run("digest", source, "--compare", made).out
        assert "hyper-parameters: equal" in compared and "counters and schedule: equal" in compared
    else:
        assert ran.out.startswith(f"identical except hyper-parameters (group 0: {change[0]})\n"), ran


def test_what_nobody_found_is_not_called_the_same() -> None:
    plain = FIXTURES / "hf-trainer/plain/checkpoint-2"
    proof = ckpttools.prove(plain, plain)
    assert proof.random == (("rng_state.pth",), ("rng_state.pth",))
    ran = run("prove", FIXTURES / "hf/single", FIXTURES / "hf/single")
    assert ran.code == 1 and "optimizer state (found in neither)" in ran.out


def test_a_single_changed_moment_is_different(tmp_path: Path) -> None:
    source = FIXTURES / "dcp/fsdp2_ws2"
    assert run("prove", source, source).code == 0
    proof = ckpttools.prove(source, FIXTURES / "dcp/app_ws2")  # the same tensors, without counters
    assert proof.verdict == "except" and proof.random[0] == ("meta.rng",) and proof.random[1] == ()
    assert all(fact.right.__repr__() == "?" and "rng" not in fact.name for fact in proof.facts)
    ran = run("prove", source, FIXTURES / "dcp/hsdp_ws4")
    assert ran.code == 1


def test_only_and_top_and_bad_calls(tmp_path: Path) -> None:
    b = FIXTURES / "hf-trainer/plain/checkpoint-4"
    a = FIXTURES / "hf-trainer/plain/checkpoint-2"
    assert "and 81 more" in run("diff", a, b, "--top", "3").out
    document = json.loads(run("diff", a, b, "--only", "weight/lm_head.*", "--json").out)
    assert [each["name"] for each in document["tensors"]] == ["lm_head.weight"] and document["facts"] == []
    assert run("compare", a, b, "-q").out == ""
    ran = run("diff", a, b, "--only", "nothing")
    assert ran.code == 2 and "error[bad-usage]" in ran.err
    ran = run("diff", a, a, "--only", "weight/*")
    assert ran.code == 0 and ran.out.endswith("equal in what was asked for\n")
    shutil.copytree(GROUPS, tmp_path / "cut")
    file = next((tmp_path / "cut").glob("*/*rank_1*"))
    file.write_bytes(file.read_bytes()[:-900])
    for command in ("diff", "prove"):
        assert run(command, GROUPS, tmp_path / "cut").code == 1
    assert run("diff", GROUPS, tmp_path / "nowhere").code == 2


def test_tags_name_two_checkpoints_of_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(GROUPS, folder)
    tag = (folder / "latest").read_text()
    resharded(GROUPS, 4, tmp_path / "four")
    shutil.copytree(tmp_path / "four" / (tmp_path / "four/latest").read_text(), folder / "four")
    for command in ("diff", "prove"):
        assert run(command, folder, folder, "-t", tag, "-t", "four").code == 0
        assert run(command, folder, folder, "-t", tag).code == 0
        assert run(command, folder, GROUPS, "--tag", "four", "--tag", "").code == 0
        ran = run(command, folder, folder, "-t", tag, "-t", "fuor")
        assert ran.code == 2 and "tag-missing" in ran.err and "four" in ran.err
        assert run(command, folder, folder, "-t", "a", "-t", "b", "-t", "c").code == 2
    ckpt = ckpttools.diff(folder, folder, tags=(tag, "four"))
    assert ckpt.same and ckpt.layout["ranks"] == (2, 4)


class Thing:
    def __init__(self, number: int) -> None:
        self.number = number


def test_objects_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    def saved(name: str, **held: object) -> Path:
        weights = {"a": torch.ones(2)}
        optimizer = torch.optim.SGD([torch.nn.Parameter(weights["a"])], momentum=0.9)
        return _saved(
            tmp_path / name,
            model_state_dict=weights,  # type: ignore[arg-type]
            optimizer_state_dict=optimizer.state_dict(),  # type: ignore[arg-type]
            epoch=1,  # type: ignore[arg-type]
            **held,  # type: ignore[arg-type]
        )

    for key in ("mine", "scheduler_state_dict"):
        one, same, other = (
            saved(f"{key}{i}.pt", **{key: {"last_epoch": 1, "thing": Thing(n)}})
            for i, n in enumerate((1, 1, 2))
        )
        assert ckpttools.prove(one, same).verdict == "same"
        assert ckpttools.prove(one, other).verdict == "except"
        assert not ckpttools.diff(one, other).same
        one, same = (saved(f"{key}{i}.pt", **{key: {"thing": Thing(torch.ones(2))}}) for i in (3, 4))  # type: ignore[arg-type]
        ran = run("prove", one, same)
        assert ran.code == 1 and "objects that are not compared" in ran.out  # nobody has looked into them
        ran = run("diff", one, same)
        assert ran.code == 1 and ran.out.endswith("\nno difference in what was compared\n"), ran.out
        assert "note: not compared: " in ran.out
    torch.save({"model": {"a.weight": torch.ones(2)}, "thing": Thing(torch.ones(2))}, tmp_path / "bare.pt")
    said = run("prove", tmp_path / "bare.pt", tmp_path / "bare.pt").out
    assert "optimizer state (found in neither), objects that are not compared" in said


def test_an_optimizer_whose_parameters_have_no_names_is_said_and_not_only_removed(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    adam.step()
    weights = model.state_dict()
    for name, kept in (("a.pt", weights), ("b.pt", {k: weights[k] for k in list(weights)[:3]})):
        torch.save({"model_state_dict": kept, "optimizer_state_dict": adam.state_dict()}, tmp_path / name)
    ran = run("diff", tmp_path / "a.pt", tmp_path / "b.pt")
    assert ran.code == 1 and "not compared: b.pt (its parameters have no names)" in ran.out, ran.out


def _trained(path: Path, order: Sequence[int], **beside: object) -> Path:
    """A model of two layers with a parameter group for each of `order`; None of them has parameters of 9."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    layers = {i: list(layer.parameters()) for i, layer in enumerate(model)}
    groups = [{"params": layers.get(i, []), "weight_decay": 0.1 * i} for i in order]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save({**state, "global_step": 1, **beside}, path)
    return path


@pytest.mark.parametrize(
    ("order", "what"), [([1, 0], "order of the parameters, from place 0"), ([0, 1, 9], "number of groups")]
)
def test_groups_in_another_order_or_number_are_said(order: list[int], what: str, tmp_path: Path) -> None:
    """torch and DeepSpeed load groups by position: one would get the settings and state of another."""
    a, b = _trained(tmp_path / "a.pt", [0, 1]), _trained(tmp_path / "b.pt", order)
    proof = ckpttools.prove(a, b)
    assert proof.verdict == "except" and [fact.name for fact in proof.facts] == [what]
    assert what in run("diff", a, b).out and "equal" not in run("diff", a, b).out.splitlines()
    ran = run("digest", a, "--compare", b)
    assert ran.code == 0 and "hyper-parameters: not the same" in ran.out
    for to in ("dcp", "universal"):
        assert run("convert", b, tmp_path / to, "--to", to).code == 0
    assert ckpttools.prove(b, tmp_path / "dcp").verdict == "same"
    # flattened, which groups there are is not in the files
    if what.startswith("order"):
        assert run("convert", b, tmp_path / "flat", "--to", "dcp", "--dcp-layout", "flat").code == 0
        assert ckpttools.prove(a, tmp_path / "flat").verdict == "same"


def test_groups_of_the_same_parameters_divided_otherwise(tmp_path: Path) -> None:
    """torch refuses to load groups of other sizes."""

    def saved(name: str, *sizes: int) -> Path:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        left = iter(model.parameters())
        groups = [{"params": [next(left) for _ in range(size)]} for size in sizes]
        state = {"model_state_dict": model.state_dict()}
        state["optimizer_state_dict"] = torch.optim.SGD(groups, lr=0.1, momentum=0.9).state_dict()
        for i, parameter in enumerate(model.parameters()):
            kept = {"momentum_buffer": torch.full_like(parameter, 0.5)}
            state["optimizer_state_dict"]["state"][i] = kept
        torch.save({**state, "global_step": 1}, tmp_path / name)
        return tmp_path / name

    a, b = saved("a.pt", 3, 1), saved("b.pt", 2, 2)
    found = [(fact.name, fact.left, fact.right) for fact in ckpttools.prove(a, b).facts]
    assert found == [("group 0: number of parameters", 3, 2), ("group 1: number of parameters", 1, 2)]
    c, d = saved("c.pt", 4, 0), saved("d.pt", 0, 4)
    assert {fact.name for fact in ckpttools.prove(c, d).facts} >= {"group 0: number of parameters"}
    assert "hyper-parameters: not the same" in run("digest", a, "--compare", b).out


def test_keys_that_are_numbers_are_not_their_text(tmp_path: Path) -> None:
    a, b = (_trained(tmp_path / f"{i}.pt", [0], seen={key: 5}) for i, key in enumerate((10, "10")))
    proof = ckpttools.prove(a, b)
    assert proof.verdict == "except"
    assert [fact.name for fact in proof.facts] == ["seen.10 (int)", "seen.10"]
    ema = {key: {key: torch.ones(3)} for key in (0, 7)}
    c = _trained(tmp_path / "c.pt", [0], ema=ema, seen={10: 5, "11": 6}, deep=[{3: 4}])
    for layout in ("nested", "flat", "titan"):  # torch makes text of all keys there
        made = tmp_path / layout
        assert run("convert", c, made, "--to", "dcp", "--dcp-layout", layout).code == 0
        assert ckpttools.prove(c, made).verdict == "same"
        ran = run("digest", c, "--compare", made)
        assert ran.code == 0 and "in no digest: ema" in ran.out, ran


def test_milestones_that_are_text_are_others(tmp_path: Path) -> None:
    """torch's MultiStepLR looks for numbers: with text, its rate would never fall."""
    parameter = torch.nn.Parameter(torch.ones(1))
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=0.1), [2, 5])
    state = schedule.state_dict()
    text = {**state, "milestones": {str(key): count for key, count in state["milestones"].items()}}
    a = _trained(tmp_path / "a.pt", [0, 1], scheduler_state_dict=state)
    b = _trained(tmp_path / "b.pt", [0, 1], scheduler_state_dict=text)
    names = {fact.name for fact in ckpttools.prove(a, b).facts}
    assert names == {"milestones.2 (int)", "milestones.5 (int)", "milestones.2", "milestones.5"}
    ran = run("digest", a, "--compare", b)
    assert ran.code == 0 and "counters and schedule: not the same" in ran.out
    assert run("convert", a, tmp_path / "dcp", "--to", "dcp").code == 0
    assert ckpttools.prove(a, tmp_path / "dcp").verdict == "same"
    assert "counters and schedule: equal" in run("digest", a, "--compare", tmp_path / "dcp").out
