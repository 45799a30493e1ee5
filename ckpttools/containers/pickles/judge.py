"""What loading a pickle would have called, judged by name and, where they decide, by arguments.

A call is KNOWN (plain data: the tables below), UNKNOWN (a class of some library: shown as data, which is
information and no fault) or DANGEROUS (it would run something: anything of the standard library that is
not in the tables, functions of torch and numpy that are not, loaders of further pickles, names that run
programs, the result of another call being called).

Nothing is looked up: a name that the file spells differently from Python's own is judged as it stands.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from ckpttools.containers.pickles.nodes import Dict, Global, Node, Object, Persistent, Set
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


def judge(calls: Iterable[Object]) -> tuple[Judgement, ...]:
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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- the tables ---------------------------------------------------------------------------------------

# Python 2's names, which protocols 0 to 2 still write, and modules that some Python versions have
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
STDLIB = sys.stdlib_module_names | _words(
    "__builtin__ copy_reg exceptions commands cPickle cStringIO StringIO Queue SocketServer ConfigParser "
    "UserDict UserList UserString Tkinter httplib urllib2 urlparse xmlrpclib thread dummy_thread _abcoll "
    "anydbm dbhash dumbdbm gdbm whichdb robotparser cookielib Cookie HTMLParser BaseHTTPServer "
    "SimpleHTTPServer CGIHTTPServer DocXMLRPCServer SimpleXMLRPCServer popen2 imp asynchat asyncore "
    "smtpd distutils pipes cgi cgitb crypt nis telnetlib lib2to3 audioop imghdr sndhdr mailcap msilib "
    "nntplib ossaudiodev spwd uu xdrlib aifc sunau nt posix pwd _winapi winreg msvcrt"
)

_DATA = {
    "builtins": "set frozenset list dict tuple complex slice range xrange int float str unicode bool long "
    "object enumerate zip reversed Ellipsis NotImplemented",
    "collections": "OrderedDict Counter deque ChainMap UserDict UserList UserString",
    "datetime": "datetime date time timedelta timezone",
    "pathlib": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "pathlib._local": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "argparse": "Namespace",
    "optparse": "Values",
    "types": "SimpleNamespace GenericAlias",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "ipaddress": "IPv4Address IPv6Address IPv4Network IPv6Network IPv4Interface IPv6Interface",
    "random": "Random",
    "time": "struct_time",
    "re": "_compile",
    "array": "array _array_reconstructor",
    "io": "BytesIO StringIO",
    "_io": "BytesIO StringIO",
    "itertools": "count repeat cycle chain islice",
    "zoneinfo": "ZoneInfo",
    "numpy": "ndarray dtype matrix bool_ bool float16 float32 float64 longdouble int8 int16 int32 int64 "
    "uint8 uint16 uint32 uint64 complex64 complex128 str_ bytes_ datetime64 timedelta64",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.ma.core": "_mareconstruct MaskedArray",
    "numpy.random.mtrand": "RandomState",
    "numpy.random": "__RandomState_ctor",
    "torch": "Size device Tensor dtype layout Generator",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
    "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor "
    "_rebuild_nested_tensor _rebuild_meta_tensor_no_storage _rebuild_device_tensor_from_numpy "
    "_rebuild_device_tensor_from_cpu_tensor _rebuild_wrapper_subclass",
    "torch.serialization": "_get_layout",
    "torch.torch_version": "TorchVersion",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.jit._pickle": "restore_type_tag build_intlist build_tensorlist build_doublelist build_boollist "
    "build_tensor_from_id",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.pt.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "deepspeed.runtime.bf16_optimizer": "fragment_address",
    "deepspeed.checkpoint.universal_checkpoint": "SubparamShape",
    "mmengine.logging.history_buffer": "HistoryBuffer",
}
KNOWN = frozenset(f"{module}.{name}" for module, names in _DATA.items() for name in names.split())
_KNOWN_PATTERN = re.compile(
    r"(?:builtins|exceptions)\.(?:[A-Z]\w*(?:Error|Exception|Warning|Interrupt|Iteration)|SystemExit)"
    r"|torch\.return_types\.\w+"
    r"|numpy\.(?:dtypes|random)\.[\w.]*[A-Z]\w*"  # bit generators and dtype classes
)

# libraries whose purpose is to run or load code
_RUNNERS = _words(
    "cloudpickle dill joblib jsonpickle pip setuptools pkg_resources _distutils_hack IPython ipykernel "
    "pexpect paramiko fabric invoke sh plumbum six past cffi pyximport Cython pytest _pytest nose"
)
_RUNNER_MODULES = ("torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension", "test.support")
# the last part of a name that runs or loads something in whatever library it is found
_RUNNING = _words(
    "system popen Popen exec eval execfile execv execve compile open call run check_call check_output "
    "getoutput getstatusoutput spawn import_module load_module __import__ run_path run_module run_code "
    "runstring load loads read_pickle unpickle Unpickler load_inline urlopen urlretrieve rmtree unlink "
    "getattr setattr delattr"
)
_STRICT = ("torch", "numpy")  # of these, functions must be in the table


def _judge_name(name: str) -> Verdict:
    """The verdict on a callable by its name alone."""
    module, _, last = name.rpartition(".")
    root = name.partition(".")[0]
    if name in KNOWN or _KNOWN_PATTERN.fullmatch(name):
        return Verdict.KNOWN
    if root in STDLIB or root in _RUNNERS or last in _RUNNING:
        return Verdict.DANGEROUS
    if any(name == m or name.startswith(m + ".") for m in _RUNNER_MODULES):
        return Verdict.DANGEROUS
    if root in _STRICT and not last.lstrip("_")[:1].isupper():
        return Verdict.DANGEROUS
    if re.search(r"(?:^|\.)(?:os|sys|subprocess|builtins|posix|pty|shutil|runpy|pickle)$", module):
        return Verdict.DANGEROUS  # a module that some library imports for itself
    return Verdict.UNKNOWN


def _judge_global(node: Global) -> Verdict:
    # a dotted name reaches through what a module holds: `torch.serialization` `os.system`
    if any(part in STDLIB or part.startswith("__") for part in node.name.split(".")[:-1]):
        return Verdict.DANGEROUS
    name = _name(node)
    if name in ("builtins.getattr", "builtins.type", "builtins.iter"):
        return Verdict.DANGEROUS  # as somebody's argument: what it does depends on what it is given
    return Verdict.KNOWN if name in _BY_ARGUMENTS else _judge_name(name)


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
    if not name.isidentifier() or name.startswith("_") or name in _RUNNING:
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
    func, kind, args, _ = call.args
    if not isinstance(args, tuple) or not _name(func).startswith("torch._utils._rebuild_"):
        return Verdict.DANGEROUS
    return _worst(_argument(func), _argument(kind))


def _factory(call: Object) -> Verdict:
    """defaultdict(factory) and partial(function, ...): harmless to make, so the function decides."""
    functions = [*call.args[:1]]
    if call.has_state and isinstance(call.state, tuple):  # partial's function is also in its state
        functions += call.state[:1]
    if len(functions) == 1 and isinstance(inner := functions[0], Object):
        return _partial(inner)
    return _worst(Verdict.KNOWN, *(_argument(f) for f in functions if f is not None))


def _partial(node: Object) -> Verdict:
    """A factory that is a partial of a plain function."""
    state = node.state if node.has_state and isinstance(node.state, tuple) else ()
    if _name(node.cls) != "functools.partial":
        return Verdict.DANGEROUS
    return _worst(Verdict.KNOWN, *(_argument(f) for f in (*node.args[:1], *state[:1])))


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
    "collections.defaultdict": _factory,
    "functools.partial": _factory,
    "logging.getLogger": _plain_text,
    "zoneinfo.ZoneInfo._unpickle": _plain_text,
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
        return escape(f"{_RENAMED.get(node.module, node.module)}.{node.name}", 120)
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
