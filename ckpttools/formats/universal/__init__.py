"""DeepSpeed's universal checkpoints: `"checkpoint": {"load_universal": true}` loads them on any ranks.

    <folder>/latest_universal                            the tag
    <tag>/mp_rank_00_model_states.pt                     as ZeRO-1 and 2 have it: weights, buffers, counters
    <tag>/zero_pp_rank_{dp}_mp_rank_00_model_states.pt   as ZeRO-3 has it; only that of rank 0 is loaded
    <tag>/zero/optimizer_state.pt                        settings of the parameter groups, loss scaler
    <tag>/zero/<parameter>/fp32.pt                       {"param": master weights, "cat_dim": 0}
    <tag>/zero/<parameter>/<kind>.pt                     likewise exp_avg, exp_avg_sq ...
    <tag>/zero/<parameter>/step.pt                       the count itself: an int or a 0-d tensor

Made from ZeRO-3 by DeepSpeed's ds_to_universal, the tensors are flat and bare, there is no step.pt, and
optimizer_state.pt is rank 0's whole shard. What ckpt writes has both model files and both places of settings
and steps, and serves the stages 1, 2 and 3 alike: stage 3 takes a dict for a bare tensor.

What the loader does not read, whatever the files hold: buffers, frozen parameters, the module as a whole; in
stage 3 all state but exp_avg and exp_avg_sq, and the settings of all groups but the first.
Source: deepspeed/checkpoint/{ds_to_universal,universal_checkpoint}.py, runtime/base_optimizer.py
(load_hp_checkpoint_state_from_checkpoint_dir), runtime/zero/stage3.py (the same, `_stage3`).

`names` knows the files, `decode` one of them, `read` all together, `write` a folder.
"""

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats import tags
from ckpttools.formats.format import Checked, Format, Source, no_file
from ckpttools.formats.universal.names import LATEST, holds, inner, names_it, recognise
from ckpttools.plan import Plan

__all__ = ["FORMAT", "plan"]


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    from ckpttools.formats.universal.write import plan

    return plan(checkpoint, layout)


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.universal.read import read  # of use to checkpoints of this format alone

    return read(source.target)


def _check(source: Source) -> Checked:
    from ckpttools.formats.universal.checks import check

    return check(source.target)


def _files(checkpoint: Checkpoint) -> tuple[TorchFile | None, tuple[TorchFile, ...]]:
    from ckpttools.formats.universal.read import Universal

    found = checkpoint.template
    return (found.models[0].file, (found.settings.file,)) if isinstance(found, Universal) else (None, ())


FORMAT = Format(
    name="universal",
    holds=holds,
    names_it=names_it,
    is_weights=tags.is_states,
    recognise=recognise,
    recognise_file=no_file,
    read=_read,
    check=_check,
    plan=plan,
    targets=("universal",),
    inner=inner,
    pointer=LATEST,
    tagged=True,
    torch_files=_files,
)
