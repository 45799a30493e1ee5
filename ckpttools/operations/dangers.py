"""Reading a checkpoint together with what loading its files would run, which comes before all else."""

from __future__ import annotations

from dataclasses import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import dangers_in, dangers_of
from ckpttools.errors import CkptError, escape
from ckpttools.formats import Source, read
from ckpttools.location import Location
from ckpttools.operations.source import find
from ckpttools.stores.files import is_folder
from ckpttools.stores.links import within

Dangers = list[tuple[Location, str]]  # a file, and what loading it would run


def read_judged(
    path: Location, tag: str | None, key: str | None = None
) -> tuple[Source, Checkpoint, Dangers]:
    """The checkpoint that a path means, and the dangers of every file of it.

    Where nothing else can be read, the error says what loading would run (pickle-dangerous).
    """
    target = None if is_folder(path) else path
    try:
        source = replace(find(path, tag), key=key)
        target = source.target
        checkpoint = read(source)
    except CkptError as error:
        if dangers := dangers_in(target) if target else []:
            raise CkptError(
                "pickle-dangerous",
                warning(*dangers[0]),
                where=path,
                why=error.message,
                hint="do not load it with anything that unpickles; find out where it came from",
            ) from None
        raise
    with within(source.root):
        dangers = [
            (file.path, what)
            for file in checkpoint.files
            for what in (dangers_of(file.path) if file.dangers is None else file.dangers)
        ]
    return source, checkpoint, dangers


def warning(path: Location, what: str) -> str:
    return f"DANGEROUS: loading {escape(path.name)} {what}"
