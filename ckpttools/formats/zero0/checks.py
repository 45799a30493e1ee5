"""Checks on the headers of a stage 0 folder: the file by itself; counters, scheduler, optimizer together."""

from __future__ import annotations

from collections.abc import Iterator

from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.containers import fields
from ckpttools.findings import ERROR, Finding
from ckpttools.formats.engine import Engine, Shard, check_engine, number_of
from ckpttools.formats.files import archive_roots, check_files
from ckpttools.formats.format import Checked
from ckpttools.formats.found import found
from ckpttools.formats.zero0.read import INNER, MASTERS, OPTIMIZER, Stage0, read
from ckpttools.location import Location


def check(folder: Location) -> Checked:
    """Raises CkptError where it cannot be read."""
    checkpoint = read(folder)
    kept = checkpoint.template
    assert isinstance(kept, Stage0)
    findings = [*check_files([kept.file]), *archive_roots([kept.file]), *_engine(kept, checkpoint)]
    return Checked([*findings, *_masters(kept)], checkpoint, [kept.file], weights=kept.file.path)


def _engine(kept: Stage0, checkpoint: Checkpoint) -> Iterator[Finding]:
    """The rules of all stages, with the optimizer of the model file as the one shard."""
    state = fields.as_mapping(kept.root.get(OPTIMIZER))
    if state is None or not checkpoint.groups:
        return
    inner = fields.as_mapping(state.get(INNER)) or state
    saved = inner.get("param_groups")
    groups = [fields.as_mapping(group) for group in saved] if isinstance(saved, list) else []
    steps = [
        number_of(step) for group in checkpoint.groups for step in group.scalars.get("step", {}).values()
    ]
    shard = Shard(
        file=kept.file,
        state=state,
        hyper=tuple(group for group in groups if group is not None),
        steps=tuple(steps) or (None,),
        kinds=frozenset(kind for group in checkpoint.groups for kind in group.state if kind != FP32),
    )
    yield from check_engine(Engine(model=kept.file, root=kept.root, shards=(shard,), kept_in=OPTIMIZER))


def _masters(kept: Stage0) -> Iterator[Finding]:
    """The wrapper of 16 bits loads its masters without asking whether they are there."""
    state = fields.as_mapping(kept.root.get(OPTIMIZER))
    if state is not None and INNER in state and not any(key in state for key in MASTERS):
        yield found(
            "field-missing",
            kept.file.path,
            f"{OPTIMIZER}.{MASTERS[0]}",
            "the fp32 masters are not there: DeepSpeed cannot load the optimizer",
            severity=ERROR,
            hint="copy the file again from where it was saved",
        )
