"""ckpt digest: what a checkpoint holds, whatever its layout, as digests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PLACE, SRC, STATS, TAG, ask, reading
from ckpttools.errors import escape
from ckpttools.location import Location
from ckpttools.stores.files import is_file

if TYPE_CHECKING:
    from ckpttools.operations.digest import Compared, Digested

SHOWN = 20


@click.command("digest")
@SRC
@click.option("--compare", "other", type=PLACE, metavar="OTHER", help="Say whether OTHER holds the same.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="With --compare: only weight, master, exp_avg, step ... (repeatable).",
)
@click.option("--tensors", is_flag=True, help="Also list the digest of each tensor.")
@FOLLOW
@STATS
@TAG
@reading
def command(
    src: Location,
    other: Location | None,
    kinds: tuple[str, ...],
    tensors: bool,
    tag: str | None,
    key: str | None,
    **options: Any,
) -> int:
    """Print a digest of all weights, master weights, optimizer state and steps of SRC, and one per kind.

    It is the same for every layout of the same content: any number of ranks, ZeRO, distributed or a single
    file. Every tensor is read once, and the checksums of the files are verified on the way. Hyper-parameters
    and counters have digests of their own.

    With --compare, exit code 0: each holds all that the other does, and it is equal; 1: something differs,
    or one side does not hold a kind at all, which is named. What is in no digest (tensors that training code
    keeps, such as an average of the weights) is read and compared too. Weights that were extracted are
    compared so:

        ckpt digest run/checkpoint-20 --compare weights --kind weight --kind master
    """
    from ckpttools.operations.digest import compare, digest

    found = ask(digest, src, tag=tag, key=key if is_file(src) else None, **options)
    if other is None:
        if options["as_json"]:
            render.document(_json(found))
        elif options["quiet"]:
            click.echo(found.digests.state)
        else:
            click.echo("\n".join(_text(found, tensors=tensors)))
        return 0
    theirs = ask(digest, other, key=key if is_file(other) else None, **options)
    result = compare(found, theirs, kinds)
    if options["as_json"]:
        render.document(_compared_json(result))
    else:
        click.echo("\n".join(compared(result)))
    return 0 if result.same else 1


def _text(found: Digested, *, tensors: bool) -> list[str]:
    digests = found.digests
    rows = [(digests.state, "", "state: weights, optimizer state and steps, in any layout")]
    for kind, digest in digests.kinds.items():
        rows.append((digest, kind, f"{render.count(len(digests.tensors[kind]))} names{_dtypes(found, kind)}"))
    rows.append((digests.settings, "", "settings: hyper-parameters"))
    rows.append((digests.counters, "", "counters: steps, epochs, losses, schedule, batch, loss scale"))
    lines = [render.table(rows)]
    if digests.apart:
        lines.append(
            f"note: {len(digests.apart)} weights are not their rounded masters, the first "
            f"{escape(digests.apart[0])}; ckpt verify says more"
        )
    lines += [f"note: not in the digests: {what}" for what in (*found.unnamed, *map(escape, found.beside))]
    if tensors:
        each = [
            (digest, kind, name) for kind, named in digests.tensors.items() for name, digest in named.items()
        ]
        lines.append(render.table(each))
    lines.append(f"{digests.checked} checksums verified")
    return lines


def _dtypes(found: Digested, kind: str) -> str:
    names = sorted(set(found.digests.dtypes.get(kind, {}).values()))
    return f", {', '.join(names)}" if names else ""


def _json(found: Digested) -> dict[str, object]:
    digests = found.digests
    return {
        "ok": True,
        "path": str(found.path),
        "format": found.checkpoint.layout.format,
        "state": digests.state,
        "settings": digests.settings,
        "counters": digests.counters,
        "kinds": dict(digests.kinds),
        "tensors": {kind: dict(named) for kind, named in digests.tensors.items()},
        "apart": list(digests.apart),
        "not_in_digests": [*found.unnamed, *found.beside],
        "checksums_verified": digests.checked,
    }


def compared(result: Compared) -> list[str]:
    """What is equal, what differs and what only one side holds; of the names, the first."""
    lines = [f"equal: {number} of {kind}" for kind, number in result.equal.items() if number]
    lines += [
        f"DIFFERENT: {each.kind} {escape(each.name, 300)}{_only(each.left, each.right)}"
        for each in result.different[:SHOWN]
    ]
    if len(result.different) > SHOWN:
        lines.append(f"and {len(result.different) - SHOWN} more that differ")
    for kind, is_left in result.one_sided.items():
        side = result.left if is_left else result.right
        lines.append(f"NOT COMPARED: {kind}, which only {escape(side.path)} holds")
    lines += [f"NOT COMPARED: {what}; ckpt prove does" for what in result.uncompared]
    lines += _beside(result)
    for what, same in (("hyper-parameters", _settings(result)), ("counters and schedule", result.counters)):
        said = {True: "equal", False: "not the same; ckpt diff names them", None: "not compared"}[same]
        lines.append(f"{what}: {said}")
    both = (result.left.checkpoint, result.right.checkpoint)
    if not any(value not in (None, {}, []) for side in both for value in side.training.stated.values()):
        lines[-1] = "counters and schedule: neither holds any"
    lines.append(_verdict(result))
    return lines


def _beside(result: Compared) -> Iterator[str]:
    """What is in no digest: whether it is equal, and what no command looks into."""
    from ckpttools.compare.facts import CLIENT

    keys, unread = result.beside, {*result.left.checkpoint.unread, *result.right.checkpoint.unread}
    if (seen := [key for key in keys if keys[key]]) and all(d.kind != CLIENT for d in result.different):
        yield f"equal: what lies beside, in no digest: {_named(seen)}"
    objects = [key for key in keys if not keys[key] and key not in unread]
    no_text = [key for key in keys if key in unread]
    for what, names in (("objects", objects), ("what lies under keys that are no text", no_text)):
        if names:
            yield f"NOT COMPARED: {what}: {_named(names)}; no command looks into it"


def _named(keys: list[str]) -> str:
    return ", ".join(map(escape, keys[:SHOWN])) + (", ..." if len(keys) > SHOWN else "")


def _settings(result: Compared) -> bool | None:
    """Whether the hyper-parameters are the same; None where those of some optimizer are not compared."""
    return None if result.settings and result.uncompared else result.settings


def _only(left: str, right: str) -> str:
    if left and right:
        return ""
    return ", only in the first" if left else ", only in the second"


def _verdict(result: Compared) -> str:
    if result.same:
        return _same(result)
    if result.different or not result.equal:
        return "different"
    kinds = " ".join(f"--kind {kind}" for kind in result.equal)
    return f"equal in what both hold; {kinds} compares that alone"


def _same(result: Compared) -> str:
    """In words of what was compared: not of what was not asked for, or what neither side has."""
    from ckpttools.compare.content import MASTER, WEIGHT

    known = dict.fromkeys((*result.left.content.kinds, *result.right.content.kinds))
    sides = (result.left, result.right)
    beside = (what for side in sides for what in (*side.unnamed, *map(escape, side.beside)))
    others = [kind for kind in known if kind not in result.equal]
    if rest := [*others, *dict.fromkeys(beside)] if result.partial else others:
        return f"the same in {', '.join(result.equal)}; not asked for: {', '.join(rest)}"
    if known.keys() <= {WEIGHT, MASTER}:
        return "the same weights; neither holds any optimizer state"
    return "the same weights and optimizer state"


def _compared_json(result: Compared) -> dict[str, object]:
    return {
        "ok": result.same,
        "left": _json(result.left),
        "right": _json(result.right),
        "equal": dict(result.equal),
        "different": [
            {"kind": d.kind, "name": d.name, "left": d.left or None, "right": d.right or None}
            for d in result.different
        ],
        "one_sided": {
            kind: str((result.left if is_left else result.right).path)
            for kind, is_left in result.one_sided.items()
        },
        "not_compared": [*result.uncompared, *(key for key, seen in result.beside.items() if not seen)],
        "settings_equal": _settings(result),
        "counters_equal": result.counters,
    }
