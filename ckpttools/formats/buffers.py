"""What no optimizer trains, where the files do not say it: buffers by type and name, the rest is frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckpttools.checkpoint import Checkpoint
from ckpttools.tensors import TensorRef

BUFFERS = "buffer_names"  # ours, as DeepSpeed calls it: which of the weights no optimizer can have
# of the buffers that torch's own modules register: torch/nn/modules/batchnorm.py
NORMS = ("running_mean", "running_var", "num_batches_tracked")


def is_buffer(name: str, ref: TensorRef) -> bool:
    """Whether no optimizer can have it: by its type, or as torch's own modules name their buffers."""
    trainable = ref.dtype.is_float or ref.dtype.name.startswith("complex")
    return not trainable or name.endswith(NORMS)


def untrained(
    tensors: Mapping[str, TensorRef], trained: Collection[str], shared: Collection[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """The frozen weights and the buffers; both are empty where no optimizer says what is trained."""
    if not trained:
        return frozenset(), frozenset()
    rest = {name for name in tensors if name not in trained}
    buffers = frozenset(name for name in rest if is_buffer(name, tensors[name]))
    return frozenset(rest - buffers - set(shared)), buffers


def told(checkpoint: Checkpoint) -> list[str] | None:
    """The buffers' names, where a file must say them because whoever reads it would guess: otherwise, or
    without being sure.
    """
    trained = {name for group in checkpoint.groups for name in group.params}
    if not trained:
        return None
    guessed = untrained(checkpoint.tensors, trained, checkpoint.shared)[1]
    sure = bool(checkpoint.frozen) and not checkpoint.roles_guessed
    return sorted(checkpoint.buffers) if sure or guessed != checkpoint.buffers else None


def listed(checkpoint: Checkpoint) -> list[str]:
    """What DeepSpeed's buffer_names gets. A tensor that may be a frozen weight or a buffer is there and among
    the frozen weights: DeepSpeed, which takes from either what its model has, loads it as both, and a reader
    knows that nobody knew.
    """
    unsure = checkpoint.frozen if checkpoint.roles_guessed else frozenset()
    return [name for name in checkpoint.tensors if name in checkpoint.buffers or name in unsure]
