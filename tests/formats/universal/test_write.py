"""Universal checkpoints that we write: they read as what they were made from, and DeepSpeed loads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES, differences, torch_folder, tree_differences, truth_of
from train_on import TOLERANCE, Job, apart, in_deepspeed, same_tensors, stage

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


# --- DeepSpeed ------------------------------------------------------------------------------------------

# one folder of each source, for stages and ranks that it was not saved with
LOADED = [
    ("z2_bf16", 1, 2),
    ("z2_bf16", 2, 3),
    ("z2_bf16", 3, 3),
    ("z2_groups", 2, 3),
    ("z2_groups", 3, 2),
    ("z3_groups", 1, 3),
    ("z3_groups", 3, 2),
    ("z2_fp32", 3, 3),
    ("z2_sgd", 2, 3),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("universal")
    jobs = []
    for source, number, ranks in LOADED:
        at = folder / source
        made = convert(SAMPLES / f"{source}_ws2", at, to="universal", how=None) if not at.exists() else None
        lines = made.next[1:] if made else jobs[[s for s, *_ in LOADED].index(source)].lines
        jobs.append(Job(folder=at, variant=source, ranks=ranks, config=stage(number), lines=lines))
    return dict(zip(LOADED, in_deepspeed(jobs, folder), strict=True))


@pytest.mark.distributed
@pytest.mark.xdist_group("train-on")
@pytest.mark.parametrize("case", LOADED, ids=lambda case: "-".join(map(str, case)))
def test_deepspeed_trains_on(
    case: tuple[str, int, int], loaded: dict[tuple[str, int, int], dict[str, Any]]
) -> None:
    """By the lines that convert prints: masters, moments, steps, settings, buffers and frozen weights are
    those of the run that saved, and so are the losses of the steps after it.
    """
    truth, result = truth_of(SAMPLES / f"{case[0]}_ws2"), loaded[case]
    assert result["ok"], result["error"]
    for key in ("fp32", "state"):
        assert same_tensors(truth[key], result["loaded"][key]) == []
    for name in truth["frozen"]:
        assert torch.equal(truth["module"][name], result["loaded"]["module"][name]), name
    assert {scalars["step"] for scalars in result["loaded"]["scalars"] if scalars} <= {3}
    groups = zip(truth["param_groups"], result["loaded"]["param_groups"], strict=False)
    for theirs, ours in groups if case[1] < 3 else ():
        assert {key: ours[key] for key in theirs} == theirs
    assert apart(result["losses"], truth["losses"]) <= TOLERANCE[truth["dtype"]]
