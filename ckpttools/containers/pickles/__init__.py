"""Pickles as data: read without importing or calling anything, and written back.

`loads` (read) interprets the opcodes of protocols 0 to 5 and builds plain values and inert nodes. A name
such as `torch._utils._rebuild_tensor_v2` becomes a `Global`, a call of it an `Object`: nothing is looked up.
`dumps` (write) writes nodes as opcodes again, so that the library that owns a class gets its object back.
`plain` (show) is for people. What loading would have called is judged in `judge`.

Why no byte of a file can do harm here: these modules import only `re`, `struct` and the standard
dataclass machinery; every length is compared with the bytes that are left before anything is allocated;
nothing from the file is hashed but strings and memo numbers; walks over the result are iterative.
"""

from ckpttools.containers.pickles.nodes import (
    Dict,
    Global,
    Node,
    Object,
    Pairs,
    Persistent,
    Pickle,
    Reject,
    Set,
    as_mapping,
    walk,
)
from ckpttools.containers.pickles.read import MAX_BYTES, loads
from ckpttools.containers.pickles.show import plain
from ckpttools.containers.pickles.template import Template
from ckpttools.containers.pickles.write import dumps

__all__ = [
    "MAX_BYTES",
    "Dict",
    "Global",
    "Node",
    "Object",
    "Pairs",
    "Persistent",
    "Pickle",
    "Reject",
    "Set",
    "Template",
    "as_mapping",
    "dumps",
    "loads",
    "plain",
    "walk",
]
