"""ckpt diff: how two checkpoints differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PLACE, STATS, TAGS, ask, reading
from ckpttools.errors import escape
from ckpttools.location import Location

if TYPE_CHECKING:
    from ckpttools.compare.facts import Fact
    from ckpttools.operations.diff import Changed, Diff


@click.command("diff")
@click.argument("a", type=PLACE)
@click.argument("b", type=PLACE)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Only tensors whose name, or KIND/NAME, matches (repeatable); settings are left out.",
)
@click.option(
    "--top", type=click.IntRange(0), default=20, show_default=True, help="How many tensors are listed."
)
@FOLLOW
@STATS
@TAGS
@reading
def command(a: Location, b: Location, top: int, **options: Any) -> int:
    """Show how B differs from A: counters, losses, settings, tensors, whatever the formats and rank counts.

    Of tensors that changed: the largest absolute difference, the norm of the difference over that of A, the
    cosine between the two, and how many elements are equal; the farthest apart first. Master weights and
    optimizer state are compared too. Exit code 0: equal, 1: different, or not all of it can be compared. How
    each is stored is no difference.

        ckpt diff run/checkpoint-10 run/checkpoint-20 --only 'exp_avg/*' --top 5
    """
    from ckpttools.operations.diff import diff

    found = ask(diff, a, b, **options)
    if options["as_json"]:
        render.document(_json(found, a, b))
    elif not options["quiet"]:
        click.echo("\n".join(_text(found, top)))
    return 0 if found.same else 1


def _text(found: Diff, top: int) -> list[str]:
    lines = []
    if found.layout:
        lines.append("stored otherwise, which counts for nothing:")
        lines.append(render.table([(name, shown(x), shown(y)) for name, (x, y) in found.layout.items()]))
    if found.facts:
        lines.append("settings and counters:")
        lines.append(facts(found.facts))
    total = {
        kind: sum(each.kind == kind for each in found.tensors)
        for kind in dict.fromkeys(e.kind for e in found.tensors)
    }
    for kind in dict.fromkeys((*found.equal, *total)):
        same, other = found.equal.get(kind, 0), total.get(kind, 0)
        lines.append(f"{escape(kind)}: {same} equal, {other} different")
    if found.tensors[:top]:
        headers = ("", "kind", "name", "largest", "relative", "cosine", "equal", "")
        lines.append(render.table(map(_row, found.tensors[:top]), headers))
    if len(found.tensors) > top:
        lines.append(f"and {len(found.tensors) - top} more; --top {len(found.tensors)} lists them")
    sides = (found.left, found.right)
    if not any(side.groups or side.unnamed for side in sides) and not found.uncompared:
        lines.append("note: optimizer state was found in neither")
    lines += [f"note: not compared: {escape(name)}" for name in found.uncompared]
    lines.append(found.verdict)
    return lines


def facts(found: tuple[Fact, ...]) -> str:
    """A table of what the two say otherwise."""
    return render.table([(fact.part, fact.name, shown(fact.left), shown(fact.right)) for fact in found])


def shown(value: object) -> str:
    return "?" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def _row(each: Changed) -> tuple[str, ...]:
    apart = each.apart
    sides = f"{each.left} -> {each.right}" if each.left != each.right else each.left
    if apart is None:
        return (each.what, each.kind, each.name, "", "", "", "", sides)
    return (
        each.what,
        each.kind,
        each.name,
        f"{apart.largest:.3g}",
        shown(apart.relative) if apart.relative is None else f"{apart.relative:.3g}",
        shown(apart.cosine) if apart.cosine is None else f"{apart.cosine:.6f}",
        f"{render.count(apart.equal)} of {render.count(apart.numel)}",
        sides,
    )


def fact_json(fact: Fact) -> dict[str, object]:
    from ckpttools.compare.facts import UNKNOWN

    left, right = (None if side is UNKNOWN else side for side in (fact.left, fact.right))
    return {"part": fact.part, "name": fact.name, "left": left, "right": right}


def _json(found: Diff, a: Location, b: Location) -> dict[str, object]:
    return {
        "ok": found.same,
        "left": str(a),
        "right": str(b),
        "layout": {name: list(sides) for name, sides in found.layout.items()},
        "facts": [fact_json(fact) for fact in found.facts],
        "equal": found.equal,
        "tensors": [_tensor_json(each) for each in found.tensors],
        "checksums_verified": found.checked,
        "not_compared": list(found.uncompared),
    }


def _tensor_json(each: Changed) -> dict[str, object]:
    about: dict[str, object] = {"kind": each.kind, "name": each.name, "what": each.what}
    about |= {"left": each.left or None, "right": each.right or None}
    if each.apart is not None:
        about |= {
            "numel": each.apart.numel,
            "equal": each.apart.equal,
            "max_abs": each.apart.largest,
            "relative": each.apart.relative,
            "cosine": each.apart.cosine,
        }
    return about
