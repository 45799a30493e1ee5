"""DeepSpeed's own universal checkpoints: read as what they were made from, verified, each fault located."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES, identical, tensor_differences, truth_of

from ckpttools.checks import verify
from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import ERROR, WARNING
from ckpttools.formats import open_checkpoint
from ckpttools.operations.digest import compare, digest

UNIVERSAL = FIXTURES / "universal"
SAMPLES = FIXTURES / "deepspeed-0.19.8"
NAMES = ("z2_groups", "z2_frozen", "z3_groups")
cases = pytest.mark.parametrize("name", NAMES)


@cases
def test_it_holds_what_it_was_made_from(name: str) -> None:
    made, source = UNIVERSAL / name, SAMPLES / f"{name}_ws2"
    result = compare(digest(made), digest(source))
    assert result.same and result.settings and result.counters and not result.different
    found, truth = open_checkpoint(made), truth_of(source)
    assert tensor_differences(found.master, truth["fp32"]) == []
    for kind, tensors in truth["state"].items():
        held = {name: ref for group in found.groups for name, ref in group.state[kind].items()}
        assert tensor_differences(held, tensors) == []
    assert list(found.tensors) == list(open_checkpoint(source).tensors)
    assert [group.hyper["weight_decay"] for group in found.groups] == [
        group["weight_decay"] for group in truth["param_groups"]
    ]
    assert found.layout.format == "universal" and found.layout.dp_degree == 2


@cases
def test_it_is_good(name: str) -> None:
    verdict = verify(UNIVERSAL / name)
    assert verdict.ok and [f for f in verdict.findings if f.severity in (ERROR, WARNING)] == []
    assert run("inspect", UNIVERSAL / name).code == 0
    assert verify(UNIVERSAL / name / "global_step3_universal").ok


def test_round_robin_is_converted_wrong_and_that_is_seen(tmp_path: Path) -> None:
    """ds_to_universal follows slice mappings that DeepSpeed saves wrong with round_robin_gradients: what it
    makes is another model. Here two parameters have changed places, as there.
    """
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    zero = folder / "global_step3_universal/zero"
    a, b = (zero / name / "fp32.pt" for name in ("ln.weight", "ln_f.weight"))
    first, second = torch.load(a, weights_only=False), torch.load(b, weights_only=False)
    torch.save(second, a)
    torch.save(first, b)
    found = [f for f in verify(folder).findings if f.id == "master-mismatch"]
    assert {"ln.weight", "ln_f.weight"} <= {f.where for f in found}


def remove(*parts: str) -> Callable[[Path], None]:
    return lambda zero: (zero.joinpath(*parts)).unlink()


def truncate(*parts: str) -> Callable[[Path], None]:
    return lambda zero: os.truncate(zero.joinpath(*parts), 300)


def shorter(*parts: str) -> Callable[[Path], None]:
    def change(zero: Path) -> None:
        path = zero.joinpath(*parts)
        value = torch.load(path, weights_only=False)
        value["param"] = value["param"].detach().reshape(-1)[:-1].clone()
        torch.save(value, path)

    return change


def flip(*parts: str) -> Callable[[Path], None]:
    def change(zero: Path) -> None:
        path = zero.joinpath(*parts)
        data = bytearray(path.read_bytes())
        value = torch.load(path, weights_only=False)["param"].detach().numpy().tobytes()
        data[data.index(value) + 5] ^= 1
        path.write_bytes(data)

    return change


def saved(value: object, *parts: str) -> Callable[[Path], None]:
    def change(zero: Path) -> None:
        zero.joinpath(*parts).parent.mkdir(exist_ok=True)
        torch.save(value, zero.joinpath(*parts))

    return change


def swapped(zero: Path) -> None:
    a, b = (zero / f"mix/{kind}.pt" for kind in ("exp_avg", "exp_avg_sq"))
    a.rename(zero / "c")
    b.rename(a)
    (zero / "c").rename(b)


def without_settings_of_a_group(zero: Path) -> None:
    path = zero / "optimizer_state.pt"
    value = torch.load(path, weights_only=False)
    value["param_groups"].pop()
    torch.save(value, path)


def a_list(zero: Path) -> None:
    torch.save([1, 2], zero / "mix/exp_avg.pt")


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "fp32 missing": (remove("mix", "fp32.pt"), "tensor-missing", "mix/fp32.pt"),
    "exp_avg missing": (remove("mix", "exp_avg.pt"), "moment-missing", "mix/exp_avg.pt"),
    "step missing": (remove("mix", "step.pt"), "moment-missing", "mix/step.pt"),
    "settings missing": (remove("optimizer_state.pt"), "shard-missing", "optimizer_state.pt"),
    "model missing": (remove("..", "mp_rank_00_model_states.pt"), "model-missing", "global_step3_universal"),
    "fp32 truncated": (truncate("mix", "fp32.pt"), "file-truncated", "mix/fp32.pt"),
    "exp_avg_sq truncated": (truncate("mix", "exp_avg_sq.pt"), "file-truncated", "mix/exp_avg_sq.pt"),
    "fp32 short": (shorter("mix", "fp32.pt"), "shape-mismatch", "mix/fp32.pt"),
    "exp_avg short": (shorter("emb.weight", "exp_avg.pt"), "moment-size", "emb.weight/exp_avg.pt"),
    "bit flipped": (flip("mix", "exp_avg.pt"), "checksum", "mix/exp_avg.pt"),
    "another step": (saved(torch.tensor(7.0), "mix", "step.pt"), "step-mismatch", "mix/step.pt"),
    "a step of text": (saved("three", "mix", "step.pt"), "field-damaged", "mix/step.pt"),
    "no tensor": (a_list, "field-damaged", "mix/exp_avg.pt"),
    "integers": (
        saved({"param": torch.zeros(5, dtype=torch.int64), "cat_dim": 0}, "mix", "exp_avg.pt"),
        "field-damaged",
        "mix/exp_avg.pt",
    ),
    "NaN": (
        saved({"param": torch.full((5,), torch.nan), "cat_dim": 0}, "mix", "exp_avg.pt"),
        "nonfinite",
        "mix/exp_avg.pt",
    ),
    "foreign weights": (
        saved({"param": torch.ones(5), "cat_dim": 0}, "mix", "fp32.pt"),
        "master-mismatch",
        "mix/fp32.pt",
    ),
    "moments exchanged": (swapped, "file-renamed", "mix/exp_avg"),
    "a leftover": (saved({"param": torch.ones(5)}, "old", "fp32.pt"), "shard-extra", "zero/old"),
    "a group lost": (without_settings_of_a_group, "group-count", "optimizer_state.pt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_located(fault: str, tmp_path: Path) -> None:
    change, id, place = FAULTS[fault]
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    change(folder / "global_step3_universal/zero")
    found = [f for f in verify(folder).findings if f.severity == ERROR]
    assert id in [f.id for f in found], [(f.id, f.file) for f in found]
    assert any(f.id == id and place in f.file.replace(os.sep, "/") for f in found)
    if id not in ("checksum", "nonfinite", "master-mismatch"):  # which take reading every byte
        assert run("convert", folder, tmp_path / "out", "--to", "pt").code == 1
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_was_killed_is_said(tmp_path: Path) -> None:
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    (folder / "global_step3_universal/tmp").mkdir()
    assert "save-unfinished" in [f.id for f in verify(folder).findings]


def test_a_rank_whose_model_file_is_gone_is_missed(tmp_path: Path) -> None:
    """No load needs it, but its part of the frozen weights lies nowhere else."""
    folder = shutil.copytree(UNIVERSAL / "z3_groups", tmp_path / "u")
    (folder / "global_step3_universal/zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    [found] = [f for f in verify(folder).findings if f.severity == ERROR]
    assert found.id == "shard-missing" and found.file.endswith("zero_pp_rank_1_mp_rank_00_model_states.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("at", ["mix/step.pt", "mix/fp32.pt", "optimizer_state.pt", "ln.weight/extra.pt"])
def test_code_in_any_file_is_shown_and_never_run(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    saved(Evil(), at)(folder / "global_step3_universal/zero")
    found = verify(folder).findings
    assert any("DANGEROUS" in f.message and f.file.endswith(at) for f in found)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("key", ["is_expert_param", "vocab_tensor", "sub_param_shape"])
def test_cuts_of_tensor_parallelism_are_refused(key: str, tmp_path: Path) -> None:
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    value = {"param": torch.ones(5), key: True}
    saved(value, "mix/exp_avg.pt")(folder / "global_step3_universal/zero")
    with pytest.raises(Unsupported) as caught:
        open_checkpoint(folder)
    assert caught.value.id == "layout-unsupported" and key in caught.value.message


def test_a_model_file_of_a_pipeline_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    (model,) = folder.rglob("mp_rank_00_model_states.pt")
    torch.save({**torch.load(model, weights_only=False), "module": None}, model)
    with pytest.raises(Unsupported) as caught:
        open_checkpoint(folder)
    assert caught.value.layout == "pipeline"


def test_a_pointer_that_leads_nowhere(tmp_path: Path) -> None:
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    (folder / "latest_universal").write_text("global_step9")
    with pytest.raises(CkptError) as caught:
        open_checkpoint(folder)
    assert caught.value.id == "latest-dangling"


@cases
def test_weights_are_extracted(name: str, tmp_path: Path) -> None:
    assert run("extract", UNIVERSAL / name, tmp_path / "w.pt", "--weights-only", "--format", "pt").code == 0
    held = torch.load(tmp_path / "w.pt", weights_only=True)
    held = held.get("model_state_dict", held)
    for parameter, tensor in truth_of(SAMPLES / f"{name}_ws2")["fp32"].items():
        assert identical(held[parameter], tensor), parameter


def test_a_manifest_covers_the_files_of_every_parameter(tmp_path: Path) -> None:
    """A moment of the same shape from another run shows nowhere else."""
    folder = shutil.copytree(UNIVERSAL / "z2_groups", tmp_path / "u")
    tag = folder / "global_step3_universal"
    assert run("verify", folder, "--write-manifest").code == 0
    stated = json.loads((tag / "ckpt-manifest.json").read_text())["files"]
    assert set(stated) == {p.relative_to(tag).as_posix() for p in tag.rglob("*.pt")}
    assert run("copy", folder, tmp_path / "copy").code == 0
    path = tag / "zero/mix/exp_avg.pt"
    value = torch.load(path, weights_only=False)
    torch.save({**value, "param": value["param"].detach() * 2}, path)
    (found,) = (f for f in verify(folder).findings if f.severity == ERROR)
    assert found.id == "manifest-mismatch" and found.file.endswith("zero/mix/exp_avg.pt")
    assert run("copy", folder, tmp_path / "again").code != 0 and not (tmp_path / "again").exists()
    for to in (("universal",), ("dcp", "--dcp-layout", "accelerate")):
        made = tmp_path / to[0]
        assert run("convert", UNIVERSAL / "z2_groups", made, "--to", *to).code == 0
        (place,) = made.rglob("ckpt-manifest.json")
        files = {p.relative_to(place.parent).as_posix() for p in place.parent.rglob("*") if p.is_file()}
        assert set(json.loads(place.read_text())["files"]) == files - {"ckpt-manifest.json"}
