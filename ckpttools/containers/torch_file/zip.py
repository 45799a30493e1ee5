"""torch >= 1.6: a zip of `data.pkl` (the pickle), `data/<key>` (one storage each), `byteorder` and others."""

from __future__ import annotations

from pathlib import PurePosixPath

from ckpttools.containers.archive import Archive, Record, damaged, read_record
from ckpttools.containers.pickles import MAX_BYTES, Node, loads
from ckpttools.containers.torch_file.dangers import refuse_torchscript
from ckpttools.containers.torch_file.storages import Storage, located, same, storage_id
from ckpttools.containers.torch_file.views import TorchFile
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.location import Location, Stored
from ckpttools.stores.files import File, inflated
from ckpttools.stores.inflated import Deflated
from ckpttools.tensors import ByteRange

MAX_DEFLATED = 16 << 20  # of all records but the pickle and the storages, after decompression
MOST_DEFLATE = 1032  # bytes that deflate makes of one, at most
# storages of zeros are a thousand times smaller: more than both is refused
RATIO, MAX_INFLATED = 200, 1 << 30


def read_zip(file: File, archive: Archive) -> TorchFile:
    records = archive.records
    refuse_torchscript(file.path, archive)
    if "data.pkl" not in records:
        raise CkptError(
            "not-torch",
            "the archive has no data.pkl: some other zip file",
            where=file.path,
            why="that file says which tensors there are",
        )
    if "byteorder" in records and read_record(file, records["byteorder"], 16) != b"little":
        raise CkptError(
            "big-endian",
            "the tensors are stored big-endian",
            where=file.path,
            why="each number would have to be turned round, which is not done here",
        )
    _check_deflated(file, archive)
    data = read_record(file, records["data.pkl"], MAX_BYTES)
    storages: dict[str, Storage] = {}
    deflated = DeflatedRecords(archive) if any(record.method for record in records.values()) else None

    def storage(pid: Node) -> Node:
        kind, dtype, key, location, numel = storage_id(pid)
        if key not in storages:
            record = records.get(f"data/{key}")
            if record is None:
                raise damaged(file.path, f"the data of storage {key} is missing")
            if record.size != numel * dtype.itemsize:
                raise damaged(
                    file.path,
                    f"storage {key} has {record.size} bytes where {numel * dtype.itemsize} are declared",
                )
            source = deflated.range(record) if deflated and record.method else archive.range(record)
            chunks = (source,) if record.size else ()
            storages[key] = Storage(kind, dtype, numel, chunks, location, f"data/{key}")
        return same(storages[key], kind, numel, key)

    pickle = located(file.path, lambda: loads(data, persistent=storage))
    stray = tuple(name for name in records if name.startswith("data/") and name[5:] not in storages)
    return TorchFile(
        path=file.path,
        size=file.size,
        value=pickle.value,
        storages=storages,
        pickle=pickle,
        archive=archive,
        deflated=deflated,
        stray=stray,
    )


def _check_deflated(file: File, archive: Archive) -> None:
    """Inflate the small records that another tool has compressed, which checks them."""
    deflated = {
        name: record
        for name, record in archive.records.items()
        if record.method and name != "data.pkl" and not name.startswith("data/")
    }
    if sum(record.size for record in deflated.values()) > MAX_DEFLATED:
        raise _compressed(file.path, f"{len(deflated)} records")
    for record in deflated.values():
        read_record(file, record, MAX_DEFLATED)


def _compressed(path: Location, what: str) -> Unsupported:
    return Unsupported(
        "storage-compressed",
        f"the data of {what} is compressed more than is read",
        where=path,
        why="another tool packed the archive anew; so much from so little may be meant to fill a machine",
        hint="load it with torch where you trust it, and save it again with torch.save",
    )


class DeflatedRecords:
    """The records of an archive that another program has compressed, as files that are inflated on the way.

    Raises Unsupported where they claim more than `RATIO` times the file and `MAX_INFLATED` bytes together.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        found = {
            f"/{name}": r for name, r in archive.records.items() if r.method and name.startswith("data/")
        }
        for key, record in found.items():
            if record.size > MOST_DEFLATE * (record.nbytes + 1):
                raise damaged(
                    archive.path, f"record '{escape(key[1:])}' cannot inflate to {record.size} bytes"
                )
        if sum(record.size for record in found.values()) > max(RATIO * archive.size, MAX_INFLATED):
            raise _compressed(archive.path, f"{len(found)} storages")
        at = {key: Deflated(archive.base + r.start, r.nbytes, r.size) for key, r in found.items()}
        self.store = inflated(archive.path, at, self._damaged)

    def _damaged(self, key: str) -> CkptError:
        return damaged(self.archive.path, f"record '{escape(key[1:])}' does not inflate to its size")

    def range(self, record: Record) -> ByteRange:
        return ByteRange(Stored(self.store, PurePosixPath(f"/{record.name}")), 0, record.size)
