"""DeepSpeed ZeRO-3 folders.

    <tag>/zero_pp_rank_{dp}_mp_rank_00_model_states.pt          one per rank: names, shapes, buffers, counters
    <tag>/[bf16_]zero_pp_rank_{dp}_mp_rank_00_optim_states.pt   one per rank: masters and optimizer state

Every parameter is cut by itself: of n elements over N ranks each rank holds ceil(n / N), the last ones filled
up with padding. A rank's parts of the parameters of a sub-group lie one after another in one flat fp32
vector, and in one of each moment; sub-groups are runs of a parameter group whose parts reach
`sub_group_size` elements. There is no 16-bit copy of what is trained: the engine makes it from the masters.
Frozen parameters are cut alike, in the engine's dtype; buffers are whole on every rank. Small parameters
that the engine keeps whole (stage3_param_persistence_threshold) and its secondary copies within a node
(zero_hpz_partition_size) leave no trace in the files.
Source: deepspeed/runtime/zero/stage3.py, partition_parameters.py, engine.py.

`names` knows the files, `cuts` the arithmetic, `decode` one file, `read` all of them together,
`write` a folder for any number of ranks.
"""

from ckpttools.checkpoint import FP32, Checkpoint, Layout
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats import tags
from ckpttools.formats.format import Checked, Format, Source, no_file
from ckpttools.formats.zero3.names import holds
from ckpttools.plan import Plan

__all__ = ["FORMAT", "plan"]


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    from ckpttools.formats.zero3.write import plan

    if any(group.scalars or group.state.keys() - {FP32} for group in checkpoint.groups):
        _refuse_rank_local(checkpoint)
    return plan(checkpoint, layout)


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.zero3.read import read  # of use to checkpoints of this format alone

    return read(source.target)


def _check(source: Source) -> Checked:
    from ckpttools.formats.zero3.checks import check

    return check(source.target)


def _files(checkpoint: Checkpoint) -> tuple[TorchFile | None, tuple[TorchFile, ...]]:
    from ckpttools.formats.zero3.join import Zero3Folder

    folder = checkpoint.template
    if not isinstance(folder, Zero3Folder):
        return None, ()
    return folder.models[0].file, tuple(shard.file for shard in folder.shards)


def _copies(checkpoint: Checkpoint) -> tuple[TorchFile, ...]:
    from ckpttools.formats.zero3.join import Zero3Folder

    folder = checkpoint.template
    return tuple(model.file for model in folder.models[1:]) if isinstance(folder, Zero3Folder) else ()


def _refuse_rank_local(checkpoint: Checkpoint) -> None:
    from ckpttools.formats import rank_local
    from ckpttools.formats.zero3.join import Zero3Folder

    if isinstance(folder := checkpoint.template, Zero3Folder):
        rank_local.refuse(folder.unaccounted(), folder.rank_files, "sub-group")


FORMAT = Format(
    name="zero3",
    holds=holds,
    names_it=tags.names_it,
    is_weights=tags.is_states,
    recognise=lambda folder: tags.recognise(folder, holds),
    recognise_file=no_file,
    read=_read,
    check=_check,
    plan=plan,
    targets=("zero3",),
    tagged=True,
    torch_files=_files,
    copies=_copies,
    refuse_rank_local=_refuse_rank_local,
)
