"""A checkpoint of ranks for another number of them: ZeRO folders and distributed checkpoints."""

from __future__ import annotations

from contextlib import suppress

from msgspec.structs import replace

from ckpttools.checks import check_before_use
from ckpttools.errors import CkptError, UsageError
from ckpttools.frameworks import read
from ckpttools.frameworks.surroundings import with_surroundings
from ckpttools.location import Location
from ckpttools.operations import advice, kept
from ckpttools.operations.destination import default_dst
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.stores.files import named
from ckpttools.transforms.reshard import ranks_of, without_positions
from ckpttools.transforms.reshard import reshard as resharded


def reshard(
    src: str | Location,
    dst: str | Location | None = None,
    *,
    world_size: int | None = None,
    mesh: str | None = None,
    tag: str | None = None,
    digest: bool | None = None,
    how: Writing | None = None,
) -> Written:
    """Move a ZeRO or a distributed checkpoint to `world_size` ranks: weights, optimizer state, counters kept.

    `mesh` ("2x4") are data-parallel times tensor-parallel ranks: for distributed checkpoints, which any ranks
    can load, but each finds what it needs in one file. With `digest`, the result must hold what the source
    holds (`ckpttools.digest`) before it gets its name, and the digest is in the notes and in the manifest: by
    default unless the source is in a store, or many processes write. It is taken as the result is read back;
    what lies in several pieces there is read once more, and what is not copied from the source is read there.

    >>> made = reshard("fixtures/trainer/z2_bf16_2", out / "four", world_size=4)
    >>> made.destination.name, len([file for file in made.plan.files if "optim" in file.path])
    ('four', 4)
    """
    src = named(src)
    ranks, sizes = ranks_of(world_size, mesh)
    if ranks is None:
        raise UsageError(
            "bad-usage",
            "for how many ranks?",
            where=src,
            why="each of them gets a file of its own",
            hint="--world-size N, or --mesh 2x4",
        )
    source = find(src, tag)
    how = how or Writing()
    checkpoint = check_before_use(source, beside=True, only_looks=how.dry_run)
    layout = resharded(checkpoint, ranks, sizes)
    data_parallel = sizes[0] if sizes else ranks
    checkpoint, notes = without_positions(checkpoint, data_parallel)
    changed = layout.dp_degree != checkpoint.layout.dp_degree
    assert source.format.plan is not None  # a layout of ranks is one that is written
    plan = source.format.plan(checkpoint, layout)
    own = () if source.format.tagged else {role.path for role in checkpoint.files}
    plan = with_surroundings(source, plan, ranks=(checkpoint, layout) if changed else None, own=own)
    if changed:
        with suppress(CkptError):  # of a framework's own counters and settings nothing is written
            notes = (*notes, *read(source, checkpoint).stays)
    plan = replace(plan, notes=(*plan.notes, *notes))
    dst = named(dst) if dst is not None else default_dst(src, f"ws{ranks}")
    steps = advice.resume(source, checkpoint, dst, ranks)
    check = (
        kept.check(source, checkpoint, plan, how, whole=True)
        if kept.asked(digest, source, dst, how)
        else None
    )
    return carry_out(src, dst, plan, how, label="reshard", next=steps, check=check)
