"""A checkpoint with some of its values changed: every file that no edit touches is copied byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.edit import at, edited, files_of, value
from ckpttools.errors import CkptError, escape
from ckpttools.formats.format import Source
from ckpttools.formats.tags import LATEST
from ckpttools.frameworks import distributed
from ckpttools.frameworks.parts import MARKER_FILE
from ckpttools.frameworks.surroundings import tree, with_surroundings
from ckpttools.location import Location, below
from ckpttools.plan import Literal, OutputFile, Plan, SourceCheck, copy_file
from ckpttools.stores.files import is_folder, size_of
from ckpttools.stores.links import within
from ckpttools.training import ABSENT, Edit, equal

_TAG = re.compile(r"(global_step)(\d+)")


def plan(source: Source, found: Checkpoint, edits: Sequence[Edit], counts: tuple[int, int] | None) -> Plan:
    """The files of the checkpoint at `source` with the edits made.

    `counts` are the old and the new count: a tag folder that is named `global_step<old>` is renamed. Edits of
    values that lie in the Checkpoint alone are written by its format.
    """
    with within(source.root):
        if is_folder(found.path) and edits and all(edit.place.file == found.path for edit in edits):
            assert source.format.plan is not None
            made = source.format.plan(distributed.edited(found, edits), found.layout)
            own = {role.path for role in found.files}
            return with_surroundings(source, made, own=own)
        return _plan(source, found, edits, counts)


def _plan(source: Source, found: Checkpoint, edits: Iterable[Edit], counts: tuple[int, int] | None) -> Plan:
    by_file = files_of(_on_all_ranks(source, found, edits))
    whole = _whole(source, found)
    notes = [by_file.pop(path) for path in list(by_file) if path.name == MARKER_FILE]
    origin = {source.root if file.path == "" else source.root / file.path: file for file in whole.files}
    made: list[OutputFile] = []
    checks: list[SourceCheck] = list(whole.checks)
    for path, file in origin.items():
        if path.name == MARKER_FILE and notes:
            continue
        if path not in by_file:
            made.append(file)
            continue
        new, its_checks = edited(path, file.path, by_file.pop(path))
        made.append(new)
        checks += its_checks
    assert not by_file, f"edits of files that are not part of the checkpoint: {list(by_file)}"
    made += [_marker(source.root, edits) for edits in notes]
    return replace(whole, files=tuple(_renamed(source, made, counts)), checks=tuple(checks))


def _whole(source: Source, found: Checkpoint) -> Plan:
    """Everything that belongs to the checkpoint, copied."""
    if source.format.tagged:
        files = (copy_file(role.path, role.path.name, role.nbytes) for role in found.files)
        return with_surroundings(source, Plan(files=tuple(files)))
    if is_folder(source.root):
        return Plan(files=tuple(tree(source.root)))
    return Plan(files=(copy_file(source.root, "", size_of(source.root)),))


def _on_all_ranks(source: Source, found: Checkpoint, edits: Iterable[Edit]) -> Iterator[Edit]:
    """ZeRO-3 saves counters, schedule and settings in the model file of every rank: each reads its own."""
    first, _ = source.format.torch_files(found)
    for edit in edits:
        yield edit
        of_first = first is not None and edit.place.file == first.path
        for file in source.format.copies(found) if of_first else ():
            own = value(file, at(file.value, *edit.place.at))
            if not equal(own, None if edit.old is ABSENT else edit.old):
                raise CkptError(
                    "ranks-disagree",
                    f"{edit.place} is {escape(own)} here, and {escape(edit.old)} on rank 0",
                    where=file.path,
                    why="each rank resumes with its own: the ranks would part",
                    hint="ckpt verify says more; use an older checkpoint",
                )
            yield replace(edit, place=replace(edit.place, file=file.path))


def _marker(root: Location, edits: list[Edit]) -> OutputFile:
    """The file that notes a rebase beside the weights of a Trainer's or accelerate's folder."""
    (edit,) = edits
    text = json.dumps(edit.new, indent=2) + "\n"
    path = below(edit.place.file, root)
    return OutputFile(path=path, segments=(Literal(text.encode()),))


def _renamed(source: Source, files: list[OutputFile], counts: tuple[int, int] | None) -> Iterator[OutputFile]:
    """The Trainer looks for `global_step*`; a number in it that no longer holds would mislead people."""
    match = _TAG.fullmatch(source.target.name) if source.inner else None
    if match is None or counts is None or int(match[2]) != counts[0] or counts[0] == counts[1]:
        yield from files
        return
    new = f"{match[1]}{counts[1]}"
    above = source.inner.rpartition("/")[0]
    latest = f"{above}/{LATEST}" if above else LATEST
    for file in files:
        if file.path == latest:
            yield replace(file, segments=(Literal(new.encode()),))
        elif file.path.startswith(f"{source.inner}/"):
            inner = file.path[len(source.inner) + 1 :]
            yield replace(file, path=f"{above}/{new}/{inner}" if above else f"{new}/{inner}")
        else:
            yield file
