"""Checks on the headers of a ZeRO-3 folder: does each file fit its name, and do all fit together?

There is no 16-bit copy to hold the masters against, as stages 1 and 2 have: a shard of another run at the
same step is seen by what its names, sizes and settings say, and by nothing else. The padding after a
parameter is not looked at: DeepSpeed does not always clear it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import TypeVar

from ckpttools.containers import fields
from ckpttools.containers.pickles import Node, plain
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, escape
from ckpttools.findings import ERROR, INFO, WARNING, Finding, of_error
from ckpttools.formats.deepspeed import settings_of
from ckpttools.formats.files import Attempts, archive_roots, check_files
from ckpttools.formats.format import Checked
from ckpttools.formats.zero3.cuts import sub_group_size, sub_groups
from ckpttools.formats.zero3.decode import Leaf, Model, Shard, read_model, read_shard
from ckpttools.formats.zero3.join import ONE_SAVE, Zero3Folder, assemble
from ckpttools.formats.zero3.names import find
from ckpttools.formats.zero3.read import checkpoint
from ckpttools.location import Location
from ckpttools.stores.files import bytes_of
from ckpttools.tensors import ByteRange, TensorRef

T = TypeVar("T")
Findings = Iterator[Finding]
# moments of torch's and DeepSpeed's optimizers, which are always as long as the rank's masters
FLAT = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "momentum_buffer"}
SCALARS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}  # dtypes of a step
MODEL_KEYS = (
    "global_steps", "skipped_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_version",
    "lr_scheduler", "buffer_names",
)  # fmt: skip
SHARD_KEYS = ("zero_stage", "loss_scaler", "dynamic_loss_scale", "overflow", "partition_count")


def check(path: Location) -> Checked:
    """Every finding, the checkpoint if it can be put together, and the files that could be read."""
    attempt = Attempts()
    try:
        files = find(path)
    except CkptError as error:
        if error.exit_code != 1:
            raise
        return Checked([of_error(error)], None, [])
    models = [attempt(lambda p=p, r=r: read_model(p, r)) for r, p in files.model.items()]  # type: ignore[misc]
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
    return Checked(attempt.findings, attempt(lambda: checkpoint(folder)), read)


def _found(
    id: str, file: TorchFile, where: str, message: str, *, severity: str = ERROR, hint: str = ONE_SAVE
) -> Finding:
    return Finding(id=id, severity=severity, file=str(file.path), where=where, message=message, hint=hint)


def same_on_all_ranks(folder: Zero3Folder) -> Findings:
    """What every rank writes for itself, and must be equal: counters, scheduler, scaler, settings."""
    first, head = folder.models[0], folder.shards[0]
    for model in folder.models[1:]:
        for key in MODEL_KEYS:
            yield from _differ(model.file, model.dp_rank, key, model.root.get(key), first.root.get(key))
        if list(model.module) != list(first.module):
            other = sorted(set(model.module) ^ set(first.module))[:1] or ["their order"]
            yield _found("ranks-differ", model.file, "module", f"has other names than rank 0: {other[0]}")
    for shard in folder.shards[1:]:
        for key in SHARD_KEYS:
            yield from _differ(shard.file, shard.dp_rank, key, shard.state.get(key), head.state.get(key))
        mine, theirs = (tuple(plain(group) for group in each.groups) for each in (shard, head))
        if mine != theirs:
            message = f"rank {shard.dp_rank} has other settings than rank 0"
            yield _found("ranks-differ", shard.file, "param_groups", message)


def _differ(file: TorchFile, rank: int, key: str, mine: Node, theirs: Node) -> Findings:
    if plain(mine) != plain(theirs):
        says, said = (escape(repr(plain(node)), 80) for node in (mine, theirs))
        yield _found("ranks-differ", file, key, f"rank {rank} says {says}, rank 0 says {said}")


def states(folder: Zero3Folder) -> Findings:
    """Every rank holds the same kinds of optimizer state, each as long as its masters if cut at all."""
    for s in range(len(folder.shapes)):
        every = {kind for shard in folder.shards for kind in shard.states[s]}
        for shard in folder.shards:
            for kind in sorted(every - shard.states[s].keys()):
                message = f"dp rank {shard.dp_rank} lacks the optimizer state {escape(kind)}, others have it"
                yield _found("moment-missing", shard.file, f"sub-group {s}", message)
            for kind in sorted(every & shard.states[s].keys()):
                value = shard.states[s][kind].value
                size = value.numel if isinstance(value, TensorRef) else None
                if kind in FLAT and value is not None and size != shard.fp32[s].numel:
                    what = "is no tensor" if size is None else f"has {size} elements"
                    message = f"{what}, where the masters have {shard.fp32[s].numel}"
                    yield _found("moment-size", shard.file, f"sub-group {s} {kind}", message)


def second_moment(folder: Zero3Folder) -> Findings:
    """Adam keeps exp_avg_sq wherever it keeps exp_avg."""
    shard = folder.shards[0]
    for g, members in enumerate(shard.members):
        for s in members:
            adam = "eps" in shard.groups[g] and "exp_avg" in shard.states[s]
            if adam and "exp_avg_sq" not in shard.states[s]:
                where, message = f"sub-group {s}", "has no exp_avg_sq"
                yield _found("moment-missing", shard.file, where, message, severity=WARNING)


def state_kept(folder: Zero3Folder) -> Findings:
    """An optimizer with betas keeps moments from its first step on; DeepSpeed loads none in silence."""
    shard, done = folder.shards[0], _done(folder.models[0])
    if done is None or done <= 0 or not all("betas" in group for group in shard.groups):
        return
    if not any(set(state) - {"step"} for each in folder.shards for state in each.states):
        yield _found(
            "moment-missing",
            shard.file,
            "optimizer_state_dict.optimizer_state_dict.state",
            f"no rank holds optimizer state after {done} steps: a resume would begin the moments anew",
            hint="use another checkpoint; or go on with fresh moments, and a warmup",
        )


def _done(model: Model) -> int | None:
    """The updates that were made, by the engine's counters."""
    made = fields.integer(model.root.get("global_steps"))
    return None if made is None else made - (fields.integer(model.root.get("skipped_steps")) or 0)


