"""Checks on the headers of a ZeRO-1/2 folder: does each file fit its name, and do all fit together?

Each check takes the decoded folder and yields findings. Nothing but a few scalars is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ckpttools.checks.findings import ERROR, INFO, WARNING, Finding
from ckpttools.containers import fields
from ckpttools.containers.pickles import Node, Object, plain
from ckpttools.containers.torch_file import TorchFile, scalar, size
from ckpttools.formats.zero.read import Rank, ZeroFolder, expected_mapping, version_numbers
from ckpttools.tensors import TensorRef

ONE_SAVE = "copy all files of the folder again from one save"


def _found(
    id: str, file: str | Path, where: str, message: str, *, severity: str = ERROR, hint: str = ONE_SAVE
) -> Finding:
    return Finding(id=id, severity=severity, file=str(file), where=where, message=message, hint=hint)


def check_folder(folder: ZeroFolder) -> Iterator[Finding]:
    """Every header check, in the order of CHECKS."""
    for check in CHECKS:
        yield from check(folder)


def archive_roots(files: Sequence[TorchFile]) -> Iterator[Finding]:
    """torch.save writes the file's stem into the archive: a renamed rank file still carries its old name."""
    stems = {file.path.stem for file in files}
    for file in files:
        if file.root in (None, "archive", file.path.stem):
            continue
        yield _found(
            "file-renamed",
            file.path,
            "archive root",
            f"the file was saved under the name {file.root}.pt",
            severity=ERROR if file.root in stems else INFO,
            hint="rename it back, or copy the files again from where they were saved",
        )


def slice_mappings(folder: ZeroFolder) -> Iterator[Finding]:
    """Each rank names the parameter fragments that it owns: they must be those of its place."""
    for rank in folder.ranks:
        if rank.mappings is None:
            continue
        wanted = _mappings(folder, rank.dp_rank)
        if rank.mappings == wanted:
            continue
        owner = next((r.dp_rank for r in folder.ranks if rank.mappings == _mappings(folder, r.dp_rank)), None)
        if owner is not None:
            yield _found(
                "rank-misplaced",
                rank.file.path,
                f"dp rank {rank.dp_rank}",
                f"the file holds the partition of dp rank {owner}, not of rank {rank.dp_rank}: "
                "it was swapped, copied over another or renamed",
            )
        else:
            group, name = _first_difference(rank, wanted)
            yield _found(
                "mapping-mismatch",
                rank.file.path,
                f"param_slice_mappings[{group}]{'.' + name if name else ''}",
                "the fragments of this rank do not follow from the parameters' shapes and order",
            )


def _mappings(folder: ZeroFolder, dp_rank: int) -> tuple[Mapping[str, tuple[int, int]], ...]:
    return tuple(expected_mapping(group, dp_rank, round_robin=folder.round_robin) for group in folder.groups)


def _first_difference(rank: Rank, wanted: tuple[Mapping[str, tuple[int, int]], ...]) -> tuple[int, str]:
    assert rank.mappings is not None
    for g, (have, want) in enumerate(zip(rank.mappings, wanted, strict=False)):
        for name in {**have, **want}:
            if have.get(name) != want.get(name):
                return g, name
    return 0, ""


def paddings(folder: ZeroFolder) -> Iterator[Finding]:
    """group_paddings: each rank's own padding since DeepSpeed 0.16.4, all of it at the last rank before."""
    for rank in folder.ranks:
        if rank.paddings is None:
            continue
        own = tuple(group.padding(rank.dp_rank) for group in folder.groups)
        last = rank.dp_rank == len(folder.ranks) - 1
        at_last = tuple(group.total - group.used if last else 0 for group in folder.groups)
        if rank.paddings not in (own, at_last):
            yield _found(
                "padding-mismatch",
                rank.file.path,
                "optimizer_state_dict.group_paddings",
                f"says {list(rank.paddings)}, the parameters' shapes make it {list(own)}",
            )


