"""Callables whose arguments decide what a call of them does. The reader keeps every call of them."""

from __future__ import annotations

from collections.abc import Callable

from ckpttools.containers.pickles.known import RUNNING, STDLIB
from ckpttools.containers.pickles.names import ONE_CYCLE, STORAGE, Verdict, judge_global, name_of, special
from ckpttools.containers.pickles.nodes import Global, Node, Object, Pickle
from ckpttools.containers.pickles.read import loads
from ckpttools.errors import CkptError


def computed(cls: Object, call: Object) -> Verdict:
    """A call of what another call returned: only a class nested in a library's class is let pass."""
    if name_of(cls.cls) != "builtins.getattr":
        return Verdict.DANGEROUS
    if _is(cls.args, "zoneinfo.ZoneInfo", "_unpickle"):
        return _plain_text(call)
    verdict = _getattr(cls)
    nested = cls.args[1] if len(cls.args) == 2 else None
    return verdict if isinstance(nested, str) and nested[:1].isupper() else Verdict.DANGEROUS


def _is(args: tuple[Node, ...], owner: str, name: str) -> bool:
    return len(args) == 2 and name_of(args[0]) == owner and args[1] == name


def _plain_text(call: Object) -> Verdict:
    plain = all(isinstance(x, str | bool | int) or x is None for x in call.args)
    return Verdict.KNOWN if plain else Verdict.DANGEROUS


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
    if name_of(owner) in ONE_CYCLE and name in ("_annealing_cos", "_annealing_linear"):
        return Verdict.KNOWN
    if not name.isidentifier() or name.startswith("_") or name in RUNNING:
        return Verdict.DANGEROUS
    if owner.module.partition(".")[0] in STDLIB or not owner.name.rpartition(".")[2][:1].isupper():
        return Verdict.DANGEROUS
    return judge_global(owner)


def _encode(call: Object) -> Verdict:
    # bytes in protocols below 3; any other codec may take very long
    latin1 = len(call.args) == 2 and isinstance(call.args[0], str) and call.args[1] in ("latin1", "latin-1")
    return Verdict.KNOWN if latin1 else Verdict.DANGEROUS


def _bytes(call: Object) -> Verdict:
    # bytes(10**12) and bytearray(10**12) would fill the memory
    plain = all(
        isinstance(x, str | bytes | bytearray | list)
        or (isinstance(x, Object) and name_of(x.cls) == "_codecs.encode")
        for x in call.args
    )
    return Verdict.KNOWN if plain else Verdict.DANGEROUS


def stored(call: Object) -> list[Pickle] | None:
    """What STORAGE is given in a plain pickle of tensors, and loads: what torch.save wrote before zips, which
    begins with five pickles, none with another one within. None for anything else.
    """
    raw = call.args[0] if len(call.args) == 1 and not call.kwargs.pairs else None
    if isinstance(raw, Object) and name_of(raw.cls) == "_codecs.encode" and _encode(raw) is Verdict.KNOWN:
        text = raw.args[0]
        raw = text.encode("latin1", "replace") if isinstance(text, str) else None
    if not isinstance(raw, bytes):
        return None
    found: list[Pickle] = []
    try:
        for _ in range(5):
            found.append(loads(raw, start=found[-1].end if found else 0, exact=False))
    except CkptError:
        return None
    nested = any(name_of(inner.cls) == STORAGE for each in found for inner in each.calls)
    return None if nested else found


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
    return worst(_argument(call.args[0]), _argument(call.args[1]))


def _from_type(call: Object) -> Verdict:
    # torch calls the function that is its first argument
    if len(call.args) != 4 or not isinstance(call.args[0], Global) or not isinstance(call.args[1], Global):
        return Verdict.DANGEROUS
    func, kind, args, state = call.args
    if (
        special(state)
        or not isinstance(args, tuple)
        or not name_of(func).startswith("torch._utils._rebuild_")
    ):
        return Verdict.DANGEROUS
    return worst(_argument(func), _argument(kind))


def _holder(call: Object) -> Verdict:
    """defaultdict(factory) and partial(function, ...) call nothing when they are made; `_names` judges what
    they hold. A call of a partial is one of a computed function.
    """
    return Verdict.KNOWN


def _parameter(call: Object) -> Verdict:
    return Verdict.DANGEROUS if any(map(special, call.args[3:])) else Verdict.KNOWN  # its attributes


def _random_ctor(call: Object) -> Verdict:
    # numpy calls a class that is the first argument, and a function that is the second
    if len(call.args) > 2:
        return Verdict.DANGEROUS
    for i, x in enumerate(call.args):
        name = (
            name_of(x.cls)
            if isinstance(x, Object) and i == 0
            else name_of(x)
            if isinstance(x, Global)
            else ""
        )
        if not (name.startswith("numpy.random.") or (isinstance(x, str) and i == 0)):
            return Verdict.DANGEROUS
    return Verdict.KNOWN


def _argument(node: Node) -> Verdict:
    """The verdict on an argument that is a class or will be called."""
    return judge_global(node) if isinstance(node, Global) else Verdict.DANGEROUS


def worst(*verdicts: Verdict) -> Verdict:
    order = (Verdict.DANGEROUS, Verdict.UNKNOWN, Verdict.KNOWN)
    return min(verdicts, key=order.index)


CHECKS: dict[str, Callable[[Object], Verdict]] = {
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
