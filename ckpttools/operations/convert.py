"""One format into another, with the optimizer's state, the schedule and the counters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from ckpttools import frameworks
from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint
from ckpttools.checks import check_before_use
from ckpttools.errors import CkptError, Unsupported, UsageError, escape, some
from ckpttools.formats import Source, torch_optimizer
from ckpttools.formats.deepspeed import SLICED, slices
from ckpttools.formats.locate import SIDE_FILES
from ckpttools.formats.notes import by_name, counts, not_read
from ckpttools.formats.tags import LATEST
from ckpttools.location import Location
from ckpttools.operations import advice, kept
from ckpttools.operations.choosing import chosen
from ckpttools.operations.convertible import needs_names, needs_state, needs_weights, refuse_unnamed
from ckpttools.operations.request import Request, Target
from ckpttools.operations.source import find
from ckpttools.operations.targets import planned
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.stores.files import entries, is_file, is_folder, named
from ckpttools.transforms.optimizers import anew, for_class, refuse_quantised
from ckpttools.transforms.rename import unwrapped


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
    asked = Request(
        to=to,
        dst=dst,
        world_size=world_size,
        mesh=mesh,
        dtype=dtype,
        include=tuple(include),
        exclude=tuple(exclude),
        rename=tuple(rename),
        reset_optimizer=reset_optimizer,
        optimizer_class=optimizer_class,
        like=Path(like) if like is not None else None,
        dcp_layout=dcp_layout,
        hf_config=Path(hf_config) if hf_config is not None else None,
    )
    source = replace(find(src, tag), key=key)
    how = how or Writing()
    checkpoint = check_before_use(source, only_looks=how.dry_run)
    if source.format.weights_alone and asked.goes_on:
        raise Unsupported(
            "layout-unsupported",
            f"of a {source.format.name} folder the weights alone are read",
            where=source.target,
            why="its optimizer's state would be lost",
            hint="--to hf, or --reset-optimizer to begin the optimizer anew",
        )
    read, names = checkpoint.notes, list(checkpoint.tensors)
    checkpoint, counted = _counted(checkpoint, source)
    behind = [*slices(checkpoint.client.get(SLICED)), *_left_behind(source), *not_read(checkpoint), *counted]
    checkpoint, asked, order = chosen(checkpoint, source, asked)
    checkpoint, fitted = _fitted(checkpoint, asked, names)
    made = planned(checkpoint, source, asked)
    carried = (note for note in made.checkpoint.notes if note not in read)
    notes = (*carried, *made.plan.notes, *order, *behind, *fitted, *made.notes)
    plan = replace(made.plan, notes=notes)
    check = kept.check(source, made.checkpoint, plan, how) if kept.asked(digest, source, dst, how) else None
    next = (advice.verify(dst), *made.lines)
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


def _fitted(checkpoint: Checkpoint, asked: Request, names: Collection[str]) -> tuple[Checkpoint, list[str]]:
    """As the target can take it, or refused before anything is written; what there is to say about it.
    `names` are those of the source's tensors.
    """
    notes = []
    if asked.reset_optimizer:
        checkpoint = anew(checkpoint)
        anew_from = ": they start anew from these settings" if checkpoint.groups else ""
        counted = "; updates count from 0 again, and epochs go on" if checkpoint.training.step == 0 else ""
        notes.append(f"optimizer and schedule are left out, as asked for{anew_from}{counted}")
    checkpoint = _saying_what_is_left_out(checkpoint)
    if asked.is_engine != (checkpoint.layout.zero_stage is not None) or asked.to == "dcp":
        checkpoint = _one_schedule(checkpoint)
    if asked.to != "hf" and list(checkpoint.tensors) != list(names):
        refuse_unnamed(checkpoint)
    if asked.to == "pt" and checkpoint.layout.format != "pt":  # which every reader of such a file removes
        checkpoint, removed = unwrapped(checkpoint, torch_optimizer.PREFIXES)
        notes += [f"the prefix '{removed}' of every name was removed"] if removed else []
    if asked.goes_on and asked.to != "pt":
        needs_names(checkpoint)
    if asked.to not in ("dcp", "hf"):
        needs_weights(checkpoint)
    if asked.goes_on and asked.is_engine:
        needs_state(checkpoint)
    if asked.is_engine or asked.ranks is not None:
        refuse_quantised(checkpoint)
    if asked.like is None and (asked.to != checkpoint.layout.format or asked.optimizer_class is not None):
        checkpoint = for_class(checkpoint, asked.optimizer_class)
    if asked.to != "hf" and asked.dcp_layout != "accelerate":  # these have no place for them, which is said
        notes += by_name(checkpoint.client, {*names}, asked.changing_names)
    return checkpoint, notes


def _left_behind(source: Source) -> Iterator[str]:
    """A note that names the files of the run in a checkpoint's folder and in those around it: of what they
    hold, a new checkpoint has the counters at most.
    """
    above = (source.target, *source.target.parents)
    around = [folder for folder in above if source.root in (folder, *folder.parents)]
    save = source.target.parent  # of a tag folder that was named by itself
    if source.format.tagged and source.root == source.target and is_file(save / LATEST):
        around.append(save)
    names: set[str] = set()
    for folder in filter(is_folder, around):
        try:
            names.update(entry.name for entry in entries(folder) if is_file(entry))
        except UsageError as error:
            yield f"unknown whether files of the run lie in {escape(error.where)}: {error.message}"
    if held := sorted(name for name in names if SIDE_FILES.fullmatch(name) or name in frameworks.STATED):
        yield f"not carried: {some(held, 12)}, the run's files beside the weights"


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
