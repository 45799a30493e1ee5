"""What lies around a ZeRO tag folder and belongs to the checkpoint: `latest`, scheduler files, HF weights.

A resharded checkpoint must be as complete as the one it was made from, whoever wrote it: HF Trainer's
`checkpoint-N/`, Lightning's `X.ckpt/`, accelerate's folder, a bundle, or a plain DeepSpeed folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.errors import escape
from ckpttools.formats.format import Source
from ckpttools.formats.tags import BUNDLE, is_tag
from ckpttools.frameworks import FRAMEWORKS
from ckpttools.frameworks.client import INFO, restated
from ckpttools.location import Location
from ckpttools.plan import OutputFile, Plan, copy_file
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import entries, is_file, is_folder, is_link, size_of
from ckpttools.stores.links import within

CARRIED_FOLDERS = ("hf_model", "hf_config")


def with_surroundings(
    source: Source,
    plan: Plan,
    *,
    ranks: tuple[Checkpoint, Layout] | None = None,
    own: Collection[Location] = (),
) -> Plan:
    """The plan of a tag folder, placed within everything that belongs to it.

    `ranks` are the checkpoint and the layout to be, where their number changes.
    A folder that is itself the checkpoint gets what lies beside its `own` files, where they are given.
    """
    notes: list[str] = []
    if not source.inner:
        if not own:
            return plan
        with within(source.root):
            beside = list(_beside(source.root, "", source, ranks, notes, own))
        return replace(plan, files=(*beside, *plan.files), notes=(*plan.notes, *notes))
    files = [replace(file, path=f"{source.inner}/{file.path}") for file in plan.files]
    base = source.root
    with within(base):
        files += _beside(base, "", source, ranks, notes)
        if source.inner.startswith(f"{BUNDLE}/"):
            files += _beside(base / BUNDLE, f"{BUNDLE}/", source, ranks, notes)
    return replace(plan, files=tuple(files), notes=(*plan.notes, *notes))


def _beside(
    folder: Location,
    prefix: str,
    source: Source,
    ranks: tuple[Checkpoint, Layout] | None,
    notes: list[str],
    own: Collection[Location] = (),
) -> Iterator[OutputFile]:
    dropped: list[str] = []
    left: list[str] = []
    for entry in entries(folder):
        path = folder / entry.name
        if path in own or any(path in each.parents for each in own):
            continue
        if is_file(entry) and not entry.name.endswith(MANIFEST):
            if ranks is not None and _of_one_rank(entry.name):
                dropped.append(entry.name)
            elif ranks is not None and entry.name == INFO:
                file, said = restated(path, prefix + entry.name, *ranks)
                notes += said
                yield file
            else:
                yield copy_file(path, prefix + entry.name, size_of(path))
        elif is_folder(entry) and path != source.target and not _holds(path, source.target):
            if entry.name in CARRIED_FOLDERS:
                yield from tree(path, f"{prefix}{entry.name}/")
            else:
                left.append(entry.name + ("/ (another checkpoint)" if is_tag(path) else "/"))
    if dropped:
        notes.append(
            f"not carried: {', '.join(map(escape, dropped))}: random states belong to one rank count; "
            "data order and dropout go on from fresh ones"
        )
    if left:
        notes.append(f"not carried: {', '.join(map(escape, left))} beside the checkpoint")


def _of_one_rank(name: str) -> bool:
    """A file of random states: one for each rank, of no use to another number of ranks."""
    patterns = (framework.random for framework in FRAMEWORKS)
    return any(pattern is not None and re.fullmatch(pattern, name) for pattern in patterns)


def _holds(folder: Location, target: Location) -> bool:
    return folder in target.parents


def tree(folder: Location, prefix: str = "", depth: int = 8) -> Iterator[OutputFile]:
    """Every regular file below a folder, copied; manifests describe other files and are not."""
    for entry in entries(folder):
        if is_file(entry) and not entry.name.endswith(MANIFEST):
            yield copy_file(folder / entry.name, prefix + entry.name, size_of(folder / entry.name))
        elif is_folder(entry) and not is_link(entry) and depth:
            yield from tree(folder / entry.name, f"{prefix}{entry.name}/", depth - 1)
