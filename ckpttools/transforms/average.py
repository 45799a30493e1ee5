"""The mean of the weights of several checkpoints of one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import isfinite

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, common_dtype
from ckpttools.errors import CkptError, UsageError, escape, some
from ckpttools.tensors import EXACT, FLOAT32, Cast, DType, Mean, Source, TensorRef, Term
from ckpttools.transforms.cast import castable
from ckpttools.transforms.select import weights_only

NORMS = ("running_mean", "running_var")


def average(checkpoints: Sequence[Checkpoint], weights: Sequence[float] = ()) -> Checkpoint:
    """The weighted mean of every floating point tensor, from each one's best copy; the rest from the last.

    Products and sums are in float64, rounded once to the widest type that the name has, float32 for float16
    with bfloat16. Integers, float8, complex numbers, counters and what else the checkpoints say are the last
    one's; notes name that. `weights` are all 1 by default. Raises CkptError where names or shapes differ,
    UsageError for weights that make no mean.
    """
    _check_weights(checkpoints, weights)
    counted = list(weights) or [1.0] * len(checkpoints)
    single = _tied([weights_only(each) for each in checkpoints])
    last = single[-1]
    for each in single[:-1]:
        _refuse_unlike(each, last)
    tensors: dict[str, TensorRef] = {}
    kept: list[str] = []
    widened: list[str] = []
    for name, ref in last.tensors.items():
        refs = [each.tensors[name] for each in single]
        if not all(castable(one.dtype) for one in refs):
            kept.append(name)
            tensors[name] = ref
            continue
        target = _wide_enough({one.dtype for one in refs})
        if len({one.dtype.name for one in refs}) > 1:
            widened.append(name)
        tensors[name] = _mean(refs, counted, target)
    tensors |= {alias: tensors[owner] for alias, owner in last.shared.items()}
    return replace(
        last,
        tensors=tensors,
        layout=replace(last.layout, dtype=common_dtype(tensors)),
        unread=tuple(dict.fromkeys(place for each in checkpoints for place in each.unread)),
        checks=tuple(dict.fromkeys(check for each in checkpoints for check in each.checks)),
        template=None,
        notes=tuple(_notes(len(checkpoints), weights, last, kept, widened)),
    )


def _wide_enough(dtypes: set[DType]) -> DType:
    """The widest; float32 for float16 and bfloat16, of which neither holds the other's values."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return FLOAT32 if len(dtypes) > 1 and widest.itemsize < FLOAT32.itemsize else widest


