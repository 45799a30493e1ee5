"""Checks on the headers of a ZeRO-3 folder: does each file fit its name, and do all fit together?

There is no 16-bit copy to hold the masters against, as stages 1 and 2 have: a shard of another run at the
same step is seen by what its names, sizes and settings say, and by nothing else. The padding after a
parameter is not looked at: DeepSpeed does not always clear it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ckpttools.containers import fields
from ckpttools.containers.edit import alike
from ckpttools.containers.pickles import Node, plain
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import escape
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.formats.deepspeed import settings_of, sub_group_size
from ckpttools.formats.engine import Engine, check_engine, number_of
from ckpttools.formats.engine import Shard as EngineShard
from ckpttools.formats.files import Attempts, archive_roots, check_files
from ckpttools.formats.format import Checked
from ckpttools.formats.found import contradiction, found, missing
from ckpttools.formats.model_states import read_stated
from ckpttools.formats.rank_files import FLAT, PADDED
from ckpttools.formats.rank_local import finding
from ckpttools.formats.zero3.cuts import sub_groups
from ckpttools.formats.zero3.decode import Shard, read_shard
from ckpttools.formats.zero3.join import Zero3Folder, assemble
from ckpttools.formats.zero3.names import find
from ckpttools.formats.zero3.read import checkpoint
from ckpttools.location import Location
from ckpttools.tensors import TensorRef

Findings = Iterator[Finding]
MODEL_KEYS = (
    "global_steps", "skipped_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_version",
    "lr_scheduler", "buffer_names",
)  # fmt: skip
SHARD_KEYS = ("zero_stage", "loss_scaler", "dynamic_loss_scale", "overflow", "partition_count")


def check(path: Location) -> Checked:
    """Each file by itself, then all together. Raises CkptError where the names of the files do not fit."""
    attempt, files = Attempts(), find(path)
    models = [attempt(lambda p=p, r=r: read_stated(p, r)) for r, p in files.model.items()]  # type: ignore[misc]
    shards = [attempt(lambda p=p, r=r: read_shard(p, r)) for r, p in files.optim.items()]  # type: ignore[misc]
    whole_models = [model for model in models if model is not None]
    whole_shards = [shard for shard in shards if shard is not None]
    read = [*(model.file for model in whole_models), *(shard.file for shard in whole_shards)]
    attempt.findings[:0] = [*check_files(read), *archive_roots(read)]
    if len(read) < len(models) + len(shards):
        return Checked(attempt.findings, None, read)
    folder = attempt(lambda: assemble(files, whole_models, whole_shards))
    if folder is None:
        return Checked(attempt.findings, None, read)
    for each in CHECKS:
        attempt.findings += each(folder)
    return Checked(attempt.findings, attempt(lambda: checkpoint(folder)), read, padded=PADDED)


def same_on_all_ranks(folder: Zero3Folder) -> Findings:
    """What every rank writes for itself, and must be equal: counters, scheduler, scaler, settings."""
    first, head = folder.models[0], folder.shards[0]
    for model in folder.models[1:]:
        for key in MODEL_KEYS:
            yield from _differ(model.file, model.dp_rank, key, model.root.get(key), first.root.get(key))
        if list(model.weights) != list(first.weights):
            other = sorted(set(model.weights) ^ set(first.weights))[:1] or ["their order"]
            yield found("ranks-differ", model.file.path, "module", f"has other names than rank 0: {other[0]}")
    for shard in folder.shards[1:]:
        for key in SHARD_KEYS:
            yield from _differ(shard.file, shard.dp_rank, key, shard.state.get(key), head.state.get(key))
        mine, theirs = (tuple(plain(group) for group in each.groups) for each in (shard, head))
        if not alike(mine, theirs):
            message = f"rank {shard.dp_rank} has other settings than rank 0"
            yield found("ranks-differ", shard.file.path, "param_groups", message)


def _differ(file: TorchFile, rank: int, key: str, mine: Node, theirs: Node) -> Findings:
    if not alike(plain(mine), plain(theirs)):
        says, said = (escape(repr(plain(node)), 80) for node in (mine, theirs))
        yield found("ranks-differ", file.path, key, f"rank {rank} says {says}, rank 0 says {said}")


def states(folder: Zero3Folder) -> Findings:
    """Every rank holds the same kinds of optimizer state, each as long as its masters if cut at all."""
    for s in range(len(folder.shapes)):
        every = {kind for shard in folder.shards for kind in shard.states[s]}
        for shard in folder.shards:
            for kind in sorted(every - shard.states[s].keys()):
                message = f"dp rank {shard.dp_rank} lacks the optimizer state {escape(kind)}, others have it"
                yield found("moment-missing", shard.file.path, f"sub-group {s}", message)
            for kind in sorted(every & shard.states[s].keys()):
                value = shard.states[s][kind].value
                size = value.numel if isinstance(value, TensorRef) else None
                if kind in FLAT and value is not None and size != shard.fp32[s].numel:
                    what = "is no tensor" if size is None else f"has {size} elements"
                    message = f"{what}, where the masters have {shard.fp32[s].numel}"
                    yield found("moment-size", shard.file.path, f"sub-group {s} {kind}", message)
                elif kind in FLAT and isinstance(value, TensorRef) and not value.dtype.is_float:
                    message = f"is {value.dtype}, where DeepSpeed keeps floats"
                    yield found("field-damaged", shard.file.path, f"sub-group {s} {kind}", message)


def of_single_ranks(folder: Zero3Folder) -> Findings:
    """State that is neither cut over the ranks nor the same on all: it fits as many ranks only."""
    for each in folder.unaccounted():
        shard = folder.shards[each.rank]
        leaf = shard.states[each.group].get(each.kind)
        if leaf is not None and each.kind not in {"step", *FLAT}:  # which their own checks name
            yield finding(each, leaf, shard.file.path, "sub-group")


def second_moment(folder: Zero3Folder) -> Findings:
    """Adam keeps exp_avg_sq (Adamax: exp_inf) wherever it keeps exp_avg. An optimizer without any may be
    another; one that lacks it here and there ends at its first update.
    """
    shard = folder.shards[0]
    kept = any({"exp_avg_sq", "exp_inf"} & state.keys() for state in shard.states)
    for g, members in enumerate(shard.members):
        for s in members:
            adam = "eps" in shard.groups[g] and "exp_avg" in shard.states[s]
            if adam and not {"exp_avg_sq", "exp_inf"} & shard.states[s].keys():
                where, message = f"sub-group {s}", "has no exp_avg_sq"
                severity = ERROR if kept else WARNING
                yield found("moment-missing", shard.file.path, where, message, severity=severity)


def steps(folder: Zero3Folder) -> Findings:
    """The optimizer's step: one number on all ranks and sub-groups, and that of the engine's counters."""
    known = [sorted(set(_steps(shard))) for shard in folder.shards]
    for shard, own in zip(folder.shards, known, strict=True):
        if len(own) > 1:
            message = f"the sub-groups have made {' and '.join(f'{n:g}' for n in own)} steps"
            yield found("step-mismatch", shard.file.path, "step", message, severity=WARNING)
        elif own != known[0]:
            made = " and ".join(f"{n:g}" for n in own) or "no"
            theirs = " and ".join(f"{n:g}" for n in known[0]) or "no"
            message = f"dp rank {shard.dp_rank} has made {made} steps, rank 0 {theirs}"
            yield found("step-mismatch", shard.file.path, "step", message)


def _steps(shard: Shard) -> Iterator[float]:
    for state in shard.states:
        number = number_of(state["step"].value) if "step" in state else None
        if number is not None:
            yield number


def names(folder: Zero3Folder) -> Findings:
    """What module names: parameters without elements, and buffers. DeepSpeed loads it strictly."""
    first = folder.models[0]
    for name in folder.trainable:
        if name not in first.weights:
            message = "a trainable parameter is not in module: DeepSpeed cannot load it"
            yield found("tensor-missing", first.file.path, name, message)
    params = folder.trainable.keys() | first.frozen | first.shared.keys()
    for model in folder.models:
        for name in params & model.weights.keys():
            if model.weights[name].numel:
                message = f"{list(model.weights[name].shape)} in module, where ZeRO-3 keeps no element"
                yield found("shape-mismatch", model.file.path, name, message)
        for name in sorted(model.buffers - model.weights.keys()):
            message = "listed as a buffer, and not in module"
            yield found("buffer-missing", model.file.path, name, message, severity=WARNING, hint="")
    known = params | first.buffers
    stray = [n for n in first.weights if n not in known and not n.endswith("_extra_state")]
    if stray:
        message = f"{len(stray)} tensors of module are neither trainable, frozen, shared nor buffers"
        yield found("tensor-unknown", first.file.path, stray[0], message, severity=WARNING, hint="")
    # frozen_param_shapes is there, unless exclude_frozen_parameters was asked for
    all_named = fields.as_mapping(first.root.get("frozen_param_shapes")) is not None
    for alias, owner in first.shared.items():
        if owner in folder.trainable or owner in first.weights:
            continue
        if all_named:
            yield found("tied-mismatch", first.file.path, alias, f"tied to {owner}, which does not exist")
        else:
            message = f"stands for {owner}, which is not in module (exclude_frozen_parameters)"
            yield found("frozen-excluded", first.file.path, alias, message, severity=INFO, hint="")


def groups(folder: Zero3Folder) -> Findings:
    """The sub-groups are those that ds_config's sub_group_size makes."""
    shard = folder.shards[0]
    limit = sub_group_size(settings_of(shard.file, shard.root))
    made = []
    for members in shard.members:
        numels = {n: math.prod(shape) for s in members for n, shape in folder.shapes[s].items()}
        made += sub_groups(numels, folder.ranks, limit)
    if made != [list(folder.shapes[s]) for members in shard.members for s in members]:
        yield found(
            "field-contradicts",
            shard.file.path,
            "ds_config.zero_optimization.sub_group_size",
            f"is {limit}, which makes other sub-groups than the {len(folder.shapes)} of the file: DeepSpeed "
            "loads it only with the setting that made them",
            severity=WARNING,
        )


