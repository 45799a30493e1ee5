"""Counters, scheduler and settings: do they fit together, and could training go on with them?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ckpttools.containers import fields
from ckpttools.containers.pickles import Node, Object, plain
from ckpttools.errors import escape
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.formats.zero.checks.found import found
from ckpttools.formats.zero.checks.ranks import steps
from ckpttools.formats.zero.decode import Rank
from ckpttools.formats.zero.join import ZeroFolder


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
        yield found("counter-mismatch", folder.model.file.path, "global_steps", text, severity=INFO)
        return
    yield found(
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
        if root.get("lr_scheduler") is None and (kind := _configured(root)) is not None:
            yield found(
                "scheduler-missing",
                folder.model.file.path,
                "lr_scheduler",
                f"is None, while ds_config asks for {kind}: DeepSpeed builds it, and fails to load its state",
                hint="use another checkpoint, or load it with load_lr_scheduler_states=False",
            )
        return
    yield from _scheduler_position(folder, state)
    last = state.get("_last_lr")
    if hyper is None or not isinstance(last, list) or len(last) != len(hyper):
        return
    for g, (value, group) in enumerate(zip(last, hyper, strict=True)):
        stated, lr = fields.number(value), fields.number(group.get("lr"))
        if stated is not None and lr is not None and not math.isclose(stated, lr, rel_tol=1e-6):
            yield found(
                "scheduler-mismatch",
                folder.model.file.path,
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
        yield found(
            "scheduler-mismatch",
            folder.model.file.path,
            "lr_scheduler.last_batch_iteration",
            f"is {last}, where {done} steps ({skipped} skipped) make it {steps - 1}: the schedule would go "
            "on from another place than the weights",
            severity=WARNING,
            hint="normal where the schedule was restarted or stepped by hand; else use another checkpoint",
        )


def plausible_settings(folder: ZeroFolder) -> Iterator[Finding]:
    """Settings that an update computes with: numbers, and in the range where the arithmetic is defined."""
    holders: dict[tuple[str, str, str], list[Rank]] = {}
    for rank in folder.ranks:
        for where, value, severity in _odd_settings(rank):
            holders.setdefault((where, escape(repr(plain(value)), 80), severity), []).append(rank)
    for (where, value, severity), ranks in holders.items():
        all_ranks = f" on all {len(ranks)} ranks" if len(ranks) == len(folder.ranks) > 1 else ""
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


def _odd_settings(rank: Rank) -> Iterator[tuple[str, Node, str]]:
    scaler = rank.state.get("loss_scaler")
    if isinstance(scaler, Object) and (state := fields.as_mapping(scaler.state)) is not None:
        scale = fields.number(state.get("cur_scale"))
        if scale is not None and not 0 < scale < math.inf:
            yield "loss_scaler.cur_scale", scale, WARNING
    for g, group in enumerate(rank.hyper or ()):
        for key, value, severity in _odd(group):
            yield f"param_groups[{g}].{key}", value, severity


def _odd(group: fields.Mapping) -> Iterator[tuple[str, Node, str]]:
    """What of a param_group cannot be, and how bad that is: torch computes with it, or raises."""
    if "lr" in group:
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
    for key in ("eps", "weight_decay"):
        value = fields.number(group.get(key))
        if value is not None and not 0 <= value < math.inf:
            yield key, value, WARNING