def moments(folder: ZeroFolder) -> Iterator[Finding]:
    """Every rank holds the same kinds of optimizer state, each as long as its partition."""
    for g, group in enumerate(folder.groups):
        for rank in folder.ranks:
            kinds, first = set(rank.moments[g]), set(folder.ranks[0].moments[g])
            if kinds != first:
                yield _found(
                    "moment-missing",
                    rank.file.path,
                    f"group {g}",
                    f"holds the optimizer state {_list(kinds)}, rank 0 holds {_list(first)}",
                )
            for key, node in rank.moments[g].items():
                view = rank.file.view(node)
                if view is None or len(view.shape) != 1 or key in folder.partitioned[g]:
                    continue
                yield _found(
                    "moment-size",
                    rank.file.path,
                    f"group {g} {key}",
                    f"has {view.shape[0]} elements where the partition has {group.part}",
                )


def second_moment(folder: ZeroFolder) -> Iterator[Finding]:
    """Adam keeps exp_avg_sq wherever it keeps exp_avg; and what one group has, the others have."""
    first = folder.ranks[0]
    everywhere = {key for moments in first.moments for key in moments}
    for g, moments in enumerate(first.moments):
        lacking = everywhere - set(moments) if moments or len(first.moments) > 1 else set()
        if first.hyper is not None and "eps" in first.hyper[g] and "exp_avg" in moments:
            lacking |= {"exp_avg_sq"} - set(moments)
        uses_muon = first.hyper is not None and any("use_muon" in group for group in first.hyper)
        if lacking and not uses_muon:
            yield _found(
                "moment-missing",
                first.file.path,
                f"group {g}",
                f"has no {_list(lacking)}",
                severity=WARNING,
                hint="a group whose parameters never got a gradient looks so, and a damaged file",
            )


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def same_on_all_ranks(folder: ZeroFolder) -> Iterator[Finding]:
    """What is replicated must be equal: version, stage, hyper-parameters, scaler and Adam's step."""
    first = folder.ranks[0]
    for rank in folder.ranks[1:]:
        for name, mine, theirs in (
            ("ds_version", rank.ds_version, first.ds_version),
            ("zero_stage", rank.stage, first.stage),
            ("layout", rank.variant, first.variant),
            ("param_groups", _hyper(rank), _hyper(first)),
            ("param_alignment_paddings", rank.gaps, first.gaps),
            *(
                (key, plain(rank.state.get(key)), plain(first.state.get(key)))
                for key in ("loss_scaler", "dynamic_loss_scale", "clip_grad", "overflow")
            ),
        ):
            if mine != theirs:
                yield _found(
                    "ranks-differ",
                    rank.file.path,
                    name,
                    f"rank {rank.dp_rank} says {_short(mine)}, rank 0 says {_short(theirs)}",
                )
        for name in {*rank.state.names()} ^ {*first.state.names()}:
            has, lacks = (rank, first) if name in rank.state else (first, rank)
            yield _found(
                "ranks-differ",
                lacks.file.path,
                f"optimizer_state_dict.{name}",
                f"rank {lacks.dp_rank} lacks what rank {has.dp_rank} has",
            )
        if plain(rank.root.get("ds_config")) != plain(first.root.get("ds_config")):
            yield _contradiction(str(rank.file.path), "ds_config", "differs from that of rank 0")
        mine_step, first_step = steps(rank), steps(first)
        if mine_step != first_step:
            yield _found(
                "step-mismatch",
                rank.file.path,
                f"dp rank {rank.dp_rank}",
                f"the shard is of optimizer step {_step(mine_step)}, rank 0 of {_step(first_step)}: "
                "they come from different saves",
            )


def _hyper(rank: Rank) -> object:
    return None if rank.hyper is None else [plain(group) for group in rank.hyper]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _step(values: tuple[float | None, ...]) -> str:
    known = sorted({int(v) for v in values if v is not None})
    return " and ".join(map(str, known)) or "0"


def steps(rank: Rank) -> tuple[float | None, ...]:
    """Adam's step per group, None where the optimizer has none (or has not stepped)."""
    return tuple(_number(rank, moments.get("step")) for moments in rank.moments)


def _number(rank: Rank, node: Node) -> float | None:
    view = rank.file.view(node)
    if view is not None:
        return scalar(view) if math.prod(view.shape) == 1 else None
    value = fields.number(node)
    return float(value) if value is not None else None


