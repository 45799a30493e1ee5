"""DeepSpeed ZeRO-1 and ZeRO-2 folders.

    <tag>/mp_rank_00_model_states.pt                            weights, counters, shapes, client state
    <tag>/[bf16_]zero_pp_rank_{dp}_mp_rank_00_optim_states.pt   one per data-parallel rank

Each optimizer parameter group is one flat fp32 vector: the group's trainable parameters one after
another (with `round_robin_gradients` in an order that depends on the rank count), padded with zeros at
the end to a multiple of 2 * ranks, and cut into equal partitions, one per rank. The optimizer's moments
are cut the same way. Source: deepspeed/runtime/zero/stage_1_and_2.py, bf16_optimizer.py, engine.py.

`names` knows the files, `flat` the arithmetic, `read` and `write` the contents.
"""

from ckpttools.formats.format import Checked, Format, Source
from ckpttools.formats.tags import holds_states
from ckpttools.formats.zero import names
from ckpttools.formats.zero.read import read
from ckpttools.formats.zero.write import plan

__all__ = ["FORMAT", "plan", "read"]


def _check(source: Source) -> Checked:
    from ckpttools.formats.zero.checks import check

    return check(source.target)


FORMAT = Format(
    name="zero",
    holds=holds_states,
    recognise=names.recognise,
    recognise_file=names.recognise_file,
    read=lambda source: read(source.target),
    check=_check,
    plan=plan,
    targets=("zero1", "zero2"),
    tagged=True,
)
