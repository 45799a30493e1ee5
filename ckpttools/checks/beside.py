"""What lies beside the weights: files that a resume needs, and what they say about the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath

from msgspec import Struct, field

from ckpttools.containers import jsons
from ckpttools.containers.fields import as_mapping
from ckpttools.containers.safetensors import read_safetensors
from ckpttools.containers.torch_file import TorchFile, is_torch_file, read_torch_file
from ckpttools.errors import CkptError
from ckpttools.findings import WARNING, Finding, of_error
from ckpttools.formats import FORMATS, Checked, Source
from ckpttools.formats.files import DANGEROUS, DATA, check_file, dangers_at, folders_of
from ckpttools.formats.tags import LATEST, is_tag
from ckpttools.frameworks import POINTERS, STATED
from ckpttools.location import Location
from ckpttools.numbered import numbers, shape
from ckpttools.plan import SourceCheck
from ckpttools.stores.files import entries, exists, is_file, is_folder, small_text, stat
from ckpttools.stores.links import within

INDEX = ".index.json"
TENSOR_FILES = (".pt", ".pth", ".bin", ".pkl", ".safetensors")
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    *STATED,
)


class Beside(Struct, frozen=True):
    """What the headers of the files around a checkpoint show, the checksums that the pass over the bytes is
    to verify, and the files that hold an optimizer's state.
    """

    findings: list[Finding] = field(default_factory=list)
    checks: list[SourceCheck] = field(default_factory=list)
    optimizers: list[TorchFile] = field(default_factory=list)


def check_beside(source: Source, checked: Checked) -> Beside:
    """Check the files around a checkpoint: schedulers, random states, optimizers, configurations."""
    found = Beside()
    findings = found.findings
    seen = {file.path for file in checked.files}
    judged = {finding.file for finding in checked.findings if finding.id == DANGEROUS}
    for folder in folders_of(source):
        names = [entry.name for entry in entries(folder) if is_file(entry)]
        for name in names:
            path = folder / name
            try:
                if name in JSON_FILES or name.endswith(INDEX):
                    jsons.read(path, allow_nan=True)
                elif path in seen or (name.endswith(TENSOR_FILES) and _tensor_file(path, found)):
                    continue
                elif str(path) not in judged and not name.endswith(DATA):
                    findings += dangers_at(path)
            except CkptError as error:
                findings.append(of_error(error))
        for format in FORMATS:
            findings += format.beside(folder, names)
        findings += _counters(folder, names)
    return found


def check_pointer(path: Location, source: Source) -> Iterator[Finding]:
    """A DeepSpeed folder whose `latest` is gone is still found here, and not by DeepSpeed.

    Not said where the tag folder itself was named, or where MMEngine's and ckpt train's pointer is.
    """
    folder = source.target.parent
    if not source.format.tagged or not is_folder(path):
        return
    with within(folder):
        yield from _stale(folder, source.target.name)
    if stat(path) == stat(source.target):
        return
    pointer, tag = source.format.pointer, source.target.name
    named = (pointer, *(name for name in POINTERS if name != LATEST))
    places = dict.fromkeys((folder, source.root))  # a tag may be a path
    if not any(exists(place / name) for place in places for name in named):
        yield Finding(
            id="latest-missing",
            severity=WARNING,
            file=str(folder),
            where=pointer,
            message=f"no `{pointer}` names {tag}: DeepSpeed would start anew from this folder",
            hint=f"if its save was finished, write {tag} into the file {pointer}",
        )


def _stale(folder: Location, tag: str) -> Iterator[Finding]:
    """`latest` names this one, while one that is named alike has a higher number."""
    pointer = folder / "latest"
    try:
        if not is_file(pointer) or small_text(pointer, 256).strip() != tag:
            return
        later = [e.name for e in entries(folder) if is_folder(e) and shape(e.name) == shape(tag)]
        newest = max((name for name in later if is_tag(folder / name)), key=numbers, default=tag)
    except CkptError:
        return  # reported by whoever reads them
    if numbers(newest) > numbers(tag):
        yield Finding(
            id="pointer-stale",
            severity=WARNING,
            file=str(pointer),
            message=f"names {tag}, and {newest} is here too: DeepSpeed resumes from the older one",
            hint=f"if the save of {newest} was finished, write {newest} into the file latest",
        )


def check_last_checkpoint(path: Location) -> Iterator[Finding]:
    """A pointer that names a path; after a copy of the run, its last part must lie beside it."""
    for name in POINTERS:
        if name != LATEST and is_folder(path) and is_file(path / name):
            yield from _last_checkpoint(path, path / name)


def _last_checkpoint(path: Location, pointer: Location) -> Iterator[Finding]:
    try:
        name = PurePath(small_text(pointer, 4096).strip()).name
    except CkptError as error:
        yield of_error(error)
        return
    if not name or not exists(path / name):
        yield Finding(
            id="pointer-dangling",
            severity=WARNING,
            file=str(pointer),
            message=f"names {name or 'nothing'}, which is not beside it: an automatic resume would fail",
            hint="ckpt latest --verified names the newest good checkpoint",
        )


def _tensor_file(path: Location, found: Beside) -> bool:
    """Check one file; False where it is none of torch's, whatever its name is."""
    if path.name.endswith(".safetensors"):
        read_safetensors(path)
        return True
    if not is_torch_file(path):
        return False
    file = read_torch_file(path)
    found.findings.extend(check_file(file))
    found.checks.extend(file.checks())
    if {"state", "param_groups"} <= set(_names(file)):
        found.optimizers.append(file)
    return True


def _names(file: TorchFile) -> list[str]:
    pairs = as_mapping(file.value)
    return [] if pairs is None else pairs.names()


def _counters(folder: Location, names: list[str]) -> Iterator[Finding]:
    """The framework's own file in `checkpoint-N` is of step N."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    file = next((name for name in STATED if name in names), None)
    if match is None or file is None:
        return
    try:
        step = jsons.read(folder / file, allow_nan=True).get("global_step")
    except CkptError:
        return  # reported by itself
    if isinstance(step, int) and abs(step - int(match[1])) > 1:
        yield Finding(
            id="counter-mismatch",
            severity=WARNING,
            file=str(folder / file),
            where="global_step",
            message=f"is {step} in a folder named {folder.name}",
            hint="the folder was renamed, or the file is of another checkpoint",
        )