def counters(folder: ZeroFolder) -> Iterator[Finding]:
    """The optimizer's step against the engine's counters: normally global_steps - skipped_steps.

    One more is normal up to DeepSpeed 0.13.1, which made a dummy step at the start. Anything else happens
    when the optimizer was reset on purpose, and when the model file is of another save: the comparison of
    weights tells the two apart.
    """
    root = folder.model.root
    done = fields.integer(root.get("global_steps"))
    skipped = fields.integer(root.get("skipped_steps")) or 0
    known = {step for step in steps(folder.ranks[0]) if step is not None}
    if done is None or not known:
        return
    if max(known) - (done - skipped) in (0, 1):
        return
    counts = f"the model file counts {done} steps ({skipped} skipped), the optimizer made {max(known):g}"
    if _rebased(root, done):
        text = f"{counts}: the checkpoint was rebased to another batch size, and Adam's count goes on"
        yield _found("counter-mismatch", folder.model.file.path, "global_steps", text, severity=INFO)
        return
    yield _found(
        "counter-mismatch",
        folder.model.file.path,
        "global_steps",
        f"{counts}: the optimizer was reset, the run was rebased to another batch size, or the files are of "
        "different saves",
        severity=WARNING,
        hint="a full verify compares the weights: if they agree, the files are of one save",
    )


def _rebased(root: fields.Mapping, done: int) -> bool:
    """Whether the file notes a rebase that led to this very count (transforms/rebase/marks.py)."""
    mark = fields.as_mapping(root.get("ckpttools_rebase"))
    return mark is not None and fields.integer(mark.get("count")) == done


def scheduler(folder: ZeroFolder) -> Iterator[Finding]:
    """The scheduler against what it goes with: the engine's counters, and the optimizer's learning rate.

    DeepSpeed's own schedulers save nothing but last_batch_iteration: -1 at first, one more for each step
    that was not skipped. A client's scheduler counts as it likes (accelerate's once per rank, others per
    epoch); where it is one of torch's, its last learning rate is the one that the optimizer goes on with.
    """
    root, hyper = folder.model.root, folder.ranks[0].hyper
    state = fields.as_mapping(root.get("lr_scheduler"))
    if state is None:
        return
    yield from _scheduler_position(folder, state)
    last = state.get("_last_lr")
    if hyper is None or not isinstance(last, list) or len(last) != len(hyper):
        return
    for g, (value, group) in enumerate(zip(last, hyper, strict=True)):
        stated, lr = fields.number(value), fields.number(group.get("lr"))
        if stated is not None and lr is not None and not math.isclose(stated, lr, rel_tol=1e-6):
            yield _found(
                "scheduler-mismatch",
                folder.model.file.path,
                f"lr_scheduler._last_lr[{g}]",
                f"the scheduler is at {stated:g}, the optimizer files at {lr:g}",
                severity=WARNING,
                hint="after a resume the first step uses the optimizer's value, later ones the scheduler's",
            )


def _scheduler_position(folder: ZeroFolder, state: fields.Mapping) -> Iterator[Finding]:
    root = folder.model.root
    last = fields.integer(state.get("last_batch_iteration"))
    done = fields.integer(root.get("global_steps"))
    skipped = fields.integer(root.get("skipped_steps")) or 0
    if last is None or done is None or len(state.names()) != 1:
        return
    steps = done - skipped
    # before the first step some versions have stepped the schedule once already, others not
    if last != steps - 1 and not (steps <= 0 and last in (-1, 0)):
        yield _found(
            "scheduler-mismatch",
            folder.model.file.path,
            "lr_scheduler.last_batch_iteration",
            f"is {last}, where {done} steps ({skipped} skipped) make it {steps - 1}: the schedule would go "
            "on from another place than the weights",
            severity=WARNING,
            hint="normal where the schedule was restarted or stepped by hand; else use another checkpoint",
        )


def shapes(folder: ZeroFolder) -> Iterator[Finding]:
    """Every trainable parameter is in module, with the shape that the optimizer knows."""
    model = folder.model
    for g, group in enumerate(folder.shapes):
        for name, shape in group.items():
            if name not in model.weights:
                yield _found(
                    "tensor-missing",
                    model.file.path,
                    name,
                    f"a trainable parameter of group {g} is not in module",
                )
            elif model.weights[name].shape != shape:
                yield _found(
                    "shape-mismatch",
                    model.file.path,
                    name,
                    f"{list(model.weights[name].shape)} in module, {list(shape)} in the optimizer",
                )


