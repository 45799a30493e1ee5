"""Checks on the headers of a verl folder: every file by itself; the ranks' parts make whole weights."""

from __future__ import annotations

from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import CkptError
from ckpttools.findings import of_error
from ckpttools.formats.files import Attempts, archive_roots, check_files
from ckpttools.formats.format import OPTIMIZER_STATE, Checked
from ckpttools.formats.verl.read import checkpoint, copies, find
from ckpttools.location import Location


def check(path: Location) -> Checked:
    """Each file by itself, then all together. Raises Unsupported where weights cannot be joined."""
    try:
        files = find(path)
    except CkptError as error:
        return Checked([of_error(error)], None, [])
    attempt = Attempts()
    read: dict[Location, TorchFile] = {}
    paths = [each for of_kind in files.paths.values() for each in of_kind.values()]
    for each in paths:
        file = attempt(lambda each=each: read_torch_file(each))  # type: ignore[misc]
        if file is not None:
            read[each] = file
    found = [*read.values()]
    attempt.findings += [*check_files(found), *archive_roots(found)]
    whole = attempt(lambda: checkpoint(path, files, read)) if len(read) == len(paths) else None
    twins = tuple(copies(files, read)) if whole is not None else ()
    return Checked(attempt.findings, whole, found, twins, state=OPTIMIZER_STATE)
