"""One format into another, with the optimizer's state, the schedule and the counters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from msgspec.structs import replace

from ckpttools import frameworks
from ckpttools.checkpoint import EXCLUDES_FROZEN, STEP, Checkpoint, Layout, ParamGroup
from ckpttools.checks import check_before_use
from ckpttools.errors import CkptError, Unsupported, UsageError, escape, some
from ckpttools.formats import FORMATS, PLANS, Source, read, refuse_rank_local, torch_optimizer
from ckpttools.formats.configs import DIFFUSERS, HEADS
from ckpttools.formats.deepspeed import SLICED, slices
from ckpttools.formats.format import Places
from ckpttools.formats.notes import by_name, counts, not_read
from ckpttools.location import Location
from ckpttools.operations import advice, kept, resuming
from ckpttools.operations.beside import left_behind
from ckpttools.operations.convertible import lacks, needs_names, needs_state, needs_weights, refuse_unnamed
from ckpttools.operations.deepspeed_folder import UNIVERSAL, moments, prepared
from ckpttools.operations.deepspeed_folder import plan as folder_plan
from ckpttools.operations.extract import with_config
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.stores.files import named
from ckpttools.tensors import DType, TensorRef
from ckpttools.transforms.cast import cast, dtype_named
from ckpttools.transforms.like import like as like_of
from ckpttools.transforms.like import matched_names
from ckpttools.transforms.optimizers import anew, for_class, refuse_quantised
from ckpttools.transforms.rename import rename as rename_all
from ckpttools.transforms.rename import unwrapped
from ckpttools.transforms.reshard import check_ranks, ranks_of, without_positions
from ckpttools.transforms.select import select, weights_only

Target = Literal["pt", "zero0", "zero1", "zero2", "zero3", "universal", "dcp", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)
PREPARED = ("zero0", "zero1", "zero2", "zero3", UNIVERSAL)  # DeepSpeed's


def convert(
    src: str | Location,
    dst: str | Location,
    *,
    to: Target,
    world_size: int | None = None,
    dtype: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    rename: Iterable[tuple[str, str]] = (),
    reset_optimizer: bool = False,
    optimizer_class: str | None = None,
    like: str | Path | None = None,
    mesh: str | None = None,
    dcp_layout: str | None = None,
    hf_config: str | Path | None = None,
    tag: str | None = None,
    key: str | None = None,
    digest: bool | None = None,
    how: Writing | None = None,
) -> Written:
    """Write a checkpoint in another format. The notes name everything that the format cannot hold.

    `to` is "pt" (one file), "zero1", "zero2" or "zero3" (a DeepSpeed folder for `world_size` ranks), "zero0"
    or "universal" (one for any number), "dcp" (for `world_size` ranks or a `mesh` of them, "2x4", as rows) or
    "hf" (weights). `dtype` is that of the weights; masters and moments stay as they are. `rename` are regular
    expressions and replacements.
    `optimizer_class` is the class that will load the groups; `like` a checkpoint of the run that will, whose
    names, groups, settings and dtype are taken. `dcp_layout` is one of formats.dcp's. `hf_config` is the
    folder that "hf" copies configuration and tokenizer from, where they are not beside the source. `key` as
    for `extract`, `digest` as for `reshard`: the result must hold what was to be written.

    >>> made = convert("fixtures/trainer/z2_bf16_2", out / "run.pt", to="pt")
    >>> made.destination.name, made.plan.is_single_file
    ('run.pt', True)
    """
    src, dst = named(src), named(dst)
    _check_usage(to, dtype, world_size, mesh, dcp_layout, hf_config, like, optimizer_class)
    world_size, sizes = ranks_of(world_size, mesh)
    source = replace(find(src, tag), key=key)
    how = how or Writing()
    checkpoint = check_before_use(source, only_looks=how.dry_run)
    if source.format.weights_alone and to != "hf" and not reset_optimizer:
        raise Unsupported(
            "layout-unsupported",
            f"of a {source.format.name} folder the weights alone are read",
            where=source.target,
            why="its optimizer's state would be lost",
            hint="--to hf, or --reset-optimizer to begin the optimizer anew",
        )
    read, saved = checkpoint.notes, torch_optimizer.of(checkpoint)
    checkpoint, counted = _counted(checkpoint, source)
    notes = [
        *slices(checkpoint.client.get(SLICED)),
        *left_behind(source),
        *not_read(checkpoint),
        *counted,
    ]
    names, said = list(checkpoint.tensors), _order(saved)
    include, exclude, rename = tuple(include), tuple(exclude), tuple(rename)
    asked = {"--include": include, "--exclude": exclude, "--rename": rename, "--dtype": dtype}
    options = [option for option, given in asked.items() if given]
    checkpoint = select(checkpoint, include=include, exclude=exclude)
    selected = list(checkpoint.tensors)
    for pattern, replacement in rename:
        checkpoint = _renamed(checkpoint, pattern, replacement)
    if to != "hf" and not reset_optimizer:
        refuse_rank_local(checkpoint)
    if like is not None:
        other = check_before_use(find(Path(like), None))
        if saved is not None and (saved.by_place or not saved.groups) and not reset_optimizer:
            called = dict(zip(selected, checkpoint.tensors, strict=True))
            checkpoint, said = _ordered(checkpoint, source, other, called)
        checkpoint = like_of(checkpoint, other, fresh=reset_optimizer)
        if to in PREPARED or not other.master:  # else that run's single copy would be the masters, too
            dtype = dtype or other.layout.dtype
    notes[:0] = said
    if reset_optimizer:
        checkpoint = anew(checkpoint)
        anew_from = ": they start anew from these settings" if checkpoint.groups else ""
        notes.append(f"optimizer and schedule are left out, as asked for{anew_from}")
    checkpoint = _saying_what_is_left_out(checkpoint)
    if (to in PREPARED) != (checkpoint.layout.zero_stage is not None) or to == "dcp":
        checkpoint = _one_schedule(checkpoint)
    if to != "hf" and list(checkpoint.tensors) != names:
        refuse_unnamed(checkpoint)
    if to == "pt" and checkpoint.layout.format != to:  # which every reader of such a file removes
        checkpoint, removed = unwrapped(checkpoint, torch_optimizer.PREFIXES)
        notes += [f"the prefix '{removed}' of every name was removed"] if removed else []
    if to not in ("pt", "hf") and not reset_optimizer:
        needs_names(checkpoint)
    if to not in ("dcp", "hf"):
        needs_weights(checkpoint)
    if to in PREPARED and not reset_optimizer:
        needs_state(checkpoint)
    if to.startswith("zero") or to == UNIVERSAL or world_size is not None:
        refuse_quantised(checkpoint)
    if like is None and (to != checkpoint.layout.format or optimizer_class is not None):
        checkpoint = for_class(checkpoint, optimizer_class)
    if to != "hf" and dcp_layout != "accelerate":  # these have no place for them, which is said
        notes += by_name(checkpoint.client, {*names}, options)
    if to in ("pt", "dcp"):
        notes += _replaced(checkpoint)
    lacking = None if reset_optimizer or to not in ("pt", "dcp") else lacks(checkpoint)
    if lacking is not None:
        notes.append(f"{lacking}: no torch optimizer goes on from that, and no line below loads it")
    target = dtype_named(dtype)
    ranks = world_size or checkpoint.layout.ranks or checkpoint.layout.dp_degree
    match to:
        case "pt":
            checkpoint = _single(checkpoint, target)
            layout = Layout(format="pt")
            plan = PLANS[to](checkpoint, layout)
            keys = _keys(to, checkpoint, layout)
            lines = resuming.single_file(checkpoint, dst, keys, optimizer=lacking is None)
        case "dcp":
            layout = Layout(format="dcp", dp_degree=world_size or 1, mesh=sizes, variant=dcp_layout)
            if world_size is not None:
                checkpoint, left = without_positions(checkpoint, sizes[0] if sizes else world_size)
                notes += left
            if dcp_layout is not None:  # its own keys, not the source's
                checkpoint = replace(checkpoint, template=None)
            checkpoint = _single(checkpoint, target)
            plan = PLANS[to](checkpoint, layout)
            notes += _stateless(resuming.without_state(checkpoint))
            keys = _keys(to, checkpoint, layout)
            lines = resuming.distributed(checkpoint, dcp_layout, dst, keys, optimizer=lacking is None)
        case "hf":
            checkpoint = weights_only(checkpoint)
            checkpoint = cast(checkpoint, target) if target is not None else checkpoint
            config = Path(hf_config) if hf_config is not None else None
            plan = with_config(PLANS[to](checkpoint, Layout(format="hf")), config, source.root)
            diffusers = checkpoint.layout.stem == DIFFUSERS
            configured = not diffusers and any(file.path in HEADS for file in plan.files)
            lines = iter(advice.weights(dst, "safetensors", single=False, configured=configured)[1:])
        case "zero0" | "zero1" | "zero2" | "zero3" | "universal":
            checkpoint, layout = prepared(checkpoint, to, ranks, target)
            if to == "zero0":
                layout = replace(layout, variant=optimizer_class)
            plan = folder_plan(checkpoint, layout)
            lines = resuming.engine(checkpoint, layout, dst)
            notes += _what_loads(checkpoint, to, optimizer_class)
    made = (note for note in checkpoint.notes if note not in read)
    plan = replace(plan, notes=(*made, *plan.notes, *notes))
    next = (advice.verify(dst), *lines)
    check = kept.check(source, checkpoint, plan, how) if kept.asked(digest, source, dst, how) else None
    return carry_out(src, dst, plan, how, label="convert", next=next, check=check)


def _counted(checkpoint: Checkpoint, source: Source) -> tuple[Checkpoint, list[str]]:
    """With the step and the epoch of the files beside it, where it has none (the Trainer with FSDP)."""
    if checkpoint.training.step is not None:
        return checkpoint, []
    try:
        found = frameworks.read(source, checkpoint)
    except CkptError:
        return checkpoint, []
    if found.step is None:
        return checkpoint, []
    epoch = found.epoch if checkpoint.training.epoch is None else checkpoint.training.epoch
    note = f"step {found.step} is that of the files beside it, whose schedule and random states stay behind"
    return replace(checkpoint, training=replace(checkpoint.training, step=found.step, epoch=epoch)), [note]


def _replaced(checkpoint: Checkpoint) -> Iterator[str]:
    """A count of the training code's own that has the name of the one which takes its place."""
    own, step = checkpoint.client.get("global_step"), checkpoint.training.step
    if isinstance(own, int) and step is not None and own != step:
        yield f"the training code's global_step ({own}) gives way to the updates that were made ({step})"