def frozen_shapes(folder: ZeroFolder) -> Iterator[Finding]:
    """frozen_param_shapes against module."""
    model = folder.model
    stated = fields.as_mapping(model.root.get("frozen_param_shapes"))
    for name, node in stated.named() if stated is not None else ():
        if name in model.weights and size(node) != model.weights[name].shape:
            yield _found(
                "shape-mismatch",
                model.file.path,
                name,
                f"{list(model.weights[name].shape)} in module, {list(size(node))} stated",
            )


def dtypes(folder: ZeroFolder) -> Iterator[Finding]:
    """Trainable weights are floating point, and of one dtype in all but deliberate cases."""
    weights = folder.model.weights
    names = [name for group in folder.shapes for name in group if name in weights]
    common = Counter(weights[name].dtype.short for name in names).most_common(1)
    for name in names:
        dtype = weights[name].dtype
        if not dtype.is_float or dtype.short != common[0][0]:
            yield _found(
                "dtype-odd",
                folder.model.file.path,
                name,
                f"a trained weight of {dtype}, where most are {common[0][0]}",
                severity=WARNING if dtype.is_float else ERROR,
            )


# what each layout's optimizer files hold, and since which DeepSpeed
_COMMON = {"partition_count": (0, 5), "group_paddings": (0, 7), "param_slice_mappings": (0, 7, 4)}
RANK_FIELDS: dict[str, dict[str, tuple[int, ...]]] = {
    "rigid": {"loss_scaler": (0, 3), "zero_stage": (0, 3), "ds_version": (0, 4), **_COMMON},
    "elastic": {"loss_scaler": (0, 3), "zero_stage": (0, 3), "ds_version": (0, 4), **_COMMON},
    "bf16_optimizer": {"ds_version": (0, 6, 2), **_COMMON},
}


def required_fields(folder: ZeroFolder) -> Iterator[Finding]:
    """What every DeepSpeed since 0.6 writes, and what must not contradict itself."""
    model, path = folder.model, str(folder.model.file.path)
    for name in ("global_steps", "dp_world_size", "ds_version", "buffer_names"):
        if name not in model.root:
            yield _found(
                "field-missing",
                path,
                name,
                "DeepSpeed writes this field, and it is not there",
                severity=WARNING,
                hint="",
            )
    for rank in folder.ranks:
        for name, since in RANK_FIELDS[rank.variant].items():
            if name not in rank.state and since <= version_numbers(rank.ds_version):
                yield _found(
                    "field-missing",
                    rank.file.path,
                    f"optimizer_state_dict.{name}",
                    "DeepSpeed writes this field, and it is not there",
                    severity=WARNING,
                    hint="",
                )
    if fields.integer(model.root.get("mp_world_size")) not in (None, 1):
        yield _contradiction(path, "mp_world_size", "says that there are several model-parallel files")
    for rank in folder.ranks:
        if rank.ds_version and model.ds_version and rank.ds_version != model.ds_version:
            where = f"saved by DeepSpeed {rank.ds_version}, the model file by {model.ds_version}"
            yield _contradiction(str(rank.file.path), "ds_version", where)
        inner = rank.state.get("ds_version")
        if isinstance(inner, str) and rank.ds_version and inner != rank.ds_version:
            yield _contradiction(str(rank.file.path), "optimizer_state_dict.ds_version", f"is {inner}")
        config = fields.as_mapping(rank.root.get("ds_config"))
        zero = fields.as_mapping(config.get("zero_optimization")) if config is not None else None
        stated = fields.integer(zero.get("stage")) if zero is not None else None
        if stated is not None and rank.stage is not None and stated != rank.stage:
            what = f"is {rank.stage}, while ds_config asks for stage {stated}"
            yield _contradiction(str(rank.file.path), "zero_stage", what)


def _contradiction(path: str, field: str, what: str) -> Finding:
    return _found("field-contradicts", path, field, what, severity=WARNING)


