"""One cause, one finding; and what is left where something is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools.checks import Verdict, verify
from ckpttools.findings import ERROR

SAMPLE = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
RANK = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE, tmp_path / "save")
    return tmp_path / "save/global_step3"


def errors(path: Path) -> list[tuple[str, str]]:
    return [(f.id, Path(f.file).name) for f in verify(path).findings if f.severity == ERROR]


def rescue(verdict: Verdict) -> list[str]:
    return [f.message for f in verdict.findings if f.id == "rescue"]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def test_a_truncated_file_is_reported_once(tag: Path, tmp_path: Path) -> None:
    shorten(tag / RANK.format(1))
    assert errors(tag.parent) == [("file-truncated", RANK.format(1))]
    shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / "checkpoint-2")
    shorten(tmp_path / "checkpoint-2/model.safetensors")
    assert errors(tmp_path / "checkpoint-2") == [("file-truncated", "model.safetensors")]


def test_swapped_shards_are_two_files(tag: Path) -> None:
    one, other = tag / RANK.format(0), tag / RANK.format(1)
    one.rename(tag / "x")
    other.rename(one)
    (tag / "x").rename(other)
    assert errors(tag.parent) == [("file-renamed", one.name), ("file-renamed", other.name)]


def test_a_foreign_shard_is_one_finding(tag: Path) -> None:
    """Of another run of the same model: everything fits but the values."""
    value = torch.load(tag / RANK.format(1), weights_only=False)
    for vector in value["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
        vector.data.add_(0.5)
    torch.save(value, tag / RANK.format(1))
    (finding,) = [f for f in verify(tag.parent).findings if f.severity == ERROR]
    assert finding.id == "master-mismatch" and " tensors (" in finding.message
    assert Path(finding.file).name == RANK.format(1)


def test_a_foreign_model_file_leads(tag: Path) -> None:
    """All ranks differ from it: it is named, with its count, and its weights are not called whole."""
    path = tag / "mp_rank_00_model_states.pt"
    value = torch.load(path, weights_only=False)
    for tensor in value["module"].values():
        tensor.add_(0.25)
    value["global_steps"] = 7
    torch.save(value, path)
    verdict = verify(tag.parent)
    (finding,) = [f for f in verdict.findings if f.severity == ERROR]
    assert (finding.id, Path(finding.file)) == ("master-mismatch", path)
    assert "the model file counts 7 steps" in finding.message and "12 tensors of module (" in finding.message
    assert not [f for f in verdict.findings if f.id == "counter-mismatch"] and rescue(verdict) == []


def test_a_shard_of_another_step_leads(tag: Path) -> None:
    value = torch.load(tag / RANK.format(1), weights_only=False)
    for vector in value["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
        vector.data.add_(0.5)
    for state in value["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] -= 1
    torch.save(value, tag / RANK.format(1))
    (finding,) = [f for f in verify(tag.parent).findings if f.severity == ERROR]
    assert finding.id == "step-mismatch" and "tensors differ in consequence" in finding.message


def test_a_flipped_bit_names_the_tensor(tag: Path) -> None:
    path = tag / "mp_rank_00_model_states.pt"
    raw = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=False)["module"]["up.weight"]
    at = raw.index(weight.contiguous().view(torch.uint8).numpy().tobytes())
    raw[at + 1] ^= 0x40
    path.write_bytes(raw)
    (finding,) = [f for f in verify(tag.parent).findings if f.severity == ERROR]
    assert finding.id == "checksum" and "up.weight" in finding.message


def test_a_lost_shard_ends_with_what_is_left(tag: Path, tmp_path: Path) -> None:
    (tag / RANK.format(1)).unlink()
    (message,) = rescue(verify(tag.parent))
    assert message.startswith("the weights are whole: ckpt extract ")
    assert message in run("verify", tag.parent).out
    command = message.split("ckpt ")[1].split()
    assert run(*command[:2], tmp_path / "out", *command[2:]).code == 0
    shorten(tag / "mp_rank_00_model_states.pt")
    assert rescue(verify(tag.parent)) == []


def test_files_of_two_saves_end_with_what_is_left(tag: Path) -> None:
    shutil.copy(tag / RANK.format(1), tag / RANK.format(1).removeprefix("bf16_"))
    verdict = verify(tag.parent)
    assert "shard-duplicate" in [f.id for f in verdict.findings] and len(rescue(verdict)) == 1


def test_a_good_checkpoint_needs_no_rescue() -> None:
    assert rescue(verify(SAMPLE)) == []


def test_the_classes_of_a_file_are_one_line(tmp_path: Path) -> None:
    class First:
        pass

    class Second:
        pass

    for made in (First, Second):
        made.__module__, made.__qualname__ = __name__, made.__name__
        globals()[made.__name__] = made
    path = tmp_path / "training_args.pt"
    torch.save({"a": First(), "b": Second(), "w": torch.ones(3)}, path)
    (finding,) = [f for f in verify(path).findings if f.id == "class-unknown"]
    assert finding.message.startswith("2 unknown classes (") and "Second" in finding.message