def _what_loads(checkpoint: Checkpoint, to: str, optimizer_class: str | None) -> Iterator[str]:
    """What DeepSpeed must load a folder with."""
    steps = (step for group in checkpoint.groups for step in group.scalars.get(STEP, {}).values())
    if optimizer_class is None and any(isinstance(step, TensorRef) for step in steps):
        yield (
            "steps are tensors, as torch's optimizers keep them; for DeepSpeed's own: "
            "--optimizer-class FusedAdam or DeepSpeedCPUAdam"
        )
    if to != "zero0" and any("ns_coefficients" in group.hyper for group in checkpoint.groups):
        yield (
            "torch's Muon updates matrices, and stages 1 to 3 give an optimizer flat vectors: it stops at "
            "its first update there; pt, dcp and zero0 keep the matrices"
        )


def _saying_what_is_left_out(checkpoint: Checkpoint) -> Checkpoint:
    """With our key among the client's values where frozen weights are not there, and there alone."""
    client = dict(checkpoint.client)
    if checkpoint.excludes_frozen:
        client[EXCLUDES_FROZEN] = counts(checkpoint)
    elif type(client.get(EXCLUDES_FROZEN)) is int:  # of the weights that were there once
        del client[EXCLUDES_FROZEN]
    return replace(checkpoint, client=client)


