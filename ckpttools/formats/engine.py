"""What a DeepSpeed engine saved beside tensors, of any ZeRO stage: do counters, scheduler and settings fit
together, and could training go on with them?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.pickles import Node, Object, plain
from ckpttools.containers.torch_file import TorchFile, scalar
from ckpttools.errors import escape
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.formats.found import found
from ckpttools.tensors import TensorRef
from ckpttools.tree import Value


class Shard(Struct, frozen=True, kw_only=True):
    """A rank's optimizer file. `steps` are the updates that the optimizer has made, for each of its flat
    vectors, None where it does not count; `kinds` its state, of all of them.
    """

    file: TorchFile
    state: fields.Mapping  # optimizer_state_dict
    hyper: tuple[fields.Mapping, ...] | None  # param_groups; None where the layout has none
    steps: tuple[float | None, ...]
    kinds: frozenset[str]


class Engine(Struct, frozen=True, kw_only=True):
    """A whole folder: the model file, of rank 0 where each has one, and the optimizer files of all ranks."""

    model: TorchFile
    root: fields.Mapping  # of the model file
    shards: tuple[Shard, ...]
    kept_in: str  # where an optimizer file has the optimizer's state

    @property
    def done(self) -> int | None:
        """The updates that were made, by the engine's counters."""
        made = fields.integer(self.root.get("global_steps"))
        return None if made is None else made - self.skipped

    @property
    def skipped(self) -> int:
        return fields.integer(self.root.get("skipped_steps")) or 0


def number_of(value: Value | Node) -> float | None:
    """A step, which optimizers keep as a number or as a tensor of one element."""
    number = scalar(value) if isinstance(value, TensorRef) else fields.number(value)
    return float(number) if number is not None else None


def check_engine(engine: Engine) -> Iterator[Finding]:
    """Every check that holds for all stages."""
    yield from _whole(engine)
    yield from _state_kept(engine)
    yield from _counters(engine)
    yield from _scheduler(engine)
    yield from _plausible_settings(engine)


def _whole(engine: Engine) -> Iterator[Finding]:
    """The files of all model-parallel ranks: without the others' these look like a smaller model's."""
    ranks = fields.integer(engine.root.get("mp_world_size"))
    if ranks is not None and ranks != 1:
        yield found(
            "shard-missing",
            engine.model.path,
            "mp_world_size",
            f"the model lies on {ranks} model-parallel ranks, and the slices of one are here",
            hint="copy the files of every mp_rank from the nodes that wrote them",
        )


def _state_kept(engine: Engine) -> Iterator[Finding]:
    """An optimizer with betas keeps moments from its first step on; DeepSpeed loads none in silence."""
    hyper, done = engine.shards[0].hyper, engine.done or 0
    if done <= 0 or not hyper or not all("betas" in group for group in hyper):
        return
    if not any(shard.kinds - {"step"} for shard in engine.shards):
        yield found(
            "moment-missing",
            engine.shards[0].file.path,
            engine.kept_in,
            f"no rank holds optimizer state after {done} steps: a resume would begin the moments anew",
            hint="use another checkpoint; or go on with fresh moments, and a warmup",
        )


