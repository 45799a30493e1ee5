"""What ckpt writes beside a checkpoint, by name: copies, manifests, pins, what is being written or deleted.

A default DST lies beside SRC, in a folder that a framework looks after. So its name must be none that a
framework takes for one of its own:

    HF Trainer    glob checkpoint-*; a resume takes checkpoint-N        transformers/trainer_utils.py
    MMEngine      epoch_*.pth, iter_*.pth, best_*                       mmengine/hooks/checkpoint_hook.py
    DeepSpeed     global_step*                                          deepspeed/runtime/engine.py
    Lightning     last*.ckpt, the names it saved itself                 callbacks/model_checkpoint.py
    OpenPCDet     every *.pth in ckpt/                                  tools/train.py
    accelerate    every entry of checkpoints/, by its first number      accelerate/accelerator.py

Hence the telling part stands in front (`ws4-of-checkpoint-20`), the suffix stays (`bs64-of-last.ckpt`), and
what lies in `ckpt/` or `checkpoints/` gets its copy beside that folder.
"""

from __future__ import annotations

import re

MANIFEST = "ckpt-manifest.json"  # describes the files beside it: never carried to files that differ
UNFINISHED = "ckpt-unfinished.json"  # in a folder of a store: what else is in it is not all of it
STAGING = ".ckpt-tmp-"
REPLACED = ".ckpt-old-"
SPREAD = ".ckpt-spread"  # what many workers are writing
VERIFIED = "last_verified"  # names the newest of which every byte was read, by a callback
PIN = ".ckpt-pin-"  # in front: no glob takes a hidden name
GONE = re.compile(r"\.ckpt-gone-[0-9a-f]{16}")  # what a prune is deleting; without the old name's suffix
# whatever lies in such a folder is the framework's own
THEIRS = ("ckpt", "checkpoints")

_KINDS = r"(?:ws\d+|bs\d+|weights)"
_COPY = re.compile(rf"{_KINDS}-of-.+|.+\.{_KINDS}")  # the latter: as the first versions named them


def is_copy(name: str) -> bool:
    """Whether a name is one that ckpt gives to a copy: no point that a run came by."""
    return _COPY.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a name is that of a manifest or a pin, or of something that is being written or deleted."""
    return (
        name.endswith((MANIFEST, SPREAD, UNFINISHED))
        or name.startswith(PIN)
        or STAGING in name
        or REPLACED in name
        or GONE.fullmatch(name) is not None
    )
