"""DeepSpeed folders of stage 0: read as the engine held them, carried to every other form, and told apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES, STAGE0_SAMPLES, as_torch, identical, name_of

import ckpttools
from ckpttools.checks import verify
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats import locate, open_checkpoint, zero0

SAMPLES = FIXTURES / "deepspeed-0.19.8"
NAMED = [path for path in STAGE0_SAMPLES if "frozen" not in path.name]
cases = pytest.mark.parametrize("path", STAGE0_SAMPLES, ids=name_of)
named = pytest.mark.parametrize("path", NAMED, ids=name_of)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(next(path.glob("*/mp_rank_00_model_states.pt")), weights_only=False)  # our own


def edited(path: Path, folder: Path, change: Any) -> Path:
    made = Path(shutil.copytree(path, folder / "edited"))
    root = saved(made)
    change(root)
    torch.save(root, next(made.glob("*/mp_rank_00_model_states.pt")))
    return made


def test_there_are_samples_of_each_kind() -> None:
    kinds = {tuple(key for key in saved(p)["optimizer"] if key.startswith(("fp32", "state"))) for p in NAMED}
    assert kinds >= {("state",), ("fp32_groups",)}


@cases
def test_the_weights_and_counters_are_the_files(path: Path) -> None:
    root, found = saved(path), open_checkpoint(path)
    assert locate(path).format is zero0.FORMAT and found.layout.zero_stage == 0
    assert found.layout.dp_degree == root["dp_world_size"] == 2
    assert found.tensors.keys() == root["module"].keys()
    assert all(identical(as_torch(found.tensors[name]), t) for name, t in root["module"].items())
    state = found.training
    assert (state.step, state.samples, state.epoch) == (root["global_steps"], root["global_samples"], 1)
    assert verify(path).ok


@named
def test_the_optimizer_is_what_the_engine_held(path: Path) -> None:
    root, found = saved(path), open_checkpoint(path)
    truth = torch.load(SAMPLES / "truth" / f"{path.name}.pt", weights_only=False)
    optimizer = root["optimizer"]
    masters = [t for group in optimizer.get("fp32_groups", []) for t in group]
    inner = optimizer.get("optimizer_state_dict", optimizer)
    (group,) = found.groups
    assert list(group.params) == list(root["module"]) and group.hyper["betas"] == (0.9, 0.999)
    for at, name in enumerate(group.params):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert identical(as_torch(group.state[kind][name]), inner["state"][at][kind])
        step = group.scalars["step"][name]  # in 16 bits one more than the engine's: a dummy step at the start
        assert float(as_torch(step)) == inner["state"][at]["step"] in (3, 4)  # type: ignore[arg-type]
        if masters:
            assert identical(as_torch(group.state["fp32"][name]), masters[at].detach())
            rounded = masters[at].detach().to(root["module"][name].dtype)
            assert identical(rounded, root["module"][name])
    assert truth["zero_stage"] == 0


@named
@pytest.mark.parametrize("to", ["pt", "zero0", "zero1", "zero2", "zero3", "universal", "dcp", "hf"])
def test_it_is_carried_to_every_form(path: Path, to: Any, tmp_path: Path) -> None:
    made = ckpttools.convert(path, tmp_path / ("x.pt" if to == "pt" else "x"), to=to).destination
    if to != "hf":
        assert ckpttools.digest(made).digests.state == ckpttools.digest(path).digests.state
    assert verify(made).ok


def test_an_order_that_is_not_known_is_said_and_carried_as_it_is(tmp_path: Path) -> None:
    path = SAMPLES / "z0_frozen_ws2"
    found = open_checkpoint(path)
    assert not found.groups and any("fit in more than one way" in note for note in found.notes)
    ran = run("verify", path, "--require", "optimizer,scheduler,step")
    assert ran.code == 0 and "no optimizer" not in ran.out
    assert run("convert", path, tmp_path / "z", "--to", "zero2").code == 2 and not (tmp_path / "z").exists()
    assert run("convert", path, tmp_path / "x.pt", "--to", "pt").code == 0
    made = torch.load(tmp_path / "x.pt", weights_only=True)
    before = saved(path)["optimizer"]["optimizer_state_dict"]["state"]
    after = made["optimizer"]["optimizer_state_dict"]["state"]
    assert after.keys() == before.keys() and identical(after[3]["exp_avg"], before[3]["exp_avg"])


def test_commands_that_read_take_it_and_reshard_says_that_nothing_is_to_do(tmp_path: Path) -> None:
    path = SAMPLES / "z0_bf16_ws2"
    shown = run("inspect", path)
    assert shown.code == 0 and "zero0" in shown.out and "not saved" not in shown.out, shown
    assert run("resume-check", path, "--world-size", 4).code == 0
    assert run("extract", path, tmp_path / "w.safetensors").code == 0
    ran = run("reshard", path, tmp_path / "r", "--world-size", 4)
    assert ran.code == 2 and "any number of ranks can load it as it is" in ran.err
    ran = run("rebase-schedule", path, tmp_path / "b", "--old-bs", 120, "--new-bs", 60)
    assert ran.code == 0, ran
    assert open_checkpoint(tmp_path / "b").training.step == 6


def test_the_flat_masters_of_fused_adam_are_cut(tmp_path: Path) -> None:
    """fp16/fused_optimizer.py: one flat vector for a group is the one parameter that the optimizer has."""

    def fused(root: dict[str, Any]) -> None:
        held = root["optimizer"]
        inner, (masters,) = held["optimizer_state_dict"], held.pop("fp32_groups")
        states = list(inner["state"].values())
        flat = {kind: torch.cat([s[kind].flatten() for s in states]) for kind in ("exp_avg", "exp_avg_sq")}
        held["fp32_groups_flat"] = [torch.cat([t.detach().flatten() for t in masters])]
        inner["state"] = {0: {"step": 3, **flat}}
        inner["param_groups"][0]["params"] = [0]

    path = SAMPLES / "z0_fp16_ws2"
    made = edited(path, tmp_path, fused)
    one, two = open_checkpoint(path).groups[0], open_checkpoint(made).groups[0]
    assert one.params == two.params and two.scalars["step"] == dict.fromkeys(one.params, 3)
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        assert all(identical(as_torch(one.state[kind][n]), as_torch(two.state[kind][n])) for n in one.params)
    ckpttools.convert(made, tmp_path / "z", to="zero2", world_size=3)

    def another(root: dict[str, Any]) -> None:
        fused(root)
        root["optimizer"]["fp32_groups_flat"][0] = root["optimizer"]["fp32_groups_flat"][0][:-1]

    assert not open_checkpoint(edited(path, tmp_path / "b", another)).groups


def test_what_is_written_says_the_names_of_groups_and_of_what_is_frozen(tmp_path: Path) -> None:
    path = SAMPLES / "z2_tied_frozen_ws2"
    before, after = (
        open_checkpoint(p) for p in (path, ckpttools.convert(path, tmp_path / "z", to="zero0").destination)
    )
    assert [list(g.params) for g in after.groups] == [list(g.params) for g in before.groups]
    assert (after.frozen, after.buffers, after.shared) == (before.frozen, before.buffers, before.shared)
    ran = run("convert", path, tmp_path / "y", "--to", "zero0", "--world-size", 2)
    assert ran.code == 2 and "any number of ranks" in ran.err


def test_the_wrapper_of_fused_adam_loads_the_vectors(tmp_path: Path) -> None:
    """DeepSpeed's own FP16_Optimizer, around another optimizer: FusedAdam needs a GPU to be built."""
    fused_optimizer = pytest.importorskip("deepspeed.runtime.fp16.fused_optimizer")
    path = SAMPLES / "z2_groups_ws2"
    made = ckpttools.convert(path, tmp_path / "z", to="zero0", optimizer_class="FusedAdam").destination
    held = open_checkpoint(path)
    assert ckpttools.digest(made).digests.state == ckpttools.digest(path).digests.state
    groups = [[torch.zeros(s, dtype=torch.bfloat16) for s in g.params.values()] for g in held.groups]
    inner = torch.optim.AdamW([{"params": [t.requires_grad_() for t in group]} for group in groups])
    wrapper = fused_optimizer.FP16_Optimizer(inner, low_precision_dtype=torch.bfloat16)
    wrapper.load_state_dict(saved(made)["optimizer"])
    for group, flat in zip(held.groups, wrapper.fp32_groups_flat, strict=True):
        state = {**inner.state[flat], "fp32": flat.detach()}
        for kind, refs in group.state.items():
            assert identical(state[kind], torch.cat([as_torch(refs[n]).flatten() for n in group.params]))
        assert state["step"] == 3
    assert [g["lr"] for g in inner.param_groups] == [g.hyper["lr"] for g in held.groups]