def fields_present(folder: Zero3Folder) -> Findings:
    """What DeepSpeed writes: it may be missing for a load, and not for its converters."""
    for model in folder.models:
        for name in ("global_steps", "dp_world_size", "ds_version"):
            if name not in model.root:
                yield missing(model.file.path, name)
    for shard in folder.shards:
        for name in ("loss_scaler", "zero_stage", "partition_count"):
            if name not in shard.state:
                yield missing(shard.file.path, f"optimizer_state_dict.{name}")
        config = settings_of(shard.file, shard.root).get("zero_optimization")
        stage = config.get("stage") if isinstance(config, dict) else None
        if isinstance(stage, int) and stage != 3:
            what = f"asks for stage {stage}, and the files are of stage 3"
            yield contradiction(shard.file.path, "ds_config", what)


def engine(folder: Zero3Folder) -> Findings:
    """What holds for all stages."""
    shards = tuple(
        EngineShard(
            file=shard.file,
            state=shard.state,
            hyper=shard.groups,
            steps=tuple(_steps(shard)),
            kinds=frozenset(kind for state in shard.states for kind in state),
        )
        for shard in folder.shards
    )
    model, place = folder.models[0], "optimizer_state_dict.optimizer_state_dict.state"
    yield from check_engine(Engine(model=model.file, root=model.root, shards=shards, kept_in=place))


CHECKS: tuple[Callable[[Zero3Folder], Findings], ...] = (
    same_on_all_ranks,
    states,
    of_single_ranks,
    second_moment,
    steps,
    engine,
    names,
    groups,
    fields_present,
)
