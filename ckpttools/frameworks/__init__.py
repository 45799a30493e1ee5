"""How far training is, for every container: `read` gives a Training; nothing is changed here.

One file per framework. The first of FRAMEWORKS that recognises a checkpoint reads it.

reference     the keys that `ckpt train` adds to DeepSpeed's
lightning     its loops, in a single file or in a ZeRO folder's model file
mmengine      meta, message_hub, param_schedulers: likewise
huggingface   the Trainer's files beside a model or a ZeRO folder
accelerate    save_state's files: likewise
client        other code that drives DeepSpeed: its keys, training_info.json
openpcdet, plain   single files; timm's too

deepspeed     what every ZeRO folder holds, whoever drove it
framework, parts   what they share; progress: all that in one line
"""

from __future__ import annotations

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import Unsupported
from ckpttools.formats.format import Source
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.formats.zero3.join import Zero3Folder
from ckpttools.frameworks import (
    accelerate,
    client,
    deepspeed,
    huggingface,
    lightning,
    mmengine,
    openpcdet,
    plain,
    reference,
)
from ckpttools.frameworks.framework import Saved
from ckpttools.stores.links import within
from ckpttools.training import Training

FRAMEWORKS = (
    reference.FRAMEWORK,
    lightning.FRAMEWORK,
    mmengine.FRAMEWORK,
    huggingface.FRAMEWORK,
    accelerate.FRAMEWORK,
    client.FRAMEWORK,
    openpcdet.FRAMEWORK,
    plain.TIMM,
    plain.FRAMEWORK,
)


def read(source: Source, checkpoint: Checkpoint) -> Training:
    """The training state of a checkpoint that was found at `source` and read. Raises CkptError."""
    with within(source.root):
        saved = _saved(source, checkpoint)
        for framework in FRAMEWORKS:
            if framework.recognise(saved):
                return framework.read(saved)
    raise Unsupported(
        "weights-only",
        "the checkpoint holds weights and no training state",
        where=checkpoint.path,
        why="there is no counter, schedule or optimizer that a batch size could change",
        hint="name the training checkpoint itself: a checkpoint-N folder, a ZeRO folder, a training .pt",
    )


def _saved(source: Source, checkpoint: Checkpoint) -> Saved:
    found = checkpoint.template
    if isinstance(found, ZeroFolder):
        engine = deepspeed.read(found.model.file, [rank.file for rank in found.ranks])
        return Saved(place=source.root, file=found.model.file, zero=True, engine=engine)
    if isinstance(found, Zero3Folder):
        model, shards = found.models[0].file, [shard.file for shard in found.shards]
        return Saved(place=source.root, file=model, zero=True, engine=deepspeed.read(model, shards))
    return Saved(place=source.target, file=found if isinstance(found, TorchFile) else None)
