"""ckpt prove: whether two checkpoints are the same training state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.diff import fact_json, facts
from ckpttools.cli.options import FOLLOW, PATH, TAGS, ask, reading
from ckpttools.errors import escape

if TYPE_CHECKING:
    from ckpttools.operations.prove import Proof

SHOWN = 20


@click.command("prove")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@FOLLOW
@TAGS
@reading
def command(a: Path, b: Path, **options: Any) -> int:
    """Say whether A and B are the same training state, whatever their layouts.

    The same: weights, optimizer state, steps, hyper-parameters, schedule and counters, bit for bit. Identical
    except: the tensors that both hold are equal, and what is not equal, or not on both sides, is named.
    Different: a tensor or a step differs. Exit code 0: the same, 1: not. Random states belong to single
    ranks: whether they are there is said.

        ckpt prove run/checkpoint-20 ws4-of-checkpoint-20
    """
    from ckpttools.operations.prove import prove

    proof = ask(prove, a, b, **options)
    if options["as_json"]:
        render.document(_json(proof))
    else:
        click.echo("\n".join(_text(proof, quiet=options["quiet"])))
    return 0 if proof.verdict == "same" else 1


def _text(proof: Proof, *, quiet: bool) -> list[str]:
    result = proof.compared
    match proof.verdict:
        case "same":
            verdict = "the same training state"
        case "except":
            verdict = f"identical except {', '.join(_exceptions(proof))}"
        case _:
            verdict = "different"
    if quiet:
        return [verdict]
    lines = [f"  {number} of {kind} are equal" for kind, number in result.equal.items() if number]
    for each in result.different[:SHOWN]:
        lines.append(f"  {each.kind} {escape(each.name, 300)} differs")
    if len(result.different) > SHOWN:
        lines.append(f"  and {len(result.different) - SHOWN} more")
    if proof.facts:
        lines.append(facts(proof.facts[:SHOWN]))
    if len(proof.facts) > SHOWN:
        lines.append(f"  and {len(proof.facts) - SHOWN} more; ckpt diff lists them")
    if proof.uncounted:
        lines.append("  neither says how far training is")
    for side, found in ((result.left, proof.random[0]), (result.right, proof.random[1])):
        what = ", ".join(map(escape, found[:8])) if found else "none"
        lines.append(f"  random states in {escape(side.path)}: {what} (not compared)")
    if proof.uncompared:
        rest = ", ".join(map(escape, proof.uncompared[:8]))
        lines.append(f"  {_unread(proof)} not looked into, and not compared: {rest}")
    return [verdict, *lines]


def _exceptions(proof: Proof) -> list[str]:
    """What is not the same, in few words."""
    result = proof.compared
    out = []
    for kind, is_left in result.one_sided.items():
        side = result.left if is_left else result.right
        out.append(f"{kind} (only in {escape(side.path)})")
    if proof.unread:
        out.append(f"optimizer state ({'not compared' if proof.unnamed else 'found in neither'})")
    said = set(proof.unnamed) if proof.unread else set()
    if set(proof.uncompared) - said:
        out.append(f"{_unread(proof)} not compared")
    parts = dict.fromkeys(fact.part for fact in proof.facts)
    return out + [f"{part} ({', '.join(_named(proof, part))})" for part in parts]


def _unread(proof: Proof) -> str:
    below = proof.compared.left.checkpoint.below or proof.compared.right.checkpoint.below
    return "objects or weights that are" if below else "objects that are"


def _named(proof: Proof, part: str) -> list[str]:
    names = [escape(fact.name) for fact in proof.facts if fact.part == part]
    return names[:4] + ([f"{len(names) - 4} more"] if len(names) > 4 else [])


def _json(proof: Proof) -> dict[str, object]:
    result = proof.compared
    left, right = result.left, result.right
    return {
        "ok": proof.verdict == "same",
        "verdict": proof.verdict,
        "left": str(left.path),
        "right": str(right.path),
        "digests": [left.digests.state, right.digests.state],
        "equal": dict(result.equal),
        "different": [{"kind": each.kind, "name": each.name} for each in result.different],
        "one_sided": {
            kind: str((left if is_left else right).path) for kind, is_left in result.one_sided.items()
        },
        "facts": [fact_json(fact) for fact in proof.facts],
        "optimizer_in_neither": proof.unread,
        "random_states": [list(found) for found in proof.random],
        "not_compared": list(proof.uncompared),
    }
