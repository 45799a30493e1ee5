"""torch >= 1.6: a zip of `data.pkl` (the pickle), `data/<key>` (one storage each), `byteorder` and others."""

from __future__ import annotations

from ckpttools.containers.archive import Archive, damaged, read_archive, read_record
from ckpttools.containers.pickles import MAX_BYTES, Node, loads
from ckpttools.containers.torch_file.dangers import refuse_torchscript
from ckpttools.containers.torch_file.storages import Storage, located, same, storage_id
from ckpttools.containers.torch_file.views import TorchFile
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.location import Location
from ckpttools.stores.files import File

MAX_DEFLATED = 16 << 20  # of all records but the pickle, after decompression


def read_zip(file: File) -> TorchFile:
    archive = read_archive(file)
    records = archive.records
    refuse_torchscript(file.path, archive)
    if "data.pkl" not in records:
        raise CkptError("not-torch", "the archive has no data.pkl: some other zip file", where=file.path)
    if "byteorder" in records and read_record(file, records["byteorder"], 16) != b"little":
        raise CkptError("big-endian", "the tensors are stored big-endian", where=file.path)
    _check_deflated(file, archive)
    data = read_record(file, records["data.pkl"], MAX_BYTES)
    storages: dict[str, Storage] = {}

    def storage(pid: Node) -> Node:
        kind, dtype, key, location, numel = storage_id(pid)
        if key not in storages:
            record = records.get(f"data/{key}")
            if record is None:
                raise damaged(file.path, f"the data of storage {key} is missing")
            if record.method:
                raise _compressed(file.path, f"storage {key}")
            if record.nbytes != numel * dtype.itemsize:
                raise damaged(
                    file.path,
                    f"storage {key} has {record.nbytes} bytes where {numel * dtype.itemsize} are declared",
                )
            chunks = (archive.range(record),) if record.nbytes else ()
            storages[key] = Storage(kind, dtype, numel, chunks, location, f"data/{key}")
        return same(storages[key], kind, numel, key)

    pickle = located(file.path, lambda: loads(data, persistent=storage))
    stray = [name for name in records if name.startswith("data/") and name[5:] not in storages]
    if stray:
        raise damaged(file.path, f"{len(stray)} storages belong to no tensor, the first {escape(stray[0])}")
    return TorchFile(
        path=file.path,
        size=file.size,
        value=pickle.value,
        storages=storages,
        pickle=pickle,
        archive=archive,
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
        f"the data of {what} is compressed, which torch.save never does",
        where=path,
        why="another tool packed the archive anew; torch loads it (not with mmap), ckpt does not read it",
        hint="load it with torch where you trust it, and save it again with torch.save",
    )
