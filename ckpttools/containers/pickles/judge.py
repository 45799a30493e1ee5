"""What loading a pickle would have done, judged by name and, where they decide, by arguments.

A call is KNOWN (plain data: the tables below), UNKNOWN (a class of some library: shown as data, which is
information and no fault) or DANGEROUS (it would run something: anything of the standard library that is
not in the tables, functions of torch and numpy that are not, loaders of further pickles, names that run
programs, the result of another call being called).

Loading also imports the module of every name that the pickle only holds, or pushes and drops: such a name
is judged by what the import and the holding can do, which is less. And it sets items and states, which no
pickler does to a tensor, and by which none changes an object's class.

Nothing is looked up: a name that the file spells differently from Python's own is judged as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from ckpttools.containers.pickles.arguments import CHECKS, computed, stored, worst
from ckpttools.containers.pickles.known import FILLED
from ckpttools.containers.pickles.names import (
    STORAGE,
    Verdict,
    is_known,
    judge_global,
    judge_held,
    name_of,
    special,
)
from ckpttools.containers.pickles.nodes import Dict, Global, Node, Object, Persistent, Pickle, Set, walk
from ckpttools.errors import escape


class Judgement(Struct, frozen=True):
    """One callable: `what` is one line for people, with everything from the file escaped."""

    verdict: Verdict
    name: str
    what: str


def judge(pickle: Pickle) -> tuple[Judgement, ...]:
    """A judgement for each callable, each name that is only resolved and each unusual change of an object.

    Equal ones once, calls first, in the order of the file.
    """
    found = [*judge_calls(pickle.calls), *_names(pickle), *filter(None, map(_change, pickle.changed))]
    return tuple(dict.fromkeys(found))


def dangers(judgements: Iterable[Judgement]) -> tuple[str, ...]:
    """What people must know before anything else; empty where nothing is dangerous."""
    return tuple(judgement.what for judgement in judgements if judgement.verdict is Verdict.DANGEROUS)


def judge_calls(calls: Iterable[Object]) -> tuple[Judgement, ...]:
    """A judgement for each callable of `Pickle.calls`, equal ones once, in the order of the file."""
    return tuple(dict.fromkeys(map(judge_call, calls)))


def judge_call(call: Object) -> Judgement:
    name = name_of(call.cls)
    verdict = _verdict(call)
    match verdict:
        case Verdict.DANGEROUS:
            what = f"would run {name}({_shown(call)})"
        case Verdict.UNKNOWN:
            what = f"unknown class {name}, shown as data"
        case _:
            what = f"{name}, plain data"
    return Judgement(verdict, name, what)


def _names(pickle: Pickle) -> Iterable[Judgement]:
    """Names that are resolved and not called, and those of unknown modules that nothing uses."""
    called = {call.cls for call in pickle.calls if isinstance(call.cls, Global)}
    verdicts = {node: judge_global(node) if node in called else judge_held(node) for node in pickle.names}
    unused = {node for node, verdict in verdicts.items() if verdict is Verdict.UNKNOWN}
    for node in walk(pickle.value) if unused else ():
        if isinstance(node, Global):
            unused.discard(node)
            if not unused:
                break
    for node, verdict in verdicts.items():
        if node in unused:  # the value shows nothing of it
            yield Judgement(
                Verdict.DANGEROUS, name_of(node), f"would import {name_of(node)} and use it for nothing"
            )
        elif node in called:
            continue
        elif verdict is Verdict.DANGEROUS:
            yield Judgement(
                verdict, name_of(node), f"would import and hold {name_of(node)}, which it does not call"
            )
        elif verdict is Verdict.UNKNOWN:
            yield Judgement(verdict, name_of(node), f"unknown name {name_of(node)}, shown as data")


def _change(made: Object) -> Judgement | None:
    """Items or a state that no pickler gives to an object of its kind."""
    name = name_of(made.cls)
    if (made.pairs or made.items) and is_known(name) and name not in FILLED:
        return Judgement(Verdict.DANGEROUS, name, f"would set items of what {name} makes")
    if made.has_state and (name.startswith("torch._utils._rebuild_") or special(made.state)):
        return Judgement(Verdict.DANGEROUS, name, f"would set the class or state of what {name} makes")
    return None


def _verdict(call: Object) -> Verdict:
    cls = call.cls
    if isinstance(cls, Object):
        return computed(cls, call)
    if not isinstance(cls, Global):
        return Verdict.DANGEROUS  # calls a value that is no function
    if name_of(cls) == STORAGE:
        pickles = stored(call)
        found = (each.verdict for pickle in pickles or () for each in judge(pickle))
        return Verdict.DANGEROUS if pickles is None else worst(Verdict.KNOWN, *found)
    check = CHECKS.get(name_of(cls))
    if check is None:
        return judge_global(cls)
    return Verdict.DANGEROUS if call.kwargs.pairs else check(call)


# --- showing ------------------------------------------------------------------------------------------


def _shown(call: Object) -> str:
    """The arguments, escaped and cut."""
    parts = [_text(x, 2) for x in call.args[:4]] + ["…"] * (len(call.args) > 4)
    parts += [f"{_text(k, 1)}={_text(v, 2)}" for k, v in call.kwargs.pairs[:4]]
    return escape(", ".join(parts), 160)


def _text(node: Node, depth: int) -> str:
    match node:
        case None | bool() | float():
            return repr(node)
        case int():
            return str(node) if abs(node) < 2**64 else "a large int"
        case str():
            return repr(node[:80]) + ("…" if len(node) > 80 else "")
        case bytes() | bytearray():
            return repr(bytes(node[:40])) + ("…" if len(node) > 40 else "")
        case Global():
            return name_of(node)
        case Object():
            inner = ", ".join(_text(x, depth - 1) for x in node.args[:2]) if depth else "…"
            return f"{name_of(node.cls)}({inner})"
        case tuple() | list() | Set():
            items = node.members if isinstance(node, Set) else node
            inner = ", ".join(_text(x, depth - 1) for x in items[:4]) if depth else "…"
            return f"({inner}{', …' if len(items) > 4 else ''})"
        case Dict():
            return f"a dict of {len(node.pairs)}"
        case Persistent():
            return "a storage"
    return f"a {type(node).__name__}"
