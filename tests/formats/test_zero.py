"""ZeRO-1/2 folders: read right, written as DeepSpeed writes them, for any number of ranks.

The oracles: what the engine held when it saved (`truth`), what DeepSpeed's own zero_to_fp32 reads, and what
DeepSpeed wrote itself at another number of ranks.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    FIXTURES,
    RANK_LOCAL,
    REFUSED,
    REFUSED_SAMPLES,
    SAMPLES,
    ZERO_FIXTURES,
    as_torch,
    differences,
    identical,
    name_of,
    resharded,
    tensor_differences,
    torch_folder,
    tree_differences,
    truth_of,
    variant_of,
)

from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats import locate, open_checkpoint, zero
from ckpttools.formats.deepspeed import original, reordered
from ckpttools.formats.zero.flat import FlatGroup, alignment_gaps
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.transforms.reshard import reshard

NEWEST = FIXTURES / "deepspeed-0.19.8"
ELASTIC = ("z2_elastic", "z2_elastic_sgd")  # read, and not resharded
RESHARDABLE = [p for p in ZERO_FIXTURES if variant_of(p) not in (*ELASTIC, *RANK_LOCAL)]
MODEL = "mp_rank_00_model_states.pt"


def cases(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=map(name_of, paths))


def tag_folder(path: Path) -> Path:
    return locate(path).target


# --- reading ------------------------------------------------------------------------------------------


@cases(SAMPLES)
def test_reads_what_the_engine_held(path: Path) -> None:
    truth = truth_of(path)
    checkpoint = open_checkpoint(path)
    assert tensor_differences(checkpoint.master, truth["fp32"], "master") == []
    kinds = {kind for group in checkpoint.groups for kind in group.state} - {"fp32"}
    assert kinds == set(truth["state"])
    for kind, expected in truth["state"].items():
        ours = {n: ref for group in checkpoint.groups for n, ref in group.state.get(kind, {}).items()}
        assert tensor_differences(ours, expected, kind) == []
    for names, group in zip(truth["group_names"], checkpoint.groups, strict=True):
        assert set(names) == set(group.params)
    known = {*checkpoint.tensors, *truth["fp32"]}  # the owner may be left out, as a frozen parameter
    assert set(checkpoint.shared.items()) == {(a, o) for a, o in truth["shared"].items() if o in known}
    layout, state = checkpoint.layout, checkpoint.training
    assert (state.step, state.samples) == (truth["global_steps"], truth["global_samples"])
    assert state.skipped_steps == truth["skipped_steps"]
    assert layout.dp_degree == truth["world_size"]
    assert layout.dtype == truth["dtype"]
    assert layout.tag == truth["tag"]
    assert layout.writer == f"DeepSpeed {truth['deepspeed']}"
    asked_for = "round_robin" in path.name or "rr_" in path.name
    # DeepSpeed 0.10 ignored the setting in stage 1
    assert layout.round_robin is (asked_for and name_of(path) != "deepspeed-0.10.3/z1_round_robin_ws2")
    stated_variant = {"BF16_Optimizer": "BF16_Optimizer", "DeepSpeedZeroOptimizer": None}
    if variant_of(path) in ELASTIC:
        assert layout.variant == "elastic"
    else:
        assert layout.variant == stated_variant[truth["optimizer_class"]]
        for group, held in zip(checkpoint.groups, truth["param_groups"], strict=True):
            assert {key: group.hyper[key] for key in held} == held


@cases(SAMPLES)
def test_frozen_and_buffers_are_told_apart(path: Path) -> None:
    truth, checkpoint = truth_of(path), open_checkpoint(path)
    module = torch.load(tag_folder(path) / MODEL, weights_only=False)["module"]
    assert tensor_differences(checkpoint.tensors, dict(module), "module") == []
    assert checkpoint.buffers == set(truth["persistent_buffers"])
    saved_frozen = {name for name in truth["frozen"] if name in module}
    saved_frozen |= {a for a, o in truth["shared"].items() if o in truth["frozen"] and o not in module}
    zero_sized = {name for name, tensor in module.items() if not tensor.numel()}
    assert checkpoint.frozen - zero_sized == saved_frozen


@cases(ZERO_FIXTURES)
def test_master_weights_equal_zero_to_fp32(
    path: Path, zero_to_fp32: Callable[[Path], dict[str, Any]]
) -> None:
    checkpoint = open_checkpoint(path)
    try:
        theirs = zero_to_fp32(tag_folder(path))
    except (ValueError, RuntimeError, KeyError) as problem:
        # what it cannot read is compared with the engine's own state above
        known = {
            "z1_bf16opt": "is not a zero checkpoint",
            "z1_bf16opt_groups": "is not a zero checkpoint",
            "z2_legacy": "mmap can only be used with files saved with",
        }
        assert known.get(variant_of(path), "a surprise") in str(problem)
        return
    for name, ref in checkpoint.master.items():
        assert identical(as_torch(ref), theirs[name]), name
    left_out = {name for name in checkpoint.tensors if name not in theirs}
    model = torch.load(tag_folder(path) / MODEL, weights_only=False)
    if left_out and (checkpoint.layout.zero_stage == 1 or model.get("frozen_param_shapes") is None):
        # it drops frozen parameters of stage 1, and the alias of an owner that was left out
        assert left_out <= checkpoint.frozen
    else:
        assert left_out <= {n for n in checkpoint.tensors if not checkpoint.tensors[n].numel}
    for name in set(theirs) - set(checkpoint.master):
        name_held = checkpoint.shared.get(name, name)
        ours = (checkpoint.master if name_held in checkpoint.master else checkpoint.tensors)[name_held]
        assert torch.equal(as_torch(ours).to(theirs[name].dtype), theirs[name]), name


@pytest.fixture(scope="module")
def zero_to_fp32() -> Callable[[Path], dict[str, Any]]:
    """DeepSpeed's own converter, of the installed version, on a tag folder."""
    module = pytest.importorskip("deepspeed.utils.zero_to_fp32")

    def convert(folder: Path) -> dict[str, Any]:
        out: dict[str, Any] = module.get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
        return out

    return convert


