"""Reading a checkpoint together with what loading its files would run, which comes before all else."""

from __future__ import annotations

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import dangers_in, dangers_of
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import Source, read
from ckpttools.formats.files import DANGEROUS, DEPTH, beside_of
from ckpttools.formats.unjoined import check_parts, in_parts
from ckpttools.location import Location
from ckpttools.operations.source import find
from ckpttools.stores.files import is_folder
from ckpttools.stores.links import within

Dangers = tuple[tuple[Location, str], ...]  # a file, and what loading it would run


def read_judged(path: Location, tag: str | None, key: str | None = None) -> tuple[Source, Checkpoint]:
    """The checkpoint that a path means. Where nothing can be read of it, the error says what loading its
    files would run (pickle-dangerous).
    """
    target = None if is_folder(path) else path
    try:
        source = replace(find(path, tag), key=key)
        target = source.target
        try:
            return source, read(source)
        except Unsupported as reason:
            if reason.layout is None or not is_folder(target):
                raise
            return _in_parts(source, reason)
    except CkptError as error:
        if found := dangers_in(target, DEPTH) if target else []:
            raise CkptError(
                DANGEROUS,
                warning(*found[0]),
                where=path,
                why=error.message,
                hint="do not load it with anything that unpickles; find out where it came from",
            ) from None
        raise


def _in_parts(source: Source, reason: Unsupported) -> tuple[Source, Checkpoint]:
    """What the files of a layout that is not put together say, each by itself."""
    with within(source.root):
        found = check_parts(source.target, reason).checkpoint
    if found is None or not found.files:
        raise reason
    parts = replace(in_parts(source.target, reason), root=source.root, how=source.how)
    return parts, replace(found, notes=(*found.notes, f"{reason.message}: each file is shown by itself"))


def dangers(source: Source, checkpoint: Checkpoint) -> Dangers:
    """What loading each file of a checkpoint that was read would run, and each that lies beside it."""
    with within(source.root):
        own = {
            file.path: dangers_of(file.path) if file.dangers is None else file.dangers
            for file in checkpoint.files
        }
        beside = {path: dangers_of(path) for path in beside_of(source) if path not in own}
    return tuple((path, what) for path, found in (own | beside).items() for what in found)


def warning(path: Location, what: str) -> str:
    return f"DANGEROUS: loading {escape(path.name)} {what}"
