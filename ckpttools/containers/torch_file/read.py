"""A torch file by its first bytes: which serialization it is, or that it is none."""

from __future__ import annotations

from ckpttools.containers.archive import ends_like_zip, is_zip, read_archive
from ckpttools.containers.torch_file.legacy import LEGACY_HEAD, read_legacy
from ckpttools.containers.torch_file.views import TorchFile
from ckpttools.containers.torch_file.zip import read_zip
from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.stores.files import File, opened


def read_torch_file(path: Location) -> TorchFile:
    """Read the header of a torch file; tensor data is not read.

    Raises CkptError where the file is damaged or is not one of torch's.
    """
    with opened(path) as file:
        return read_opened(file)


def read_opened(file: File) -> TorchFile:
    """The same for a file that is open, or a window of one."""
    # the end first: of an archive that is whole, the beginning is then read together with the pickle
    archive = read_archive(file) if ends_like_zip(file) else None
    head = file.head(len(LEGACY_HEAD))
    if is_zip(head):
        return read_zip(file, archive or read_archive(file))
    if head == LEGACY_HEAD:
        return read_legacy(file)
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise CkptError(
            "bare-pickle",
            "a plain pickle, not a file of torch.save",
            where=file.path,
            why="its values may be anything; no tensor can be read from it",
            hint="save it again with torch.save",
        )
    raise CkptError(
        "not-torch",
        f"not a file of torch.save (it starts with {head[:8]!r})",
        where=file.path,
        why="neither a zip archive nor torch's older serialization",
        hint="check that this is the right file, and that its download finished",
    )


def is_torch_file(path: Location) -> bool:
    """Whether the first bytes are those of a torch file, in either serialization."""
    with opened(path) as file:
        head = file.head(len(LEGACY_HEAD))
    return is_zip(head) or head == LEGACY_HEAD