# --- the contract: what is written reads as it was read -------------------------------------------------


@cases(RESHARDABLE)
def test_written_as_read(path: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(path)
    found = locate(path)
    copy = resharded(path, checkpoint.layout.dp_degree, tmp_path / found.root.name)
    assert differences(open_checkpoint(copy), checkpoint) == []
    before, after = torch_folder(found.target), torch_folder(tag_folder(copy))
    assert [d for d in tree_differences(after, before) if not is_old_padding(path, d)] == []


@cases(RESHARDABLE)
@pytest.mark.parametrize("ranks", [1, 3, 4, 5, 8, 12])
def test_there_and_back_is_bit_identical(path: Path, ranks: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(path)
    own, name = checkpoint.layout.dp_degree, locate(path).root.name
    (tmp_path / "there").mkdir()
    there = resharded(path, ranks, tmp_path / "there" / name)
    assert differences(open_checkpoint(there), checkpoint, but=("ranks", "dp_degree")) == expected_batch(
        open_checkpoint(there), checkpoint
    )
    back = resharded(there, own, tmp_path / name)
    before, after = torch_folder(tag_folder(path)), torch_folder(tag_folder(back))
    found = tree_differences(after, before)
    assert [d for d in found if not is_batch_setting(d) and not is_old_padding(path, d)] == []
    for new, old in zip(after.values(), before.values(), strict=True):
        config, was = new.get("ds_config", {}), old.get("ds_config", {})
        assert batch_of(config) == batch_of(was)
    shards = tree_differences(optim(after), optim(before), storages=True)
    if variant_of(path) != "z2_legacy":
        assert [d for d in shards if "storage of" in d and "fp32_groups" in d] == []


def expected_batch(there: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """The one difference that resharding makes: micro batch and accumulation, for the same global batch."""
    new, old = there.training, checkpoint.training
    if new == old:
        return []
    assert new.saved_batch.get("global") == old.saved_batch.get("global")
    total = old.saved_batch.get(
        "global", old.saved_batch["micro"] * old.saved_batch["accumulation"] * checkpoint.layout.dp_degree
    )
    assert total == new.saved_batch["micro"] * new.saved_batch["accumulation"] * there.layout.dp_degree
    return [f"training: {new} != {old}"]


def is_batch_setting(difference: str) -> bool:
    return ".ds_config.train_micro" in difference or ".ds_config.gradient_accumulation_steps" in difference


def is_old_padding(path: Path, difference: str) -> bool:
    """Padding that we write as newer DeepSpeed does, and as zeros; the parameters' values are the same.

    Where a group is so small that several ranks hold nothing but padding, a DeepSpeed before 0.16.4 noted the
    whole padding at the last rank and cut only that rank's partition. Adamax keeps eps in it.
    """
    old = path.parent.name in ("deepspeed-0.10.3", "deepspeed-0.14.5")
    fields = ("group_paddings", "single_partition_of_fp32_groups")
    if variant_of(path) == "z2_adamax":
        return difference.endswith(".exp_inf: values")
    return old and variant_of(path) == "z2_tiny_groups" and any(field in difference for field in fields)


def batch_of(config: dict[str, Any]) -> object:
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return math.prod(v for k in keys if isinstance(v := config.get(k, 1), int))


def optim(files: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in files.items() if name.endswith("optim_states.pt")}


# --- as DeepSpeed itself writes at that number of ranks -------------------------------------------------

SERIES: dict[str, dict[int, Path]] = {}
for _path in RESHARDABLE:
    if _path in SAMPLES:
        _variant, _, _ranks = name_of(_path).rpartition("_ws")
        SERIES.setdefault(_variant, {})[int(_ranks)] = _path
for _name in ("z2_bf16", "z2_fp32"):
    SERIES[f"trainer/{_name}"] = {n: FIXTURES / f"trainer/{_name}_{n}" for n in (1, 2, 4)}
PAIRS = [
    (paths[source], paths[target], target)
    for paths in SERIES.values()
    for source, target in itertools.permutations(paths, 2)
]


@pytest.mark.parametrize(
    ("source", "target", "ranks"), PAIRS, ids=[f"{name_of(a)}-to-{n}" for a, _, n in PAIRS]
)
def test_structure_equals_a_save_at_that_rank_count(
    source: Path, target: Path, ranks: int, tmp_path: Path
) -> None:
    """Files, keys, types, sizes, paddings, mappings and storages; the values were trained apart."""
    ours = torch_folder(tag_folder(resharded(source, ranks, tmp_path / "out")))
    theirs = torch_folder(tag_folder(target))
    assert list(ours) == list(theirs)
    found = [
        d
        for d in tree_differences(ours, theirs, values=False, storages=True)
        # module: views into the whole flat group, whose padding is not carried; ds_config: see expected_batch
        if not (".module." in d and "storage of" in d) and "ds_config." not in d
    ]
    assert found == []


def test_whether_frozen_weights_were_left_out_is_told() -> None:
    """Whoever loads what is made of it must load the frozen ones first, and is told so."""
    samples = [p for p in NEWEST.iterdir() if p.name != "truth" and variant_of(p) not in REFUSED]
    told = {path.name for path in samples if open_checkpoint(path).excludes_frozen}
    assert told == {path.name for path in samples if "exclude" in path.name} and len(told) == 6


def test_twelve_ranks_are_sorted_as_numbers(
    tmp_path: Path, zero_to_fp32: Callable[[Path], dict[str, Any]]
) -> None:
    source = NEWEST / "z2_round_robin_ws2"
    made = resharded(source, 12, tmp_path / "twelve")
    names = sorted(p.name for p in tag_folder(made).iterdir())
    assert names[2] == "bf16_zero_pp_rank_11_mp_rank_00_optim_states.pt"  # as text, 11 comes before 2
    checkpoint = open_checkpoint(made)
    assert differences(checkpoint, open_checkpoint(source), but=("ranks", "dp_degree")) == expected_batch(
        checkpoint, open_checkpoint(source)
    )
    theirs = zero_to_fp32(tag_folder(made))
    assert tensor_differences(checkpoint.master, {n: theirs[n] for n in checkpoint.master}) == []


RESHARD_TO = (1, 3, 5, 8)


@cases([p for p in RESHARDABLE if variant_of(p) not in ("z1_bf16opt", "z1_bf16opt_groups")])
def test_zero_to_fp32_reads_what_we_wrote(
    path: Path, tmp_path: Path, zero_to_fp32: Callable[[Path], dict[str, Any]]
) -> None:
    checkpoint = open_checkpoint(path)
    for ranks in RESHARD_TO:
        theirs = zero_to_fp32(tag_folder(resharded(path, ranks, tmp_path / str(ranks))))
        assert tensor_differences(checkpoint.master, {n: theirs[n] for n in checkpoint.master}) == []


def test_global_batch_that_does_not_divide_is_said(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(NEWEST / "z2_bf16_ws2")
    plan = zero.plan(checkpoint, reshard(checkpoint, 7))
    assert any("the global batch of 120 does not divide by 7 ranks" in note for note in plan.notes)
    assert any("119 or 126" in note for note in plan.notes)


# --- the arithmetic -----------------------------------------------------------------------------------

NUMELS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
RANKS = st.integers(1, 13)


@st.composite
def flat_groups(draw: st.DrawFn) -> FlatGroup:
    numels, ranks = draw(NUMELS), draw(RANKS)
    gaps = alignment_gaps(numels, 8) if draw(st.booleans()) else (0,) * len(numels)
    names = tuple(f"p{i}" for i in range(len(numels)))
    alignment = ranks * draw(st.sampled_from([1, 2]))
    return FlatGroup(names=names, numels=tuple(numels), gaps=gaps, ranks=ranks, alignment=alignment)


@given(st.integers(0, 60), st.integers(1, 70))
def test_round_robin_order_is_undone(count: int, ranks: int) -> None:
    names = [f"p{i}" for i in range(count)]
    assert sorted(reordered(names, ranks)) == sorted(names)
    assert original(reordered(names, ranks), ranks) == names
    assert reordered(original(names, ranks), ranks) == names
    if ranks == 1 or ranks >= count:
        assert reordered(names, ranks) == names


@given(st.integers(1, 40), st.integers(1, 9))
def test_round_robin_order_is_deepspeeds(count: int, ranks: int) -> None:
    tensors: dict[int, list[int]] = {}  # as in DeepSpeedZeroOptimizer._round_robin_reorder
    for i in range(count):
        tensors.setdefault(i % ranks, []).append(i)
    theirs = [i for partition in range(ranks) if partition in tensors for i in tensors[partition]]
    assert [int(n) for n in reordered([str(i) for i in range(count)], ranks)] == theirs


@given(flat_groups())
def test_partitions_cover_the_group_exactly(group: FlatGroup) -> None:
    assert group.part * group.ranks == group.total >= group.used
    assert group.total - group.used < group.alignment
    assert sum(group.padding(rank) for rank in range(group.ranks)) == group.total - group.used
    assert all(0 <= group.padding(rank) <= group.part for rank in range(group.ranks))


@given(flat_groups())
def test_mappings_cover_each_parameter_exactly_once(group: FlatGroup) -> None:
    starts = group.starts()
    covered = dict.fromkeys(group.names, 0)
    for rank in range(group.ranks):
        for name, (numel, start) in group.mapping(rank, group.in_order).items():
            assert numel > 0 and 0 <= start <= start + numel <= group.part
            assert rank * group.part + start == starts[name] + covered[name]
            covered[name] += numel
    assert covered == dict(zip(group.names, group.numels, strict=True))


@given(NUMELS, st.sampled_from([4, 8]))
def test_alignment_gaps_put_each_parameter_on_a_boundary(numels: list[int], boundary: int) -> None:
    gaps = alignment_gaps(numels, boundary)
    ends = list(itertools.accumulate(n + gap for n, gap in zip(numels, gaps, strict=True)))
    assert all(end % boundary == 0 for end in ends[:-1]) and gaps[-1] == 0
    assert all(0 <= gap < boundary for gap in gaps)


# --- older layouts, made from newer ones ----------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[str, dict[str, Any]], None]) -> None:
    """Change the value of every file of a tag folder, with torch."""
    for file in sorted(folder.iterdir()):
        value = torch.load(file, weights_only=False)
        change(file.name, value)
        torch.save(value, file)


ORIGINAL = NEWEST / "z2_groups_ws2"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A writable copy of a checkpoint with two ranks; its tag folder is global_step3."""
    shutil.copytree(ORIGINAL, tmp_path / "save")
    return tmp_path / "save"


def test_names_without_the_underscore(copied: Path, tmp_path: Path) -> None:
    """DeepSpeed up to 0.3.13 wrote ..._mp_rank_00optim_states.pt."""
    before = open_checkpoint(ORIGINAL)
    for file in (copied / "global_step3").glob("*optim_states.pt"):
        file.rename(file.with_name(file.name.replace("_optim_states", "optim_states")))
    assert differences(open_checkpoint(copied), before) == []
    made = resharded(copied, 3, tmp_path / "out") / "global_step3"
    assert (made / "bf16_zero_pp_rank_2_mp_rank_00optim_states.pt").exists()


def test_shapes_in_the_optimizer_files(copied: Path, tmp_path: Path) -> None:
    """DeepSpeed 0.5.4 to 0.5.10: param_shapes with the optimizer; no mappings, paddings or stage."""
    before = open_checkpoint(ORIGINAL)
    shapes = torch.load(copied / "global_step3" / MODEL, weights_only=False)["param_shapes"]

    def change(name: str, value: dict[str, Any]) -> None:
        if name == MODEL:
            for key in ("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"):
                del value[key]
            value["ds_version"] = "0.5.8"
        else:
            value["param_shapes"], value["ds_version"] = shapes, "0.5.8"
            state = value["optimizer_state_dict"]
            state["zero_stage"] = 2
            for key in ("param_slice_mappings", "group_paddings", "param_alignment_paddings", "clip_grad"):
                state.pop(key, None)

    rewrite(copied / "global_step3", change)
    old = open_checkpoint(copied)
    assert differences(old, before, but=("writer",)) == []
    assert old.layout.writer == "DeepSpeed 0.5.8"
    made = resharded(copied, 3, tmp_path / "out")
    assert differences(open_checkpoint(made), old, but=("ranks", "dp_degree")) == expected_batch(
        open_checkpoint(made), old
    )
    assert "param_shapes" in torch.load(
        tag_folder(made) / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", weights_only=False
    )


def test_tied_names_without_shared_params(tmp_path: Path) -> None:
    """Before DeepSpeed 0.9.2 only the common storage says that two names are one parameter."""
    shutil.copytree(NEWEST / "z2_tied_ws2", tmp_path / "save")
    before = open_checkpoint(NEWEST / "z2_tied_ws2")
    rewrite(tmp_path / "save/global_step3", lambda _, value: value.pop("shared_params", None) and None)
    assert differences(open_checkpoint(tmp_path / "save"), before) == []
    assert before.shared == {"head.weight": "emb.weight"}


# --- refusals -----------------------------------------------------------------------------------------


def refused(path: Path, tag: str | None = None) -> CkptError:
    with pytest.raises(CkptError) as caught:
        open_checkpoint(path, tag)
    assert caught.value.message and caught.value.where
    return caught.value


@cases(REFUSED_SAMPLES)
def test_other_layouts_are_recognised(path: Path) -> None:
    error = refused(path)
    assert error.id == REFUSED[variant_of(path)]
    assert isinstance(error, Unsupported)
    words = {"moe": "mixture-of-experts", "pp": "pipeline"}
    words |= dict.fromkeys(("autotp1", "autotp3"), "tensor-parallel")
    words |= {"autoep2": words["moe"], "autoep3": "AutoEP", "folded2": words["moe"]}
    assert words[variant_of(path)] in f"{error.message} {error.why}"


@cases([p for p in SAMPLES if variant_of(p) in ELASTIC])
def test_elastic_is_read_and_not_resharded(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    with pytest.raises(Unsupported) as caught:
        zero.plan(checkpoint, reshard(checkpoint, 3))
    assert caught.value.id == "elastic"


def test_formats_without_ranks_are_not_resharded() -> None:
    checkpoint = open_checkpoint(FIXTURES / "hf/single")
    with pytest.raises(Unsupported, match="not-zero"):
        reshard(checkpoint, 2)
    with pytest.raises(Unsupported, match="no-groups"):
        zero.plan(checkpoint, checkpoint.layout)


@pytest.mark.parametrize("ranks", [0, -1, 10**6])
def test_senseless_rank_counts(ranks: int) -> None:
    with pytest.raises(CkptError, match="bad-usage"):
        reshard(open_checkpoint(NEWEST / "z2_bf16_ws2"), ranks)


RANK = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def name(rank: int) -> str:
    return RANK.format(rank)


FILE_DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "rank missing": ("shard-missing", lambda d: (d / name(1)).unlink()),
    "first rank missing": ("shard-missing", lambda d: (d / name(0)).unlink()),
    "rank too many": ("shard-extra", lambda d: shutil.copy(d / name(1), d / name(2))),
    "rank twice": ("shard-duplicate", lambda d: shutil.copy(d / name(1), d / name(1)[5:])),
    "two styles": ("shard-mixed", lambda d: (d / name(1)).rename(d / name(1)[5:])),
    "no model file": ("model-missing", lambda d: (d / MODEL).unlink()),
    "no optimizer": ("no-optimizer-shards", lambda d: [(d / name(r)).unlink() for r in (0, 1)]),
    "second mp model": (
        "layout-unsupported",
        lambda d: shutil.copy(d / MODEL, d / f"mp_rank_01{MODEL[10:]}"),
    ),
    "second mp optimizer": (
        "layout-unsupported",
        lambda d: (d / name(1)).rename(d / name(1).replace("mp_rank_00", "mp_rank_01")),
    ),
    "stage 3 model": (
        "field-damaged",  # the optimizer files say stage 2
        lambda d: (d / MODEL).rename(d / f"zero_pp_rank_0_{MODEL}"),
    ),
    "expert": (
        "layout-unsupported",
        lambda d: shutil.copy(d / MODEL, d / f"layer_0_expert_1_{MODEL}"),
    ),
    "pipeline layer": (
        "layout-unsupported",
        lambda d: shutil.copy(d / MODEL, d / "layer_00-model_states.pt"),
    ),
    "split by the FAST writer": ("layout-unsupported", lambda d: (d / MODEL).rename(d / f"{MODEL}-0.1")),
    "empty rank file": ("file-empty", lambda d: (d / name(1)).write_bytes(b"")),
    "a folder for a rank": (
        "not-a-file",
        lambda d: ((d / name(1)).unlink(), (d / name(1)).mkdir()),
    ),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_files_missing_extra_or_foreign(copied: Path, damage: str) -> None:
    expected, do = FILE_DAMAGE[damage]
    do(copied / "global_step3")
    assert refused(copied).id == expected


def test_a_missing_rank_is_named(copied: Path) -> None:
    (copied / "global_step3" / name(1)).unlink()
    error = refused(copied)
    assert "dp rank 1 of 2" in error.message
    assert name(1) in error.hint


def edit(value: Any, path: str, new: object) -> None:
    """Set the item at a path such as a/0/b, where numbers index lists; a function maps what is there."""
    keys = [int(k) if k.isdigit() else k for k in path.split("/")]
    holder = functools.reduce(lambda held, key: held[key], keys[:-1], value)
    holder[keys[-1]] = new(holder[keys[-1]]) if callable(new) else new


STATE = "optimizer_state_dict"
FIELD_DAMAGE: dict[str, tuple[str, str, str, object]] = {
    "more ranks stated": ("shard-missing", MODEL, "dp_world_size", 3),
    "fewer ranks stated": ("shard-extra", MODEL, "dp_world_size", 1),
    "ranks disagree": ("rank-count", name(1), f"{STATE}/partition_count", [4, 4, 4]),
    "a group less": ("group-count", MODEL, "param_shapes", []),
    "another shape": ("partition-size", MODEL, "param_shapes/0/emb.weight", torch.Size([99, 99])),
    "module empty": ("layout-unsupported", MODEL, "module", None),
    "module a number": ("field-damaged", MODEL, "module", 5),
    "shapes a text": ("field-damaged", MODEL, "param_shapes", "all"),
    "fp32 gone": ("field-damaged", name(0), f"{STATE}/single_partition_of_fp32_groups", None),
    "fp32 no tensor": ("field-damaged", name(0), f"{STATE}/single_partition_of_fp32_groups/0", 3),
    "fp32 a matrix": (
        "field-damaged",
        name(0),
        f"{STATE}/single_partition_of_fp32_groups/0",
        torch.zeros(3, 3),
    ),
    "fp32 of another dtype": (
        "field-damaged",
        name(1),
        f"{STATE}/single_partition_of_fp32_groups/1",
        torch.Tensor.double,
    ),
    "a short partition": (
        "partition-size",
        name(0),
        f"{STATE}/single_partition_of_fp32_groups/0",
        torch.zeros(1),
    ),
    "no optimizer state": ("field-damaged", name(0), f"{STATE}/base_optimizer_state", None),
    "settings gone": ("field-damaged", name(0), f"{STATE}/base_optimizer_state/param_groups", []),
    "the first ZeRO-1": ("layout-unsupported", name(0), f"{STATE}/local_sub_partitions_of_fp32_groups", []),
    "ZeRO-3": ("layout-unsupported", name(0), f"{STATE}/fp32_flat_groups", []),
    "gaps of another model": ("field-damaged", name(0), f"{STATE}/param_alignment_paddings", [[0], [0], [0]]),
    "an address that is none": (
        "field-damaged",
        name(0),
        f"{STATE}/param_slice_mappings/0",
        {"emb.weight": 1},
    ),
    "shapes nowhere": ("field-damaged", MODEL, "param_shapes", None),
}


@pytest.mark.parametrize("damage", FIELD_DAMAGE)
def test_contents_that_contradict(copied: Path, damage: str) -> None:
    expected, file, path, new = FIELD_DAMAGE[damage]

    def change(held_in: str, value: dict[str, Any]) -> None:
        if held_in == file:
            edit(value, path, new)

    rewrite(copied / "global_step3", change)
    assert refused(copied).id == expected


LATEST: dict[str, tuple[str, bytes]] = {
    "gone": ("latest-dangling", b"global_step99"),
    "outside": ("name-unsafe", b"../save/global_step3"),
    "absolute": ("name-unsafe", b"/etc"),
    "parent": ("name-unsafe", b".."),
    "nothing": ("file-empty", b""),
    "blank": ("name-unsafe", b"\n"),
    "control characters": ("name-unsafe", b"global\x1b[31m"),
    "not text": ("text-damaged", b"\xff\xfe\xfa"),
    "long": ("text-too-long", b"g" * 5000),
    "two lines": ("name-unsafe", b"global_step3\nglobal_step4"),
}


@pytest.mark.parametrize("case", LATEST)
def test_latest_that_leads_nowhere(copied: Path, case: str) -> None:
    expected, text = LATEST[case]
    (copied / "latest").write_bytes(text)
    error = refused(copied)
    assert error.id == expected
    assert open_checkpoint(copied, "global_step3").layout.tag == "global_step3"
    if expected == "latest-dangling":
        assert "global_step3" in error.hint


def test_latest_with_a_newline_and_other_tags(copied: Path) -> None:
    (copied / "latest").write_text("global_step3\n")
    assert open_checkpoint(copied).layout.tag == "global_step3"
    assert refused(copied, "global_step4").id == "tag-missing"
    assert refused(copied, "../save").id == "name-unsafe"


# --- what lies around a tag folder ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "dropped"),
    [
        ("hf-trainer/deepspeed/checkpoint-4", set()),
        ("accelerate/deepspeed", {"random_states_0.pkl"}),
        ("bundle/checkpoint-200", set()),
        ("lightning/deepspeed/epoch=0-step=3.ckpt", set()),
        ("trainer/z2_bf16_2", set()),
    ],
)
def test_a_resharded_checkpoint_is_as_complete(path: str, dropped: set[str], tmp_path: Path) -> None:
    source = FIXTURES / path
    made = resharded(source, 4, tmp_path / "out")
    inner = locate(source).target

    def around(root: Path) -> dict[str, bytes]:
        files = (p for p in root.rglob("*") if p.is_file() and not p.name.endswith("_states.pt"))
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}

    before, after = around(source), around(made)
    if path == "trainer/z2_bf16_2":
        assert set(before) - set(after) <= {"hf_config/config.json"}
    else:
        assert set(before) - set(after) == dropped
    if (stated := "training_info.json") in before:  # restated for the ranks there are, at the same batch
        was, now = json.loads(before.pop(stated)), json.loads(after.pop(stated))
        assert was | {"world_size": 4, "gradient_accumulation_steps": 1} == now
    assert after.items() <= before.items()
    assert len(list((made / inner.relative_to(source)).glob("*optim_states.pt"))) == 4
    same = resharded(source, 2, tmp_path / "same")
    assert dropped <= set(around(same))


def test_what_each_rank_lists_for_all_parameters_is_held_once() -> None:
    """On 1,024 ranks of 41,000 parameters it would be 42 million numbers."""
    path = NEWEST / "z2_bf16_ws2/global_step3"
    for found in (zero.FORMAT.read(locate(path)), zero.FORMAT.check(locate(path)).checkpoint):
        assert found is not None and isinstance(found.template, ZeroFolder)
        (one,), (other,) = (rank.state.get("param_alignment_paddings") for rank in found.template.ranks)
        assert one is other and len(one) == len(found.template.ranks[0].gaps[0]) > 0
