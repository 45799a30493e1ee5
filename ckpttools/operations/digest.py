"""What a checkpoint holds, as digests that every layout of it has; two of them compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import nullcontext

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks import check_before_use
from ckpttools.checks.changing import watched
from ckpttools.compare.content import Content, content
from ckpttools.compare.digests import Digests, digests, jobs_of, nbytes_of
from ckpttools.compare.facts import UNKNOWN, differences_beside, grouped, rekeyed, state_beside
from ckpttools.compare.pairs import Pair, pairs
from ckpttools.errors import UsageError, escape
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.beside import unnamed
from ckpttools.operations.source import find
from ckpttools.operations.stated import stated
from ckpttools.operations.writing import Bar
from ckpttools.stores.files import named
from ckpttools.stores.links import within


class Digested(Struct, frozen=True, kw_only=True):
    """`path` and what it holds; `digests.state` is the digest of the whole."""

    path: Location
    source: Source
    checkpoint: Checkpoint
    digests: Digests

    def __repr__(self) -> str:
        return f"Digested({str(self.path)!r}, {self.digests.state!r})"

    @property
    def content(self) -> Content:
        return content(self.checkpoint)

    @property
    def unnamed(self) -> tuple[str, ...]:
        """What it keeps of optimizers that the digests do not hold."""
        return unnamed(self.source, self.checkpoint)

    @property
    def beside(self) -> dict[str, bool]:
        """What else it keeps that the digests do not hold: what lies in the model's state beside tensors,
        tensors of training code, and keys that are no text; with whether it can be compared.
        """
        return state_beside(self.checkpoint) | dict.fromkeys(self.checkpoint.unread, False)


class Difference(Struct, frozen=True, kw_only=True):
    """A tensor or number that is not the same in both; "" where one side does not have it."""

    kind: str
    name: str
    left: str
    right: str


class Compared(Struct, frozen=True, kw_only=True):
    """Two checkpoints by their digests. `equal` counts what is the same, by kind; `different` has values
    of "client state" too, which are in no digest.

    `one_sided` are the kinds that one side does not hold at all, with True where it is the left one that
    holds them: they are not counted as equal. `settings` and `counters` say whether those are the same, and
    do not count for `same`. `partial`: only some kinds were asked for.
    """

    left: Digested
    right: Digested
    equal: dict[str, int]
    different: tuple[Difference, ...]
    one_sided: dict[str, bool]
    settings: bool
    counters: bool
    partial: bool = False

    @property
    def uncompared(self) -> tuple[str, ...]:
        """Optimizers of either that no digest holds, unless they were not asked for."""
        return () if self.partial else tuple(dict.fromkeys((*self.left.unnamed, *self.right.unnamed)))

    @property
    def beside(self) -> dict[str, bool]:
        """What either keeps that is in no digest, if all was asked for, with whether it can be compared."""
        ours, theirs = self.left.beside, self.right.beside
        keys = () if self.partial else dict.fromkeys((*ours, *theirs))
        return {key: ours.get(key, True) and theirs.get(key, True) for key in keys}

    @property
    def same(self) -> bool:
        """Whether each side holds all that the other does, and all of it is equal."""
        unknown = self.uncompared or not all(self.beside.values())
        return not (self.different or self.one_sided or unknown) and bool(self.equal)


def digest(
    path: str | Location,
    *,
    tag: str | None = None,
    key: str | None = None,
    workers: int = 0,
    bar: Bar | None = None,
) -> Digested:
    """Read every tensor once: a digest for each, one for each kind, and one for the whole.

    They are equal for every layout of the same content: any number of ranks, ZeRO, distributed, one file.
    Where a manifest states them and the files are still those that it describes, they are taken from it.
    Raises CkptError where the checkpoint is damaged, UsageError where it changes meanwhile.

    >>> found = digest("fixtures/trainer/z2_bf16_2")
    >>> list(found.digests.kinds)[:4]
    ['weight', 'master', 'exp_avg', 'exp_avg_sq']
    >>> from ckpttools import reshard
    >>> reshard("fixtures/trainer/z2_bf16_2", out / "ws3", world_size=3).destination.name
    'ws3'
    >>> digest(out / "ws3").digests.state == found.digests.state
    True
    """
    with watched(named(path)) as (watch,):
        source, checkpoint = opened(path, tag, key)
        watch.below(source.target)
        return digested(path, source, checkpoint, workers=workers, bar=bar)


def opened(path: str | Location, tag: str | None, key: str | None) -> tuple[Source, Checkpoint]:
    """A checkpoint whose headers are good. Raises CkptError."""
    source = replace(find(named(path), tag), key=key)
    return source, check_before_use(source)


def digested(
    path: str | Location, source: Source, checkpoint: Checkpoint, *, workers: int = 0, bar: Bar | None = None
) -> Digested:
    """`digest` of one that is open. Raises CkptError where a checksum does not hold."""
    with within(source.root):
        found = stated(source, checkpoint, workers=workers, bar=bar)
        if found is None:
            jobs = jobs_of(checkpoint)
            shown = bar(nbytes_of(jobs), "digest") if bar is not None else nullcontext()
            with shown as progress:
                found = digests(checkpoint, workers=workers, bar=progress, jobs=jobs)
    return Digested(path=named(path), source=source, checkpoint=checkpoint, digests=found)


def compare(left: Digested, right: Digested, kinds: Collection[str] = ()) -> Compared:
    """What two checkpoints hold, each tensor against the same one of the other; only `kinds`, if any, else
    what is in no digest too, which is read for that.

    Raises UsageError for a kind that neither holds, CkptError where a file cannot be read.
    """
    found = by_digests(left, right, kinds)
    if kinds:
        return found
    facts = differences_beside(left.checkpoint, right.checkpoint)
    beside = (
        Difference(kind=each.part, name=each.name, left=_said(each.left), right=_said(each.right))
        for each in facts
    )
    return replace(found, different=(*found.different, *beside))


def _said(value: object) -> str:
    if value is UNKNOWN:
        return ""
    return value if isinstance(value, str) and value else json.dumps(value)


def by_digests(left: Digested, right: Digested, kinds: Collection[str] = ()) -> Compared:
    """`compare` of what is in the digests, which reads nothing; `same` says no more than that."""
    a, b = left.content, right.content
    known = {*a.kinds, *b.kinds}
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                "bad-usage",
                f"neither holds '{escape(kind)}'",
                where="--kind",
                why="nothing would be compared",
                hint=f"they hold {', '.join(sorted(known))}",
            )
    equal: dict[str, int] = {}
    different: list[Difference] = []
    one_sided: dict[str, bool] = {}
    all_pairs = [pair for pair in pairs(a, b) if not kinds or pair.kind in kinds]
    for kind in dict.fromkeys(pair.kind for pair in all_pairs):
        of_kind = [pair for pair in all_pairs if pair.kind == kind]
        if all(pair.left == "absent" for pair in of_kind) or all(p.right == "absent" for p in of_kind):
            one_sided[kind] = of_kind[0].right == "absent"
            continue
        found = list(_different(of_kind, left.digests, right.digests))
        different += found
        equal[kind] = len(of_kind) - len(found)
    both = left.checkpoint, right.checkpoint
    return Compared(
        left=left,
        right=right,
        equal=equal,
        different=tuple(different),
        one_sided=one_sided,
        settings=left.digests.settings == right.digests.settings and not any(grouped(*both)),
        counters=left.digests.counters == right.digests.counters and not rekeyed(*both),
        partial=bool(kinds),
    )


def _different(of_kind: list[Pair], a: Digests, b: Digests) -> Iterator[Difference]:
    for pair in of_kind:
        one, two = _text(pair, pair.left, a), _text(pair, pair.right, b)
        if pair.left == "rounded" or pair.right == "rounded":
            # the master pair says whether the copy is the same; here only whether it follows from it
            if pair.name in (b.apart if pair.left == "rounded" else a.apart):
                yield Difference(kind=pair.kind, name=pair.name, left=one, right=two)
        elif one != two:
            yield Difference(kind=pair.kind, name=pair.name, left=one, right=two)


def _text(pair: Pair, side: str, of: Digests) -> str:
    if side in ("absent", "rounded"):
        return ""
    return of.tensors["weight" if side == "single" else pair.kind][pair.name]
