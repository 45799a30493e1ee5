"""One format into another, with the optimizer's state, the schedule and the counters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from ckpttools.checkpoint import Checkpoint, Layout, ParamGroup
from ckpttools.checks import check_before_use
from ckpttools.errors import UsageError, escape
from ckpttools.formats import PLANS, refuse_rank_local
from ckpttools.operations import advice
from ckpttools.operations.extract import with_config
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.plan import Literal as Bytes
from ckpttools.plan import OutputFile, Plan
from ckpttools.tensors import FLOAT32, DType, TensorRef
from ckpttools.transforms.cast import DTYPE_NAMES, cast, castable
from ckpttools.transforms.optimizers import for_class
from ckpttools.transforms.rename import rename as renamed
from ckpttools.transforms.reshard import check_ranks, ranks_of, without_positions
from ckpttools.transforms.select import select, weights_only
from ckpttools.tree import at, put

Target = Literal["pt", "zero1", "zero2", "dcp", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)
FP32 = "fp32"


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Target,
    world_size: int | None = None,
    dtype: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    rename: Iterable[tuple[str, str]] = (),
    reset_optimizer: bool = False,
    optimizer_class: str | None = None,
    mesh: str | None = None,
    dcp_layout: str | None = None,
    tag: str | None = None,
    how: Writing | None = None,
) -> Written:
    """Write a checkpoint in another format. The notes name everything that the format cannot hold.

    `to` is "pt" (one file), "zero1" or "zero2" (a DeepSpeed folder for `world_size` ranks), "dcp" (for
    `world_size` ranks or a `mesh` of them, "2x4", as rows) or "hf" (weights). `dtype` is that of the weights;
    masters and moments stay as they are. `rename` are regular expressions and replacements. `optimizer_class`
    is the class that will load the groups, `dcp_layout` one of formats.dcp's.

    >>> made = convert("fixtures/trainer/z2_bf16_2", out / "run.pt", to="pt")
    >>> made.destination.name, made.plan.is_single_file
    ('run.pt', True)
    """
    src, dst = Path(src), Path(dst)
    _check_usage(to, dtype, world_size, mesh, dcp_layout)
    world_size, sizes = ranks_of(world_size, mesh)
    source = find(src, tag)
    checkpoint = check_before_use(source)
    read = checkpoint.notes
    checkpoint = select(checkpoint, include=include, exclude=exclude)
    for pattern, replacement in rename:
        checkpoint = _renamed(checkpoint, pattern, replacement)
    notes: list[str] = []
    if to != "hf" and not reset_optimizer:
        refuse_rank_local(checkpoint)
    if reset_optimizer:
        checkpoint = _reset(checkpoint)
        notes.append("the optimizer's state is left out, as asked for: it starts anew from these settings")
    if to != checkpoint.layout.format or optimizer_class is not None:
        checkpoint = for_class(checkpoint, optimizer_class)
    target = DTYPE_NAMES[dtype] if dtype is not None else None
    ranks = world_size or checkpoint.layout.dp_degree
    match to:
        case "pt":
            plan = PLANS[to](_single(checkpoint, target), Layout(format="pt"))
        case "dcp":
            layout = Layout(format="dcp", dp_degree=world_size or 1, mesh=sizes, variant=dcp_layout)
            if world_size is not None:
                checkpoint, left = without_positions(checkpoint, sizes[0] if sizes else world_size)
                notes += left
            if dcp_layout is not None:  # its own keys, not the source's
                checkpoint = replace(checkpoint, template=None)
            plan = PLANS[to](_single(checkpoint, target), layout)
        case "hf":
            checkpoint = weights_only(checkpoint)
            checkpoint = cast(checkpoint, target) if target is not None else checkpoint
            plan = with_config(PLANS[to](checkpoint, Layout(format="hf")), None, source.root)
        case "zero1" | "zero2":
            plan = _zero(checkpoint, int(to[-1]), ranks, target)
            if optimizer_class is None and checkpoint.groups:
                notes.append(
                    "steps are tensors, as torch's optimizers keep them; for DeepSpeed's own: "
                    "--optimizer-class FusedAdam or DeepSpeedCPUAdam"
                )
    made = (note for note in checkpoint.notes if note not in read)
    plan = replace(plan, notes=(*made, *plan.notes, *notes))
    next = advice.converted(to, dst, ranks, dcp_layout)
    return carry_out(src, dst, plan, how or Writing(), label="convert", next=next)


def _check_usage(
    to: str, dtype: str | None, world_size: int | None, mesh: str | None, dcp_layout: str | None
) -> None:
    """Options that do not fit together are refused, not passed over."""
    if to not in TARGETS:
        raise UsageError(
            "bad-usage",
            f"'{escape(to)}' is not a format that ckpt writes",
            hint=f"choose from {', '.join(TARGETS)}",
        )
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(
            "bad-usage", f"'{escape(dtype)}' is not a dtype", hint=f"choose from {', '.join(DTYPE_NAMES)}"
        )
    if world_size is not None:
        check_ranks(world_size)
    if mesh is not None and to != "dcp":
        raise UsageError("bad-usage", "--mesh is for --to dcp", hint="--world-size N, or --to dcp")
    if world_size is not None and to in ("pt", "hf"):
        raise UsageError(
            "bad-usage", f"{to} files are for any number of ranks", hint="leave out --world-size"
        )
    if dcp_layout is not None and to != "dcp":
        raise UsageError("bad-usage", "--dcp-layout is for --to dcp", hint="leave it out, or use --to dcp")


def _reset(checkpoint: Checkpoint) -> Checkpoint:
    def fresh(group: ParamGroup) -> ParamGroup:
        masters = {kind: refs for kind, refs in group.state.items() if kind == FP32}
        return replace(group, state=masters, scalars={}, paths={})

    return replace(checkpoint, groups=tuple(fresh(group) for group in checkpoint.groups))


def _renamed(checkpoint: Checkpoint, pattern: str, replacement: str) -> Checkpoint:
    """One rule: a regular expression and what takes its place in every name (`\\1` for a group of it)."""
    rule = f"{escape(pattern)}={escape(replacement)}"
    try:
        if not any(re.search(pattern, name) for name in checkpoint.tensors):
            raise UsageError(
                "bad-usage",
                f"'{rule}' fits no name",
                where=checkpoint.path,
                hint=f"the first name is {escape(next(iter(checkpoint.tensors), ''))}; "
                "ckpt inspect --tensors lists them",
            )
        return renamed(checkpoint, lambda name: re.sub(pattern, replacement, name))
    except (re.error, IndexError) as error:
        raise UsageError(
            "bad-usage",
            f"'{rule}' is no renaming: {escape(error)}",
            hint=r"a regular expression, = and its replacement: --rename '^model\.='",
        ) from error


def _single(checkpoint: Checkpoint, dtype: DType | None) -> Checkpoint:
    """One copy of each weight in the dtype that is asked for, where one is."""
    if dtype is None:
        return checkpoint
    made = cast(checkpoint, dtype)
    return replace(made, groups=tuple(replace(group, state=_moments(group)) for group in made.groups))


def _zero(checkpoint: Checkpoint, stage: int, ranks: int, dtype: DType | None) -> Plan:
    """A new DeepSpeed folder: fp32 masters from the best copy, a plain layout, and `latest`."""
    best, old = checkpoint.best_copies(), checkpoint.layout
    groups = tuple(
        replace(
            group,
            state={FP32: {name: _master(best[name]) for name in group.params}, **_moments(group)},
        )
        for group in checkpoint.groups
    )
    if dtype is not None:
        checkpoint = cast(checkpoint, dtype)
    short = checkpoint.layout.dtype
    settings = checkpoint.settings
    if at(settings, "zero_optimization", "stage") is not None:
        settings = put(settings, ("zero_optimization", "stage"), stage)
    tag = f"global_step{checkpoint.train_state.step or 0}"
    layout = Layout(
        format=f"zero{stage}", zero_stage=stage, dp_degree=ranks, tag=tag, dtype=short, writer=old.writer
    )
    if old.zero_stage is None:  # no number of ranks to keep the batch of
        old = replace(old, dp_degree=ranks)
    made = replace(checkpoint, groups=groups, settings=settings, layout=old, template=None)
    plan = PLANS[layout.format](made, layout)
    files = tuple(replace(file, path=f"{tag}/{file.path}") for file in plan.files)
    return replace(plan, files=(*files, OutputFile(path="latest", segments=(Bytes(tag.encode()),))))


def _master(ref: TensorRef) -> TensorRef:
    return ref.cast(FLOAT32) if castable(ref.dtype) else ref


def _moments(group: ParamGroup) -> dict[str, dict[str, TensorRef]]:
    return {kind: dict(refs) for kind, refs in group.state.items() if kind != FP32}