def _counters(engine: Engine) -> Iterator[Finding]:
    """The optimizer's step against the engine's counters: normally global_steps - skipped_steps.

    One more is normal up to DeepSpeed 0.13.1, which made a dummy step at the start. Anything else happens
    when the optimizer was reset on purpose, and when the model file is of another save: the comparison of
    weights tells the two apart.
    """
    done, skipped = fields.integer(engine.root.get("global_steps")), engine.skipped
    known = {step for step in engine.shards[0].steps if step is not None}
    if done is None or not known:
        return
    if max(known) - (done - skipped) in (0, 1):
        return
    counts = f"the model file counts {done} steps ({skipped} skipped), the optimizer made {max(known):g}"
    if _rebased(engine.root, done):
        text = f"{counts}: the checkpoint was rebased to another batch size, and Adam's count goes on"
        yield found("counter-mismatch", engine.model.path, "global_steps", text, severity=INFO)
        return
    yield found(
        "counter-mismatch",
        engine.model.path,
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


def _scheduler(engine: Engine) -> Iterator[Finding]:
    """The scheduler against what it goes with: the engine's counters, and the optimizer's learning rate.

    DeepSpeed's own schedulers save nothing but last_batch_iteration: -1 at first, one more for each step
    that was not skipped. A client's scheduler counts as it likes (accelerate's once per rank, others per
    epoch); where it is one of torch's, its last learning rate is the one that the optimizer goes on with.
    """
    root, hyper = engine.root, engine.shards[0].hyper
    state = fields.as_mapping(root.get("lr_scheduler"))
    if state is None:
        if root.get("lr_scheduler") is None and (kind := _configured(root)) is not None:
            yield found(
                "scheduler-missing",
                engine.model.path,
                "lr_scheduler",
                f"is None, while ds_config asks for {kind}: DeepSpeed builds it, and fails to load its state",
                hint="use another checkpoint, or load it with load_lr_scheduler_states=False",
            )
        return
    yield from _scheduler_position(engine, state)
    last = state.get("_last_lr")
    if hyper is None or not isinstance(last, list) or len(last) != len(hyper):
        return
    for g, (value, group) in enumerate(zip(last, hyper, strict=True)):
        stated, lr = fields.number(value), fields.number(group.get("lr"))
        if stated is not None and lr is not None and not math.isclose(stated, lr, rel_tol=1e-6):
            yield found(
                "scheduler-mismatch",
                engine.model.path,
                f"lr_scheduler._last_lr[{g}]",
                f"the scheduler is at {stated:g}, the optimizer files at {lr:g}",
                severity=WARNING,
                hint="after a resume the first step uses the optimizer's value, later ones the scheduler's",
            )


def _configured(root: fields.Mapping) -> str | None:
    """The scheduler that ds_config names."""
    config = fields.as_mapping(root.get("ds_config"))
    section = fields.as_mapping(config.get("scheduler")) if config is not None else None
    kind = section.get("type") if section is not None else None
    return kind if isinstance(kind, str) else None


def _scheduler_position(engine: Engine, state: fields.Mapping) -> Iterator[Finding]:
    last, steps, skipped = fields.integer(state.get("last_batch_iteration")), engine.done, engine.skipped
    if last is None or steps is None or len(state.names()) != 1:
        return
    # before the first step some versions have stepped the schedule once already, others not
    if last != steps - 1 and not (steps <= 0 and last in (-1, 0)):
        yield found(
            "scheduler-mismatch",
            engine.model.path,
            "lr_scheduler.last_batch_iteration",
            f"is {last}, where {steps + skipped} steps ({skipped} skipped) make it {steps - 1}: the "
            "schedule would go on from another place than the weights",
            severity=WARNING,
            hint="normal where the schedule was restarted or stepped by hand; else use another checkpoint",
        )


def _plausible_settings(engine: Engine) -> Iterator[Finding]:
    """Settings that an update computes with: numbers, and in the range where the arithmetic is defined."""
    holders: dict[tuple[str, str, str], list[Shard]] = {}
    for rank in engine.shards:
        for where, value, severity in _odd_settings(rank):
            holders.setdefault((where, escape(repr(plain(value)), 80), severity), []).append(rank)
    for (where, value, severity), ranks in holders.items():
        all_ranks = f" on all {len(ranks)} ranks" if len(ranks) == len(engine.shards) > 1 else ""
        for rank in ranks[:1] if all_ranks else ranks:
            yield found(
                "setting-implausible",
                rank.file.path,
                where,
                f"is {value}{all_ranks}",
                severity=severity,
                hint="a resume takes it from here, not from the new configuration"
                + (", and fails at its first update" if severity == ERROR else ""),
            )


def _odd_settings(rank: Shard) -> Iterator[tuple[str, Node, str]]:
    scaler = rank.state.get("loss_scaler")
    if isinstance(scaler, Object) and (state := fields.as_mapping(scaler.state)) is not None:
        scale = fields.number(state.get("cur_scale"))
        if scale is not None and not 0 < scale < math.inf:
            yield "loss_scaler.cur_scale", scale, WARNING
    for g, group in enumerate(rank.hyper or ()):
        for key, value, severity in odd_settings(group):
            yield f"param_groups[{g}].{key}", value, severity


def odd_settings(group: fields.Mapping | Mapping[str, Any]) -> Iterator[tuple[str, Node, str]]:
    """What of a param_group cannot be, and how bad that is: torch computes with it, or raises."""
    if "lr" in group and not group.get("relative_step"):  # Adafactor then finds one itself
        lr = group.get("lr")
        value = fields.number(lr)
        if value is None:
            if isinstance(lr, str | list | tuple) or lr is None:
                yield "lr", lr, ERROR
        elif not 0 <= value < math.inf:
            yield "lr", value, WARNING
    betas = group.get("betas")
    for i, beta in enumerate(betas if isinstance(betas, list | tuple) else ()):
        value = fields.number(beta)
        if (value is None and isinstance(beta, str)) or (value is not None and not 0 <= value < 1):
            yield f"betas[{i}]", beta, ERROR
    # Adam divides by eps, and by the gradients beside it: next to this one they are nothing
    for key, most in (("eps", 1e4), ("weight_decay", math.inf)):
        given = group.get(key)
        value = fields.number(given)
        if value is not None and not 0 <= value < most:
            yield key, value, WARNING
        elif key in group and "betas" in group and (given is None or isinstance(given, str)):
            yield key, given, ERROR
    decay = fields.number(group.get("weight_decay"))
    rates = [fields.number(group.get(key)) for key in ("lr", "initial_lr")]
    lr = max((rate for rate in rates if rate is not None and 0 < rate < math.inf), default=None)
    # an update multiplies weights by 1 - lr * decay; some optimizers scale that down by a factor of their own
    if decay is not None and lr is not None and max(1, 2 / lr) < decay < math.inf and "d" not in group:
        yield "weight_decay", decay, WARNING
