"""What a framework is to us: everything that is particular to it, as one value.

A field that is left out says that the framework has no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats import locate, read
from ckpttools.frameworks.rules import AutoResume, Lack, Rule, Setting
from ckpttools.location import Location
from ckpttools.numbered import by_number
from ckpttools.stores.files import entries, is_folder
from ckpttools.training import Training, merge

SHOWN = 12


class Saved(Struct, frozen=True, kw_only=True):
    """A checkpoint as it was found. `place` is the file or folder that a framework's own files lie in.

    `file` is a single torch file, or the model file of a ZeRO folder (rank 0's); `zero` says which, and
    `engine` what DeepSpeed itself says in it. Without a file the Checkpoint holds the `values`.
    """

    place: Location
    file: TorchFile | None = None
    zero: bool = False
    engine: Training | None = None
    values: Checkpoint | None = None

    def is_folder(self, of: Callable[[Location], bool]) -> bool:
        """Whether the place is a folder that has a framework's files beside the weights."""
        return is_folder(self.place) and of(self.place)

    def over(self, training: Training) -> Training:
        """A framework's description over DeepSpeed's, where that was driven by it."""
        return training if self.engine is None else merge(training, self.engine)


class Brief(Struct, frozen=True, kw_only=True):
    """What a listing shows: whether optimizer state is there, counters, the last of each loss, the best."""

    resumes: bool
    training: Training


class Framework(Struct, frozen=True, kw_only=True):
    """`name` is the `framework` of the Training that `read` gives; `title` is for people. `brief` reads less;
    it is given no `engine`, and None where it is part of what `read` finds.

    `rule` is what it does with a resumed run, `settings` what other values of its configuration do,
    which is of the kind `config`. `keys`
    are those that its writer always saves and a file's top level lacks. `takes` is its own automatic resume
    in a folder, by the `pointers` that it leaves there. `wraps` tells a folder of its own around
    DeepSpeed's; `unfinished` why a save is not whole. `stated` are its JSON files
    with counters, `lacks` the side files that a resume misses, given the names that are there, `random` the
    files of random states, one for each rank. `launch` is the line that goes on from a path on a number of
    ranks; the path may be one of DeepSpeed's tag folders itself.
    """

    name: str
    title: str
    recognise: Callable[[Saved], bool]
    read: Callable[[Saved], Training]
    rule: Rule
    launch: Callable[[Location, object, bool], str]
    brief: Callable[[Saved], Brief] | None = None
    config: str = ""
    settings: tuple[Setting, ...] = ()
    keys: Callable[[fields.Mapping], Iterator[str]] = lambda root: iter(())
    takes: Callable[[Location], Iterator[AutoResume]] = lambda folder: iter(())
    pointers: tuple[str, ...] = ()
    wraps: Callable[[Location], bool] = lambda folder: False
    unfinished: Callable[[Location], str | None] = lambda path: None
    stated: tuple[str, ...] = ()
    lacks: Callable[[set[str]], Iterator[Lack]] = lambda names: iter(())
    random: str | None = None


# --- what the rules of automatic resume share ---------------------------------------------------------


def inner(folder: Location, name: str) -> Location:
    """The folder of that name within, where there is one, else the folder itself."""
    found = any(entry.name == name and is_folder(entry) for entry in entries(folder))
    return folder / name if found else folder


def shown(names: list[str]) -> tuple[str, ...]:
    """The last ones by number."""
    return tuple(sorted(names, key=by_number)[-SHOWN:])


def damage(path: Location) -> str:
    """What the headers of a checkpoint show to be wrong with it."""
    try:
        read(locate(path))
    except Unsupported:
        return ""  # whole, for all that is known, and read by its framework
    except CkptError as error:
        return f"{error.message} [{error.id}]"
    return ""
