"""Reading a checkpoint together with what loading its files would run, which comes before all else."""

from __future__ import annotations

from dataclasses import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import dangers_in, dangers_of
from ckpttools.errors import CkptError, escape
from ckpttools.formats import Source, read
from ckpttools.formats.files import DANGEROUS, DEPTH
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
        return source, read(source)
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


def dangers(source: Source, checkpoint: Checkpoint) -> Dangers:
    """What loading each file of a checkpoint that was read would run."""
    with within(source.root):
        return tuple(
            (file.path, what)
            for file in checkpoint.files
            for what in (dangers_of(file.path) if file.dangers is None else file.dangers)
        )


def warning(path: Location, what: str) -> str:
    return f"DANGEROUS: loading {escape(path.name)} {what}"
