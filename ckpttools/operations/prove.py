"""Whether two checkpoints are the same training state: one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from ckpttools.checks.changing import watched
from ckpttools.compare.facts import RANDOM, Fact, differences, opaque, random_states
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.beside import both
from ckpttools.operations.digest import Compared, Digested, by_digests, digested, opened
from ckpttools.operations.source import tags_for
from ckpttools.operations.writing import Bar
from ckpttools.stores.files import entries, is_file, is_folder, named
from ckpttools.stores.links import within
from ckpttools.training import Training

Verdict = Literal["same", "except", "different"]


class Proof(Struct, frozen=True, kw_only=True):
    """`compared` holds weights, moments and steps against each other, `facts` what else is said otherwise.

    `random` are the random states that each side has, `uncompared` the objects of training code that nobody
    can look into, and `unnamed`, the optimizers without names where the other side has names: with any of
    them the verdict is "except". Random states belong to single ranks and do not count.
    """

    compared: Compared
    facts: tuple[Fact, ...]
    random: tuple[tuple[str, ...], tuple[str, ...]]
    uncompared: tuple[str, ...]
    unnamed: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """ "different" where a tensor or a step is, "except" where anything else is, or one side lacks it."""
        if self.compared.different or not self.compared.equal:
            return "different"
        unknown = self.unread or self.uncompared
        return "except" if self.compared.one_sided or self.facts or unknown else "same"

    @property
    def unread(self) -> bool:
        """Whether no optimizer state was found in either: there is none, or none that is read. That of
        optimizers without names is compared as the values that it is.
        """
        sides = (self.compared.left.checkpoint, self.compared.right.checkpoint)
        return not any(side.groups or (side.unnamed and not self.unnamed) for side in sides)

    @property
    def uncounted(self) -> bool:
        """Whether neither says how far training is."""
        sides = (self.compared.left, self.compared.right)
        return all(side.checkpoint.training == Training() for side in sides)


def prove(
    left: str | Location,
    right: str | Location,
    *,
    tags: Sequence[str] = (),
    key: str | None = None,
    workers: int = 0,
    bar: Bar | None = None,
) -> Proof:
    """Hold two checkpoints of any layouts against each other: weights, moments, steps, hyper-parameters,
    schedule, counters, and what training code saved. Every byte of both is read once. `tags` are the tag
    folders to take: one for both, or one for each.

    Raises CkptError where one is damaged, UsageError where one changes meanwhile.

    >>> prove("fixtures/trainer/z2_bf16_2", "fixtures/trainer/z2_bf16_2").verdict
    'same'
    """
    chosen = zip((left, right), tags_for([named(left), named(right)], tags), strict=True)
    with watched(named(left), named(right)) as watches:
        one, two = (opened(path, tag, _key(path, key)) for path, tag in chosen)
        for watch, (source, _) in zip(watches, (one, two), strict=True):
            watch.below(source.target)
        ours, theirs, unnamed = both(one, two)
        a = digested(left, one[0], ours, workers=workers, bar=bar)
        b = digested(right, two[0], theirs, workers=workers, bar=bar)
    found = differences(a.checkpoint, b.checkpoint)
    return Proof(
        compared=by_digests(a, b),
        facts=found,
        random=(_random(a), _random(b)),
        unnamed=unnamed,
        uncompared=tuple(dict.fromkeys((*unnamed, *opaque(a.checkpoint), *opaque(b.checkpoint)))),
    )


def _key(path: str | Location, key: str | None) -> str | None:
    return key if is_file(named(path)) else None


def _random(found: Digested) -> tuple[str, ...]:
    """Random states: what training code saved, and the files that trainers write beside the weights."""
    return (*random_states(found.checkpoint), *sorted(_files(found.source)))


def _files(source: Source) -> set[str]:
    with within(source.root):
        folders = [folder for folder in {source.root, source.target} if is_folder(folder)]
        return {e.name for folder in folders for e in entries(folder) if is_file(e) and RANDOM.search(e.name)}
