"""What loading a file would run, said even where nothing else can be read from it.

torch.load unpickles `data.pkl` of a zip; of any other file it unpickles what comes first, whatever its name
is. An archive with `constants.pkl` goes to torch.jit.load, which runs the program in it. Source:
torch.serialization.load and _is_torchscript_zip.
"""

from __future__ import annotations

from ckpttools.containers.archive import Archive, is_zip, read_archive, read_record
from ckpttools.containers.pickles import MAX_BYTES, Pickle, loads
from ckpttools.containers.pickles.judge import dangers, judge
from ckpttools.errors import CkptError, Unsupported
from ckpttools.location import Location
from ckpttools.stores.files import File, entries, is_file, is_folder, is_link, opened

_PICKLE_STARTS = b"\x80c(]}i"  # a protocol, a name, MARK, a list, a dict, INST
_MAX_BARE = 64 << 20
TORCHSCRIPT = "would run the TorchScript program that it holds (constants.pkl)"


def dangers_of(path: Location) -> tuple[str, ...]:
    """One line for each thing that loading the file would run; empty for files that are not pickles.

    Damage is not looked at: what cannot be read is judged as far as it can.
    """
    try:
        with opened(path) as file:
            head = file.head(4)
            if is_zip(head):
                archive = read_archive(file)
                script = (TORCHSCRIPT,) if "constants.pkl" in archive.records else ()
                record = archive.records.get("data.pkl")
                raw = read_record(file, record, MAX_BYTES) if record else b""
                return (*script, *(dangers(judge(loads(raw))) if raw else ()))
            if head[:1] not in _PICKLE_STARTS:
                return ()
            found: dict[str, None] = {}
            for pickle in _pickles(file):
                found |= dict.fromkeys(dangers(judge(pickle)))
            return tuple(found)
    except CkptError:
        return ()


def dangers_in(path: Location, depth: int = 0) -> list[tuple[Location, str]]:
    """The same for a file, or for every file of a folder, and of folders in it down to a depth."""
    if not is_folder(path):
        return [(path, what) for what in dangers_of(path)]
    found: list[tuple[Location, str]] = []
    for entry in entries(path):
        if is_file(entry) or (depth and is_folder(entry) and not is_link(entry)):
            found += dangers_in(path / entry.name, depth - 1)
    return found


def _pickles(file: File) -> list[Pickle]:
    """The pickles that a file begins with: five of torch's older serialization, one of any other."""
    raw = file.head(_MAX_BARE)
    found: list[Pickle] = []
    at = 0
    try:
        while at < len(raw) and len(found) < 5:
            found.append(loads(raw, start=at, exact=False))
            at = found[-1].end
    except CkptError:
        pass
    return found


def refuse_torchscript(path: Location, archive: Archive) -> None:
    """Raise Unsupported for an archive that torch.load would run as a program."""
    if "constants.pkl" in archive.records:
        raise Unsupported(
            "torchscript",
            "a TorchScript program, not a checkpoint",
            where=path,
            why="torch.load hands an archive with constants.pkl to torch.jit.load, which runs what it holds",
            hint="where you trust it, load it with torch.jit.load and save its state_dict() with torch.save",
        )
