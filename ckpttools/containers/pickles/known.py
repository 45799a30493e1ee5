"""Names that a pickle may hold: plain data, what runs something, what does nothing unless called."""

from __future__ import annotations

import re
import sys


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Python 2's names, which protocols 0 to 2 still write, and modules that some Python versions have
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
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
    "_rebuild_qtensor _rebuild_sparse_tensor "
    "_rebuild_nested_tensor _rebuild_meta_tensor_no_storage _rebuild_device_tensor_from_numpy "
    "_rebuild_device_tensor_from_cpu_tensor _rebuild_wrapper_subclass",
    "torch.serialization": "_get_layout",
    "torch.torch_version": "TorchVersion",
    "torch.distributed.checkpoint.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata "
    "TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
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
_DECIDED = {
    "builtins": "getattr bytes bytearray type iter",
    "_codecs": "encode",
    "copyreg": "__newobj__ __newobj_ex__ _reconstructor",
    "collections": "defaultdict",
    "functools": "partial",
    "logging": "getLogger",
    "zoneinfo": "ZoneInfo._unpickle",
    "torch._utils": "_rebuild_parameter_with_state",
    "torch.storage": "_load_from_bytes",
    "torch._tensor": "_rebuild_from_type _rebuild_from_type_v2",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
}


def _named(table: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for module, names in table.items() for name in names.split())


KNOWN = _named(_DATA)
# callables whose arguments decide what a call of them does, and their names alone, in whatever module
BY_ARGUMENTS = _named(_DECIDED)
ARGUMENTS_DECIDE = _words(" ".join(_DECIDED.values()))
KNOWN_PATTERN = re.compile(
    r"(?:builtins|exceptions)\.(?:[A-Z]\w*(?:Error|Exception|Warning|Interrupt|Iteration)|SystemExit)"
    r"|torch\.return_types\.\w+"
    r"|torch\.\w+Storage|torch\.storage\.\w+Storage"
    r"|numpy\.(?:dtypes|random)\.[\w.]*[A-Z]\w*"  # bit generators and dtype classes
)

# what picklers add items to
FILLED = _words(
    "collections.OrderedDict collections.Counter collections.defaultdict collections.deque builtins.dict "
    "builtins.list collections.ChainMap copyreg.__newobj__ copyreg.__newobj_ex__ copyreg._reconstructor"
)
SPECIAL = _words(
    "__class__ __bases__ __mro__ __code__ __globals__ __getattr__ __getattribute__ __setattr__ __setstate__ "
    "__reduce__ __reduce_ex__ __init__ __new__ __call__ __del__ __torch_function__ __torch_dispatch__"
)
# of the standard library: importing them and holding what they define does nothing
INERT = _words(
    "builtins math cmath operator _operator functools itertools collections collections.abc typing types "
    "string re enum abc dataclasses datetime time calendar decimal fractions numbers statistics random copy "
    "copyreg logging logging.handlers json argparse pathlib pathlib._local posixpath ntpath genericpath "
    "heapq bisect array struct textwrap pprint uuid hashlib inspect warnings weakref io _io codecs _codecs "
    "zoneinfo ipaddress secrets base64 binascii unicodedata contextlib optparse queue exceptions"
)

# libraries whose purpose is to run or load code
RUNNERS = _words(
    "cloudpickle dill joblib jsonpickle pip setuptools pkg_resources _distutils_hack IPython ipykernel "
    "pexpect paramiko fabric invoke sh plumbum six past cffi pyximport Cython pytest _pytest nose"
)
RUNNER_MODULES = ("torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension", "test.support")
# the last part of a name that runs or loads something in whatever library it is found
RUNNING = _words(
    "system popen Popen exec eval execfile execv execve compile open call run check_call check_output "
    "getoutput getstatusoutput spawn import_module load_module __import__ run_path run_module run_code "
    "runstring load loads read_pickle unpickle Unpickler load_inline urlopen urlretrieve rmtree unlink "
    "getattr setattr delattr"
)
STRICT = ("torch", "numpy")  # of these, functions must be in the table
