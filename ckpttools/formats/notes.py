"""What the notes of several formats' plans say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Sized

from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import counted, escape, some
from ckpttools.tree import Path, Value, tensors


def counts(checkpoint: Checkpoint) -> int:
    """What EXCLUDES_FROZEN says in a file of these weights."""
    return len(checkpoint.best_copies())


def holds_for(stated: object, tensors: Sized) -> bool:
    """Whether EXCLUDES_FROZEN, as a file states it, is of the tensors in it.

    A run that goes on from such a file may save the client's values with its own. Its model has the frozen
    weights by then: where they are saved, there are more tensors than the key counts.
    """
    return type(stated) is int and len(tensors) <= stated


def left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """Weights that the model has and the source has not: whoever loads the result must be told."""
    then = "load them into the model first, and then this, not strictly"
    if checkpoint.left_out:
        names = some(checkpoint.left_out, 12)
        yield f"{len(checkpoint.left_out)} weights of the model are not in the source ({names}): {then}"
    elif checkpoint.excludes_frozen:
        yield f"frozen weights are not in the source, nor their names (exclude_frozen_parameters): {then}"


def unnamed(checkpoint: Checkpoint) -> Iterator[str]:
    """Optimizers that only fit the tensors as they are, in their order."""
    if checkpoint.unnamed:
        keys = ", ".join(map(escape, checkpoint.unnamed))
        yield f"carried as it is: the optimizer's state under {keys}, whose parameters have no names"


def by_name(client: Mapping[str, Value], names: Collection[str], options: Sequence[str]) -> Iterator[str]:
    """Tensors of the training code's own under `names` of weights, or names that end so (an average of them),
    which `options` change in the model alone.
    """
    keys = [key for key, value in client.items() if any(_is_of(path, names) for path, _ in tensors(value))]
    if keys and options:
        was, it = ("it was", "it") if len(keys) == 1 else ("they were", "them")
        does = f"{' and '.join(options)} {'does' if len(options) == 1 else 'do'} not"
        yield f"{some(keys, 12)}: carried as {was}, {does} reach {it}"


def _is_of(path: Path, names: Collection[str]) -> bool:
    ends = (key.split(".", i)[i] for key in path if isinstance(key, str) for i in range(key.count(".") + 1))
    return any(end in names for end in ends)


def of_other_kinds(names: Sequence[str]) -> Iterator[str]:
    """Tensors of a torch file that are none of plain bytes."""
    if names:
        many = f"{counted(len(names), 'tensor')} {'is' if len(names) == 1 else 'are'}"
        yield f"{many} of a kind that is not read (sparse, quantised, conjugated ...): {some(names)}"


def unread(checkpoint: Checkpoint) -> Iterator[str]:
    """What only the source's own file can hold."""
    if checkpoint.unread:
        yield f"left out: what lies under keys that are no text ({some(checkpoint.unread)})"


def not_read(checkpoint: Checkpoint) -> Iterator[str]:
    """Weights that lie in folders below a model's and may belong to it, and those of other ranks."""
    if checkpoint.several:
        yield "weights that several ranks have are taken from the first: ckpt verify compares them"
    if checkpoint.below:
        yield f"other weights below it are not read: {', '.join(map(escape, checkpoint.below))}"


def unsaid(checkpoint: Checkpoint) -> Iterator[str]:
    """Of a DeepSpeed folder: what the source does not say, and the result needs."""
    yield from left_out(checkpoint)
    yield from unread(checkpoint)
    if checkpoint.training.step is None:
        yield "global_steps is not known: written as 0"


def one_copy(checkpoint: Checkpoint) -> Iterator[str]:
    """Of a format that keeps one copy of a weight: the masters, where the source has both."""
    best = checkpoint.best_copies()
    dtypes = {
        ref.dtype.short for name, ref in checkpoint.tensors.items() if best[name].dtype is not ref.dtype
    }
    if dtypes:
        yield f"one copy of each weight: the fp32 masters, not their {', '.join(sorted(dtypes))} copies"
