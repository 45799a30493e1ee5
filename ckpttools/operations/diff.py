"""How two checkpoints differ: counters, settings, and each tensor, whatever the layouts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks import check_before_use
from ckpttools.checks.changing import watched
from ckpttools.compare.apart import Apart, measure
from ckpttools.compare.content import Content, Held, content, is_number, plain
from ckpttools.compare.digests import shown
from ckpttools.compare.facts import Fact, differences, opaque
from ckpttools.compare.pairs import Pair, left_out, pairs, value
from ckpttools.compare.stream import Stream, refuse_links
from ckpttools.errors import UsageError
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.beside import both
from ckpttools.operations.source import find, tags_for
from ckpttools.operations.writing import Bar
from ckpttools.stores.files import is_file, named
from ckpttools.stores.links import within
from ckpttools.tensors import TensorRef
from ckpttools.tree import Value


class Changed(Struct, frozen=True, kw_only=True):
    """A tensor or number that is not the same in both.

    `what` is "changed", "added" (only on the right), "removed", "reshaped" or "retyped". `left` and `right`
    say type and shape, or the number. `apart` is None where there are not as many elements on both sides.
    """

    kind: str
    name: str
    what: str
    left: str
    right: str
    apart: Apart | None = None


class Diff(Struct, frozen=True, kw_only=True):
    """`layout` is how each is stored, which makes no difference; `equal` counts what is the same, by kind.

    `tensors` has those that changed, the farthest apart first; `checked` counts checksums found right;
    `uncompared` are files of optimizers without names, where the other side has names, and objects that
    nobody looks into; `only`: settings and counters, and tensors of other names, were left out as asked.
    """

    left: Checkpoint
    right: Checkpoint
    layout: dict[str, tuple[object, object]]
    facts: tuple[Fact, ...]
    equal: dict[str, int]
    tensors: tuple[Changed, ...]
    checked: int
    uncompared: tuple[str, ...] = ()
    only: bool = False

    @property
    def same(self) -> bool:
        """Whether both hold the same; not where something could not be compared."""
        return not self.differs and not self.uncompared

    @property
    def differs(self) -> bool:
        """Whether something was found that is not the same, or nothing that could be."""
        return bool(self.facts or self.tensors) or not self.equal

    @property
    def verdict(self) -> str:
        """In words."""
        if self.differs:
            return "different"
        if self.uncompared:
            return "no difference in what was compared"
        return "equal in what was asked for" if self.only else "equal"


def diff(
    left: str | Location,
    right: str | Location,
    *,
    only: Collection[str] = (),
    tags: Sequence[str] = (),
    key: str | None = None,
    workers: int = 0,
    bar: Bar | None = None,
) -> Diff:
    """Compare two checkpoints of any formats: what was added, removed, reshaped, retyped, and how far apart
    the rest is. `only` are globs for names of tensors; settings and counters are then left out. `tags` are
    the tag folders to take: one for both, or one for each.

    Raises CkptError where one is damaged, UsageError where nothing matches or one changes meanwhile.

    >>> found = diff("fixtures/hf-trainer/plain/checkpoint-2", "fixtures/hf-trainer/plain/checkpoint-4")
    >>> found.same, found.tensors[-1].what, found.tensors[-1].apart.cosine > 0.9
    (False, 'changed', True)
    """
    chosen = tags_for([named(left), named(right)], tags)
    with watched(named(left), named(right)) as watches:
        one, two = _open(left, chosen[0], key), _open(right, chosen[1], key)
        for watch, (source, _) in zip(watches, (one, two), strict=True):
            watch.below(source.target)
        return _diff(one, two, only, workers, bar)


def _diff(
    one: tuple[Source, Checkpoint],
    two: tuple[Source, Checkpoint],
    only: Collection[str],
    workers: int,
    bar: Bar | None,
) -> Diff:
    a, b, unnamed = both(one, two)
    ours, theirs = content(a), content(b)
    wanted = [pair for pair in pairs(ours, theirs) if _matches(pair, only)]
    if not wanted:
        raise UsageError(
            "bad-usage",
            "no tensor has such a name",
            where="--only",
            why="nothing would be compared, and nothing found to differ",
            hint="ckpt inspect --tensors lists the names",
        )
    held = [_both(pair, ours.held, theirs.held) for pair in wanted]
    measured = [i for i, both in enumerate(held) if _is_measured(*both)]
    refs = [_refs(*held[i]) for i in measured]
    streams = Stream(a.checks), Stream(b.checks)
    for side, (source, _) in enumerate((one, two)):
        with within(source.root):
            refuse_links(pair[side] for pair in refs)
    nbytes = sum(ref.nbytes for pair in refs for ref in pair)
    with bar(nbytes, "diff") if bar is not None else nullcontext() as progress:
        found = dict(zip(measured, measure(refs, *streams, workers=workers, bar=progress), strict=True))
    checked = sum(stream.finish(workers) for stream in streams)
    counts = ours.counts | theirs.counts
    equal: dict[str, int] = {}
    changed: list[Changed] = []
    for i, pair in enumerate(wanted):
        apart = _changed(pair, *held[i], found.get(i), counted=pair.kind in counts)
        if apart is None:
            equal[pair.kind] = equal.get(pair.kind, 0) + 1
        else:
            changed.append(apart)
    return Diff(
        left=a,
        right=b,
        layout=_layout(a, b) | _tied(ours, theirs),
        facts=() if only else differences(a, b),
        equal=equal,
        tensors=tuple(sorted(changed, key=_rank)),
        checked=checked,
        uncompared=() if only else tuple(dict.fromkeys((*unnamed, *opaque(a), *opaque(b)))),
        only=bool(only),
    )


def _open(path: str | Location, tag: str | None, key: str | None) -> tuple[Source, Checkpoint]:
    source = find(path, tag)
    if key is not None and is_file(source.target):
        source = replace(source, key=key)
    return source, check_before_use(source)


def _matches(pair: Pair, only: Collection[str]) -> bool:
    return not only or any(
        fnmatchcase(text, glob) for glob in only for text in (pair.name, f"{pair.kind}/{pair.name}")
    )


Two = tuple[TensorRef | Value, TensorRef | Value]


def _both(pair: Pair, ours: Held, theirs: Held) -> Two:
    """What each side has, None where it has nothing."""
    one = two = None
    if pair.left != "rounded":
        one = value(ours, pair, pair.left, None)
    two = value(theirs, pair, pair.right, one)
    if pair.left == "rounded":
        one = value(ours, pair, pair.left, two)
    return one, two


def _is_measured(a: TensorRef | Value, b: TensorRef | Value) -> bool:
    if not isinstance(a, TensorRef) or not isinstance(b, TensorRef):
        return False
    return a.shape == b.shape and a.numel > 0


def _refs(a: TensorRef | Value, b: TensorRef | Value) -> tuple[TensorRef, TensorRef]:
    assert isinstance(a, TensorRef) and isinstance(b, TensorRef)
    return a, b


def _changed(
    pair: Pair, a: TensorRef | Value, b: TensorRef | Value, apart: Apart | None, *, counted: bool
) -> Changed | None:
    """None where both are the same; `counted` kinds are numbers, however they are kept."""
    one, two = (
        "" if side == "absent" else _described(held) for side, held in ((pair.left, a), (pair.right, b))
    )
    if not pair.is_whole:
        what = "added" if pair.left == "absent" else "removed"
    elif counted and all(is_number(side) for side in (a, b)):
        one, two = str(plain(a, shown)), str(plain(b, shown))
        if one == two:
            return None
        what = "changed"
    elif isinstance(a, TensorRef) and isinstance(b, TensorRef):
        same = apart.equal == apart.numel if apart is not None else a.shape == b.shape
        if same and a.dtype.name == b.dtype.name:
            return None
        what = "reshaped" if a.shape != b.shape else "retyped" if a.dtype.name != b.dtype.name else "changed"
    else:
        one, two = str(plain(a, shown)), str(plain(b, shown))
        if one == two:
            return None
        what = "changed"
    return Changed(kind=pair.kind, name=pair.name, what=what, left=one, right=two, apart=apart)


def _described(held: TensorRef | Value) -> str:
    return f"{held.dtype.short} {list(held.shape)}" if isinstance(held, TensorRef) else str(held)


def _rank(changed: Changed) -> tuple[bool, float]:
    """What is there on one side only first, then the farthest apart."""
    if changed.apart is None:
        return False, 0.0
    relative = changed.apart.relative
    return True, float("-inf") if relative is None or relative != relative else -relative


def _layout(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[object, object]]:
    """How each is stored, where it is not the same."""
    of_a, of_b = a.training.saved_batch, b.training.saved_batch
    fields = {
        "format": (a.layout.format, b.layout.format),
        "ranks": (a.layout.ranks, b.layout.ranks),
        "dtype": (a.layout.dtype, b.layout.dtype),
        "writer": (a.layout.writer, b.layout.writer),
        "variant": (a.layout.variant, b.layout.variant),
        "tag": (a.layout.tag, b.layout.tag),
        "micro-batch": (of_a.get("micro"), of_b.get("micro")),
        "accumulation": (of_a.get("accumulation"), of_b.get("accumulation")),
    }
    return {name: sides for name, sides in fields.items() if sides[0] != sides[1]}


def _tied(a: Content, b: Content) -> dict[str, tuple[object, object]]:
    """Names that one side leaves out because they are tied to one that it has."""
    sides = (", ".join(sorted(left_out(b, a))) or None, ", ".join(sorted(left_out(a, b))) or None)
    return {"left out, tied": sides} if sides != (None, None) else {}
