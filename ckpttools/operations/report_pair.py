"""The page of two checkpoints: what differs, and how far apart each layer is."""

from __future__ import annotations

import re

from ckpttools.compare.content import WEIGHT
from ckpttools.compare.facts import UNKNOWN
from ckpttools.location import Location
from ckpttools.operations.diff import Changed, Diff, diff
from ckpttools.operations.writing import Bar
from ckpttools.pages.sections import Cell, Gathered, Section, Table

SHOWN = 300  # tensors, and facts
_WORDS = {"equal": "They hold the same.", "different": "They differ."}
_LAYER = re.compile(r"(.*?\.\d+)(\.|$)")


def gather(left: Location, right: Location, *, workers: int = 0, bar: Bar | None = None) -> Gathered:
    """Read both. Raises CkptError where one is damaged."""
    found = diff(left, right, workers=workers, bar=bar)
    sections = [
        Section(id="verdict", title="Verdict", text=_verdict(found, left, right)),
        Section(id="settings", title="Counters and settings", tables=tuple(_facts(found))),
        Section(id="layers", title="How far apart each layer is", tables=(_layers(found),)),
        Section(id="tensors", title="Tensors that differ", tables=(_tensors(found),)),
    ]
    if not found.tensors:
        sections = sections[:2]
    return Gathered(
        title=f"{left.name} and {right.name}",
        how="all tensors, counters and settings of both were compared",
        sections=sections,
    )


def _verdict(found: Diff, left: Location, right: Location) -> tuple[str, ...]:
    kinds = dict.fromkeys((*found.equal, *(each.kind for each in found.tensors)))
    counts = (
        f"{kind}: {found.equal.get(kind, 0)} equal, {sum(e.kind == kind for e in found.tensors)} different"
        for kind in kinds
    )
    return (
        _WORDS.get(found.verdict, f"There is {found.verdict}."),
        f"A is {left}; B is {right}.",
        *(f"Not compared: {name}." for name in found.uncompared),
        "; ".join(counts) + ".",
    )


def _facts(found: Diff) -> list[Table]:
    out = []
    if found.facts:
        rows = [(f"{f.part}: {f.name}", _shown(f.left), _shown(f.right)) for f in found.facts[:SHOWN]]
        out.append(Table(caption="Said otherwise", heads=("what", "A", "B"), rows=tuple(rows)))
    if found.layout:
        rows = [(name, _shown(a), _shown(b)) for name, (a, b) in found.layout.items()]
        caption = "Stored otherwise, which counts for nothing"
        out.append(Table(caption=caption, heads=("what", "A", "B"), rows=tuple(rows)))
    return out


def _shown(value: object) -> str:
    if value is UNKNOWN or value is None:
        return "?"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def layer(name: str) -> str:
    """The layer that a tensor belongs to: up to the first number in its name, else its module.

    >>> layer("model.layers.3.mlp.up.weight"), layer("lm_head.weight")
    ('model.layers.3', 'lm_head')
    """
    match = _LAYER.match(name)
    return match[1] if match else name.rpartition(".")[0] or name


def _layers(found: Diff) -> Table:
    """In the model's order; each by the weight of it that is farthest apart."""
    names = dict.fromkeys((*found.left.tensors, *found.right.tensors))
    changed = {each.name: each for each in found.tensors if each.kind == WEIGHT}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(layer(name), []).append(name)
    far = {
        key: max((changed[n] for n in own if n in changed), key=_relative, default=None)
        for key, own in members.items()
    }
    most = max((_relative(each) for each in far.values() if each is not None), default=0.0)
    rows: list[tuple[Cell, ...]] = []
    for key, own in list(members.items())[: SHOWN * 2]:
        each = far[key]
        differ = sum(name in changed for name in own)
        if each is None:
            rows.append((key, f"0 of {len(own)}", "", 0.0, {"bar": None}))
            continue
        value = _relative(each)
        share = 100 * value / most if most and most != float("inf") else 0
        relative = each.apart.relative if each.apart is not None else None
        rows.append((key, f"{differ} of {len(own)}", each.name, relative, {"bar": f"{min(share, 100):.1f}"}))
    return Table(
        caption="Norm of the difference over that of A, of the weight that is farthest apart",
        heads=("layer", "differ", "farthest", "relative", "seen against the largest"),
        rows=tuple(rows),
        numbers=frozenset({3}),
    )


def _relative(each: Changed) -> float:
    value = each.apart.relative if each.apart is not None else None
    return float("inf") if value is None or value != value else value


def _tensors(found: Diff) -> Table:
    rows = []
    for each in found.tensors[:SHOWN]:
        apart = each.apart
        sides = each.left if each.left == each.right else f"{each.left} to {each.right}"
        figures = (apart.largest, apart.relative, apart.cosine, apart.equal) if apart else ("", "", "", "")
        rows.append((each.name, each.kind, each.what, sides, *figures))
    more = len(found.tensors) - SHOWN
    return Table(
        caption="The farthest apart first" + (f"; {more} more are left out" if more > 0 else ""),
        heads=("name", "kind", "what", "A to B", "largest", "relative", "cosine", "equal elements"),
        rows=tuple(rows),
        numbers=frozenset({4, 5, 6, 7}),
        folded=len(rows) > 40,
    )
