"""Hugging Face folders: every layout is read, and written, as safetensors, torch and transformers do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from support import FIXTURES, as_torch, differences, tensor_differences

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.findings import ERROR
from ckpttools.formats import hf, locate, open_checkpoint
from ckpttools.plan import Literal, Plan
from ckpttools.tensors import DTYPES, DType
from ckpttools.transforms.cast import cast
from ckpttools.transforms.select import weights_only

transformers = pytest.importorskip("transformers")
HF = FIXTURES / "hf"
FOLDERS = ["single", "sharded", "bin", "bin_sharded", "gpt2_tied", "peft"]


def oracle(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every weights file of a folder."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            out |= load_file(file)
        elif file.name.startswith("pytorch_model") and file.suffix == ".bin":
            out |= torch.load(file, weights_only=True)
    return out


# --- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_reads_every_layout(name: str) -> None:
    checkpoint = open_checkpoint(HF / name)
    assert checkpoint.layout.format == "hf"
    assert tensor_differences(checkpoint.tensors, oracle(HF / name)) == []
    assert checkpoint.groups == () and checkpoint.master == {}
    assert {role.path for role in checkpoint.files} == set((HF / name).iterdir())
    assert all(role.nbytes == role.path.stat().st_size for role in checkpoint.files)


def test_dtypes_and_checksums() -> None:
    assert open_checkpoint(HF / "sharded").layout.dtype == "bf16"
    assert open_checkpoint(HF / "single").layout.dtype == "fp32"
    assert open_checkpoint(HF / "single").checks == ()
    assert "no checksums" in open_checkpoint(HF / "single").notes[0]
    assert open_checkpoint(HF / "bin_sharded").checks


def test_the_same_model_in_every_layout() -> None:
    single = open_checkpoint(HF / "single")
    for name in ("bin", "bin_sharded"):
        other = open_checkpoint(HF / name)
        assert set(other.tensors) == set(single.tensors)
        assert tensor_differences(other.tensors, {n: as_torch(t) for n, t in single.tensors.items()}) == []


def test_reads_what_transformers_loads() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(HF / "single")
    assert tensor_differences(open_checkpoint(HF / "single").tensors, model.state_dict()) == []


def test_tied_weights_are_stored_once() -> None:
    checkpoint = open_checkpoint(HF / "gpt2_tied")
    model = transformers.AutoModelForCausalLM.from_pretrained(HF / "gpt2_tied")
    assert set(model.state_dict()) - set(checkpoint.tensors) == {"lm_head.weight"}
    assert checkpoint.shared == {}


def test_tied_names_in_one_bin_file_share_their_bytes(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(HF / "gpt2_tied")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shared == {"lm_head.weight": "transformer.wte.weight"}
    owner, alias = (checkpoint.tensors[n] for n in ("transformer.wte.weight", "lm_head.weight"))
    assert owner.chunks == alias.chunks


def test_adapter_of_peft() -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(HF / "single")
    model = peft.PeftModel.from_pretrained(base, HF / "peft")
    expected = peft.get_peft_model_state_dict(model)
    assert tensor_differences(open_checkpoint(HF / "peft").tensors, expected) == []


def test_one_safetensors_file() -> None:
    path = HF / "sharded/model-00001-of-00002.safetensors"
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout.format == "safetensors"
    assert tensor_differences(checkpoint.tensors, load_file(path)) == []


def test_checkpoint_of_the_trainer() -> None:
    folder = FIXTURES / "hf-trainer/plain/checkpoint-4"
    checkpoint = open_checkpoint(folder)
    stated = json.loads((folder / "trainer_state.json").read_text())
    assert (checkpoint.training.step, checkpoint.training.epoch) == (4, stated["epoch"])
    assert tensor_differences(checkpoint.tensors, load_file(folder / "model.safetensors")) == []
    roles = {role.path.name: role.role for role in checkpoint.files}
    assert roles["optimizer.pt"] == "optimizer state"


def test_safetensors_are_preferred_as_transformers_does(tmp_path: Path) -> None:
    shutil.copytree(HF / "bin", tmp_path / "both")
    expected = {"only.this": torch.ones(2)}
    save_file(expected, tmp_path / "both/model.safetensors")
    assert tensor_differences(open_checkpoint(tmp_path / "both").tensors, expected) == []


# --- damage -------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shutil.copytree(HF / "sharded", tmp_path / "model")
    return tmp_path / "model"


INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes.pop("add", {})
    for name in changes.pop("remove", []):
        del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index | changes))


NORM = "model.norm.weight"


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    error = refused(sharded)
    assert error.id == "shard-missing" and SHARDS[1] in error.message


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("index-mismatch", {"add": {"more": SHARDS[0]}}),
        ("index-mismatch", {"remove": [NORM]}),
        ("shard-missing", {"add": {NORM: "model-00003-of-00002.safetensors"}}),
        ("name-unsafe", {"add": {NORM: "../model.safetensors"}}),
        ("name-unsafe", {"add": {NORM: "/etc/passwd"}}),
        ("name-unsafe", {"add": {NORM: ""}}),
        ("json-damaged", {"add": {NORM: 3}}),
        ("json-damaged", {"weight_map": {}}),
        ("json-damaged", {"weight_map": []}),
    ],
)
def test_index_that_does_not_fit(sharded: Path, expected: str, change: dict[str, Any]) -> None:
    edit_index(sharded, **change)
    assert refused(sharded).id == expected


def test_index_that_is_no_json(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"a"')
    assert refused(sharded).id == "json-damaged"


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    both = load_file(sharded / SHARDS[1]) | {NORM: torch.ones(8)}
    save_file(both, sharded / SHARDS[1])
    save_file(load_file(sharded / SHARDS[0]) | {NORM: torch.ones(8)}, sharded / SHARDS[0])
    assert refused(sharded).id == "index-mismatch"


def test_truncated_shard(sharded: Path) -> None:
    path = sharded / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-10])
    assert refused(sharded).where == str(path)


def refused(path: Path) -> CkptError:
    with pytest.raises(CkptError) as caught:
        open_checkpoint(path)
    return caught.value


# --- writing ------------------------------------------------------------------------------------------


def plan(
    checkpoint: Checkpoint, max_shard_size: int, dtype: DType | None = None, *, bin: bool = False
) -> Plan:
    chosen = weights_only(checkpoint)
    layout = Layout(format="hf", variant=hf.BIN if bin else None, max_shard_size=max_shard_size)
    return hf.plan(chosen if dtype is None else cast(chosen, dtype), layout)


def logits(folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(12).reshape(1, 12) * 3 % 40).logits
    return out


@pytest.mark.parametrize("name", ["single", "sharded", "bin", "bin_sharded", "gpt2_tied"])
@pytest.mark.parametrize("max_shard_size", [1, 1000, 3000, 10**9])
@pytest.mark.parametrize("bin", [False, True], ids=["safetensors", "bin"])
def test_transformers_loads_what_we_wrote(name: str, max_shard_size: int, bin: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(HF / name)
    out = tmp_path / "out"
    execute(plan(checkpoint, max_shard_size, bin=bin), out)
    assert tensor_differences(open_checkpoint(out).tensors, oracle(HF / name)) == []
    for extra in ("config.json", "generation_config.json"):
        if (HF / name / extra).exists():
            shutil.copy(HF / name / extra, out)
    assert torch.equal(logits(out), logits(HF / name))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("bin", [False, True], ids=["safetensors", "bin"])
def test_written_as_read(name: str, bin: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(HF / name)
    for size in (700, 10**9):
        execute(plan(checkpoint, size, bin=bin), tmp_path / str(size))
        again = open_checkpoint(tmp_path / str(size))
        # a safetensors header may be in another order
        ordered = replace(again, tensors={fqn: again.tensors[fqn] for fqn in checkpoint.tensors})
        assert differences(ordered, checkpoint) == []


def test_tied_names_written(tmp_path: Path) -> None:
    """Once into safetensors, which has no aliases; as one storage with two names into a torch file."""
    checkpoint = open_checkpoint(FIXTURES / "monolithic/tied/weights.pt")
    assert checkpoint.shared == {"out.weight": "emb.weight"}
    made = plan(checkpoint, 10**9)
    execute(made, tmp_path / "safetensors")
    assert "out.weight" not in oracle(tmp_path / "safetensors")
    assert open_checkpoint(tmp_path / "safetensors").shared == checkpoint.shared
    assert any("out.weight is tied to emb.weight" in note for note in made.notes)
    for size in (1, 10**9):
        execute(plan(checkpoint, size, bin=True), tmp_path / str(size))
        again = open_checkpoint(tmp_path / str(size))
        assert again.shared == checkpoint.shared
        loaded = oracle(tmp_path / str(size))
        assert loaded["out.weight"].data_ptr() == loaded["emb.weight"].data_ptr()
        assert tensor_differences(checkpoint.tensors, loaded) == []


def test_cast_on_the_way_equals_torch(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(HF / "single")
    execute(plan(checkpoint, 2000, DTYPES["bfloat16"]), tmp_path / "out")
    expected = {name: tensor.bfloat16() for name, tensor in oracle(HF / "single").items()}
    assert tensor_differences(open_checkpoint(tmp_path / "out").tensors, expected) == []


def test_tensors_that_torch_stores_with_strides(tmp_path: Path) -> None:
    source = FIXTURES / "monolithic/views/weights.pt"
    execute(plan(open_checkpoint(source), 10**9), tmp_path / "out")
    assert tensor_differences(open_checkpoint(tmp_path / "out").tensors, torch.load(source)) == []


# --- shard sizes --------------------------------------------------------------------------------------


@pytest.fixture
def sized(tmp_path: Path) -> Checkpoint:
    """Tensors of 100, 100, 300, 40, 60 and 8 bytes, in this order."""
    sizes = {"a": 100, "b": 100, "c": 300, "d": 40, "e": 60, "f": 8}
    save_file(
        {name: torch.full((n,), i, dtype=torch.uint8) for i, (name, n) in enumerate(sizes.items())},
        tmp_path / "sized.safetensors",
    )
    read = open_checkpoint(tmp_path / "sized.safetensors")
    return replace(read, tensors={name: read.tensors[name] for name in sizes})


def packed(made: Plan) -> list[str]:
    """The names in each shard, joined."""
    index = next((f for f in made.files if f.path == INDEX), None)
    if index is None:
        return [made.files[0].path]
    (segment,) = index.segments
    assert isinstance(segment, Literal)
    by_file: dict[str, str] = {}
    for name, file in sorted(json.loads(segment.data)["weight_map"].items()):
        by_file[file] = by_file.get(file, "") + name
    return [by_file[file.path] for file in made.files if file is not index]


@pytest.mark.parametrize(
    ("max_shard_size", "expected"),
    [
        (608, ["model.safetensors"]),
        (607, ["abcde", "f"]),
        (200, ["ab", "c", "def"]),
        (199, ["a", "b", "c", "def"]),
        (108, ["a", "b", "c", "def"]),
        (107, ["a", "b", "c", "de", "f"]),
        (1, ["a", "b", "c", "d", "e", "f"]),
    ],
)
def test_shards_are_as_large_as_allowed(sized: Checkpoint, max_shard_size: int, expected: list[str]) -> None:
    made = plan(sized, max_shard_size)
    assert packed(made) == expected
    if len(expected) > 1:
        n = len(expected)
        assert [f.path for f in made.files] == [
            *(f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)),
            INDEX,
        ]


@pytest.mark.parametrize("max_shard_size", [300, 399, 400, 508, 607])  # none below the largest tensor
def test_shards_hold_the_same_as_huggingface_hubs(sized: Checkpoint, max_shard_size: int) -> None:
    hub = pytest.importorskip("huggingface_hub")
    state = {name: torch.zeros(ref.numel, dtype=torch.uint8) for name, ref in sized.tensors.items()}
    split = hub.split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    theirs = ["".join(sorted(names)) for names in split.filename_to_tensors.values()]
    ours = packed(plan(sized, max_shard_size))
    assert sorted(theirs) == sorted(ours)


def test_index_names_the_total_size(sized: Checkpoint, tmp_path: Path) -> None:
    execute(plan(sized, 200), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 608}
    assert locate(tmp_path / "out" / INDEX).target == tmp_path / "out"
    assert sum(len(load_file(p)) for p in (tmp_path / "out").glob("*.safetensors")) == 6


def test_free_text_that_happens_to_name_a_tensor_is_no_tied_weight(tmp_path: Path) -> None:
    said = {"format": "pt", "base": "emb.weight", "lm_head.weight": "emb.weight"}
    save_file({"emb.weight": torch.arange(6.0)}, tmp_path / "model.safetensors", metadata=said)
    found = open_checkpoint(tmp_path / "model.safetensors")
    assert found.shared == {"lm_head.weight": "emb.weight"}
    assert any(note.endswith("the text of its header under base") for note in plan(found, 200).notes)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]
)
def test_a_single_file_comes_before_its_own_index_alone(name: str, sharded: Path) -> None:
    """As transformers does: Mistral's second copy, an adapter, an older file is not the model."""
    before = open_checkpoint(sharded)
    if name.endswith(".bin"):
        torch.save({"only.this": torch.zeros(1)}, sharded / name)
    else:
        save_file({"only.this": torch.zeros(1)}, sharded / name, {"format": "pt"})
    found = open_checkpoint(sharded)
    assert found.tensors.keys() == before.tensors.keys()
    assert any("is the model" in note and note.endswith(name) for note in found.notes)
    save_file({"only.this": torch.zeros(1)}, sharded / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(sharded).tensors.keys() == {"only.this"}


def test_consolidated_weights_alone_are_read(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "consolidated.safetensors", {"format": "pt"})
    assert open_checkpoint(tmp_path).tensors.keys() == {"w"}


def test_adapters_beside_the_default_one_are_looked_at(tmp_path: Path) -> None:
    """PEFT's save_pretrained keeps every other adapter in a folder of its own below the first."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(FIXTURES / "hf/peft", folder)
    shutil.copytree(FIXTURES / "hf/peft", folder / "second")
    good = verify(folder, workers=1)
    assert good.ok and any("another adapter" in f.message for f in good.findings)
    weights = folder / "second/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    bad = verify(folder, workers=1)
    assert not bad.ok
    assert any("second" in f.file for f in bad.findings if f.severity == ERROR)
    weights.unlink()
    assert not verify(folder, workers=1).ok
