"""A file that would run something when it is loaded is named first, by inspect as by verify."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import hostile
import pytest
import torch
from commands import Ckpt
from support import FIXTURES

import ckpttools
from ckpttools.errors import CkptError

NAMES = ["reduce", "popped", "imported", "imported for nothing", "class of a tensor", "item of a tensor"]


def made(folder: Path, kind: str, name: str) -> Path:
    data = hostile.payloads(folder)[name]
    if kind == "zip":
        return hostile.torch_zip(folder / "a.pt", data)
    if kind == "bare":
        return hostile.written(folder / "a.pt", data)
    return hostile.written(folder / "a.pt", hostile.LEGACY + hostile.SYSTEM + data + hostile.P + b"].")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_it_is_named_first(kind: str, name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = made(tmp_path, kind, name)
    shown = ckpt("inspect", path)
    assert shown.code == 1
    assert "DANGEROUS: " in (shown.out + shown.err).splitlines()[0]
    assert "\x1b" not in shown.out + shown.err  # no colour but on a terminal
    checked = ckpt("verify", path, "--json")
    assert checked.code == 1
    findings = json.loads(checked.out)["checkpoints"][0]["findings"]
    assert findings[0]["id"] == "pickle-dangerous"
    assert not (tmp_path / hostile.MARKER).exists()


def test_beside_good_weights(tmp_path: Path, ckpt: Ckpt) -> None:
    class Bomb:
        def __reduce__(self) -> object:
            return print, ("ran",)

    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.ones(2)}, "extra": Bomb()}, path)
    shown = ckpt("inspect", path)
    first = "DANGEROUS: loading a.pt would run builtins.print('ran')"
    assert (shown.code, shown.out.splitlines()[0]) == (1, first)
    document = json.loads(ckpt("inspect", path, "--json").out)
    assert document["dangers"] == [{"file": str(path), "what": "would run builtins.print('ran')"}]
    assert ckpt("extract", path, tmp_path / "out.safetensors").code == 1
    assert not (tmp_path / "out.safetensors").exists()


BESIDE = {
    "hf-trainer/plain/checkpoint-4": "training_args.bin",
    "hf-trainer/deepspeed/checkpoint-4": "rng_state.pth",
    "accelerate/plain": "random_states_0.pkl",
    "bundle/checkpoint-200": "hf_model/pytorch_model.bin",
    "deepspeed-0.19.8/z2_groups_ws2": "global_step3/state",
}


@pytest.mark.parametrize("sample", BESIDE)
def test_what_lies_beside_the_weights(sample: str, tmp_path: Path, ckpt: Ckpt) -> None:
    """A run's next start loads it too: no listing shows such a checkpoint as good."""
    folder = tmp_path / "run" / Path(sample).name
    shutil.copytree(FIXTURES / sample, folder)
    made = hostile.torch_zip if sample.startswith("hf-trainer") else hostile.written  # a bare pickle
    made(folder / BESIDE[sample], hostile.payloads(tmp_path)["reduce"])
    for command in ("inspect", "verify", "ls", "resume-check"):
        done = ckpt(command, folder)
        assert done.code == 1 and "DANGEROUS: " in done.out + done.err, (command, done)
    assert "DANGEROUS: " in ckpt("batch", folder, "--bs", 4).out
    assert "DANGEROUS: " in ckpt("latest", folder).err
    assert not (tmp_path / hostile.MARKER).exists()


UNREADABLE = {
    "dcp/fsdp2_ws2": (".metadata",),
    "dcp/accelerate_ws2": ("optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"),
    "deepspeed-0.19.8/z2_groups_ws2": ("global_step3/mp_rank_00_model_states.pt",),
    "deepspeed-0.19.8/z3_groups_ws2": ("global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",),
    "deepspeed-0.19.8/pp_ws2": ("global_step3/layer_00-model_states.pt",),
    "hf/bin_sharded": ("pytorch_model-00001-of-00002.bin",),
}