def _check_weights(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> None:
    if len(checkpoints) < 2:
        raise UsageError(
            "bad-usage",
            "a mean is of two checkpoints or more",
            where=checkpoints[0].path if checkpoints else "",
            why="of one it would be a copy",
            hint="name another one",
        )
    if not weights:
        return
    if len(weights) != len(checkpoints):
        raise UsageError(
            "bad-usage",
            f"{len(weights)} weights for {len(checkpoints)} checkpoints",
            where="--weights",
            why="which of them belongs to which checkpoint is not known",
            hint="--weights takes one number for each, with commas between",
        )
    if not all(isfinite(each) for each in weights) or not isfinite(sum(weights)) or sum(weights) == 0:
        raise UsageError(
            "bad-usage",
            "the weights add up to nothing that can be divided by",
            where="--weights",
            why="a mean is divided by their sum",
            hint="give finite numbers whose sum is not 0",
        )


def _tied(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """With both names of every tied pair, as far as none of them keeps two tensors for it: a model's folder
    stores one of the names, a training checkpoint often both."""
    said = {alias: owner for each in checkpoints for alias, owner in each.shared.items()}
    pairs = {a: o for a, o in said.items() if all(_is_one(each, a, o) for each in checkpoints)}
    out = []
    for each in checkpoints:
        tensors = dict(each.tensors)
        for alias, owner in pairs.items():
            for here, there in ((alias, owner), (owner, alias)):
                if here in tensors:
                    tensors.setdefault(there, tensors[here])
        out.append(replace(each, tensors=tensors, shared={a: o for a, o in pairs.items() if o in tensors}))
    return out


def _is_one(checkpoint: Checkpoint, alias: str, owner: str) -> bool:
    both = alias in checkpoint.tensors and owner in checkpoint.tensors
    return not both or checkpoint.shared.get(alias) == owner


def _refuse_unlike(one: Checkpoint, last: Checkpoint) -> None:
    """Raises CkptError where two do not hold the same tensors."""
    problem = next(_unlike(one, last), None)
    if problem is not None:
        raise CkptError(
            "not-averaged",
            problem,
            where=one.path,
            why=f"the mean of other tensors than those of {escape(last.path)} is no model",
            hint="ckpt diff shows what differs; extract --include or --strip-prefix may make them alike",
        )


def _unlike(one: Checkpoint, last: Checkpoint) -> Iterator[str]:
    for here, there, said in ((one, last, "only here"), (last, one, "missing here")):
        missing = sorted(here.tensors.keys() - there.tensors.keys())
        if missing:
            yield f"{some(missing, 1)}: {said}"
    for name, ref in last.tensors.items():
        other = one.tensors[name]
        if other.shape != ref.shape:
            yield f"{escape(name)} has the shape {list(other.shape)}, elsewhere {list(ref.shape)}"
        if castable(ref.dtype) != castable(other.dtype):
            yield f"{escape(name)} is {other.dtype.short}, elsewhere {ref.dtype.short}"


def _mean(refs: Sequence[TensorRef], weights: Sequence[float], target: DType) -> TensorRef:
    """Cut wherever the type in which one is stored changes: a `Term` has one type. What counts nothing
    is not looked at (0 times NaN is NaN), and the mean of one is that one.
    """
    refs = [ref for ref, weight in zip(refs, weights, strict=True) if weight]
    weights = [weight for weight in weights if weight]
    if len(refs) == 1 and refs[0].dtype == target:
        return refs[0]
    edges = sorted({0, refs[0].numel, *(edge for ref in refs for edge in _edges(ref))})
    chunks = []
    for first, end in pairwise(edges):
        cut = (ref if end - first == ref.numel else ref.flat(first, end - first) for ref in refs)
        terms = (_term(ref, weight) for ref, weight in zip(cut, weights, strict=True))
        chunks.append(Mean(tuple(terms), target))
    return TensorRef(target, refs[0].shape, tuple(chunks))


def _edges(ref: TensorRef) -> Iterator[int]:
    at = 0
    for chunk in ref.chunks:
        if isinstance(chunk, Cast):
            yield from (at, at + chunk.numel)
        at += chunk.nbytes // ref.dtype.itemsize


def _term(ref: TensorRef, weight: float) -> Term:
    """In the type that the elements have on disk: what is wider holds them exactly."""
    sources: list[Source] = []
    dtype = ref.dtype
    for chunk in ref.chunks:
        assert not isinstance(chunk, Mean)
        if isinstance(chunk, Cast):
            assert (chunk.source.name, chunk.target.name) in EXACT
            dtype = chunk.source
            sources += chunk.chunks
        else:
            sources.append(chunk)
    return Term(tuple(sources), dtype, weight)


def _notes(
    count: int, weights: Sequence[float], last: Checkpoint, kept: list[str], widened: list[str]
) -> Iterator[str]:
    yield from last.notes
    shares = f", weighted {', '.join(f'{weight:g}' for weight in weights)}" if weights else ""
    yield f"the mean of {count} checkpoints{shares}: sums in float64, rounded once"
    yield f"counters, losses and configuration are those of the last, {escape(last.path)}"
    if kept:
        yield (
            f"{len(kept)} tensors are not averaged (integers, float8, complex): the last one's; "
            f"{escape(kept[0])}"
        )
    if widened:
        how = "the widest, fp16 with bf16 in fp32"
        yield f"{len(widened)} tensors have several types: written in {how}; {escape(widened[0])}"
    norms = [name for name in last.tensors if name.rpartition(".")[2] in NORMS]
    if norms:
        yield (
            f"{len(norms)} running statistics of batch norms are averaged like weights: they are not those "
            "of the mean model, which torch.optim.swa_utils.update_bn finds"
        )