def _one_schedule(checkpoint: Checkpoint) -> Checkpoint:
    """With the schedule that is alone in a list, as Lightning saves it, as everybody else loads it."""
    state = checkpoint.training
    if not isinstance(state.scheduler, list) or len(state.scheduler) != 1:
        return checkpoint
    (alone,) = state.scheduler
    keys = {field: path for field, path in state.keys.items() if field != "scheduler"}
    if not isinstance(alone, Mapping):
        return checkpoint
    return replace(checkpoint, training=replace(state, scheduler=alone, keys=keys))


def _keys(to: str, checkpoint: Checkpoint, layout: Layout) -> Places:
    """Where the parts lie in what is made."""
    (keys,) = (format.keys for format in FORMATS if format.keys is not None and to in format.targets)
    return keys(checkpoint, layout)


def _stateless(names: tuple[str, ...]) -> Iterator[str]:
    """What torch makes of a folder without the state of parameters that its optimizer trains."""
    if names:
        yield (
            f"no optimizer state for {some(names)}, without a gradient so far: torch asks for it, and fails "
            "without allow_partial_load, which leaves what a new optimizer has there, with a step of 1"
        )


def _check_usage(
    to: str,
    dtype: str | None,
    world_size: int | None,
    mesh: str | None,
    dcp_layout: str | None,
    hf_config: object,
    like: object,
    optimizer_class: str | None,
) -> None:
    """Options that do not fit together are refused, not passed over."""
    if to not in TARGETS:
        raise UsageError(
            "bad-usage",
            f"'{escape(to)}' is not a format that ckpt writes",
            where="--to",
            why="nothing was written",
            hint=f"choose from {', '.join(TARGETS)}",
        )
    dtype_named(dtype)
    if world_size is not None:
        check_ranks(world_size, "--world-size")
    cut = to not in ("pt", "hf", "zero0", UNIVERSAL)
    for option, given, fits, problem, why, hint in (
        ("--mesh", mesh, to == "dcp", "--mesh is for --to dcp",
         "only distributed checkpoints are cut over more than one dimension", "--world-size N, or --to dcp"),
        ("--world-size", world_size, cut, f"{to} files are for any number of ranks",
         "they are not cut over ranks", "leave out --world-size"),
        ("--dcp-layout", dcp_layout, to == "dcp", "--dcp-layout is for --to dcp",
         "it names the keys of a distributed checkpoint", "leave it out, or use --to dcp"),
        ("--hf-config", hf_config, to == "hf", "--hf-config is for --to hf",
         "no other format has a place for a configuration", "leave it out, or use --to hf"),
        ("--like", like, to != "hf", "--like is for formats with an optimizer",
         "names, groups and settings of another run's optimizer have no place in these files",
         "leave out --like"),
        ("--optimizer-class", optimizer_class, to != "hf",
         "--optimizer-class is for formats with an optimizer",
         "no settings of groups have a place in these files", "leave it out"),
        ("--optimizer-class", optimizer_class, like is None,
         "--optimizer-class and --like both say what loads the groups",
         "the class is taken from that checkpoint", "leave one of them out"),
    ):  # fmt: skip
        if given is not None and not fits:
            raise UsageError("bad-usage", problem, where=option, why=why, hint=hint)