def plausible_settings(folder: ZeroFolder) -> Iterator[Finding]:
    """A learning rate is not negative, a loss scale is positive, and both are numbers."""
    for rank in folder.ranks:
        scaler = rank.state.get("loss_scaler")
        scale = None
        if isinstance(scaler, Object) and (state := fields.as_mapping(scaler.state)) is not None:
            scale = fields.number(state.get("cur_scale"))
        values = [("loss_scaler.cur_scale", scale, scale is None or 0 < scale < math.inf)]
        for g, group in enumerate(rank.hyper or ()):
            lr = fields.number(group.get("lr"))
            values.append((f"param_groups[{g}].lr", lr, lr is None or 0 <= lr < math.inf))
        for where, value, fine in values:
            if not fine:
                yield _found(
                    "setting-implausible",
                    rank.file.path,
                    where,
                    f"is {value}",
                    severity=WARNING,
                    hint="resuming would train with it",
                )


def module_names(folder: ZeroFolder) -> Iterator[Finding]:
    """Whatever module holds is trainable, frozen, shared or a buffer."""
    model = folder.model
    known = {name for group in folder.shapes for name in group}
    known |= model.frozen | model.buffers | set(model.shared)
    stray = [name for name in model.weights if name not in known and not name.endswith("_extra_state")]
    if stray:
        yield _found(
            "tensor-unknown",
            model.file.path,
            stray[0],
            f"{len(stray)} tensors of module are neither trainable, frozen, shared nor buffers",
            severity=INFO if model.root.get("frozen_param_shapes") is None else WARNING,
            hint="",
        )
    dropped = sorted(name for name in model.frozen if name not in model.weights)
    if dropped and len(dropped) < len(model.frozen):
        yield _found(
            "tensor-missing",
            model.file.path,
            dropped[0],
            f"{len(dropped)} frozen parameters are not in module, while others are",
        )
    elif dropped:
        yield _found(
            "frozen-excluded",
            model.file.path,
            dropped[0],
            f"{len(dropped)} frozen parameters are not in module (exclude_frozen_parameters)",
            severity=INFO,
            hint="",
        )
    for name in sorted(model.buffers - model.weights.keys()):
        yield _found(
            "buffer-missing",
            model.file.path,
            name,
            "listed as a buffer, and not in module",
            severity=WARNING,
            hint="",
        )


def tied_weights(folder: ZeroFolder) -> Iterator[Finding]:
    """shared_params: an alias is its owner's tensor; the owner may be left out, as a frozen parameter is."""
    model = folder.model
    stated = fields.as_mapping(model.root.get("shared_params"))
    known = {name for group in folder.shapes for name in group} | model.weights.keys()
    # stage 2 writes frozen_param_shapes, unless exclude_frozen_parameters was asked for
    all_named = fields.as_mapping(model.root.get("frozen_param_shapes")) is not None
    for alias, owner in stated.named() if stated is not None else ():
        weight = model.weights.get(alias)
        if owner not in known:
            twins = weight is not None and weight.numel and _same_bytes(model.weights, alias)
            if all_named or twins:
                what = f", and is {twins[0]}" if twins else ""
                message = f"tied to {owner}, which does not exist{what}"
                yield _found("tied-mismatch", model.file.path, alias, message)
            elif weight is not None:
                yield _found(
                    "frozen-excluded",
                    model.file.path,
                    alias,
                    f"stands for {owner}, which is not in module (exclude_frozen_parameters)",
                    severity=INFO,
                    hint="",
                )
        elif weight is not None and isinstance(owner, str) and owner in model.weights:
            other = model.weights[owner]
            if (weight.shape, weight.dtype) != (other.shape, other.dtype):
                yield _found(
                    "tied-mismatch",
                    model.file.path,
                    alias,
                    f"tied to {owner}, which has another shape or dtype",
                )


def _same_bytes(weights: Mapping[str, TensorRef], alias: str) -> list[str]:
    """The other names of one tensor: torch.save writes what shares a storage once."""
    own = weights[alias]
    return [name for name, ref in weights.items() if name != alias and ref.chunks == own.chunks]


CHECKS: tuple[Callable[[ZeroFolder], Iterator[Finding]], ...] = (
    slice_mappings,
    paddings,
    moments,
    second_moment,
    same_on_all_ranks,
    counters,
    scheduler,
    shapes,
    frozen_shapes,
    dtypes,
    required_fields,
    plausible_settings,
    module_names,
    tied_weights,
)
