"""Everything that is particular to a framework, one file for each, and one table of them.

How its checkpoints are recognised and read (`read` gives a Training; nothing is changed), what it does with a
resumed run, its pointers and its idea of the newest, the keys and side files that it always writes. The first
of FRAMEWORKS that recognises a checkpoint reads it. Nothing outside this folder names one of them.

reference     the keys that `ckpt train` adds to DeepSpeed's
lightning     its loops, in a single file or in a ZeRO folder's model file
mmengine      meta, message_hub, param_schedulers: likewise
huggingface   the Trainer's files beside a model or a ZeRO folder
accelerate    save_state's files: likewise
deepspeed     what every ZeRO folder holds, whoever drove it; client: other code's keys, training_info.json
openpcdet, plain   single files; timm's too
distributed   torch distributed checkpoints

framework, rules, parts   what they share; progress: all that in one line
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import Unsupported
from ckpttools.formats.format import Source
from ckpttools.frameworks import (
    accelerate,
    deepspeed,
    distributed,
    huggingface,
    lightning,
    mmengine,
    openpcdet,
    plain,
    reference,
)
from ckpttools.frameworks.framework import Brief, Framework, Saved
from ckpttools.frameworks.rules import AutoResume
from ckpttools.location import Location
from ckpttools.stores.files import is_folder
from ckpttools.stores.links import within
from ckpttools.training import Training

FRAMEWORKS = (
    reference.FRAMEWORK,
    lightning.FRAMEWORK,
    mmengine.FRAMEWORK,
    huggingface.FRAMEWORK,
    accelerate.FRAMEWORK,
    deepspeed.FRAMEWORK,
    openpcdet.FRAMEWORK,
    plain.TIMM,
    plain.FRAMEWORK,
    distributed.FRAMEWORK,
)
BY_NAME = {framework.name: framework for framework in FRAMEWORKS}
POINTERS = tuple(pointer for framework in FRAMEWORKS for pointer in framework.pointers)
# JSON files beside the weights that state counters
STATED = tuple(name for framework in FRAMEWORKS for name in framework.stated)


def framework_of(training: Training | None) -> Framework:
    """The framework that read it; plain code where there is none."""
    return BY_NAME[training.framework] if training is not None else plain.FRAMEWORK


Files = tuple[TorchFile | None, tuple[TorchFile, ...]]


def read(source: Source, checkpoint: Checkpoint, files: Files | None = None) -> Training:
    """The training state of a checkpoint that was found at `source` and read. Raises CkptError.

    `files` are its torch files, where they are others than those that the Checkpoint was read from.
    """
    files = source.format.torch_files(checkpoint) if files is None else files
    with within(source.root):
        saved = _saved(source, checkpoint, files)
        for framework in FRAMEWORKS:
            if framework.recognise(saved):
                found = framework.read(saved)
                return found.over(checkpoint.training)
    raise _weights_only(checkpoint)


def brief(source: Source, checkpoint: Checkpoint, files: Files | None = None) -> Brief:
    """What a listing shows of it, from as few files as possible. Raises CkptError."""
    files = source.format.torch_files(checkpoint) if files is None else files
    with within(source.root):
        bare = _bare(source, checkpoint, files)
        for framework in FRAMEWORKS:
            if framework.recognise(bare):
                if framework.brief is None:
                    break
                found = framework.brief(bare)
                return replace(found, training=found.training.over(checkpoint.training))
    whole = read(source, checkpoint, files)
    return Brief(resumes=bool(whole.optimizers), training=whole.brief)


def _weights_only(checkpoint: Checkpoint) -> Unsupported:
    return Unsupported(
        "weights-only",
        "the checkpoint holds weights and no training state",
        where=checkpoint.path,
        why="there is no counter, schedule or optimizer that a batch size could change",
        hint="name the training checkpoint itself: a checkpoint-N folder, a ZeRO folder, a training .pt",
    )


def auto_resume(folder: Location) -> tuple[AutoResume, ...]:
    """What each framework whose checkpoints are here would take. () for a path that is no folder."""
    if not is_folder(folder):
        return ()
    return tuple(taken for framework in FRAMEWORKS for taken in framework.takes(folder))


def wraps(folder: Location) -> bool:
    """Whether a folder is a framework's own checkpoint, with DeepSpeed's somewhere below."""
    return any(framework.wraps(folder) for framework in FRAMEWORKS)


def unfinished(path: Location) -> str | None:
    """Why the save is not whole, by its framework's own marks."""
    return next((why for framework in FRAMEWORKS if (why := framework.unfinished(path))), None)


def missing_keys(root: fields.Mapping) -> Iterator[tuple[str, str]]:
    """Frameworks that a file says it is of, each with a key that its writer always saves and that is gone."""
    return ((framework.title, key) for framework in FRAMEWORKS for key in framework.keys(root))


def _saved(source: Source, checkpoint: Checkpoint, files: Files) -> Saved:
    bare = _bare(source, checkpoint, files)
    if bare.file is None or not bare.zero:
        return bare
    return replace(bare, engine=deepspeed.engine(bare.file, files[1], checkpoint.layout.dp_degree))


def _bare(source: Source, checkpoint: Checkpoint, files: Files) -> Saved:
    """Without what DeepSpeed itself says."""
    file, _ = files
    tagged, place = source.format.tagged, source.root if source.format.tagged else source.target
    values = checkpoint if file is None else None
    return Saved(place=place, file=file, zero=tagged and file is not None, values=values)