def _order(saved: torch_optimizer.Saved | None) -> list[str]:
    """How the optimizer's parameters got their names, where it does not name them itself."""
    if saved is None or not saved.by_place or not saved.groups:
        return []
    return [_taken(saved.groups, "the model's order and by shape", " (--like takes the order of a run)")]


def _taken(groups: Iterable[ParamGroup], order: str, more: str = "") -> str:
    names = [name for group in groups for name in group.params]
    return (
        f"the optimizer numbers its {len(names)} parameters: taken in {order}, from {escape(names[0])} to "
        f"{escape(names[-1])}{more}"
    )


def _ordered(
    checkpoint: Checkpoint, source: Source, other: Checkpoint, called: Mapping[str, str]
) -> tuple[Checkpoint, list[str]]:
    """With an optimizer that numbers its parameters as in the order of the other run, where they fit that
    one, and what there is to say about it. `called` says what the file's names have become.
    """
    theirs = {new: old for old, new in matched_names(checkpoint, other).items()}
    in_file = {new: old for old, new in called.items()}
    ours = [[theirs.get(name, name) for name in group.params] for group in other.groups]
    there = escape(other.path.name)
    if ours:
        known = read(replace(source, order=[[in_file.get(name, name) for name in names] for names in ours]))
        known = rename_all(known, lambda name: called.get(name, name))
        if known.groups:
            said = [_taken(known.groups, f"the order of {there}")] if any(ours) else []
            before, after = (list(_trained(each)) for each in (checkpoint, known))
            if before and [name for name in after if name in set(before)] != before:
                said.append(
                    f"careful: they fit the model's order, from {escape(before[0])}, too: where that is the "
                    "optimizer's, convert to dcp without --like, and that with it"
                )
            return replace(checkpoint, groups=known.groups, client=known.client), said
        if not checkpoint.groups:
            return replace(checkpoint, client=known.client), []
    if not checkpoint.groups:
        return checkpoint, []
    return checkpoint, [_taken(checkpoint.groups, "the model's order and by shape")]


def _trained(checkpoint: Checkpoint) -> Iterator[str]:
    return (name for group in checkpoint.groups for name in group.params)


def _renamed(checkpoint: Checkpoint, pattern: str, replacement: str) -> Checkpoint:
    """One rule: a regular expression and what takes its place in every name (`\\1` for a group of it)."""
    rule = f"{escape(pattern)}={escape(replacement)}"
    prefix = escape(checkpoint.layout.prefix)
    without = f" ('{prefix}' is taken off where it is read, and put back in a .pt)" if prefix else ""
    try:
        if not any(re.search(pattern, name) for name in checkpoint.tensors):
            raise UsageError(
                "bad-usage",
                f"'{rule}' fits no name",
                where=checkpoint.path,
                why="nothing would be renamed: a slip of the pattern is likely",
                hint=f"the first name is {escape(next(iter(checkpoint.tensors), ''))}{without}; "
                "ckpt inspect --tensors lists them",
            )
        return rename_all(checkpoint, lambda name: re.sub(pattern, replacement, name))
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        raise UsageError(
            "bad-usage",
            f"'{rule}' is no renaming: {escape(error)}",
            where="--rename",
            why="Python cannot compile it, or its replacement names a group that is not there",
            hint=r"a regular expression, = and its replacement: --rename '^model\.='",
        ) from error


def _single(checkpoint: Checkpoint, dtype: DType | None) -> Checkpoint:
    """One copy of each weight in the dtype that is asked for, where one is."""
    if dtype is None:
        return checkpoint
    made, masters = cast(checkpoint, dtype), checkpoint.master.values()
    note = f"the fp32 master weights are left out: one copy of each weight, in {dtype.short}, as asked for"
    return replace(
        made,
        groups=tuple(replace(group, state=moments(group)) for group in made.groups),
        notes=(*made.notes, *([note] if any(ref.dtype is not dtype for ref in masters) else [])),
    )
