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

from dataclasses import replace

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
from ckpttools.frameworks.framework import Brief, Saved
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
    raise _weights_only(checkpoint)


def brief(source: Source, checkpoint: Checkpoint) -> Brief:
    """What a listing shows of it, from as few files as possible. Raises CkptError."""
    with within(source.root):
        bare = _bare(source, checkpoint)
        for framework in FRAMEWORKS:
            if framework.recognise(bare):
                if framework.brief is not None:
                    return framework.brief(bare)
                found = framework.read(_saved(source, checkpoint))
                return Brief(resumes=bool(found.optimizers), metrics=dict(found.losses))
    raise _weights_only(checkpoint)


def _weights_only(checkpoint: Checkpoint) -> Unsupported:
    return Unsupported(
        "weights-only",
        "the checkpoint holds weights and no training state",
        where=checkpoint.path,
        why="there is no counter, schedule or optimizer that a batch size could change",
        hint="name the training checkpoint itself: a checkpoint-N folder, a ZeRO folder, a training .pt",
    )


def _saved(source: Source, checkpoint: Checkpoint) -> Saved:
    found, bare = checkpoint.template, _bare(source, checkpoint)
    if bare.file is None or not bare.zero:
        return bare
    shards: list[TorchFile] = []
    if isinstance(found, ZeroFolder):
        shards = [rank.file for rank in found.ranks]
    elif isinstance(found, Zero3Folder):
        shards = [shard.file for shard in found.shards]
    return replace(bare, engine=deepspeed.read(bare.file, shards))


def _bare(source: Source, checkpoint: Checkpoint) -> Saved:
    """Without what DeepSpeed itself says."""
    found = checkpoint.template
    if isinstance(found, ZeroFolder):
        return Saved(place=source.root, file=found.model.file, zero=True)
    if isinstance(found, Zero3Folder):
        return Saved(place=source.root, file=found.models[0].file, zero=True)
    return Saved(place=source.target, file=found if isinstance(found, TorchFile) else None)
