"""Universal checkpoints that we write: they read as what they were made from, and DeepSpeed loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import run
from msgspec.structs import replace
from support import FIXTURES, differences, torch_folder, tree_differences

from ckpttools.checks import verify
from ckpttools.errors import CkptError, Unsupported
from ckpttools.execute import execute
from ckpttools.formats import open_checkpoint, universal
from ckpttools.operations.convert import convert
from ckpttools.tensors import FLOAT32, TensorRef, Zeros

SAMPLES = FIXTURES / "deepspeed-0.19.8"
ALIKE = ("format", "zero_stage", "dp_degree", "tag", "round_robin", "aligned", "variant", "writer", "ranked")
SOURCES = ("z2_groups", "z2_rr_frozen_tied_groups", "z2_buffers", "z2_sgd", "z1_fp16", "z2_lion", "z3_groups")


@pytest.mark.parametrize("name", SOURCES)
def test_it_reads_as_its_source(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(SAMPLES / f"{name}_ws2")
    execute(universal.plan(replace(source, template=None)), tmp_path / "u", source=source.path)
    made = open_checkpoint(tmp_path / "u")
    assert differences(source, made, but=ALIKE) == []
    assert list(source.client) == list(made.client)
    assert [f for f in verify(tmp_path / "u").findings if f.severity == "error"] == []
    execute(universal.plan(replace(made, template=None)), tmp_path / "again", source=made.path)
    assert differences(made, open_checkpoint(tmp_path / "again"), but=("tag",)) == []


def test_back_to_zero_it_is_what_it_was(tmp_path: Path) -> None:
    source = SAMPLES / "z2_groups_ws2"
    there = convert(source, tmp_path / "u", to="universal").destination
    back = convert(there, tmp_path / "z", to="zero1").destination
    again = convert(source, tmp_path / "direct", to="zero1").destination
    ours, theirs = (torch_folder(path / "global_step3") for path in (back, again))
    assert list(tree_differences(ours, theirs)) == []


@pytest.mark.parametrize("name", ["../x", "a//b", ".", "x" * 256, "optimizer_state.pt", "a\0b"])
def test_names_that_are_no_folder(name: str) -> None:
    source = open_checkpoint(SAMPLES / "z2_bf16_ws2")
    (group,) = source.groups
    old = next(iter(group.params))

    def new(values: Any) -> Any:
        return {name if key == old else key: value for key, value in values.items()}

    state = {kind: new(refs) for kind, refs in group.state.items()}
    scalars = {kind: new(values) for kind, values in group.scalars.items()}
    group = replace(group, params=new(group.params), state=state, scalars=scalars)
    with pytest.raises(Unsupported) as caught:
        universal.plan(replace(source, tensors=new(source.tensors), groups=(group,)))
    assert caught.value.id == "name-unsafe"


def test_state_that_has_no_place(tmp_path: Path) -> None:
    source = open_checkpoint(SAMPLES / "z2_bf16_ws2")
    (group,) = source.groups
    row = dict.fromkeys(group.params, TensorRef(FLOAT32, (3,), (Zeros(12),)))
    for made in (replace(group, state={**group.state, "row": row}), replace(group, scalars={"row": row})):
        with pytest.raises(CkptError) as caught:
            universal.plan(replace(source, groups=(made,)))
        assert caught.value.id == "state-not-flat"


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    done = run("convert", SAMPLES / "z2_bf16_ws2", tmp_path / "u", "--to", "universal", "--world-size", "3")
    assert done.code == 2 and "any number of ranks" in done.err


def test_a_rebase_says_which_way_there_is(tmp_path: Path) -> None:
    done = run("rebase-schedule", FIXTURES / "universal/z2_groups", tmp_path / "u", "--new-bs", "60")
    assert done.code == 2 and "--to zero2" in done.err and not (tmp_path / "u").exists()


def test_a_resume_is_not_foretold_by_another_loaders_rules() -> None:
    done = run("resume-check", FIXTURES / "universal/z2_groups")
    assert done.code == 2 and "load_universal" in done.err and "--to zero2" in done.err
