"""Layouts whose weights are not put together: their files are checked one by one, and none may be missing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from support import FIXTURES, REFUSED_SAMPLES, name_of

from ckpttools.checks import verify

ZERO = FIXTURES / "deepspeed-0.19.8"


def ids(path: Path) -> set[str]:
    return {f.id for f in verify(path).findings if f.severity != "info"}


@pytest.fixture(scope="module")
def universal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A universal checkpoint of a tensor-parallel run, made by DeepSpeed's own converter."""
    out = tmp_path_factory.mktemp("universal") / "out"
    source = ZERO / "autotp1_ws2"
    tag = (source / "latest").read_text()
    options = ["--inject_missing_state", "--input_folder", str(source / tag), "--output_folder", str(out)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.mark.parametrize("path", REFUSED_SAMPLES, ids=name_of)
def test_good_ones_of_deepspeed(path: Path, tmp_path: Path) -> None:
    verdict = verify(path)
    assert verdict.ok and {f.severity for f in verdict.findings} == {"info"}
    assert "layout-in-parts" in {f.id for f in verdict.findings}
    for command in (
        ["extract", tmp_path / "x"],
        ["reshard", tmp_path / "x", "--world-size", "2"],
    ):
        ran = run(command[0], path, *command[1:])  # refused by everything that would use the weights
        assert ran.code == 2 and ran.err.startswith("error["), ran


PARTS = ["pp_ws2", "moe_ws2", "autotp1_ws2", "autotp3_ws2", "autoep2_ws2", "autoep3_ws2", "folded2_ws2"]


@pytest.mark.parametrize("name", PARTS)
def test_none_of_their_files_may_be_missing(name: str, tmp_path: Path) -> None:
    """The last one of a kind, too: no gap in the numbers shows it, but what the model file states."""
    folder = shutil.copytree(ZERO / name, tmp_path / "run")
    paths = sorted(folder.glob("*/*.pt"))
    assert len(paths) >= 4
    for path in paths:
        if "layer_04-" in path.name:  # it has no parameters
            continue
        data = path.read_bytes()
        path.unlink()
        assert ids(folder) & {"shard-missing", "experts-missing"}, path.name
        path.write_bytes(data)
    for path in folder.glob("*/*optim_states.pt"):
        path.unlink()
    assert "shard-missing" in ids(folder)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("autotp1_ws2", "*mp_rank_01*"),
        ("autotp3_ws2", "*mp_rank_01*"),
        ("autoep3_ws2", "*pp_rank_1_*"),
        ("folded2_ws2", "*mp_rank_01*"),  # and with it the experts of the other expert-parallel rank
    ],
)
def test_a_rank_with_all_its_files_is_missed(name: str, gone: str, tmp_path: Path) -> None:
    """What is left looks like a folder of fewer ranks, and of a smaller model."""
    folder = shutil.copytree(ZERO / name, tmp_path / "run")
    for path in folder.glob(f"*/{gone}"):
        path.unlink()
    assert "shard-missing" in ids(folder)
    for command in (["convert", "--to", "pt"], ["extract"], ["reshard", "--world-size", "3"]):
        ran = run(command[0], folder, tmp_path / "x", *command[1:])
        assert ran.code and not (tmp_path / "x").exists(), ran
    ran = run("inspect", folder)
    assert "1 rank" not in ran.out or "the model lies on 2" in ran.out, ran


def test_the_slices_of_one_rank_are_not_taken_for_the_model(tmp_path: Path) -> None:
    path = next((ZERO / "autotp1_ws2").glob("*/mp_rank_01_model_states.pt"))
    for command in (
        ["extract", path, tmp_path / "w.safetensors"],
        ["convert", path, tmp_path / "a", "--to", "pt"],
    ):
        ran = run(*command)
        assert ran.code == 0 and "slices of one model-parallel rank: the model lies on 2" in ran.err, ran
    assert "the model lies on 2" in run("verify", path).out


