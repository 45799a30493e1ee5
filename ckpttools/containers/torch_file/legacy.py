"""torch < 1.6: five pickles one after another (magic number, protocol 1001, system information, the value,
the storage keys), then per key, in that order, an int64 element count and the storage's data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.containers.pickles import MAX_BYTES, Dict, Global, Node, Pickle, Reject, dumps, loads
from ckpttools.containers.torch_file.storages import Storage, same, storage_id
from ckpttools.containers.torch_file.views import TorchFile
from ckpttools.errors import CkptError
from ckpttools.plan import Literal, Segment
from ckpttools.stores.files import File, truncated

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
LEGACY_PROTOCOL = 1001


def read_legacy(file: File) -> TorchFile:
    # the pickles lie before the data, and their length is written nowhere: read ahead until they fit
    ahead = min(file.size, 1 << 20)
    while True:
        try:
            return _legacy(file, file.read(0, ahead), whole=ahead == file.size)
        except _NeedMore as need:
            if ahead >= MAX_BYTES:
                raise need.error from None
            ahead = min(file.size, ahead * 8, MAX_BYTES)


class _NeedMore(Exception):
    def __init__(self, error: Reject) -> None:
        self.error = error


def _legacy(file: File, data: bytes, *, whole: bool) -> TorchFile:
    storages: dict[str, Storage] = {}

    def storage(pid: Node) -> Node:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
            return pid[1]  # the class of a pickled nn.Module, with its source code, which is not looked at
        kind, dtype, key, location, numel = storage_id(pid)
        if key not in storages:
            storages[key] = Storage(kind, dtype, numel, (), location, f"storage {key}")
        return same(storages[key], kind, numel, key)

    at = 0
    parts: list[Pickle] = []
    for _ in range(5):
        try:
            part = loads(data, start=at, exact=False, persistent=storage)
        except Reject as error:
            error.where = str(file.path)
            if not whole:
                raise _NeedMore(error) from None
            raise
        parts.append(part)
        at = part.end
    magic, protocol, system, value, keys = (part.value for part in parts)
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
        raise CkptError(
            "not-torch",
            "the magic number or protocol is not torch's",
            where=file.path,
            why="torch.load asks for both before anything else, and refuses the file",
        )
    if not isinstance(system, Dict):
        raise CkptError(
            "pickle-damaged",
            "the system information is not a dict",
            where=file.path,
            why="it says how numbers are laid out: without it no tensor can be read",
        )
    if system.get("little_endian") is not True:
        raise CkptError(
            "big-endian",
            "the tensors are stored big-endian",
            where=file.path,
            why="each number would have to be turned round, which is not done here",
        )
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else None
    if not isinstance(keys, list) or names != keys or sorted(names) != sorted(storages):
        raise CkptError(
            "pickle-damaged",
            "the list of storages does not match the tensors that use them",
            where=file.path,
            why="which bytes belong to which tensor would be a guess",
        )
    for key in names:
        made = storages[key]
        (count,) = struct.unpack("<q", _exactly(file, at, 8, f"storage {key}"))
        if count != made.numel:
            raise CkptError(
                "pickle-damaged",
                f"storage {key} has {count} elements where {made.numel} are declared",
                where=file.path,
                why="the tensors would begin at other bytes than those that were saved",
            )
        if at + 8 + made.nbytes > file.size:
            raise truncated(file.path, f"storage {key} needs {made.nbytes} bytes from {at + 8}")
        made.chunks = (file.range(at + 8, made.nbytes),) if made.nbytes else ()
        at += 8 + made.nbytes
    if at != file.size:
        raise CkptError(
            "file-appended",
            f"{file.size - at} bytes follow the last storage",
            where=file.path,
            why="the file was joined with another one, or written over a longer one",
        )
    return TorchFile(
        path=file.path,
        size=file.size,
        value=value,
        storages=storages,
        pickle=replace(
            parts[3],
            calls=[call for part in parts for call in part.calls],
            names=list(dict.fromkeys(name for part in parts for name in part.names)),
            changed=[made for part in parts for made in part.changed],
        ),
        archive=None,
    )


def _exactly(file: File, start: int, nbytes: int, what: str) -> bytes:
    if start + nbytes > file.size:
        raise truncated(file.path, f"{what} is missing")
    return file.read(start, nbytes)


def legacy_segments(pickle: bytes, storages: dict[str, Storage]) -> Iterator[Segment]:
    """Magic number, protocol, system information, value, keys; then each storage after its length."""
    system = Dict.of(
        [
            ("protocol_version", LEGACY_PROTOCOL),
            ("little_endian", True),
            ("type_sizes", Dict.of([("short", 2), ("int", 4), ("long", 4)])),
        ]
    )
    keys = sorted(storages)  # as torch.save orders them
    yield Literal(LEGACY_HEAD + b"." + dumps(LEGACY_PROTOCOL) + dumps(system) + pickle + dumps(list(keys)))
    for key in keys:
        yield Literal(struct.pack("<q", storages[key].numel))
        yield from storages[key].chunks
