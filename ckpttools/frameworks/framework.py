"""What a framework is to us: how its checkpoints are recognised, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpttools.containers.torch_file import TorchFile
from ckpttools.location import Location
from ckpttools.stores.files import is_folder
from ckpttools.training import Training, merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint as it was found. `place` is the file or folder that a framework's own files lie in.

    `file` is a single torch file, or the model file of a ZeRO folder (rank 0's); `zero` says which, and
    `engine` what DeepSpeed itself says in it.
    """

    place: Location
    file: TorchFile | None = None
    zero: bool = False
    engine: Training | None = None

    def is_folder(self, of: Callable[[Location], bool]) -> bool:
        """Whether the place is a folder that has a framework's files beside the weights."""
        return is_folder(self.place) and of(self.place)

    def over(self, training: Training) -> Training:
        """A framework's description over DeepSpeed's, where that was driven by it."""
        return training if self.engine is None else merge(training, self.engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """What a listing shows: whether optimizer state is there, and the last of each loss and metric."""

    resumes: bool
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """`name` is the `framework` of the Training that `read` gives. `brief` reads less; it is given no
    `engine`, and None where it is part of what `read` finds."""

    name: str
    recognise: Callable[[Saved], bool]
    read: Callable[[Saved], Training]
    brief: Callable[[Saved], Brief] | None = None
