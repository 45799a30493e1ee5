"""How the forecast of ckpt resume-check looks, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.errors import escape

MARK = {True: "yes", False: "NO", None: "?"}
WORD = {
    "safe": "it will resume",
    "careful": "it will resume, but look at what changed",
    "impossible": "it will NOT resume as it should",
}
TENSORS = 20  # shown before the rest is only counted


def show(found: Any, *, quiet: bool) -> None:
    """For people: the verdict and where it goes on; unless `quiet`, all that the forecast holds."""
    refusal = found.refusal
    unknown = _unknown(found) if found.verdict == "safe" else []
    but = f" as far as is known; not known: {', '.join(unknown)}" if unknown else ""
    click.echo(f"{escape(found.path, 4000)}: {WORD[found.verdict]} ({found.verdict}{but})")
    if refusal is not None:
        text = f": {escape(refusal.text, 600)}" if refusal.text else ""
        click.echo(f"  {refusal.moment.when}: {refusal.error}{text}")
    elif found.verdict == "impossible" and not found.damaged:
        click.echo("  no error is raised: it would go on wrongly")
    if found.resumes:
        place = [
            f"{name} {value}"
            for name, value in (("step", found.step), ("epoch", found.epoch), ("sample", found.samples))
            if value is not None and not (name == "epoch" and value == 0 and found.step)
        ]
        click.echo(
            f"  goes on after {', '.join(place) if place else 'a step that the checkpoint does not state'}"
        )
        click.echo(f"  learning rate {_rates(found.rates)}")
    if quiet:
        return
    if found.loads and found.resumes:
        click.echo(f"  loads {'; '.join(escape(line, 300) for line in found.loads)}")
    click.echo("\nchecks")
    click.echo(render.table([(MARK[c.ok], c.name, c.text) for c in found.checks]))
    if found.differences:
        click.echo("\nchanged")
        rows = [(d.cls, d.setting, _short(d.old), _short(d.new), d.why) for d in found.differences]
        click.echo(render.table(rows, ("", "setting", "checkpoint", "new run", "")))
    if found.overridden:
        click.echo("\nwithout effect")
        over = [(o.setting, _short(o.configured), _short(o.used), o.why) for o in found.overridden]
        click.echo(render.table(over, ("setting", "configured", "used", "")))
    if found.tensors:
        click.echo(f"\ntensors that do not fit: {len(found.tensors)}")
        shown = [(t.problem, t.name, t.saved, t.wanted) for t in found.tensors[:TENSORS]]
        click.echo(render.table(shown, ("", "name", "checkpoint", "new model")))
        if len(found.tensors) > TENSORS:
            click.echo(f"and {len(found.tensors) - TENSORS} more: see --json")
    if found.auto_resume:
        click.echo("\nan automatic resume here takes")
        for rule in found.auto_resume:
            taken = escape(rule.path, 1000) if rule.path is not None else "nothing"
            click.echo(f"  {rule.framework}: {taken} ({escape(rule.why, 500)})")
            if rule.problem:
                click.echo(f"    but {escape(rule.problem, 1000)}")
    for note in found.notes:
        click.echo(f"note: {escape(note, 1000)}")
    for hint in dict.fromkeys(d.hint for d in found.differences if d.hint and d.cls != "safe"):
        click.echo(f"hint: {escape(hint, 1000)}")


def _rates(rates: Any) -> str:
    if not rates.first:
        return f"not forecast: {rates.note}"
    first = _list(rates.first)
    if rates.next is None and rates.last:
        return f"{first} for the first update; then {rates.note}"
    if rates.next is None:
        return f"{first} for the first update; then ? ({rates.note or 'not forecast'})"
    return f"{first} for the first update, {_list(rates.next)} for the next" + (
        f" ({rates.note})" if rates.note else ""
    )


def _list(values: tuple[float, ...]) -> str:
    same = all(value == values[0] for value in values)
    return f"{values[0]:.6g}" if same else ", ".join(f"{value:.6g}" for value in values)


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping | list | tuple) and len(str(value)) > 60:
        return f"{str(value)[:59]}…"
    return str(value)


def _unknown(found: Any) -> list[str]:
    """What could be told by nobody: it counts neither as safe nor as changed."""
    return [check.name for check in found.checks if check.ok is None]


def document(found: Any) -> dict[str, object]:
    """The structure of --json.

    ok, resumes   whether it will resume (exit code 0)
    verdict       "safe", "careful" or "impossible": the worst class of any difference
    unknown       names of the checks that cannot be told, which the verdict leaves out
    error         null, or what the framework raises first: {class, text, when}
    step, epoch, samples
                  where the checkpoint stands; null where it does not say
    lr            {first, next, groups: [{first, next}], note}: of the first resumed update and of the one
                  after it, of the first parameter group and of each; next is null where it is not foretold
    loads         what will be loaded, in words
    checks        [{name, ok, text}]; ok is null where it cannot be told
    differences   [{setting, old, new, class, why, hint, error}]
    tensors       [{name, problem, checkpoint, model}]; problem: missing, unexpected, shape or dtype
    overridden    [{setting, configured, used, why}]: values of the new configuration without effect
    auto_resume   [{framework, path, why, problem, found}]: what each framework would take in this folder
    notes         what is not foretold, and by which DeepSpeed the rest is
    """
    refusal = found.refusal
    rates = found.rates
    return {
        "ok": found.resumes,
        "path": str(found.path),
        "format": found.format,
        "resumes": found.resumes,
        "verdict": found.verdict,
        "unknown": _unknown(found),
        "error": None
        if refusal is None
        else {"class": refusal.error, "text": refusal.text, "when": refusal.moment.when},
        "step": found.step,
        "epoch": found.epoch,
        "samples": found.samples,
        "lr": {
            "first": rates.first[0] if rates.first else None,
            "next": rates.next[0] if rates.next else None,
            "groups": [
                {"first": first, "next": rates.next[g] if rates.next else None}
                for g, first in enumerate(rates.first)
            ],
            "note": rates.note,
        },
        "loads": list(found.loads),
        "checks": [{"name": c.name, "ok": c.ok, "text": c.text} for c in found.checks],
        "differences": [
            {
                "setting": d.setting,
                "old": d.old,
                "new": d.new,
                "class": d.cls,
                "why": d.why,
                "hint": d.hint,
                "error": d.refusal.error if d.refusal is not None else None,
            }
            for d in found.differences
        ],
        "tensors": [
            {"name": t.name, "problem": t.problem, "checkpoint": t.saved, "model": t.wanted}
            for t in found.tensors
        ],
        "overridden": [
            {"setting": o.setting, "configured": o.configured, "used": o.used, "why": o.why}
            for o in found.overridden
        ],
        "auto_resume": [
            {
                "framework": a.framework,
                "path": None if a.path is None else str(a.path),
                "why": a.why,
                "problem": a.problem,
                "found": list(a.found),
            }
            for a in found.auto_resume
        ],
        "notes": list(found.notes),
    }
