"""`ckpt digest`: the same for every layout of the same content, another one for every changed byte."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from commands import run
from msgspec.structs import replace
from safetensors.torch import load_file
from support import FIXTURES, RANK_LOCAL, ZERO_FIXTURES, as_torch, bits, name_of, resharded, variant_of

import ckpttools
from ckpttools.checkpoint import Checkpoint, Layout, ParamGroup
from ckpttools.compare.content import content
from ckpttools.compare.digests import Digests, digests
from ckpttools.errors import CkptError
from ckpttools.formats import locate, read
from ckpttools.operations.digest import compare, digest
from ckpttools.tensors import FLOAT32, ByteRange, Cast, Strided, TensorRef, Zeros, spans
from ckpttools.tree import Value

TIED = FIXTURES / "deepspeed-0.19.8/z2_tied_ws2"
GROUPS = FIXTURES / "deepspeed-0.19.8/z2_groups_ws2"
FSDP = FIXTURES / "dcp/fsdp2_ws2"
RESHARDED = [
    path for path in ZERO_FIXTURES if "elastic" not in path.name and variant_of(path) not in RANK_LOCAL
]


def of(path: Path) -> Digests:
    return digests(read(locate(path)))


@pytest.mark.parametrize("path", RESHARDED, ids=name_of)
def test_any_number_of_ranks_has_the_same_digest(path: Path, tmp_path: Path) -> None:
    before = of(path)
    assert not before.apart
    for ranks in (1, 3, 4):
        after = of(resharded(path, ranks, tmp_path / str(ranks)))
        assert (after.state, after.kinds, after.tensors) == (before.state, before.kinds, before.tensors)
        assert (after.settings, after.counters) == (before.settings, before.counters)


@pytest.mark.parametrize("path", [GROUPS, TIED, FSDP, FIXTURES / "dcp/tp_ws4"], ids=name_of)
def test_each_digest_is_that_of_torchs_bytes(path: Path) -> None:
    checkpoint = read(locate(path))
    found = digests(checkpoint)
    for kind, held in content(checkpoint).held.items():
        for name, ref in held.items():
            assert isinstance(ref, TensorRef)
            tensor = as_torch(ref)
            if kind == "step":
                assert found.tensors[kind][name] == str(int(tensor.item()))
                continue
            head = f"{ref.dtype.name} {','.join(map(str, tensor.shape))}\n"
            assert found.tensors[kind][name] == xxhash.xxh3_128(head.encode() + bits(tensor)).hexdigest()


def test_other_layouts_of_the_same_run_agree() -> None:
    """FSDP2 through torch's application API and through accelerate."""
    one, two, three = (of(FIXTURES / "dcp" / name) for name in ("fsdp2_ws2", "app_ws2", "accelerate_ws2"))
    assert one.state == two.state == three.state and one.settings == two.settings
    assert list(one.kinds) == ["weight", "exp_avg", "exp_avg_sq", "step"]


@pytest.mark.parametrize(
    "name", ["z2_bf16_ws2", "z2_fp16_ws2", "z2_fp32_ws2", "z2_tied_ws2", "z2_frozen_ws2"]
)
def test_one_fp32_copy_is_the_master(name: str, tmp_path: Path) -> None:
    """A distributed checkpoint of a ZeRO folder keeps one copy of each weight: its whole is the same."""
    from ckpttools.execute import execute
    from ckpttools.formats import dcp

    path = FIXTURES / "deepspeed-0.19.8" / name
    checkpoint = read(locate(path))
    # DeepSpeed's number of the flat parameter is no setting
    hypers = [{key: value for key, value in g.hyper.items() if key != "params"} for g in checkpoint.groups]
    groups = tuple(replace(g, hyper=hyper) for g, hyper in zip(checkpoint.groups, hypers, strict=True))
    execute(dcp.plan(replace(checkpoint, groups=groups)), tmp_path / "dcp", source=path)
    zero, single = digest(path), digest(tmp_path / "dcp")
    assert zero.digests.state == single.digests.state
    assert "master" in zero.digests.kinds and "master" not in single.digests.kinds
    for both in (compare(zero, single), compare(single, zero)):
        assert both.same and both.equal["master"] > 0 and not both.one_sided


def _changed_bytes(checkpoint: Checkpoint, count: int) -> Iterator[tuple[Path, int]]:
    """Places of bytes, each within one of the tensors, of every kind."""
    chance = random.Random(1)
    for kind, held in content(checkpoint).held.items():
        refs = [ref for ref in held.values() if isinstance(ref, TensorRef) and ref.numel]
        for ref in chance.sample(refs, min(count, len(refs))):
            span = chance.choice([span for chunk in ref.chunks for span in spans(chunk)])  # type: ignore[arg-type]
            assert span.nbytes, kind
            yield span.path, chance.randrange(span.start, span.end)