@pytest.mark.parametrize("sample", UNREADABLE)
def test_what_cannot_be_read_is_judged_too(sample: str, tmp_path: Path, ckpt: Ckpt) -> None:
    """torch unpickles a file before it finds that its contents are not what was expected."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / sample, folder)
    for name in UNREADABLE[sample]:
        assert (folder / name).is_file()
        (folder / name).write_bytes(hostile.payloads(tmp_path)["reduce"])
    for command in ("inspect", "verify"):
        done = ckpt(command, folder)
        assert done.code == 1, (done.out, done.err)
        assert "DANGEROUS: " in "".join((done.out + done.err).splitlines()[:2])
    findings = json.loads(ckpt("verify", folder, "--json").out)["checkpoints"][0]["findings"]
    named = [each["file"] for each in findings if each["id"] == "pickle-dangerous"]
    assert sorted(named) == [str(folder / name) for name in UNREADABLE[sample]]
    assert not (tmp_path / hostile.MARKER).exists()


def test_what_is_recognised_and_not_read_is_judged_too(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "save").mkdir()
    rank = hostile.torch_zip(tmp_path / "save/optimizer_0_rank0.bin", hostile.payloads(tmp_path)["reduce"])
    other = hostile.written(tmp_path / "save/state.metadata", hostile.payloads(tmp_path)["reduce"])
    findings = json.loads(ckpt("verify", tmp_path / "save", "--json").out)["checkpoints"][0]["findings"]
    named = {each["file"] for each in findings if each["id"] == "pickle-dangerous"}
    assert named == {str(rank), str(other)}
    assert not (tmp_path / hostile.MARKER).exists()


def test_the_metadata_of_one_of_two_distributed_checkpoints(tmp_path: Path, ckpt: Ckpt) -> None:
    class Bomb:
        def __reduce__(self) -> object:
            return print, ("ran",)

    folder = shutil.copytree(FIXTURES / "dcp/accelerate_ws2", tmp_path / "run/step_3")
    path = folder / "optimizer_0/.metadata"
    saved = pickle.loads(path.read_bytes())  # noqa: S301
    saved.extra = Bomb()
    path.write_bytes(pickle.dumps(saved))
    for command in ("inspect", "verify", "ls"):
        done = ckpt(command, folder)
        assert done.code == 1 and "DANGEROUS: " in done.out + done.err, (command, done)


def test_the_library_says_it_too(tmp_path: Path) -> None:
    path = hostile.torch_zip(tmp_path / "a.pt", hostile.payloads(tmp_path)["reduce"])
    with pytest.raises(CkptError) as caught:
        ckpttools.inspect(path)
    assert caught.value.id == "pickle-dangerous"
    torch.save({"w": torch.ones(2)}, path)
    assert ckpttools.inspect(path).dangers == ()
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "hf/single", folder)
    side = hostile.torch_zip(folder / "optimizer.pt", hostile.payloads(tmp_path)["reduce"])
    ((file, what),) = ckpttools.open(folder).dangers
    assert file == side and "os.system" in what
    assert not (tmp_path / hostile.MARKER).exists()


@pytest.mark.parametrize("name", ["script", "script without code"])
def test_programs_of_torchscript(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = hostile.archives(tmp_path)[name]()
    for command in ("inspect", "verify"):
        done = ckpt(command, path)
        assert done.code == 1
        assert "TorchScript program" in "".join((done.out + done.err).splitlines()[:2])


@pytest.mark.parametrize("name", ["link", "link beside", "device"])
def test_members_that_are_no_records(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = hostile.archives(tmp_path)[name]()
    for command in ("inspect", "verify", "extract"):
        done = ckpt(command, path)
        assert done.code == 1 and "is a link or no regular file" in done.out + done.err


def test_a_real_program_of_torchscript(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert ckpt("verify", path).code == 1


def test_no_listing_shows_it_as_good(tmp_path: Path, ckpt: Ckpt) -> None:
    class Bomb:
        def __reduce__(self) -> object:
            return print, ("ran",)

    run = tmp_path / "run"
    run.mkdir()
    for epoch in range(1, 5):
        extra = Bomb() if epoch == 4 else 0
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
        saved = {"model": {"a.weight": torch.ones(2)}, "optimizer": optimizer, "epoch": epoch, "extra": extra}
        torch.save(saved, run / f"epoch_{epoch}.pt")
    listed = ckpt("ls", run)
    assert listed.code == 1
    assert next(line for line in listed.out.splitlines() if "epoch_4" in line).endswith(" would run code")
    assert "epoch_4.pt: DANGEROUS: would run builtins.print('ran') [pickle-dangerous]" in listed.out
    latest = ckpt("latest", run)
    assert latest.out == f"{run / 'epoch_3.pt'}\n" and "DANGEROUS" in latest.err
    assert ckpt("prune", run, "--keep-last", 1, "-y").code == 0
    assert sorted(path.name for path in run.iterdir()) == ["epoch_3.pt", "epoch_4.pt"]