def test_state_that_no_vector_holds_is_refused(tmp_path: Path) -> None:
    ran = run(
        "convert", SAMPLES / "z2_sgd_ws2", tmp_path / "z", "--to", "zero0", "--optimizer-class", "FusedAdam"
    )
    assert ran.code == 2 and "error[optimizer-differs]" in ran.err and not (tmp_path / "z").exists()


def test_lost_shards_are_no_stage_0(tmp_path: Path) -> None:
    made = shutil.copytree(SAMPLES / "z2_bf16_ws2", tmp_path / "lost")
    for file in made.glob("*/*optim_states.pt"):
        file.unlink()
    with pytest.raises(Unsupported, match="no-optimizer-shards"):
        open_checkpoint(made)
    ran = run("verify", made)
    assert ran.code == 1 and "those of all ranks are missing" in ran.out


def lost_masters(root: dict[str, Any]) -> None:
    del root["optimizer"]["fp32_groups"]


def a_master_less(root: dict[str, Any]) -> None:
    root["optimizer"]["fp32_groups"][0].pop()


def another_step(root: dict[str, Any]) -> None:
    root["global_steps"] = 9


def lost_moments(root: dict[str, Any]) -> None:
    root["optimizer"]["optimizer_state_dict"]["state"] = {}


@pytest.mark.parametrize(
    ("change", "id"),
    [
        (lost_masters, "field-missing"),
        (a_master_less, "field-damaged"),
        (another_step, "counter-mismatch"),
        (lost_moments, "moment-missing"),
    ],
)
def test_what_is_damaged_is_found(change: Any, id: str, tmp_path: Path) -> None:
    made = edited(SAMPLES / "z0_bf16_ws2", tmp_path, change)
    try:
        findings = [f.id for f in verify(made).findings if f.severity != "info"]
    except CkptError as error:
        findings = [error.id]
    assert id in findings, findings


@named
def test_a_changed_byte_is_found(path: Path, tmp_path: Path) -> None:
    made = shutil.copytree(path, tmp_path / "c")
    file = next(made.glob("*/mp_rank_00_model_states.pt"))
    ref = open_checkpoint(made).groups[0].state["exp_avg"]["emb.weight"]
    raw = bytearray(file.read_bytes())
    raw[ref.chunks[0].start] ^= 1  # type: ignore[union-attr]
    file.write_bytes(raw)
    assert "checksum" in {f.id for f in verify(made).findings}
