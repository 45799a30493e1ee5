"""Reading the checkpoints of a run by what they have in common, as far as a listing asks.

A thousand saves of one run are a thousand times the same names and shapes. Of each kind of save (by names
without their numbers) one is read whole; another one whose files are the same but for numbers that nothing
depends on (containers/torch_file/alike.py) has its layout, ranks and model, and only what it says is read
anew. Whatever differs in any other way, or is damaged, is read whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import TorchFile
from ckpttools.containers.torch_file.alike import Alike
from ckpttools.errors import CkptError
from ckpttools.formats import Folder, Source, locate
from ckpttools.formats.counters import EPOCH, SAMPLES, STEP
from ckpttools.location import Location, below
from ckpttools.numbered import shape
from ckpttools.stores.files import is_folder

# whole numbers that count, in what frameworks save: nothing else in a file depends on them
COUNTS = {
    *STEP, *EPOCH, *SAMPLES, "skipped_steps", "global_samples", "micro_steps", "last_epoch", "_step_count",
    "last_batch_iteration", "num_updates", "cur_iter", "last_overflow_iter",
}  # fmt: skip
MANY = 8  # saves of a kind from which on the first is looked at closely
TRIES = 4  # times that a kind is learnt anew: a number that needs more bytes makes another pickle


class Known(Struct, frozen=True):
    """A checkpoint that was read whole, with what its files have in common with others."""

    path: Location
    source: Source
    checkpoint: Checkpoint
    names: tuple[str, ...] | None  # in its folder
    main: Alike
    shards: tuple[Alike, ...]

    def other(self, path: Location) -> tuple[Source, Checkpoint, Files] | None:
        """Where another checkpoint is, what it has from this one, its counters, and its torch files."""
        source = locate(path)
        if source.format is not self.source.format or (source.target, source.root) != (path, path):
            return None
        if _names(path) != self.names:
            return None
        main, shards = self._read(self.main, path), [self._read(shard, path) for shard in self.shards]
        if main is None or source.format.state is None:
            return None
        files = tuple(shard for shard in shards if shard is not None)
        if len(files) != len(shards):
            return None
        state = source.format.state(main)
        return source, replace(self.checkpoint, path=path, training=state), (main, files)

    def _read(self, file: Alike, path: Location) -> TorchFile | None:
        at = file.file.path
        return file.read(path if at == self.path else path / below(at, self.path))


Files = tuple[TorchFile, tuple[TorchFile, ...]]


class Kinds:
    """What is known of each kind of save below a folder."""

    def __init__(self, places: Sequence[tuple[Location, Location]]) -> None:
        self.counts = Counter(map(_kind, places))
        self.known: dict[Hashable, Known] = {}
        self.tries: Counter[Hashable] = Counter()

    def other(self, place: tuple[Location, Location]) -> tuple[Source, Checkpoint, Files] | None:
        """The same of a checkpoint that is like one that was learnt, None where it is not."""
        known = self.known.get(_kind(place))
        found = known.other(place[0]) if known is not None else None
        if found is not None:
            self.tries[_kind(place)] = 0
        return found

    def learn(self, place: tuple[Location, Location], source: Source, checkpoint: Checkpoint) -> None:
        """Keep what a checkpoint that was read whole has in common with others, where that can help."""
        kind = _kind(place)
        if self.counts[kind] < MANY or self.tries[kind] >= TRIES:
            return
        self.tries[kind] += 1
        try:
            known = _learnt(place[0], source, checkpoint)
        except CkptError:
            return
        if known is not None:
            self.known[kind] = known


def _kind(place: tuple[Location, Location]) -> Hashable:
    path, run = place
    return run, shape(path.name)


def _learnt(path: Location, source: Source, checkpoint: Checkpoint) -> Known | None:
    if source.format.state is None or (source.target, source.root) != (path, path):
        return None
    main, shards = source.format.torch_files(checkpoint)
    if main is None or source.format.state(main) != checkpoint.training:
        return None
    first = Alike.of(main, COUNTS)
    others = [Alike.of(file, COUNTS) for file in shards]
    rest = tuple(each for each in others if each is not None)
    if first is None or len(rest) != len(others):
        return None
    return Known(path, source, checkpoint, _names(path), first, rest)


def _names(path: Location) -> tuple[str, ...] | None:
    return tuple(sorted(Folder.of(path).names)) if is_folder(path) else None
