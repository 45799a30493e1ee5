"""What convert and reshard wrote holds what was to be written, and the manifest says what that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run
from msgspec.structs import replace
from support import FIXTURES

import ckpttools
from ckpttools.compare import digests as compared
from ckpttools.errors import CkptError
from ckpttools.execute import copy
from ckpttools.formats import PLANS
from ckpttools.location import Location
from ckpttools.operations import digest as digesting
from ckpttools.operations import kept, stated
from ckpttools.operations.writing import Writing
from ckpttools.passes.read import Reader, computed
from ckpttools.plan import Plan

SAMPLES = FIXTURES / "deepspeed-0.19.8"
GROUPS = SAMPLES / "z2_groups_ws2"
TARGETS = ("pt", "zero1", "zero3", "universal", "dcp", "hf")


def state_of(path: Path) -> str:
    return ckpttools.digest(path).digests.state


def manifest_of(path: Path) -> Path:
    (found,) = [*path.parent.glob(f"{path.name}.ckpt-manifest.json"), *path.rglob("ckpt-manifest.json")]
    return found


@pytest.mark.parametrize("to", TARGETS)
def test_convert_prints_the_digest_of_what_it_wrote(to: str, tmp_path: Path) -> None:
    made = tmp_path / "made.pt" if to == "pt" else tmp_path / "made"
    ran = run("convert", GROUPS, made, "--to", to)
    assert ran.code == 0 and f"digest {state_of(made)}, of what was to be written" in ran.err
    held = json.loads(manifest_of(made).read_text()).get("digest")
    if to == "universal":  # its tensors lie in folders, and a manifest describes the files beside it
        assert held is None
    else:
        assert held["state"] == state_of(made) and (to == "hf" or held["state"] == state_of(GROUPS))


def test_reshard_prints_the_digest_of_the_source(tmp_path: Path) -> None:
    ran = run("reshard", GROUPS, tmp_path / "made", "--world-size", 3)
    assert ran.code == 0 and f"digest {state_of(GROUPS)}" in ran.err
    ran = run("reshard", GROUPS, tmp_path / "fast", "--world-size", 3, "--no-digest")
    assert ran.code == 0 and "note: digest" not in ran.err
    assert "digest" not in json.loads(manifest_of(tmp_path / "fast").read_text())


@pytest.mark.parametrize("to", TARGETS)
def test_a_writer_that_loses_a_value_is_caught(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of two weights exchanged: every checksum is right, and the destination does not appear."""
    plan = PLANS[to]

    def exchanged(checkpoint, layout):  # type: ignore[no-untyped-def]
        a, b = "ln_f.weight", "ln_f.bias"
        masters = [group.state.get("fp32", {}) for group in checkpoint.groups]
        groups = tuple(
            replace(group, state={**group.state, "fp32": {n: held[{a: b, b: a}.get(n, n)] for n in held}})
            if held
            else group
            for group, held in zip(checkpoint.groups, masters, strict=True)
        )
        swapped = {**checkpoint.tensors, a: checkpoint.tensors[b], b: checkpoint.tensors[a]}
        return plan(replace(checkpoint, tensors=swapped, groups=groups, template=None), layout)

    monkeypatch.setitem(PLANS, to, exchanged)
    made = tmp_path / "made.pt" if to == "pt" else tmp_path / "made"
    ran = run("convert", GROUPS, made, "--to", to)
    assert ran.code == 1 and "error[written-wrong]" in ran.err and not list(tmp_path.iterdir()), ran


@pytest.mark.parametrize("to", ["pt", "hf"])
def test_a_byte_of_an_unchecked_source_that_is_read_wrong_is_caught(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors state no checksums: what was read wrong was written so, and read back so."""
    changed: list[int] = []

    class Wrong(Reader):
        def read(self, view: memoryview, path: Location, start: int) -> None:
            super().read(view, path, start)
            if len(view) > 64 and not changed:
                changed.append(len(view))
                view[9] ^= 4

    monkeypatch.setattr(copy, "Reader", Wrong)
    made = tmp_path / "made.pt" if to == "pt" else tmp_path / "made"
    ran = run("convert", FIXTURES / "hf/single", made, "--to", to, "--reset-optimizer")
    assert changed and ran.code == 1 and "error[written-wrong]" in ran.err, ran
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_cast_wrong_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cast is right where it was read, whatever became of it."""
    monkeypatch.setattr(copy, "computed", lambda segment, source: computed(segment, source).view("u1") ^ 1)
    ran = run("convert", GROUPS, tmp_path / "made.pt", "--to", "pt", "--dtype", "fp16")
    assert ran.code == 1 and "error[written-wrong]" in ran.err, ran
    assert not list(tmp_path.iterdir())


def test_sixteen_bit_weights_of_their_own_are_named(tmp_path: Path) -> None:
    """A `.pt` keeps the masters alone: a 16-bit copy that is not rounded from them is lost."""
    checkpoint = ckpttools.open(GROUPS).checkpoint
    source = ckpttools.open(GROUPS).source
    tensors = {**checkpoint.tensors, "ln_f.weight": checkpoint.tensors["ln_f.bias"]}
    apart = replace(checkpoint, tensors=tensors)
    made = ckpttools.convert(GROUPS, tmp_path / "made.pt", to="pt", digest=False).destination
    told, _ = kept.check(source, apart, Plan(files=()), Writing())(made, b"{}", made)
    assert "left out: 1 16-bit weights that are not their rounded masters" in told


def test_digest_takes_what_a_manifest_says_while_the_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ckpttools.reshard(GROUPS, tmp_path / "made", world_size=3).destination
    before = ckpttools.digest(made)
    with monkeypatch.context() as patch:
        patch.setattr(digesting, "digests", lambda *args, **options: pytest.fail("read tensor by tensor"))
        again = ckpttools.digest(made)
        assert run("prove", made, made).code == 0 and run("digest", made, "--compare", made).code == 0
    whole = compared.digests(again.checkpoint)
    # all checksums of the files, not only those of the tensors' bytes
    assert again.digests == before.digests == replace(whole, checked=again.digests.checked)
    # a manifest that lies, of a file that changed, or of contents: nothing is taken from it
    place = manifest_of(made)
    text = place.read_text()
    for old, new in ((f'"state": "{before.digests.state}"', f'"state": "{"0" * 32}"'), ('"emb.', '"lmb.')):
        assert old in text
        place.write_text(text.replace(old, new))
        assert replace(ckpttools.digest(made).digests, checked=0) == replace(before.digests, checked=0)
    place.write_text(text)
    optim = next(place.parent.glob("*_rank_1_*optim_states.pt"))
    raw = bytearray(optim.read_bytes())
    raw[len(raw) // 2] ^= 1
    optim.write_bytes(raw)
    with pytest.raises(CkptError):
        ckpttools.digest(made)


def test_a_manifest_without_a_digest_is_read_as_before(tmp_path: Path) -> None:
    made = ckpttools.reshard(GROUPS, tmp_path / "made", world_size=3, digest=False).destination
    source = ckpttools.open(made)
    assert stated.stated(source.source, source.checkpoint) is None
    assert state_of(made) == state_of(GROUPS) and run("verify", made).code == 0
