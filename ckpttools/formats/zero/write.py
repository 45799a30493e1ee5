"""Writing a ZeRO-1/2 tag folder for any number of ranks.

What DeepSpeed reads on load is `dp_world_size`, the file names, `ds_version`, `base_optimizer_state` and the
fp32 partitions; its converters read the rest. Everything that the Checkpoint says is written; where a folder
was read, a value that has not changed is written as it was.
"""

from __future__ import annotations

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.formats.deepspeed import kept_batch
from ckpttools.formats.notes import left_out, unsaid
from ckpttools.formats.zero import model_file, optim_file
from ckpttools.formats.zero.target import target
from ckpttools.plan import Plan, copy_file
from ckpttools.stores.files import size_of


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    """The files of a tag folder, for `layout.dp_degree` ranks.

    Raises Unsupported for a checkpoint whose optimizer's settings or state cannot be cut over ranks.
    """
    to = target(checkpoint, layout)
    settings, notes = kept_batch(checkpoint, layout)
    files = [model_file.output(to, settings), *optim_file.outputs(to, settings)]
    if to.template is not None:
        files += [copy_file(path, path.name, size_of(path)) for path in to.template.files.others]
    lacks = unsaid if to.template is None else left_out
    return Plan(files=tuple(files), notes=(*notes, *lacks(checkpoint)), checks=checkpoint.checks)
