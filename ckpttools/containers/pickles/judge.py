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

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from ckpttools.containers.pickles.known import (
    FILLED,
    INERT,
    KNOWN,
    KNOWN_PATTERN,
    RENAMED,
    RUNNER_MODULES,
    RUNNERS,
    RUNNING,
    SPECIAL,
    STDLIB,
    STRICT,
)
from ckpttools.containers.pickles.nodes import Dict, Global, Node, Object, Persistent, Pickle, Set, walk
from ckpttools.errors import escape


class Verdict(StrEnum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    DANGEROUS = "dangerous"


@dataclass(frozen=True, slots=True)
class Judgement:
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
    name = _name(call.cls)
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
    verdicts = {node: _judge_global(node) if node in called else _held(node) for node in pickle.names}
    unused = {node for node, verdict in verdicts.items() if verdict is Verdict.UNKNOWN}
    for node in walk(pickle.value) if unused else ():
        if isinstance(node, Global):
            unused.discard(node)
            if not unused:
                break
    for node, verdict in verdicts.items():
        if node in unused:  # the value shows nothing of it
            yield Judgement(
                Verdict.DANGEROUS, _name(node), f"would import {_name(node)} and use it for nothing"
            )
        elif node in called:
            continue
        elif verdict is Verdict.DANGEROUS:
            yield Judgement(
                verdict, _name(node), f"would import and hold {_name(node)}, which it does not call"
            )
        elif verdict is Verdict.UNKNOWN:
            yield Judgement(verdict, _name(node), f"unknown name {_name(node)}, shown as data")


def _change(made: Object) -> Judgement | None:
    """Items or a state that no pickler gives to an object of its kind."""
    name = _name(made.cls)
    if _is_known(name) and (made.pairs or made.items) and name not in FILLED:
        return Judgement(Verdict.DANGEROUS, name, f"would set items of what {name} makes")
    if made.has_state and (name.startswith("torch._utils._rebuild_") or _special(made.state)):
        return Judgement(Verdict.DANGEROUS, name, f"would set the class or state of what {name} makes")
    return None


def _special(state: Node) -> bool:
    """Whether a state sets what Python itself looks up, such as `__class__`."""
    parts = state if isinstance(state, tuple) else (state,)
    dicts = [part for part in parts[:4] if isinstance(part, Dict)]
    return any(isinstance(key, str) and key in SPECIAL for part in dicts for key, _ in part.pairs)


# --- names --------------------------------------------------------------------------------------------


def _is_known(name: str) -> bool:
    return name in KNOWN or name in _BY_ARGUMENTS or KNOWN_PATTERN.fullmatch(name) is not None


def _judge_name(name: str, *, held: bool = False) -> Verdict:
    """The verdict on a callable by its name alone; `held`: it is not called."""
    module, _, last = name.rpartition(".")
    root = name.partition(".")[0]
    if _is_known(name):
        return Verdict.KNOWN
    if held and module in INERT and last not in RUNNING:
        return Verdict.KNOWN
    if root in STDLIB or root in RUNNERS or last in RUNNING:
        return Verdict.DANGEROUS
    if any(name == m or name.startswith(m + ".") for m in RUNNER_MODULES):
        return Verdict.DANGEROUS
    if root in STRICT and not held and not last.lstrip("_")[:1].isupper():
        return Verdict.DANGEROUS
    if "__main__" in module.split(".")[1:]:
        return Verdict.DANGEROUS  # a program: importing it is running it
    if re.search(r"(?:^|\.)(?:os|sys|subprocess|builtins|posix|pty|shutil|runpy|pickle)$", module):
        return Verdict.DANGEROUS  # a module that some library imports for itself
    return Verdict.KNOWN if held and root in STRICT else Verdict.UNKNOWN


def _judge_global(node: Global) -> Verdict:
    """The verdict on a name that is called."""
    name = _name(node)
    if name in ("builtins.getattr", "builtins.type", "builtins.iter"):
        return Verdict.DANGEROUS  # as somebody's argument: what it does depends on what it is given
    return Verdict.DANGEROUS if _reaches_through(node) else _judge_name(name)


def _held(node: Global) -> Verdict:
    """The verdict on a name that is looked up and not called."""
    if _name(node) in _ONE_CYCLE:
        return Verdict.KNOWN
    return Verdict.DANGEROUS if _reaches_through(node) else _judge_name(_name(node), held=True)


def _reaches_through(node: Global) -> bool:
    # a dotted name reaches through what a module holds: `torch.serialization` `os.system`
    return any(part in STDLIB or part.startswith("__") for part in node.name.split(".")[:-1])


def _verdict(call: Object) -> Verdict:
    cls = call.cls
    if isinstance(cls, Object):
        return _computed(cls, call)
    if not isinstance(cls, Global):
        return Verdict.DANGEROUS  # calls a value that is no function
    check = _BY_ARGUMENTS.get(_name(cls))
    if check is None:
        return _judge_global(cls)
    return Verdict.DANGEROUS if call.kwargs.pairs else check(call)


# --- callables whose arguments decide (read.ARGUMENTS_DECIDE keeps every call of them) --------------


def _computed(cls: Object, call: Object) -> Verdict:
    """A call of what another call returned: only a class nested in a library's class is let pass."""
    if _name(cls.cls) != "builtins.getattr":
        return Verdict.DANGEROUS
    if _is(cls.args, "zoneinfo.ZoneInfo", "_unpickle"):
        return _plain_text(call)
    verdict = _getattr(cls)
    nested = cls.args[1] if len(cls.args) == 2 else None
    return verdict if isinstance(nested, str) and nested[:1].isupper() else Verdict.DANGEROUS


def _is(args: tuple[Node, ...], owner: str, name: str) -> bool:
    return len(args) == 2 and _name(args[0]) == owner and args[1] == name


def _plain_text(call: Object) -> Verdict:
    plain = all(isinstance(x, str | bool | int) or x is None for x in call.args)
    return Verdict.KNOWN if plain else Verdict.DANGEROUS


# their anneal_func is a static method, which protocol 2 pickles as getattr(class, name): torch's up to 2.1
_ONE_CYCLE = (
    "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler",
    "torch.optim.lr_scheduler.OneCycleLR",
)


def _getattr(call: Object) -> Verdict:
    # MMEngine saves getattr(HistoryBuffer, 'mean'); Python 3.11.0 to 3.11.3 saved every enum member so,
    # and protocols below 4 every class within a class
    if len(call.args) != 2:
        return Verdict.DANGEROUS
    owner, name = call.args
    if _is(call.args, "zoneinfo.ZoneInfo", "_unpickle"):
        return Verdict.KNOWN
    if not (isinstance(owner, Global) and isinstance(name, str)):
        return Verdict.DANGEROUS
    if _name(owner) in _ONE_CYCLE and name in ("_annealing_cos", "_annealing_linear"):
        return Verdict.KNOWN
    if not name.isidentifier() or name.startswith("_") or name in RUNNING:
        return Verdict.DANGEROUS
    if owner.module.partition(".")[0] in STDLIB or not owner.name.rpartition(".")[2][:1].isupper():
        return Verdict.DANGEROUS
    return _judge_global(owner)


def _encode(call: Object) -> Verdict:
    # bytes in protocols below 3; any other codec may take very long
    latin1 = len(call.args) == 2 and isinstance(call.args[0], str) and call.args[1] in ("latin1", "latin-1")
    return Verdict.KNOWN if latin1 else Verdict.DANGEROUS


def _bytes(call: Object) -> Verdict:
    # bytes(10**12) and bytearray(10**12) would fill the memory
    plain = all(
        isinstance(x, str | bytes | bytearray | list)
        or (isinstance(x, Object) and _name(x.cls) == "_codecs.encode")
        for x in call.args
    )
    return Verdict.KNOWN if plain else Verdict.DANGEROUS


def _only_one(call: Object) -> Verdict:
    # NoneType is saved as type(None); type(name, bases, dict) makes classes, iter(f, x) calls f
    return Verdict.KNOWN if len(call.args) == 1 else Verdict.DANGEROUS


def _first_is_class(call: Object) -> Verdict:
    """`__newobj__(cls, ...)`: the class is judged as if it were called."""
    return _argument(call.args[0]) if call.args else Verdict.DANGEROUS


def _reconstructor(call: Object) -> Verdict:
    # calls base.__init__(object, state) unless the base is object
    if len(call.args) != 3:
        return Verdict.DANGEROUS
    return _worst(_argument(call.args[0]), _argument(call.args[1]))


def _from_type(call: Object) -> Verdict:
    # torch calls the function that is its first argument
    if len(call.args) != 4 or not isinstance(call.args[0], Global) or not isinstance(call.args[1], Global):
        return Verdict.DANGEROUS
    func, kind, args, state = call.args
    if _special(state) or not isinstance(args, tuple) or not _name(func).startswith("torch._utils._rebuild_"):
        return Verdict.DANGEROUS
    return _worst(_argument(func), _argument(kind))


def _holder(call: Object) -> Verdict:
    """defaultdict(factory) and partial(function, ...) call nothing when they are made; `_names` judges what
    they hold. A call of a partial is one of a computed function.
    """
    return Verdict.KNOWN


def _parameter(call: Object) -> Verdict:
    return Verdict.DANGEROUS if any(map(_special, call.args[3:])) else Verdict.KNOWN  # its attributes


def _random_ctor(call: Object) -> Verdict:
    # numpy calls a class that is the first argument, and a function that is the second
    if len(call.args) > 2:
        return Verdict.DANGEROUS
    for i, x in enumerate(call.args):
        name = _name(x.cls) if isinstance(x, Object) and i == 0 else _name(x) if isinstance(x, Global) else ""
        if not (name.startswith("numpy.random.") or (isinstance(x, str) and i == 0)):
            return Verdict.DANGEROUS
    return Verdict.KNOWN


def _argument(node: Node) -> Verdict:
    """The verdict on an argument that is a class or will be called."""
    return _judge_global(node) if isinstance(node, Global) else Verdict.DANGEROUS


def _worst(*verdicts: Verdict) -> Verdict:
    order = (Verdict.DANGEROUS, Verdict.UNKNOWN, Verdict.KNOWN)
    return min(verdicts, key=order.index)


_BY_ARGUMENTS: dict[str, Callable[[Object], Verdict]] = {
    "builtins.getattr": _getattr,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.type": _only_one,
    "builtins.iter": _only_one,
    "_codecs.encode": _encode,
    "copyreg.__newobj__": _first_is_class,
    "copyreg.__newobj_ex__": _first_is_class,
    "copyreg._reconstructor": _reconstructor,
    "collections.defaultdict": _holder,
    "functools.partial": _holder,
    "logging.getLogger": _plain_text,
    "zoneinfo.ZoneInfo._unpickle": _plain_text,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "numpy.random._pickle.__bit_generator_ctor": _random_ctor,
    "numpy.random._pickle.__generator_ctor": _random_ctor,
    "numpy.random._pickle.__randomstate_ctor": _random_ctor,
}


# --- showing ------------------------------------------------------------------------------------------


def _name(node: Node) -> str:
    """A callable's name, as Python 3 spells it, escaped."""
    if isinstance(node, Global):
        return escape(f"{RENAMED.get(node.module, node.module)}.{node.name}", 120)
    if isinstance(node, Object) and isinstance(node.cls, Global):
        return f"the result of {_name(node.cls)}"
    return "something computed" if isinstance(node, Object) else "something that is no function"


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
            return _name(node)
        case Object():
            inner = ", ".join(_text(x, depth - 1) for x in node.args[:2]) if depth else "…"
            return f"{_name(node.cls)}({inner})"
        case tuple() | list() | Set():
            items = node.members if isinstance(node, Set) else node
            inner = ", ".join(_text(x, depth - 1) for x in items[:4]) if depth else "…"
            return f"({inner}{', …' if len(items) > 4 else ''})"
        case Dict():
            return f"a dict of {len(node.pairs)}"
        case Persistent():
            return "a storage"
    return f"a {type(node).__name__}"
