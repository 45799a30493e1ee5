"""How far training is, for every container: `read` gives a Training; nothing is changed here.

deepspeed     a ZeRO folder's own counters, schedulers and shards
client        keys that other code adds to it, and training_info.json beside it
reference     the keys that `ckpt train` adds to it
lightning     its loops, in a single file or in a ZeRO folder's model file
mmengine      meta, message_hub, param_schedulers: likewise
huggingface   the Trainer's and accelerate's files beside a model or a ZeRO folder
single        plain training files, OpenPCDet, timm
parts         what they share
"""

from __future__ import annotations

from dataclasses import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import Unsupported
from ckpttools.formats.locate import Source
from ckpttools.formats.zero.read import ZeroFolder
from ckpttools.frameworks import client, deepspeed, huggingface, lightning, mmengine, reference, single
from ckpttools.stores.links import within
from ckpttools.training import Training, merge


def read(source: Source, checkpoint: Checkpoint) -> Training:
    """The training state of a checkpoint that was found at `source` and read. Raises CkptError."""
    with within(source.root):
        return _read(source, checkpoint)


def _read(source: Source, checkpoint: Checkpoint) -> Training:
    extra = checkpoint.template
    if isinstance(extra, ZeroFolder):
        return _zero(source, extra)
    if isinstance(extra, TorchFile):
        return single.read(extra)
    if source.target.is_dir() and huggingface.is_trainer(source.target):
        return huggingface.read(source.target, deepspeed=False)
    if source.target.is_dir() and huggingface.is_accelerate(source.target):
        return huggingface.read_accelerate(source.target, updates=None)
    raise Unsupported(
        "weights-only",
        "the checkpoint holds weights and no training state",
        where=checkpoint.path,
        why="there is no counter, schedule or optimizer that a batch size could change",
        hint="name the training checkpoint itself: a checkpoint-N folder, a ZeRO folder, a training .pt",
    )


def _zero(source: Source, folder: ZeroFolder) -> Training:
    """DeepSpeed's own state, under that of the framework which drove it."""
    own = deepspeed.read(folder)
    model = folder.model.file
    if reference.is_ours(model):
        return merge(reference.read(model, folder), own)
    if lightning.is_lightning(model):
        return merge(lightning.read(model), own)
    if mmengine.is_mmengine(model):
        return merge(mmengine.read(model, in_folder=True), own)
    if huggingface.is_trainer(source.root):
        own = replace(own, schedules=huggingface.of_trainer(source.root, own.schedules))
        return merge(huggingface.read(source.root, deepspeed=True), own)
    if huggingface.is_accelerate(source.root):
        return merge(huggingface.read_accelerate(source.root, updates=own.count), own)
    found = (client.of_model_file(own, model), client.of_bundle(own, source.root))
    return merge(own, *(each for each in found if each is not None))