@pytest.mark.parametrize("path", [GROUPS, TIED, FSDP, FIXTURES / "dcp/tp_ws4"], ids=name_of)
@pytest.mark.parametrize("count", [4, pytest.param(1000, marks=pytest.mark.heavy)])
def test_every_changed_byte_changes_the_whole(path: Path, count: int, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    checkpoint = replace(read(locate(copy)), checks=())
    before = digests(checkpoint)
    for file, at in _changed_bytes(checkpoint, count):
        with file.open("r+b") as edited:
            edited.seek(at)
            was = edited.read(1)[0]
            edited.seek(at)
            edited.write(bytes([was ^ 0x40]))
            edited.flush()
            after = digests(checkpoint)
            assert after.state != before.state and after.kinds != before.kinds
            edited.seek(at)
            edited.write(bytes([was]))
    assert digests(checkpoint) == before


def test_checksums_are_verified_on_the_way(tmp_path: Path) -> None:
    for path in (GROUPS, FSDP):
        copy = tmp_path / path.name
        shutil.copytree(path, copy)
        checkpoint = read(locate(copy))
        assert digests(checkpoint).checked > 0
        file, at = next(_changed_bytes(checkpoint, 1))
        with file.open("r+b") as edited:
            edited.seek(at)
            was = edited.read(1)[0]
            edited.seek(at)
            edited.write(bytes([was ^ 1]))
        with pytest.raises(CkptError, match="CRC-32"):
            digests(checkpoint)
        ran = run("digest", copy)
        assert ran.code == 1 and "error[checksum]" in ran.err and not ran.out


def _made(step: Value, weight: TensorRef) -> Checkpoint:
    params = {"w": weight.shape}
    group = ParamGroup(params=params, state={}, scalars={"step": {"w": step}}, hyper={"lr": 0.5})
    return Checkpoint(path=Path("x"), layout=Layout(format="x"), tensors={"w": weight}, groups=(group,))


def test_numbers_are_the_same_however_they_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "raw"
    file.write_bytes(torch.tensor([3.0, 4.0, -0.0, 0.0]).numpy().tobytes())
    weight = TensorRef(FLOAT32, (2,), (Zeros(8),))

    def stepped(step: Value) -> str:
        return digests(_made(step, weight)).state

    def tensor(i: int, *shape: int) -> TensorRef:
        return TensorRef(FLOAT32, shape, (ByteRange(file, 4 * i, 4),))

    assert stepped(3) == stepped(3.0) == stepped(tensor(0)) == stepped(tensor(0, 1))
    assert len({stepped(3), stepped(4), stepped(tensor(2)), stepped(tensor(3)), stepped(2.5)}) == 5
    assert stepped(4) == stepped(tensor(1)) and stepped(0) == stepped(tensor(3))


def test_chunks_of_every_kind(tmp_path: Path) -> None:
    """Views, zeros and casts are read as what they stand for, also where they take many blocks."""
    matrix = torch.randn(700, 1100)
    file = tmp_path / "raw"
    file.write_bytes(matrix.numpy().tobytes())
    shape = (1100, 700)
    view = Strided(path=file, start=0, itemsize=4, shape=shape, strides=(1, 1100), first=0, numel=770_000)
    whole = TensorRef(FLOAT32, (700, 1100), (ByteRange(file, 0, 4 * 770_000),))
    bfloat16 = whole.cast(ckpttools.tensors.DTYPES["bfloat16"])
    assert any(isinstance(chunk, Cast) for chunk in bfloat16.chunks)
    for ref, expected in (
        (TensorRef(FLOAT32, shape, (view,)), matrix.t().contiguous()),
        (bfloat16, matrix.bfloat16()),
        (TensorRef(FLOAT32, (3, 2), (Zeros(24),)), torch.zeros(3, 2)),
    ):
        found = digests(_made(1, ref)).tensors["weight"]["w"]
        head = f"{ref.dtype.name} {','.join(map(str, ref.shape))}\n".encode()
        assert found == xxhash.xxh3_128(head + bits(expected)).hexdigest()


def test_a_kind_that_one_side_lacks_is_named_and_not_equal(tmp_path: Path) -> None:
    made = ckpttools.extract(TIED, tmp_path / "hf").destination
    single = ckpttools.extract(TIED, tmp_path / "half.pt", copy="model").destination
    assert len(load_file(made / "model.safetensors")) == 11  # the tied name is left out
    ran = run("digest", TIED, "--compare", made)
    assert ran.code == 1 and "NOT COMPARED: exp_avg," in ran.out and "DIFFERENT" not in ran.out
    ran = run("digest", TIED, "--compare", made, "--kind", "weight", "--kind", "master")
    assert ran.code == 0
    assert ran.out.splitlines()[-1].endswith("not asked for: exp_avg, exp_avg_sq, step")
    ran = run("digest", made, "--compare", made)
    assert ran.out.splitlines()[-1] == "the same weights; neither holds any optimizer state"
    document = json.loads(run("digest", TIED, "--compare", single, "--json").out)
    assert document["one_sided"].keys() == {"master", "exp_avg", "exp_avg_sq", "step"} and not document["ok"]
    assert document["equal"] == {"weight": 12} and document["different"] == []
    ran = run("digest", TIED, "--compare", single, "--kind", "nothing")
    assert ran.code == 2 and "exp_avg_sq" in ran.err


def test_the_first_differences_are_named(tmp_path: Path) -> None:
    ran = run("digest", GROUPS, "--compare", TIED)
    assert ran.code == 1 and "DIFFERENT: weight down.bias" in ran.out
    assert "more that differ" in ran.out and ran.out.splitlines()[-1] == "different"
    assert run("digest", GROUPS, "--compare", GROUPS).code == 0
    document = json.loads(run("digest", GROUPS, "--json").out)
    assert run("digest", GROUPS, "-q").out.strip() == document["state"] and len(document["state"]) == 32
    listed = run("digest", GROUPS, "--tensors").out
    assert all(digest in listed for named in document["tensors"].values() for digest in named.values())


def test_weights_of_another_save_are_content_of_their_own(tmp_path: Path) -> None:
    """A 16-bit weight that is not its rounded master is missing in a layout that keeps the master alone."""
    made = ckpttools.extract(TIED, tmp_path / "hf").destination
    copy = tmp_path / "copy"
    shutil.copytree(TIED, copy)
    checkpoint = replace(read(locate(copy)), checks=())
    ref = checkpoint.tensors["ln.weight"]
    (chunk,) = ref.chunks
    assert isinstance(chunk, ByteRange)
    with chunk.path.open("r+b") as edited:
        edited.seek(chunk.start)
        edited.write(b"\x12\x34")
    assert digests(checkpoint).apart == ("ln.weight",)
    before, single = digest(TIED), digest(made)
    for other in (replace(before, digests=digests(checkpoint)),):
        both = compare(other, single, ["weight", "master"])
        assert [d.name for d in both.different] == ["ln.weight"] and both.equal["master"] >= 11


def test_reshard_holds_the_result_against_the_source(tmp_path: Path) -> None:
    ran = run("reshard", GROUPS, tmp_path / "three", "--world-size", "3", "--digest")
    assert ran.code == 0 and f"digest {of(GROUPS).state}" in ran.err


@pytest.mark.parametrize("where", ["average", "optimizer_state_dict", "_extra_state"])
@pytest.mark.parametrize("other", ["another", "gone", "same"])
def test_what_is_in_no_digest_is_named_and_compared(where: str, other: str, tmp_path: Path) -> None:
    """An average of the weights, a tensor that the optimizer's dict has beside the state, a plain value in
    the model's: text, JSON and exit code say the same of it. Random states do not count.
    """
    for name, factor in (("a.pt", 1.0), ("b.pt", 1.0 if other == "same" else 2.0)):
        torch.manual_seed(int(factor))
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
        tree = {
            "model": {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
            "optimizer_state_dict": optimizer,
        }
        tree |= {"global_step": 1, "rng_state": {"torch": torch.get_rng_state()}}
        if other != "gone" or name == "a.pt":
            beside = {"extra": factor if where == "_extra_state" else factor * torch.ones(2, 2)}
            place = tree["model"] if where == "_extra_state" else tree
            place[where] = {**place.get(where, {}), **beside}  # type: ignore[attr-defined,index]
        torch.save(tree, tmp_path / name)
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    assert f"note: not in the digests: {where}" in run("digest", a).out
    ran = run("digest", a, "--compare", b)
    document = json.loads(run("digest", a, "--compare", b, "--json").out)
    assert document["left"]["not_in_digests"] == [where] and document["not_compared"] == []
    names = [f"{each['kind']} {each['name']}" for each in document["different"]]
    if other == "same":
        assert ran.code == 0 and document["ok"] and not names
        assert f"equal: what lies beside, in no digest: {where}" in ran.out
    else:
        assert ran.code == 1 and not document["ok"] and names == [f"client state {where}.extra"]
        only = ", only in the first" if other == "gone" else ""
        assert f"DIFFERENT: client state {where}.extra{only}\n" in ran.out and ran.out.endswith("different\n")
    assert run("prove", a, b).code == (other != "same")
    ran = run("digest", a, "--compare", b, "--kind", "weight")
    assert ran.code == 0 and f"not asked for: {where}" in ran.out


def test_an_empty_dict_that_a_format_cannot_hold_is_no_difference(tmp_path: Path) -> None:
    source = FIXTURES / "lightning/file"
    ckpttools.convert(source, tmp_path / "dcp", to="dcp")
    assert run("digest", source, "--compare", tmp_path / "dcp").code == 0


def test_what_the_models_state_holds_beside_tensors_is_compared(tmp_path: Path) -> None:
    """TransformerEngine keeps the scales of its float8 there."""
    for name, scale in (("a.pt", 1.0), ("b.pt", 2.0)):
        model = {"w.weight": torch.ones(2, 2), "w._extra_state": {"scale": scale}}
        torch.save({"model_state_dict": model}, tmp_path / name)
    ran = run("digest", tmp_path / "a.pt", "--compare", tmp_path / "b.pt")
    assert ran.code == 1 and "DIFFERENT: client state w._extra_state.scale" in ran.out
    ran = run("prove", tmp_path / "a.pt", tmp_path / "b.pt")
    assert ran.code == 1 and "w._extra_state.scale  1  2" in ran.out
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt").code == 1


@pytest.mark.parametrize("kind", ["alike groups", "sgd", "two", "lbfgs"])
def test_an_optimizer_without_names_is_never_called_equal(kind: str, tmp_path: Path) -> None:
    """Its state is in no digest: that is said, and `prove` compares it."""
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path, factor in zip(paths, (1, 2), strict=True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        halves = [{"params": list(part.parameters())} for part in model]
        made: dict[str, torch.optim.Optimizer] = {"optimizer": torch.optim.SGD(halves, lr=0.1 * factor)}
        if kind == "lbfgs":
            made = {"optimizer": torch.optim.LBFGS(model.parameters(), lr=0.1 * factor)}
        elif kind != "sgd":
            names = ["optimizer"] if kind == "alike groups" else ["optimizer_g", "optimizer_d"]
            made = {name: torch.optim.AdamW(halves, lr=0.1) for name in names}
        saved = copy.deepcopy(model.state_dict())
        model(torch.ones(1, 2)).sum().backward()
        for name, optimizer in made.items():
            optimizer.step(lambda: torch.tensor(0.0))
            state = optimizer.state_dict()
            for held in state["state"].values():
                if "exp_avg" in held:
                    held["exp_avg"] *= factor
            made[name] = state  # type: ignore[assignment]
        torch.save({"model": saved, **made}, path)
    key = "optimizer" if kind != "two" else "optimizer_g"
    ran = run("digest", paths[0], "--compare", paths[1])
    assert ran.code == 1 and f"NOT COMPARED: the optimizer under {key}" in ran.out, ran
    assert "hyper-parameters: not compared" in ran.out and "neither holds" not in ran.out.splitlines()[-1]
    document = json.loads(run("digest", paths[0], "--compare", paths[1], "--json").out)
    assert not document["ok"] and document["settings_equal"] is None and document["not_compared"]
    ran = run("digest", paths[0], "--compare", paths[1], "--kind", "weight")
    assert ran.code == 0 and f"not asked for: the optimizer under {key}" in ran.out, ran
    assert f"not in the digests: the optimizer under {key}" in run("digest", paths[0]).out
    assert run("prove", paths[0], paths[0]).out.startswith("the same training state")
    ran = run("prove", *paths)
    assert ran.code == 1 and f"{key}." in ran.out and "found in neither" not in ran.out, ran
    assert "found in neither" not in run("diff", *paths).out


def test_the_optimizer_beside_a_trainers_model_is_not_compared() -> None:
    folder = FIXTURES / "hf-trainer/plain/checkpoint-2"
    ran = run("digest", folder, "--compare", folder)
    assert ran.code == 1 and "NOT COMPARED: optimizer.pt (its parameters have no names)" in ran.out, ran
    assert run("digest", folder, "--compare", folder, "--kind", "weight").code == 0
