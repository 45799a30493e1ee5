"""Another batch size: the same sample, the right learning rate."""

from __future__ import annotations

from msgspec import Struct

from ckpttools import frameworks
from ckpttools.checks import check_before_use
from ckpttools.errors import Unsupported
from ckpttools.formats import Source
from ckpttools.frameworks.edited import plan as plan_of
from ckpttools.location import Location
from ckpttools.operations import advice
from ckpttools.operations.destination import default_dst
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.plan import Plan
from ckpttools.stores.files import named
from ckpttools.transforms.rebase import Rebased, Request
from ckpttools.transforms.rebase import rebase as rebased


class Rebase(Struct, frozen=True, kw_only=True):
    """A rebase that was worked out, and not written yet: what changes, and how to go on afterwards."""

    source: Source
    rebased: Rebased
    plan: Plan
    destination: Location
    next: tuple[str, ...]


def prepare(src: Location, dst: Location | None, request: Request, tag: str | None = None) -> Rebase:
    """Everything that another batch size changes. Raises CkptError with a reason where it cannot be told."""
    source = find(src, tag)
    checkpoint = check_before_use(source, beside=True)
    if source.format.name == "universal":
        raise Unsupported(
            "layout-unsupported",
            "a universal checkpoint, which is read and not rebased yet",
            where=checkpoint.path,
            why="its counters and settings are in several files, one for each stage that loads it",
            hint="make a ZeRO folder of it (ckpt convert --to zero2), rebase that, and convert it back",
        )
    result = rebased(frameworks.read(source, checkpoint), request)
    known = result.old_count is not None and result.new_count is not None
    counts = (result.old_count or 0, result.new_count or 0) if known else None
    plan = plan_of(source, checkpoint, result.edits, counts)
    dst = dst or default_dst(src, f"bs{request.new_bs or result.timeline.new.total}")
    ranks = checkpoint.layout.ranks if checkpoint.layout.zero_stage is not None else None
    steps = advice.resume(source, checkpoint, dst, ranks)
    return Rebase(source=source, rebased=result, plan=plan, destination=dst, next=steps)


def rebase(
    src: str | Location,
    dst: str | Location | None = None,
    request: Request | None = None,
    *,
    tag: str | None = None,
    how: Writing | None = None,
    **asked: object,
) -> tuple[Written, Rebased]:
    """Write a training checkpoint for another batch size: counters, schedule and learning rate follow.

    `asked` are the fields of a `Request`, where none is given: `new_bs=4`. Returns what was written and what
    was changed in it.

    >>> made, changed = rebase("fixtures/hf-trainer/plain/checkpoint-2", out / "two", new_bs=1)
    >>> made.destination.name, changed.old_count, changed.new_count
    ('two', 2, 4)
    """
    wanted = request if request is not None else Request(**asked)  # type: ignore[arg-type]
    src = named(src)
    ready = prepare(src, named(dst) if dst is not None else None, wanted, tag)
    return write(ready, src, how or Writing()), ready.rebased


def write(ready: Rebase, src: Location, how: Writing) -> Written:
    """Carry out what `prepare` worked out."""
    return carry_out(src, ready.destination, ready.plan, how, label="rebase", next=ready.next)
