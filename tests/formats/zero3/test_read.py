"""ZeRO-3 folders of real DeepSpeed: what the engine held, what zero_to_fp32 reads, and every damage is
found.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from support import (
    FIXTURES,
    ZERO3_SAMPLES,
    as_torch,
    identical,
    name_of,
    tensor_differences,
    truth_of,
)

from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.formats import open_checkpoint
from ckpttools.formats.zero3.cuts import held, part_of, sub_groups

cases = pytest.mark.parametrize("path", ZERO3_SAMPLES, ids=name_of)
GROUPS = FIXTURES / "deepspeed-0.19.8/z3_groups_ws3"


def tag_of(path: Path) -> Path:
    return path / (path / "latest").read_text()


@cases
def test_reads_what_the_engine_held(path: Path) -> None:
    truth, checkpoint = truth_of(path), open_checkpoint(path)
    assert tensor_differences(checkpoint.master, truth["fp32"], "master") == []
    kinds = {kind for group in checkpoint.groups for kind in group.state} - {"fp32"}
    assert kinds == set(truth["state"])
    for kind, expected in truth["state"].items():
        ours = {n: ref for group in checkpoint.groups for n, ref in group.state.get(kind, {}).items()}
        assert tensor_differences(ours, expected, kind) == []
    # the engine's own weights are the masters rounded, frozen ones and buffers as saved
    weights = {n: ref for n, ref in checkpoint.tensors.items() if n not in checkpoint.buffers}
    model = {n: t for n, t in truth["module"].items() if n in weights or "exclude" not in path.name}
    assert tensor_differences(weights, model, "weight") == []
    assert checkpoint.buffers == set(truth["persistent_buffers"])
    assert checkpoint.frozen == {n for n in truth["frozen"] if n in weights}
    assert dict(checkpoint.shared) == truth["shared"]
    names = [name for group in checkpoint.groups for name in group.params]
    assert names == [name for sub_group in truth["group_names"] for name in sub_group]
    for group, there in zip(checkpoint.groups, truth["param_groups"], strict=True):
        assert {key: group.hyper[key] for key in there} == there
    layout, state = checkpoint.layout, checkpoint.training
    assert (layout.format, layout.zero_stage, layout.dtype) == ("zero3", 3, truth["dtype"])
    assert (layout.dp_degree, layout.tag) == (truth["world_size"], truth["tag"])
    assert (state.step, state.samples) == (truth["global_steps"], truth["global_samples"])
    assert state.scheduler == (truth["lr_scheduler"] or {})
    scalars = {(n, k): v for g in checkpoint.groups for k, by in g.scalars.items() for n, v in by.items()}
    for sub_group, expected in zip(truth["group_names"], truth["scalars"], strict=True):
        for name in sub_group:
            for kind, value in expected.items():
                found = scalars[name, kind]
                assert (as_torch(found).item() if hasattr(found, "chunks") else found) == value


def test_samples_have_what_they_are_for() -> None:
    """Several groups and sub-groups that depend on the ranks; frozen, tied, buffers of three dtypes."""
    counts = {p.name: len(open_checkpoint(p).template.shapes) for p in ZERO3_SAMPLES if "z3_groups" in p.name}  # type: ignore[attr-defined]
    assert len(set(counts.values())) > 1 and min(counts.values()) > 3
    found = open_checkpoint(GROUPS)
    assert found.frozen and found.shared and len({found.tensors[n].dtype for n in found.buffers}) == 3
    assert {"args", "array", "names", "when"} <= found.client.keys()


@cases
def test_extract_is_zero_to_fp32(path: Path, tmp_path: Path) -> None:
    module = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    theirs: dict[str, Any] = module.get_fp32_state_dict_from_zero_checkpoint(str(path))
    assert run("extract", path, tmp_path / "x.safetensors").code == 0
    ours = load_file(tmp_path / "x.safetensors")
    shared = open_checkpoint(path).shared
    assert set(theirs) == {*ours, *shared}
    for name, tensor in theirs.items():
        mine = ours[name] if name in ours else ours[shared[name]]
        # it makes floats of every buffer, and leaves frozen weights as they are
        same = mine if name in open_checkpoint(path).master else mine.to(tensor.dtype)
        assert identical(same, tensor.contiguous()), name


@cases
def test_every_sample_is_good(path: Path) -> None:
    verdict = verify(path)
    assert verdict.ok and [f for f in verdict.findings if f.severity != "info"] == []
    assert not any(f.id in ("wild-value", "nonfinite") for f in verdict.findings)  # nor is its padding
    for command in (["inspect"], ["inspect", "--json"], ["latest"]):
        assert run(command[0], path, *command[1:]).code == 0


# --- damage -------------------------------------------------------------------------------------------


def bad(path: Path) -> set[str]:
    return {f.id for f in verify(path).findings if f.severity == "error"}


def optim(folder: Path, rank: int) -> Path:
    return tag_of(folder) / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model(folder: Path, rank: int) -> Path:
    return tag_of(folder) / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def swap(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


def changed(path: Path, change: Callable[[Any], object]) -> None:
    """A file saved again by torch, under its own name, after a change of its value."""
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


def inner(value: Any) -> Any:
    return value["optimizer_state_dict"]["optimizer_state_dict"]


def drop(folder: Path, what: str) -> None:
    flat = "optimizer_state_dict"
    match what:
        case "fp32":
            changed(optim(folder, 1), lambda v: v[flat]["fp32_flat_groups"].pop())
        case "short":
            groups = "fp32_flat_groups"
            changed(optim(folder, 1), lambda v: v[flat][groups].__setitem__(0, v[flat][groups][0][:-1]))
        case "moment":
            changed(optim(folder, 1), lambda v: inner(v)["state"][0].pop("exp_avg"))
        case "moment-short":
            changed(optim(folder, 1), lambda v: inner(v)["state"][0].update(exp_avg=torch.zeros(3)))
        case "step":
            changed(
                optim(folder, 1), lambda v: [s.update(step=s["step"] - 1) for s in inner(v)["state"].values()]
            )
        case "ids":
            changed(optim(folder, 1), lambda v: inner(v)["param_groups"][0]["params"].pop())
        case "lr":
            changed(optim(folder, 1), lambda v: inner(v)["param_groups"][0].update(lr=9.0))
        case "count":
            changed(optim(folder, 1), lambda v: v[flat].update(partition_count=4))
        case "steps":
            changed(model(folder, 1), lambda v: v.update(global_steps=2))
        case "shapes":
            changed(model(folder, 1), lambda v: v["param_shapes"][0].update({"emb.weight": torch.Size([66])}))
        case "frozen-shape":
            changed(
                model(folder, 1), lambda v: v["frozen_param_shapes"].update({"ln.weight": torch.Size([6, 1])})
            )
        case "fragment":
            changed(model(folder, 1), lambda v: v["frozen_param_fragments"].pop("ln.weight"))
        case "placeholder":
            changed(model(folder, 1), lambda v: v["module"].update({"ln.bias": torch.ones(6)}))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "optimizer file gone": ("shard-missing", lambda f: optim(f, 1).unlink()),
    "model file gone": ("shard-missing", lambda f: model(f, 0).unlink()),
    "last rank gone": ("shard-missing", lambda f: (optim(f, 2).unlink(), model(f, 2).unlink())),
    "optimizer files swapped": ("file-renamed", lambda f: swap(optim(f, 0), optim(f, 1))),
    "model files swapped": ("file-renamed", lambda f: swap(model(f, 0), model(f, 2))),
    "copied over another": ("file-renamed", lambda f: shutil.copy(optim(f, 0), optim(f, 1))),
    "a rank too many": ("shard-extra", lambda f: shutil.copy(optim(f, 0), optim(f, 3))),
    "a second style": (
        "shard-duplicate",
        lambda f: shutil.copy(optim(f, 0), optim(f, 0).with_name(optim(f, 0).name.removeprefix("bf16_"))),
    ),
    "of stage 2": (
        "shard-mixed",
        lambda f: shutil.copy(model(f, 0), tag_of(f) / "mp_rank_00_model_states.pt"),
    ),
    "of another run's ranks": (
        "rank-count",
        lambda f: shutil.copy(optim(FIXTURES / "deepspeed-0.19.8/z3_groups_ws2", 1), optim(f, 1)),
    ),
    "a sub-group less": ("group-count", lambda f: drop(f, "fp32")),
    "masters too short": ("partition-size", lambda f: drop(f, "short")),
    "no moment": ("moment-missing", lambda f: drop(f, "moment")),
    "a short moment": ("moment-size", lambda f: drop(f, "moment-short")),
    "another step": ("step-mismatch", lambda f: drop(f, "step")),
    "a sub-group in no group": ("field-damaged", lambda f: drop(f, "ids")),
    "another rate": ("ranks-differ", lambda f: drop(f, "lr")),
    "other ranks stated": ("rank-count", lambda f: drop(f, "count")),
    "another counter": ("ranks-differ", lambda f: drop(f, "steps")),
    "another shape": ("shape-mismatch", lambda f: drop(f, "shapes")),
    "another frozen shape": ("field-damaged", lambda f: drop(f, "frozen-shape")),
    "a frozen part less": ("field-damaged", lambda f: drop(f, "fragment")),
    "a parameter whole in module": ("shape-mismatch", lambda f: drop(f, "placeholder")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GROUPS, tmp_path / "run")
    id, harm = DAMAGE[name]
    harm(folder)
    assert id in bad(folder), verify(folder).findings
    ran = run("extract", folder, tmp_path / "x")
    assert ran.code == 1 and ran.err.startswith("error[") and not (tmp_path / "x").exists()


def test_a_second_moment_that_one_sub_group_lacks(tmp_path: Path) -> None:
    """On every rank, so that no rank contradicts another; an optimizer without any is another."""
    folder = shutil.copytree(GROUPS, tmp_path / "run")
    for rank in range(3):
        changed(optim(folder, rank), lambda v: inner(v)["state"][0].pop("exp_avg_sq"))
    [found] = [f for f in verify(folder).findings if f.id == "moment-missing"]
    assert (found.severity, found.where) == ("error", "sub-group 0")


@pytest.mark.parametrize("at", [0.02, 0.3, 0.5, 0.7, 0.95])
def test_flipped_and_cut_bytes_are_found_in_every_file(at: float, tmp_path: Path) -> None:
    for file in sorted(tag_of(GROUPS).iterdir()):
        folder = shutil.copytree(GROUPS, tmp_path / file.name)
        path = tag_of(folder) / file.name
        raw = bytearray(path.read_bytes())
        raw[int(len(raw) * at)] ^= 16
        path.write_bytes(raw)
        found = [f for f in verify(folder).findings if f.severity == "error"]
        assert found and {Path(f.file).name for f in found} == {file.name}, (file.name, found)
        path.write_bytes(file.read_bytes()[: int(len(raw) * at)])
        found = [f for f in verify(folder).findings if f.severity == "error"]
        assert found and {Path(f.file).name for f in found} == {file.name}, (file.name, found)


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(GROUPS, tmp_path / "run")
    ref = open_checkpoint(folder).master["emb.weight"]
    chunk: Any = ref.chunks[1]
    raw = bytearray(chunk.path.read_bytes())
    raw[chunk.start + 5] ^= 1
    chunk.path.write_bytes(raw)
    (found,) = (f for f in verify(folder).findings if f.severity == "error")
    assert found.id == "checksum" and "emb.weight" in found.message and "rank_1" in found.file


def test_one_file_alone_is_refused() -> None:
    for path in (model(GROUPS, 0), optim(GROUPS, 0)):
        with pytest.raises(CkptError) as caught:
            open_checkpoint(path)
        assert caught.value.id == "one-shard"


# --- arithmetic ---------------------------------------------------------------------------------------


def test_parts_and_sub_groups() -> None:
    assert [part_of(1, 3), held(1, 3, 0), held(1, 3, 1), held(1, 3, 2)] == [1, 1, 0, 0]
    for numel in range(30):
        for ranks in range(1, 9):
            assert sum(held(numel, ranks, r) for r in range(ranks)) == numel
    # the boundaries depend on the rank count, through the rounded parts
    sizes = {"emb": 808, "a": 128, "b": 128, "conv": 384, "up": 56, "down": 56}
    assert sub_groups(sizes, 2, 250) == [["emb"], ["a", "b", "conv"], ["up", "down"]]
    assert sub_groups(sizes, 1, 250) == [["emb"], ["a", "b"], ["conv"], ["up", "down"]]
    assert sub_groups(sizes, 2, 780) == [list(sizes)]
    assert sub_groups({"a": 4}, 2, 1) == [["a"]] and sub_groups({}, 2, 1) == []


SGD = FIXTURES / "deepspeed-0.19.8/z3_sgd_ws2"


def with_state(folder: Path, change: Callable[[dict[str, Any], int], object]) -> Path:
    """A sample whose ranks keep more, as `change` makes it from the state of a sub-group and the rank."""
    shutil.copytree(SGD, folder)
    for rank in range(2):
        (path,) = folder.glob(f"*/*rank_{rank}_mp*optim_states.pt")
        root = torch.load(path, weights_only=False)
        for state in root["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            change(state, rank)
        torch.save(root, path)
    return folder


def of_8_bits(state: dict[str, Any], rank: int) -> None:
    state["state1"] = torch.zeros(state.pop("momentum_buffer").numel(), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda state, rank: state.update(scale=torch.tensor([rank + 1.0, 2.0, 3.0])), "scale"),
        (lambda state, rank: state.update(own_lr=0.1 * rank), "own_lr"),
        (lambda state, rank: state.update(scale=torch.ones(3 + rank)), "scale"),
        (of_8_bits, "state1"),
    ],
)
def test_state_of_single_ranks_is_never_taken_from_one(
    change: Callable[[Any, int], object], kind: str, tmp_path: Path
) -> None:
    source = with_state(tmp_path / "save", change)
    assert any(f.id == "rank-local-state" and f.where.endswith(f" {kind}") for f in verify(source).findings)
    for command in (
        ("reshard", "--world-size", 3),
        ("convert", "--to", "zero3"),
        ("convert", "--to", "zero2"),
        ("convert", "--to", "pt"),
        ("convert", "--to", "dcp"),
        ("convert", "--to", "universal"),
    ):
        refused = run(command[0], source, tmp_path / "out", *command[1:])
        assert refused.code == 2
        assert f"error[rank-local-state]: optimizer state '{kind}' of sub-group 0" in refused.err
        assert not (tmp_path / "out").exists()
    assert run("extract", source, tmp_path / "w.safetensors").code == 0
    assert run("convert", source, tmp_path / "out", "--to", "pt", "--reset-optimizer").code == 0


def test_what_all_ranks_keep_alike_is_moved(tmp_path: Path) -> None:
    source = with_state(tmp_path / "save", lambda state, rank: state.update(scale=torch.ones(3), beta=0.5))
    assert [f.id for f in verify(source).findings if f.id == "rank-local-state"] == []
    assert run("reshard", source, tmp_path / "out", "--world-size", 3).code == 0


def test_a_tied_pair_whose_frozen_owner_was_left_out(tmp_path: Path) -> None:
    """PEFT on a tied model: module keeps a placeholder under the other name, and DeepSpeed loads it."""
    path = tmp_path / "run"
    shutil.copytree(FIXTURES / "deepspeed-0.19.8/z3_exclude_frozen_ws2", path)
    before = set(open_checkpoint(path).tensors)
    for file in tag_of(path).glob("*model_states.pt"):
        saved = torch.load(file, weights_only=False)
        assert saved["frozen_param_shapes"] is None
        saved["module"]["head.weight"] = torch.empty(0, dtype=torch.bfloat16)
        saved["shared_params"]["head.weight"] = "embed.weight"
        torch.save(saved, file)
    found = verify(path)
    assert found.ok
    assert "frozen-excluded" in {f.id for f in found.findings}
    assert set(open_checkpoint(path).tensors) == before
