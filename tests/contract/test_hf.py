"""Model folders hold what a Checkpoint says: read(write(c)) == c, also where c was changed on the way.

Whatever the format has no place for is named. What no other test of a format holds is its writing from a
Checkpoint alone: `template` is stripped as well as kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from support import FIXTURES, as_torch, differences, identical

from ckpttools.checkpoint import Checkpoint, Layout, ParamGroup
from ckpttools.errors import UsageError
from ckpttools.execute import execute
from ckpttools.formats import hf, open_checkpoint
from ckpttools.plan import Plan
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TensorRef
from ckpttools.training import Training
from ckpttools.transforms.cast import cast
from ckpttools.transforms.rename import rename
from ckpttools.transforms.select import select, weights_only

SOURCES = [
    "hf/single",
    "hf/sharded",
    "hf/bin",
    "hf/gpt2_tied",
    "hf/peft",
    "monolithic/tied/weights.pt",
    "trainer/z2_bf16_2",
    "trainer/z1_frozen_tied_2",
    "dcp/fsdp2_ws2",
]
Change = Callable[[Checkpoint], Checkpoint]
SAFETENSORS, BIN = Layout(format="hf"), Layout(format="hf", variant=hf.BIN)


def held(checkpoint: Checkpoint, *, counters: bool) -> Checkpoint:
    """What of a Checkpoint the format has a place for."""
    state = checkpoint.training
    kept = Training(step=state.step, epoch=state.epoch, train_loss=state.train_loss, val_loss=state.val_loss)
    return replace(
        weights_only(checkpoint),
        layout=Layout(format="hf", dtype=weights_only(checkpoint).layout.dtype, stem=checkpoint.layout.stem),
        training=kept if counters else Training(),
        frozen=frozenset(),
        buffers=frozenset(),
    )


def written(checkpoint: Checkpoint, out: Path, layout: Layout = SAFETENSORS, size: int = 2000) -> Checkpoint:
    execute(hf.plan(checkpoint, replace(layout, max_shard_size=size)), out)
    return open_checkpoint(out)


def unlike(made: Checkpoint, expected: Checkpoint) -> list[str]:
    """The order of names is that of the files."""
    names = sorted(made.tensors)
    assert names == sorted(expected.tensors)
    sort = [replace(c, tensors={name: c.tensors[name] for name in names}) for c in (made, expected)]
    return differences(*sort)


def renamed(checkpoint: Checkpoint) -> Checkpoint:
    return rename(checkpoint, lambda name: f"model.{name}")


def in_halves(checkpoint: Checkpoint) -> Checkpoint:
    return cast(checkpoint, FLOAT16)


def dropped(checkpoint: Checkpoint) -> Checkpoint:
    return select(checkpoint, exclude=[max(checkpoint.tensors)])


def tied(checkpoint: Checkpoint) -> Checkpoint:
    owner = min(name for name in checkpoint.tensors if name not in checkpoint.shared)
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, "another.name": checkpoint.tensors[owner]},
        shared={**checkpoint.shared, "another.name": owner},
    )


def counted(checkpoint: Checkpoint) -> Checkpoint:
    state = Training(step=12_345, epoch=2.25, train_loss=math.nan, val_loss=1e-7)
    return replace(checkpoint, training=state)


def as_it_is(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


CHANGES = [as_it_is, renamed, in_halves, dropped, tied, counted]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_is_read(source: str, change: Change, tmp_path: Path) -> None:
    found = weights_only(open_checkpoint(FIXTURES / source))
    changed = change(found)
    kept = written(changed, tmp_path / "kept")
    assert unlike(kept, held(changed, counters=True)) == []
    stripped = written(replace(changed, template=None), tmp_path / "stripped")
    for file in sorted((tmp_path / "kept").iterdir()):
        assert (tmp_path / "stripped" / file.name).read_bytes() == file.read_bytes()
    if change is not as_it_is and (change is not in_halves or found.layout.dtype != "fp16"):
        assert change is tied or unlike_anything(kept, found)
    as_bin = written(replace(changed, template=None), tmp_path / "bin", BIN)
    assert unlike(as_bin, held(changed, counters=False)) == []
    assert unlike(change(written(found, tmp_path / "before")), stripped) == []


def unlike_anything(made: Checkpoint, before: Checkpoint) -> bool:
    """Whether the change was one."""
    return set(made.tensors) != set(before.tensors) or bool(unlike(made, held(before, counters=True)))


def test_changes_of_a_whole_training_state_reach_the_files(tmp_path: Path) -> None:
    """Without `weights_only`: the fp32 masters are what is written, under their new names."""
    found = open_checkpoint(FIXTURES / "trainer/z1_frozen_tied_2")
    changed = renamed(found)
    assert {n for g in changed.groups for n in g.params} <= set(changed.tensors)
    made = written(changed, tmp_path / "out")
    assert sorted(made.tensors) == sorted(changed.tensors)
    for name, ref in found.best_copies().items():
        assert identical(as_torch(made.tensors[f"model.{name}"]), as_torch(ref))
    assert made.shared == changed.shared != {}


# --- what has no place --------------------------------------------------------------------------------


def test_everything_that_is_dropped_is_named() -> None:
    ref = open_checkpoint(FIXTURES / "hf/single").tensors["model.norm.weight"]
    group = ParamGroup(params={"w": ref.shape}, state={"exp_avg": {"w": ref}}, hyper={"lr": 1.0})
    checkpoint = Checkpoint(
        path=Path("x"),
        layout=Layout(format="pt"),
        tensors={"w": ref, "b": ref},
        groups=(group,),
        training=Training(step=3, iteration=4, samples=5, scheduler={"last": 1}, saved_batch={"micro": 2}),
        frozen=frozenset({"b"}),
        buffers=frozenset({"b"}),
        optimizer="AdamW",
        loss_scaler={"scale": 2.0},
        client={"seed": 1, "note": "x"},
        settings={"zero": 1},
        left_out={"gone": (2,)},
        extra_state={"fp8._extra_state": b""},
    )
    gone, note = hf.plan(checkpoint).notes
    assert "1 weights of the model are not in the source (gone)" in gone
    for what in (
        "AdamW",
        "loss scaler",
        "scheduler",
        "iteration",
        "samples",
        "batch",
        "frozen (1)",
        "settings",
        "beside plain tensors (",
    ):
        assert what in note
    assert "buffers" in note and "seed, note" in note and "step" not in note
    _, note = hf.plan(checkpoint, BIN).notes
    assert ", step, " in note  # a torch file of weights has no place for counters
    assert hf.plan(replace(checkpoint, **_nothing()), BIN).notes == ()


def _nothing() -> dict[str, object]:
    rest: dict[str, object] = {"settings": {}, "left_out": {}, "extra_state": {}}
    empty: dict[str, object] = {"groups": (), "training": Training(), "optimizer": None}
    return empty | {"frozen": frozenset(), "buffers": frozenset(), "loss_scaler": {}, "client": {}, **rest}


@pytest.mark.parametrize(
    "metadata",
    [{"step": "many"}, {"step": "1.5"}, {"step": "9" * 4000}, {"epoch": "x" * 99}, {"w2": "no such tensor"}],
)
def test_a_header_that_says_nonsense_says_nothing(metadata: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", metadata)
    found = open_checkpoint(tmp_path)
    assert found.training.step is None and set(found.tensors) == {"w"} and found.shared == {}


def test_a_tied_pair_that_safetensors_itself_saved(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == set(model.state_dict()) and len(found.shared) == 1
    for name, value in model.state_dict().items():
        assert identical(as_torch(found.tensors[name]), value)


# --- the changes themselves ---------------------------------------------------------------------------


def zero() -> Checkpoint:
    return open_checkpoint(FIXTURES / "trainer/z1_frozen_tied_2")


def test_rename_reaches_everything_that_has_a_name() -> None:
    before = replace(zero(), left_out={"gone": (2,)}, extra_state={"fp8": 1})
    after = rename(before, str.upper)
    assert after.left_out == {"GONE": (2,)} and after.extra_state == {"FP8": 1}
    assert list(after.tensors) == [name.upper() for name in before.tensors]
    assert after.shared == {a.upper(): o.upper() for a, o in before.shared.items()} != {}
    assert after.frozen == {name.upper() for name in before.frozen} != set()
    assert after.buffers == {name.upper() for name in before.buffers}
    for old, new in zip(before.groups, after.groups, strict=True):
        assert [*new.params.items()] == [(n.upper(), s) for n, s in old.params.items()]
        for mine, theirs in ((new.state, old.state), (new.scalars, old.scalars)):
            assert {k: {n.upper(): v for n, v in values.items()} for k, values in theirs.items()} == mine  # type: ignore[attr-defined]


@pytest.mark.parametrize(("new_name", "why"), [(lambda _: "same", "overwrite"), (lambda _: "", "nothing")])
def test_rename_refuses_names_that_collide(new_name: Callable[[str], str], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        rename(zero(), new_name)
    assert caught.value.id == "names-collide" and why in caught.value.why


def test_select_reaches_everything_that_has_a_name() -> None:
    before = zero()
    owners = set(before.shared.values())  # whose state another name would have
    gone = next(name for name in before.groups[0].params if name not in owners)
    before = replace(before, left_out={"other": (2,), "more": (1,)}, extra_state={"other": 1, "more": 2})
    after = select(before, exclude=[gone, "other"])
    assert after.left_out == {"more": (1,)} and after.extra_state == {"more": 2}
    assert gone not in after.tensors and len(after.tensors) == len(before.tensors) - 1
    assert len(after.groups) == len(before.groups)
    for group in after.groups:
        for values in (group.params, *group.state.values(), *group.scalars.values()):
            assert gone not in values
    assert gone not in after.shared and gone not in after.shared.values()
    lost = "as asked for, and the master weights and the optimizer's state of 1 of them"
    assert after.notes[-1] == f"1 of {len(before.tensors)} tensors are left out, {lost}"
    only = select(before, include=["no such tensor", next(iter(before.frozen))])
    assert set(only.tensors) == only.frozen and len(only.groups) == len(before.groups)


def test_names_tied_to_one_that_is_gone_stay_tied(tmp_path: Path) -> None:
    ref = open_checkpoint(FIXTURES / "hf/single").tensors["model.norm.weight"]
    names = ["a", "b", "c"]
    checkpoint = Checkpoint(
        path=Path("x"),
        layout=SAFETENSORS,
        tensors=dict.fromkeys(names, ref),
        shared={"b": "a", "c": "a"},
    )
    after = select(checkpoint, exclude=["a"])
    assert after.shared == {"c": "b"}
    execute(hf.plan(after), tmp_path / "out")
    assert set(load_file(tmp_path / "out/model.safetensors")) == {"b"}


def test_cast_of_a_training_state_is_from_its_masters() -> None:
    before = open_checkpoint(FIXTURES / "trainer/z2_bf16_2")
    after = cast(before, FLOAT16)
    assert after.layout.dtype == "fp16" and after.groups == before.groups
    for name, master in before.master.items():
        assert identical(as_torch(after.tensors[name]), as_torch(master).half())
    same = cast(before, BFLOAT16)
    assert same.tensors == before.tensors


def test_cast_is_rounded_once() -> None:
    source = next(iter(open_checkpoint(FIXTURES / "trainer/z2_bf16_2").tensors.values()))
    assert source.dtype is BFLOAT16
    wide = source.cast(FLOAT32)
    assert wide.cast(BFLOAT16) == source and wide.cast(FLOAT16) == source.cast(FLOAT16)
    assert wide.cast(FLOAT64) == source.cast(FLOAT64)
    with pytest.raises(ValueError, match="cast again"):
        source.cast(FLOAT16).cast(FLOAT32)
    assert identical(as_torch(wide), as_torch(source).float())
    joined = TensorRef(FLOAT32, (2 * source.numel,), (*wide.chunks, *wide.chunks))
    assert as_torch(joined.cast(FLOAT16)).equal(as_torch(source).half().reshape(-1).repeat(2))


def test_float8_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    found = open_checkpoint(tmp_path)
    after = cast(found, BFLOAT16)
    assert after.tensors["a"] == found.tensors["a"] and after.tensors["b"].dtype is BFLOAT16
    assert "1 float8 tensors stay" in after.notes[-1]


def test_plans_of_equal_checkpoints_are_equal() -> None:
    made: list[Plan] = [hf.plan(zero()), hf.plan(zero())]
    assert made[0] == made[1]