def steps(folder: Zero3Folder) -> Findings:
    """The optimizer's step: one number on all ranks and sub-groups, and that of the engine's counters."""
    known = [sorted(set(_steps(shard))) for shard in folder.shards]
    for shard, own in zip(folder.shards, known, strict=True):
        if len(own) > 1:
            message = f"the sub-groups have made {' and '.join(f'{n:g}' for n in own)} steps"
            yield _found("step-mismatch", shard.file, "step", message, severity=WARNING)
        elif own != known[0]:
            made = " and ".join(f"{n:g}" for n in own) or "no"
            theirs = " and ".join(f"{n:g}" for n in known[0]) or "no"
            message = f"dp rank {shard.dp_rank} has made {made} steps, rank 0 {theirs}"
            yield _found("step-mismatch", shard.file, "step", message)
    model, done = folder.models[0], _done(folder.models[0])
    if done is None or not known[0] or max(known[0]) - done in (0, 1):
        return
    mark = fields.as_mapping(model.root.get("ckpttools_rebase"))
    rebased = mark is not None and mark.get("count") == model.root.get("global_steps")
    yield _found(
        "counter-mismatch",
        model.file,
        "global_steps",
        f"the model file counts {done} updates, the optimizer made {max(known[0]):g}: it was reset, the run "
        "was rebased to another batch size, or the files are of different saves",
        severity=INFO if rebased else WARNING,
    )


def _steps(shard: Shard) -> Iterator[float]:
    for state in shard.states:
        number = _number(state["step"]) if "step" in state else None
        if number is not None:
            yield number


def _number(leaf: Leaf) -> float | None:
    value = leaf.value
    if isinstance(value, TensorRef):
        form = SCALARS.get(value.dtype.name)
        if form is None or value.numel != 1 or not isinstance(value.chunks[0], ByteRange):
            return None
        return float(struct.unpack(form, bytes_of(value.chunks[0]))[0])
    number = fields.number(value)
    return float(number) if number is not None else None