@pytest.mark.parametrize("name", ["z1_bf16_ws2", "z3_bf16_ws2", "z0_bf16_ws2"])
def test_one_model_parallel_rank_is_no_smaller_model(name: str, tmp_path: Path) -> None:
    """AutoTP on two nodes, and the folder of one: every weight would be cut in half."""
    folder = shutil.copytree(ZERO / name, tmp_path / "run")
    for path in folder.glob("*/*model_states.pt"):
        torch.save(torch.load(path, weights_only=False) | {"mp_world_size": 2}, path)
    assert "shard-missing" in ids(folder)
    ran = run("convert", folder, tmp_path / "x.pt", "--to", "pt")
    assert ran.code == 1 and "2 model-parallel ranks" in ran.err and not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    ("name", "roles", "numel"),
    [
        ("pp_ws2", "weights of a pipeline layer", 252),
        ("moe_ws2", "weights of expert 1 of MoE layer 0", 475),
        ("autotp1_ws2", "a rank's part of the optimizer's state", 976),  # each rank's slices
        ("autotp3_ws2", "names and shapes of the weights, buffers, counters, client state", None),
        ("folded2_ws2", "weights of expert 3 of MoE layer 0", 2096),
        ("autoep2_ws2", "weights of expert 3 of MoE layer 0", 1752),
        ("autoep3_ws2", "a rank's part of the optimizer's state", None),  # they are in the optimizer files
    ],
)
def test_inspect_shows_each_file_and_extract_takes_one(
    name: str, roles: str, numel: int | None, tmp_path: Path
) -> None:
    path = ZERO / name
    shown = json.loads(run("inspect", path, "--json", "--tensors").out)
    assert (shown["step"], shown["epoch"], shown["parameters"]) == (3 if name in PARTS[:2] else 2, 1, numel)
    assert roles in {file["role"] for file in shown["files"]}
    ran = run("inspect", path)
    assert ran.code == 0 and "each file is shown by itself" in ran.out and roles in ran.out
    ran = run("verify", path)
    assert ran.code == 0 and "no optimizer" not in ran.out and "warning" not in ran.out, ran
    for file in path.glob("*/*model_states.pt"):
        saved = torch.load(file, weights_only=False)
        held = {n: t for n, t in (saved.get("module", saved) or {}).items() if isinstance(t, torch.Tensor)}
        if not held:  # of a layer without weights, too
            continue
        if file.name.startswith("zero_pp"):  # ZeRO-3: the weights' names, and no element of them
            ran = run("extract", file, tmp_path / "x.safetensors")
            assert ran.code == 2 and "error[one-shard]" in ran.err, ran
            continue
        assert run("extract", file, tmp_path / f"{file.name}.safetensors").code == 0
        made = load_file(tmp_path / f"{file.name}.safetensors")
        assert made.keys() == held.keys() and all(torch.equal(made[n], held[n]) for n in held)


