"""What of a checkpoint is carried over, and under which names: --include, --exclude, --rename, --like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, ParamGroup
from ckpttools.checks import check_before_use
from ckpttools.checks.kept import sizes
from ckpttools.errors import Unsupported, UsageError, escape, some
from ckpttools.findings import raised
from ckpttools.formats import Source, read, refuse_rank_local, torch_optimizer
from ckpttools.operations.request import Request
from ckpttools.operations.source import find
from ckpttools.transforms.like import like as like_of
from ckpttools.transforms.like import matched_names
from ckpttools.transforms.rename import rename as rename_all
from ckpttools.transforms.select import select


def chosen(checkpoint: Checkpoint, source: Source, asked: Request) -> tuple[Checkpoint, Request, list[str]]:
    """The tensors that are asked for under the names that they get, with the names, groups and settings of
    the run `asked.like`; what is asked for then, with that run's dtype; how the optimizer's parameters got
    their names. Raises CkptError where moments do not fit their parameters.
    """
    if asked.goes_on:
        for unfit in sizes(checkpoint):
            raise raised(unfit)
    saved = torch_optimizer.of(checkpoint)
    order, whose = _order(saved), list(_whose(checkpoint, source, asked))
    checkpoint = select(checkpoint, include=asked.include, exclude=asked.exclude)
    selected, trained = list(checkpoint.tensors), list(_trained(checkpoint))
    for pattern, replacement in asked.rename:
        checkpoint = _renamed(checkpoint, pattern, replacement)
    if asked.goes_on:
        refuse_rank_local(checkpoint)
    if asked.like is None:
        if asked.rename and asked.by_position and trained:
            _refuse_other_order(checkpoint, trained)
            order.append(
                "the renamed parameters are restored by position: the new model must have them in this order "
                "(--like takes the order of a run)"
            )
        return checkpoint, asked, [*order, *whose]
    other = check_before_use(find(asked.like, None))
    if saved is not None and (saved.by_place or not saved.groups) and asked.goes_on:
        called = dict(zip(selected, checkpoint.tensors, strict=True))
        checkpoint, order = _ordered(checkpoint, source, other, called)
    checkpoint = like_of(checkpoint, other, fresh=asked.reset_optimizer)
    if asked.is_engine or not other.master:  # else that run's single copy would be the masters, too
        asked = replace(asked, dtype=asked.dtype or other.layout.dtype)
    return checkpoint, asked, [*order, *whose]


def _refuse_other_order(checkpoint: Checkpoint, before: list[str]) -> None:
    """Names that change places: a model that has them in the order as before gets one's state for another."""
    after = list(_trained(checkpoint))
    both = {*before} & {*after}
    was, now = ([name for name in names if name in both] for names in (before, after))
    if was != now:
        moved = [a for a, b in zip(was, now, strict=True) if a != b]
        raise Unsupported(
            "names-ambiguous",
            f"--rename puts {some(moved)} in another order",
            where=checkpoint.path,
            why="these files are loaded by position: a model that has its parameters in the order as before "
            "would get the state, and in ZeRO folders the weights, of others",
            hint="--like CHECKPOINT takes the order of the run that loads it; universal and dcp go by name",
        )


def _order(saved: torch_optimizer.Saved | None) -> list[str]:
    """How the optimizer's parameters got their names, where it does not name them itself."""
    if saved is None or not saved.by_place or not saved.groups:
        return []
    return [_taken(saved.groups, "the model's order and by shape", " (--like takes the order of a run)")]


def _whose(checkpoint: Checkpoint, source: Source, asked: Request) -> Iterator[str]:
    """Of a file with several models and one optimizer, where --key says which model."""
    if not asked.goes_on or source.key is None or not checkpoint.groups:
        return
    keys = [key for key in torch_optimizer.keys_of_weights(checkpoint) if key != source.key]
    others = ((key, read(replace(source, key=key))) for key in keys)
    fit = [key for key, other in others if other.groups and not any(sizes(other))]
    if fit:
        yield (
            f"careful: the optimizer is taken for that of '{escape(source.key)}', and fits {some(fit)} as "
            "well: where it is another's, --reset-optimizer leaves its state out"
        )


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
