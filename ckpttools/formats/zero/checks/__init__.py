"""Checks on the headers of a ZeRO-1/2 folder: does each file fit its name, and do all fit together?

Each check takes the decoded folder and yields findings. Nothing but a few scalars is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError
from ckpttools.findings import Finding, of_error
from ckpttools.formats.engine import Engine, Shard, check_engine
from ckpttools.formats.files import Attempts, archive_roots, check_files
from ckpttools.formats.format import Checked, Copy
from ckpttools.formats.model_states import read_model
from ckpttools.formats.rank_files import MODEL_NAME
from ckpttools.formats.zero.checks import model, ranks
from ckpttools.formats.zero.decode import Rank, read_rank
from ckpttools.formats.zero.join import ZeroFolder, assemble, check_complete
from ckpttools.formats.zero.names import find
from ckpttools.formats.zero.read import alike, checkpoint
from ckpttools.location import Location
from ckpttools.stores.files import is_file

__all__ = ["check", "check_folder"]


def _engine(folder: ZeroFolder) -> Iterator[Finding]:
    shards = tuple(
        Shard(
            file=rank.file,
            state=rank.state,
            hyper=rank.hyper,
            steps=ranks.steps(rank),
            kinds=frozenset(kind for moments in rank.moments for kind in moments),
        )
        for rank in folder.ranks
    )
    place = "optimizer_state_dict.base_optimizer_state.state"
    model = folder.model
    yield from check_engine(Engine(model=model.file, root=model.root, shards=shards, kept_in=place))


CHECKS: tuple[Callable[[ZeroFolder], Iterator[Finding]], ...] = (
    ranks.slice_mappings,
    ranks.paddings,
    ranks.masters,
    ranks.moments,
    ranks.second_moment,
    ranks.of_single_ranks,
    ranks.same_on_all_ranks,
    _engine,
    model.shapes,
    model.frozen_shapes,
    model.dtypes,
    model.required_fields,
    model.module_names,
    model.tied_weights,
    model.strays,
)


def check(path: Location) -> Checked:
    """Each file by itself, then all together. Raises Unsupported for another layout."""
    attempt = Attempts()
    try:
        files = find(path)
    except CkptError as error:
        if error.exit_code != 1:
            raise
        alone = path / MODEL_NAME
        return Checked([of_error(error)], None, [], weights=alone if is_file(alone) else None)
    model = attempt(lambda: read_model(files.model))
    ranks: list[Rank] = []
    for number, each in files.optim.items():
        rank = attempt(lambda each=each, number=number: read_rank(each, number))  # type: ignore[misc]
        if rank is not None:
            ranks.append(alike(rank, ranks))
    torch_files = [model.file] if model is not None else []
    torch_files += [rank.file for rank in ranks]
    attempt.findings += check_files(torch_files)
    complete = None
    joined: ZeroFolder | None = None
    if model is not None and len(ranks) == len(files.optim):
        complete = attempt(lambda: check_complete(files, model, tuple(ranks)))
    attempt.findings += archive_roots(torch_files)
    if complete and model is not None:
        joined = attempt(lambda: assemble(files, model, tuple(ranks)))
    if joined is None:
        return Checked(attempt.findings, None, torch_files, weights=files.model)
    attempt.findings += check_folder(joined)
    found = attempt(lambda: checkpoint(joined))
    copies = tuple(_second(found, joined)) if found is not None else ()
    return Checked(attempt.findings, found, torch_files, copies=copies, weights=files.model)


def _second(found: Checkpoint, folder: ZeroFolder) -> Iterator[Copy]:
    """DeepSpeed's second copy of the frozen parameters."""
    for name, ref in folder.model.fragments.items():
        if name in found.tensors:
            twin = f"frozen_param_fragments.{name}"
            yield Copy(name=name, tensor=found.tensors[name], twin=twin, copy=ref)


def check_folder(folder: ZeroFolder) -> Iterator[Finding]:
    """Every header check, in the order of CHECKS."""
    for check in CHECKS:
        yield from check(folder)
