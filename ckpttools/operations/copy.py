"""A whole checkpoint to another place, every byte of it compared and every checksum that it states."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial

from ckpttools import manifest
from ckpttools.checks import check_before_use
from ckpttools.errors import CkptError, escape
from ckpttools.launch import Worker
from ckpttools.location import Location, Stored, below
from ckpttools.operations import advice
from ckpttools.operations.source import find
from ckpttools.operations.writing import Options, Writing, Written, is_last, refuse
from ckpttools.plan import OutputFile, Plan, copy_file
from ckpttools.siblings import MANIFEST, is_ours
from ckpttools.stores.files import Entered, entries, is_file, is_folder, named, size_of
from ckpttools.stores.links import within


def copy(
    src: str | Location, dst: str | Location, *, tag: str | None = None, how: Writing | None = None
) -> Written:
    """Copy all files of a checkpoint to `dst`: both on this machine or in a store.

    Its headers are checked first. On the way every checksum that a copied file states is compared; what was
    written is read back, and held against the source's manifest, if it has one. A copy that was ended is gone
    on with by the same call: finished pieces (of up to 512 MiB) are not copied again. Raises CkptError for a
    damaged source, UsageError where `dst` cannot be written.

    >>> copied = copy("fixtures/trainer/z2_bf16_2", out / "safe")
    >>> copied.destination.name, len(copied.plan.files), copied.checked
    ('safe', 8, 36)
    """
    src, dst, how = named(src), named(dst), how or Writing()
    source = find(src, tag)
    checkpoint = check_before_use(source, beside=True, only_looks=how.dry_run)
    root = src if tag is None else source.target
    with within(root):
        files = tuple(_files(root))
    plan = Plan(files=files, checks=checkpoint.checks)
    next = (advice.verify(dst),)
    if how.dry_run:
        refuse(plan, dst, src, how)
        return Written(source=src, destination=dst, plan=plan, notes=(), next=next)
    told: list[str] = []

    def finish(staged: Location, crcs: Mapping[Location, int]) -> Mapping[str, bytes]:
        told.extend(_read_back(crcs, how.workers))
        return {}

    started = time.monotonic()
    with how.bar(plan.nbytes, "copy") if how.bar else nullcontext() as progress:
        options: Options = {
            "source": src,
            "force": how.force,
            "workers": how.workers,
            "progress": progress,
            "replaces": partial(_replaces, dst, plan),
        }
        if isinstance(dst, Stored):
            from ckpttools.execute.upload import upload

            report = upload(plan, dst, finish=finish, is_last=is_last, **options)
        else:
            from ckpttools.execute.others import Job
            from ckpttools.execute.spread import spread

            job = Job(worker=Worker(0, 1), is_result=lambda place, digest: False, alone=True)
            done = spread(plan, dst, job, finish=lambda digest, look: finish, **options).report
            assert done is not None  # the only worker commits
            report = done
    return Written(
        source=src,
        destination=dst,
        plan=plan,
        notes=(*report.notes, *told),
        next=next,
        seconds=time.monotonic() - started,
        checked=report.checked,
    )


def _replaces(dst: Location, plan: Plan) -> str:
    from ckpttools.operations.replacing import replaceable

    return replaceable(dst, plan)


def _files(root: Location) -> Iterator[OutputFile]:
    """Every regular file below the root, manifests included; nothing that is being written or deleted."""
    if not is_folder(root):
        yield copy_file(root, "", size_of(root))
        return
    todo, entered = [root], Entered()
    while todo:
        here = todo.pop(0)
        entered.enter(here)
        for entry in entries(here):
            path = here / entry.name
            if is_ours(entry.name) and not entry.name.endswith(MANIFEST):
                continue
            if is_folder(entry):
                todo.append(path)
            elif is_file(entry):
                yield copy_file(path, below(path, root), size_of(path))


def _read_back(crcs: Mapping[Location, int], workers: int) -> Iterator[str]:
    """Read what was written once: its CRC-32s, and the digests of the manifests that came along."""
    from ckpttools.checks.manifests import entry_of, read_back

    digests = read_back({path: {} for path in crcs}, crcs, workers)
    held = 0
    for place in crcs:
        if place.name != MANIFEST:
            continue
        try:
            stated = manifest.load(place)
        except CkptError as error:
            if error.id != manifest.UNUSABLE:
                raise
            yield f"{error.message}; it was copied as it is"
            continue
        near = [path for path in crcs if place.parent in path.parents]
        now = {below(path, place.parent): entry_of(path, digests) for path in near}
        for difference in manifest.differences(stated, now):
            raise CkptError(
                "manifest-mismatch",
                f"{escape(difference.name)} {difference.problem} since the manifest was written",
                where=place,
                why="the source was changed before it was copied; nothing was written",
                hint="ckpt verify names what changed; copy from a place where it did not",
            )
        held += len(stated.keys() & now.keys())
    if held:
        yield f"{held} files are what the manifest says"