def scheduler(folder: Zero3Folder) -> Findings:
    """DeepSpeed's own schedulers save last_batch_iteration: one less than the updates that were made."""
    model, done = folder.models[0], _done(folder.models[0])
    settings = settings_of(model.file, model.root).get("scheduler")
    kind = settings.get("type") if isinstance(settings, dict) else None
    state = fields.as_mapping(model.root.get("lr_scheduler"))
    if state is None:
        if isinstance(kind, str) and model.root.get("lr_scheduler") is None:
            message = f"is None, while ds_config asks for {escape(kind)}: DeepSpeed fails to load its state"
            hint = "use another checkpoint, or load it with load_lr_scheduler_states=False"
            yield _found("scheduler-missing", model.file, "lr_scheduler", message, hint=hint)
        return
    last = fields.integer(state.get("last_batch_iteration"))
    if last is None or done is None or len(state.names()) != 1:
        return
    if last != done - 1 and not (done <= 0 and last in (-1, 0)):
        yield _found(
            "scheduler-mismatch",
            model.file,
            "lr_scheduler.last_batch_iteration",
            f"is {last}, where {done} updates make it {done - 1}: the schedule would go on from another "
            "place than the weights",
            severity=WARNING,
            hint="normal where the schedule was restarted or stepped by hand; else use another checkpoint",
        )


def names(folder: Zero3Folder) -> Findings:
    """What module names: parameters without elements, and buffers. DeepSpeed loads it strictly."""
    first = folder.models[0]
    for name in folder.trainable:
        if name not in first.module:
            message = "a trainable parameter is not in module: DeepSpeed cannot load it"
            yield _found("tensor-missing", first.file, name, message)
    params = folder.trainable.keys() | first.frozen.keys() | first.shared.keys()
    for model in folder.models:
        for name in params & model.module.keys():
            if model.module[name].numel:
                message = f"{list(model.module[name].shape)} in module, where ZeRO-3 keeps no element"
                yield _found("shape-mismatch", model.file, name, message)
        for name in sorted(model.buffers - model.module.keys()):
            message = "listed as a buffer, and not in module"
            yield _found("buffer-missing", model.file, name, message, severity=WARNING, hint="")
    known = params | first.buffers
    stray = [n for n in first.module if n not in known and not n.endswith("_extra_state")]
    if stray:
        message = f"{len(stray)} tensors of module are neither trainable, frozen, shared nor buffers"
        yield _found("tensor-unknown", first.file, stray[0], message, severity=WARNING, hint="")
    for alias, owner in first.shared.items():
        if owner not in folder.trainable and owner not in first.module:
            yield _found("tied-mismatch", first.file, alias, f"tied to {owner}, which does not exist")


def groups(folder: Zero3Folder) -> Findings:
    """The sub-groups are those that ds_config's sub_group_size makes."""
    shard = folder.shards[0]
    limit = sub_group_size(settings_of(shard.file, shard.root))
    made = []
    for members in shard.members:
        numels = {n: math.prod(shape) for s in members for n, shape in folder.shapes[s].items()}
        made += sub_groups(numels, folder.ranks, limit)
    if made != [list(folder.shapes[s]) for members in shard.members for s in members]:
        yield _found(
            "field-contradicts",
            shard.file,
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
                yield _missing(model.file, name)
    for shard in folder.shards:
        for name in ("loss_scaler", "zero_stage", "partition_count"):
            if name not in shard.state:
                yield _missing(shard.file, f"optimizer_state_dict.{name}")
        config = settings_of(shard.file, shard.root).get("zero_optimization")
        stage = config.get("stage") if isinstance(config, dict) else None
        if isinstance(stage, int) and stage != 3:
            message = f"asks for stage {stage}, and the files are of stage 3"
            yield _found("field-contradicts", shard.file, "ds_config", message, severity=WARNING)


def _missing(file: TorchFile, field: str) -> Finding:
    message = "DeepSpeed writes this field, and it is not there"
    return _found("field-missing", file, field, message, severity=WARNING, hint="")


def settings(folder: Zero3Folder) -> Findings:
    """Learning rates that an update can compute with."""
    for shard in folder.shards:
        for g, group in enumerate(shard.groups):
            lr = fields.number(group.get("lr"))
            if lr is not None and not 0 <= lr < math.inf:
                yield _found(
                    "setting-implausible",
                    shard.file,
                    f"param_groups[{g}].lr",
                    f"is {lr}",
                    severity=WARNING,
                    hint="a resume takes it from here, not from the new configuration",
                )


CHECKS: tuple[Callable[[Zero3Folder], Findings], ...] = (
    same_on_all_ranks,
    states,
    second_moment,
    state_kept,
    steps,
    scheduler,
    names,
    groups,
    fields_present,
    settings,
)
