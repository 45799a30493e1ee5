"""DeepSpeed folders of ZeRO stage 0: every rank holds everything, and rank 0 writes it.

    <tag>/mp_rank_00_model_states.pt    module, counters, client state; `optimizer` has what the stages cut

In fp32 `optimizer` is the state dict of the torch optimizer. In fp16 and bf16 it is that of a wrapper:
`optimizer_state_dict` is the torch optimizer's, whose parameters are the fp32 masters. They lie in
`fp32_groups`, a list of tensors for each group, or in `fp32_groups_flat`, one flat vector for each group
(FusedAdam), which then is the one parameter that the optimizer has in it. Parameters have numbers and no
names: `param_shapes` is None; in what is written here it says them. Any number of ranks loads it.
Source: deepspeed/runtime/engine.py (_save_checkpoint), fp16/fused_optimizer.py, fp16/unfused_optimizer.py.
"""

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats import tags
from ckpttools.formats.format import Checked, Folder, Format, Source, no_file
from ckpttools.formats.rank_files import MODEL, OPTIM, STAGE3_MODEL
from ckpttools.plan import Plan

__all__ = ["FORMAT", "plan"]


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    from ckpttools.formats.zero0.write import plan

    return plan(checkpoint, layout)


def _holds(folder: Folder) -> bool:
    """Whether the folder has a model file and no optimizer files: stage 0, or those of all ranks are lost."""
    names = folder.names
    return any(map(MODEL.fullmatch, names)) and not any(
        pattern.fullmatch(name) for pattern in (OPTIM, STAGE3_MODEL) for name in names
    )


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.zero0.read import read  # of use to checkpoints of this format alone

    return read(source.target)


def _check(source: Source) -> Checked:
    from ckpttools.formats.zero0.checks import check

    return check(source.target)


def _files(checkpoint: Checkpoint) -> tuple[TorchFile | None, tuple[TorchFile, ...]]:
    from ckpttools.formats.zero0.read import Stage0

    found = checkpoint.template
    return (found.file, (found.file,)) if isinstance(found, Stage0) else (None, ())


FORMAT = Format(
    name="zero0",
    holds=_holds,
    names_it=tags.names_it,
    is_weights=tags.is_states,
    recognise=lambda folder: tags.recognise(folder, _holds),
    recognise_file=no_file,
    read=_read,
    check=_check,
    plan=plan,
    targets=("zero0",),
    tagged=True,
    torch_files=_files,
)