@pytest.mark.parametrize("name", ["z3_bf16_ws2", "pp_ws2", "moe_ws2"])
def test_damage_in_deepspeed_folders(name: str, tmp_path: Path) -> None:
    good = ZERO / name
    tag = (good / "latest").read_text()
    files = sorted(p.name for p in (good / tag).iterdir())
    ranks = [f for f in files if "optim_states" in f]
    for i, (first, second) in enumerate(((ranks[0], ranks[1]), (files[-1], files[-2]))):
        swapped = shutil.copytree(good, tmp_path / f"swapped{i}")
        a, b = swapped / tag / first, swapped / tag / second
        a.rename(swapped / "spare")
        b.rename(a)
        (swapped / "spare").rename(b)
        assert "file-renamed" in ids(swapped), (first, second)
    gone = shutil.copytree(good, tmp_path / "gone")
    (gone / tag / ranks[0]).unlink()
    assert "shard-missing" in ids(gone)
    flipped = shutil.copytree(good, tmp_path / "flipped")
    raw = bytearray((flipped / tag / ranks[1]).read_bytes())
    raw[len(raw) // 2] ^= 16
    (flipped / tag / ranks[1]).write_bytes(raw)
    assert ids(flipped) & {"checksum", "zip-damaged", "zip-unexplained"}


@pytest.mark.parametrize("expert", [0, 1])
def test_a_missing_expert_is_an_error(expert: int, tmp_path: Path) -> None:
    folder = shutil.copytree(ZERO / "moe_ws2", tmp_path / "run")
    next(folder.glob(f"*/layer_0_expert_{expert}_*")).unlink()
    (found,) = (f for f in verify(folder).findings if f.severity == "error")
    assert (
        found.id == "experts-missing"
        and f"1 of 2 experts of MoE layer 0 are in no file: {expert}" in found.message
    )


@pytest.mark.parametrize(("name", "stage"), [("moe_ws2", 0), ("moe_ws2", 2), ("autoep2_ws2", 2)])
def test_without_all_experts_it_is_no_smaller_model(name: str, stage: int, tmp_path: Path) -> None:
    """Nothing in the names says then that there were any."""
    folder = shutil.copytree(ZERO / name, tmp_path / "run")
    for path in folder.glob("*/*expert_*"):
        path.unlink()
    if stage == 0:
        for path in folder.glob("*/*zero_pp_rank_*"):
            path.unlink()
        model = next(folder.glob("*/mp_rank_00_model_states.pt"))
        state = torch.load(model, weights_only=False)
        torch.save(state | {"optimizer": {"state": {}, "param_groups": []}}, model)
    assert "experts-missing" in ids(folder)
    for command in (["convert", "--to", "pt"], ["extract"], ["reshard", "--world-size", "3"]):
        ran = run(command[0], folder, tmp_path / "x", *command[1:])
        assert ran.code and "mixture-of-experts" in ran.err and not (tmp_path / "x").exists(), ran
    ran = run("resume-check", folder)
    assert ran.code and "mixture-of-experts" in ran.out + ran.err, ran
    assert run("verify", folder).code == 1


def test_experts_of_a_whole_layer_are_missed_by_what_the_model_file_states(tmp_path: Path) -> None:
    folder = shutil.copytree(ZERO / "moe_ws2", tmp_path / "run")
    model = next(folder.glob("*/mp_rank_00_model_states.pt"))
    state = torch.load(model, weights_only=False)
    torch.save(state | {"num_experts": [2, 4]}, model)
    assert ids(folder) == {"experts-missing"}
    for name in ("layer_1_expert_0", "layer_1_expert_1", "layer_1_expert_2", "layer_1_expert_3"):
        source = next(folder.glob("*/layer_0_expert_0_*"))
        shutil.copy(source, source.with_name(f"{name}_mp_rank_00_model_states.pt"))
    assert "experts-missing" not in ids(folder)


def test_expert_parallel_optimizers_are_fewer_than_the_ranks(tmp_path: Path) -> None:
    """Without ZeRO there is one for each part of the experts, whatever the number of data-parallel ranks."""
    folder = shutil.copytree(ZERO / "moe_ws2", tmp_path / "run")
    for path in sorted(folder.glob("*/*zero_pp_rank_*")):
        path.unlink()
    model = next(folder.glob("*/mp_rank_00_model_states.pt"))
    assert torch.load(model, weights_only=False)["dp_world_size"] == 2
    torch.save({"optimizer": {"state": {}}}, model.with_name("expp_rank_0_mp_rank_00_optim_states.pt"))
    assert "shard-missing" not in ids(folder)
    torch.save({"optimizer": {"state": {}}}, model.with_name("expp_rank_2_mp_rank_00_optim_states.pt"))
    assert "shard-missing" in ids(folder)


def test_model_files_of_different_steps(tmp_path: Path) -> None:
    folder = shutil.copytree(ZERO / "z3_bf16_ws2", tmp_path / "run")
    path = next(folder.glob("*/zero_pp_rank_1_mp_rank_00_model_states.pt"))
    state = torch.load(path, weights_only=False)
    torch.save(state | {"global_steps": 2}, path)
    assert "ranks-differ" in ids(folder)


def test_all_optimizer_files_missing_is_no_stage_0(tmp_path: Path) -> None:
    folder = shutil.copytree(ZERO / "z2_bf16_ws2", tmp_path / "run")
    for path in folder.glob("*/*optim_states.pt"):
        path.unlink()
    assert ids(folder) == {"shard-missing"}
    assert verify(ZERO / "z0_bf16_ws2").ok


@pytest.mark.parametrize("gone", ["exp_avg.pt", "*.pt"])
def test_universal_of_a_tensor_parallel_run(universal: Path, gone: str, tmp_path: Path) -> None:
    """Its optimizer files are those of the parameters: no rank has one of its own."""
    assert ids(universal) == set()
    folder = shutil.copytree(universal, tmp_path / "u")
    first, second, *_ = sorted(p for p in (folder / "zero").iterdir() if p.is_dir())
    (folder / "zero/tower.weight").mkdir()  # a frozen one, which ds_to_universal copies from the model file
    shutil.copy(second / "fp32.pt", folder / "zero/tower.weight/fp32.pt")
    assert ids(folder) == set()
    for path in first.glob(gone):
        path.unlink()
    assert ids(folder) == {"shard-missing"} and first.name in run("verify", folder).out
    os.truncate(second / "fp32.pt", 300)
    assert "file-truncated" in ids(folder)


def test_a_pointer_to_what_is_not_read_is_no_alarm() -> None:
    """DeepSpeed resumes from it: whether it could is only not known here."""
    for command in ("ls", "latest"):
        ran = run(command, ZERO / "autotp1_ws2")
        said = ran.out + ran.err
        assert ran.code == 0 and "can be resumed from is not known" in said and "cannot be" not in said, ran


def test_experts_that_are_folded_into_tensor_parallel_ranks(tmp_path: Path) -> None:
    """Each such rank writes its own experts: with four ranks of which two are data-parallel as with two."""
    folder = shutil.copytree(ZERO / "folded2_ws2", tmp_path / "run")
    gone = next(folder.glob("*/layer_0_expert_2_mp_rank_01_*"))
    gone.rename(gone.with_name(gone.name.replace("rank_01", "rank_00")))
    assert "experts-missing" in ids(folder)


def test_the_numbers_in_a_name_are_no_measure(tmp_path: Path) -> None:
    """They come from file names, and any may be there."""
    ranks = 65_536
    names = [f"mp_rank_{rank:02}_model_states.pt" for rank in (0, 1)]
    names.append(f"zero_pp_rank_{ranks}_mp_rank_{ranks}_optim_states.pt")
    tag = tmp_path / "global_step1"
    tag.mkdir()
    (tmp_path / "latest").write_text(tag.name)
    for name in names:
        torch.save({"module": {}, "dp_world_size": 1, "mp_world_size": 2}, tag / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "shard-missing" in {finding.id for finding in verify(tmp_path).findings}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB; 16 TB without a bound


@pytest.mark.parametrize(("sample", "at"), [("z2_bf16_ws2", "param_groups"), ("z3_bf16_ws2", "deeper")])
def test_nan_among_settings_is_no_difference_of_ranks(sample: str, at: str, tmp_path: Path) -> None:
    """A best loss that is not known yet, in every rank's file; another rate is a difference."""
    folder = shutil.copytree(ZERO / sample, tmp_path / "run")

    def set_all(key: str, values: tuple[object, ...]) -> set[str]:
        for path, value in zip(sorted(folder.glob("*/*optim_states.pt")), values, strict=True):
            state = torch.load(path, weights_only=False)
            kept = state["optimizer_state_dict"]
            kept = kept if at == "param_groups" else kept["optimizer_state_dict"]
            groups = (
                kept["base_optimizer_state"]["param_groups"] if at == "param_groups" else kept["param_groups"]
            )
            for group in groups:
                group[key] = value
            torch.save(state, path)
        return ids(folder)

    nan = float("nan")
    assert not {"ranks-differ", "ranks-disagree"} & set_all("best", (nan, nan))
    assert "ranks-differ" in set_all("best", (nan, 2.0))
    assert not {"ranks-differ", "ranks-disagree"} & set_all("best", (Namespace(a=nan), Namespace(a=nan)))
