"""DeepSpeed ZeRO-1 and ZeRO-2 folders.

    <tag>/mp_rank_00_model_states.pt                            weights, counters, shapes, client state
    <tag>/[bf16_]zero_pp_rank_{dp}_mp_rank_00_optim_states.pt   one per data-parallel rank

Each optimizer parameter group is one flat fp32 vector: the group's trainable parameters one after
another (with `round_robin_gradients` in an order that depends on the rank count), padded with zeros at
the end to a multiple of 2 * ranks, and cut into equal partitions, one per rank. The optimizer's moments
are cut the same way. Source: deepspeed/runtime/zero/stage_1_and_2.py, bf16_optimizer.py, engine.py.

`names` knows the files, `flat` the arithmetic, `read` and `write` the contents.
"""

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats import tags
from ckpttools.formats.format import Checked, Format, Source
from ckpttools.formats.zero import names
from ckpttools.plan import Plan
from ckpttools.training import Training

__all__ = ["FORMAT", "plan"]


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    from ckpttools.formats.zero.write import plan

    return plan(checkpoint, layout)


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.zero.read import read  # of use to checkpoints of this format alone

    return read(source.target)


def _check(source: Source) -> Checked:
    from ckpttools.formats.zero.checks import check

    return check(source.target)


def _files(checkpoint: Checkpoint) -> tuple[TorchFile | None, tuple[TorchFile, ...]]:
    from ckpttools.formats.zero.join import ZeroFolder

    folder = checkpoint.template
    if not isinstance(folder, ZeroFolder):
        return None, ()
    return folder.model.file, tuple(rank.file for rank in folder.ranks)


def _state(file: TorchFile) -> Training:
    from ckpttools.containers import fields
    from ckpttools.formats.deepspeed import counters

    return counters(file, fields.mapping(file.path, file.value, "the file's value"))


def _refuse_rank_local(checkpoint: Checkpoint) -> None:
    from ckpttools.formats import rank_local
    from ckpttools.formats.zero.join import ZeroFolder

    if isinstance(folder := checkpoint.template, ZeroFolder):
        rank_local.refuse(folder.unaccounted(), folder.rank_files, "group")


FORMAT = Format(
    name="zero",
    holds=tags.holds_states,
    names_it=tags.names_it,
    is_weights=tags.is_states,
    recognise=names.recognise,
    recognise_file=names.recognise_file,
    read=_read,
    check=_check,
    plan=plan,
    targets=("zero1", "zero2"),
    tagged=True,
    torch_files=_files,
    state=_state,
    refuse_rank_local=_refuse_rank_local,
)
