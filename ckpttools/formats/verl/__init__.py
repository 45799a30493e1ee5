"""verl's folders of FSDP: torch files of each rank, whose tensors are pickled DTensors.

    model_world_size_{N}_rank_{R}.pt           the rank's part of each weight, the whole shape, the mesh
    optim_world_size_{N}_rank_{R}.pt           the same of the optimizer's state
    extra_state_world_size_{N}_rank_{R}.pt     learning rate schedule, random states
    fsdp_config.json                           FSDP's version, the number of ranks
    huggingface/                               configuration, tokenizer

A DTensor is a call of `_rebuild_from_type_v2` with `_local_tensor` and `_spec`: where it is `Shard(0)`,
rank R has the R-th of N pieces along the first dimension, the first ones of ceil(rows / N) rows, the last
ones shorter or empty; where it is `Replicate()`, every rank has all of it. On a mesh of `ddp` times `fsdp`
ranks (HSDP) it is both, and every N / ddp ranks have all. Weights are joined; of the optimizer the files are
checked.
Source: verl/utils/checkpoint/fsdp_checkpoint_manager.py; torch/distributed/tensor/_api.py of torch 2.13.
"""

from ckpttools.checkpoint import Checkpoint
from ckpttools.formats.format import Checked, Folder, Format, Found, Source, no_file
from ckpttools.formats.verl.names import CONFIG, NAME, holds

__all__ = ["FORMAT"]


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.verl.read import read  # of use to checkpoints of this format alone

    return read(source.target)


def _recognise(folder: Folder) -> Found | None:
    return Found(folder.path, "verl's files of FSDP ranks") if holds(folder) else None


def _check(source: Source) -> Checked:
    from ckpttools.formats.verl.checks import check

    return check(source.target)


FORMAT = Format(
    name="verl",
    holds=holds,
    names_it=lambda path: path.name == CONFIG or NAME.fullmatch(path.name) is not None,
    is_part=lambda name: NAME.fullmatch(name) is not None,
    recognise=_recognise,
    recognise_file=no_file,
    read=_read,
    check=_check,
    resumes=False,
    weights_alone=True,
)
