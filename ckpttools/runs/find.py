"""Every checkpoint below a folder.

Experiments lie in folders of folders: work_dirs/EXPERIMENT/TIMESTAMP/, lightning_logs/version_N/checkpoints/,
output/GROUP/CONFIG/TAG/ckpt/. The folder that directly holds checkpoints is a run: only checkpoints of one
run are compared by their counters. DeepSpeed's save folder with several tags is a run; with one it is a
checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

from msgspec import Struct, field

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import dangers_of
from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import ERROR, raised
from ckpttools.formats import FORMATS, Folder, Source, locate, read
from ckpttools.formats.files import beside_of, dangerous
from ckpttools.formats.locate import checkpoints, holds_one
from ckpttools.formats.tags import is_tag
from ckpttools.location import Location, below
from ckpttools.runs.alike import Kinds
from ckpttools.runs.cores import each
from ckpttools.runs.order import newest_first
from ckpttools.siblings import is_ours
from ckpttools.stores.files import entries, is_file, is_folder, is_link, stat
from ckpttools.stores.links import within
from ckpttools.stores.once import anew, once
from ckpttools.training import Best, Training

MAX_DEPTH = 8
COUNTERS = ("iteration", "step", "epoch")
CLOSED = ("no-permission", "upload-unfinished")  # what may be whole, and is not for us to read now
NUMBERED = re.compile(r"checkpoint-\d+")


class Entry(Struct, frozen=True, kw_only=True, eq=False):
    """A checkpoint of a run, as far as its headers say.

    `resumes` is whether it holds optimizer state, None where that is not known. `time` is that of its newest
    file, in ns, and `nbytes` the size of all of them. `ranks` is None where the format does not say.
    `metrics` are the last of each loss, `best` what its framework calls the best so far. `model` is the same
    for checkpoints of one model: a digest of the names and shapes of its weights, None where they do not look
    like a model's. A `problem` is why it cannot be read or resumed from, or is not finished: its counters may
    then be unknown.
    """

    path: Location
    run: Location
    format: str | None
    state: Training
    resumes: bool | None
    time: int
    nbytes: int = 0
    ranks: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: tuple[Best, ...] = ()
    model: int | None = None
    problem: CkptError | None = None

    def count(self, counter: str) -> int | float | None:
        """One of COUNTERS."""
        values = {"iteration": self.state.iteration, "step": self.state.step, "epoch": self.state.epoch}
        return values[counter]

    @property
    def damaged(self) -> bool:
        """As far as was looked."""
        return self.problem is not None and self.problem.exit_code == 1

    @property
    def at(self) -> str:
        """Where training stood, in words: "step 200"; "" where it does not say."""
        known = next((name for name in ("step", "iteration", "epoch") if self.count(name) is not None), None)
        return f"{known} {self.count(known)}" if known else ""


def find(folder: Location) -> tuple[Entry, ...]:
    """Every checkpoint below a folder, newest first, run by run; ckpt's own copies are left out.

    Raises UsageError where the folder itself cannot be listed.
    """
    return tuple(entry for run in runs(folder) for entry in run)


def paths(folder: Location) -> tuple[Location, ...]:
    """Where the checkpoints below a folder are, in no order, none of them read.

    Raises UsageError where the folder itself cannot be listed.
    """
    entries(folder)  # raises where it cannot be listed
    with within(folder):
        if _whole(folder) and not _several(folder):
            return (folder,)
        return tuple(path for _, found in _runs(folder, MAX_DEPTH) for path in found)


def holds_others(folder: Location) -> bool:
    """Whether a folder that is a checkpoint is also a run: the Trainer's final model beside checkpoint-N/."""
    with within(folder):
        return _whole(folder) and _several(folder)


def own(folder: Location) -> list[Entry]:
    """The same of the run whose checkpoints lie in the folder itself; of those below none."""
    return next(iter(runs(folder, depth=0)), [])


def runs(folder: Location, depth: int = MAX_DEPTH) -> list[list[Entry]]:
    """The same by run: the newest run first, by its number where they are named alike, else by time.

    `depth` is how many folders below are looked into. Raises UsageError of CLOSED where there are some and
    none of them can be looked into.
    """
    with once(), within(folder):
        entries(folder)  # raises where it cannot be listed
        if _whole(folder) and not _several(folder):
            alone = _entry(folder, folder, Kinds(()))
            if alone.problem is not None and alone.problem.id in CLOSED:
                raise alone.problem
            return [[alone]]
        places = list(_runs(folder, depth))
        every = [(path, run) for run, paths in places for path in paths]
        entered = iter(each(partial(_at, Kinds(every)), every))
        found = [ordered([next(entered) for _ in paths]) for _, paths in places]
    closed = [entry.problem for run in found for entry in run]
    if closed and closed[0] and all(problem and problem.id in CLOSED for problem in closed):
        raise closed[0]
    keyed = {run[0].run: run for run in found}
    names = {run: below(run, folder) if run != folder else "" for run in keyed}
    order = newest_first(
        list(keyed),
        count=lambda run: None,
        name=lambda run: names[run],
        time=lambda run: max(entry.time for entry in keyed[run]),
    )
    return [keyed[run] for run in order]


def grouped(folder: Location) -> list[list[Entry]]:
    """The same, with DeepSpeed's save folder of one tag as the run that it is: it has no other checkpoint."""
    out: list[list[Entry]] = []
    for run in runs(folder):
        alone = [entry for entry in run if _is_run(entry.path)]
        rest = [entry for entry in run if entry not in alone]
        out += [*([rest] if rest else []), *([entry] for entry in alone)]
    return out


def _is_run(path: Location) -> bool:
    try:
        return is_folder(path) and any(e.name == "latest" for e in entries(path)) and not _whole(path)
    except CkptError:
        return False


def ordered(found: list[Entry]) -> list[Entry]:
    """The checkpoints of one run, newest first."""
    counter = common(found)
    return newest_first(
        found, count=partial(_key, counter), name=lambda entry: entry.path.name, time=lambda entry: entry.time
    )


def common(found: list[Entry]) -> str | None:
    """The counter by which the checkpoints of a run can be compared: all that could be resumed state it."""
    told = [entry for entry in found if entry.problem is None]
    told = [entry for entry in told if entry.resumes is not False] or told
    return next((c for c in COUNTERS if told and all(entry.count(c) is not None for entry in told)), None)


def _key(counter: str | None, entry: Entry) -> tuple[float, ...] | None:
    value = entry.count(counter) if counter is not None else None
    return None if value is None else (value, entry.resumes is not False)


def _runs(folder: Location, depth: int) -> Iterator[tuple[Location, list[Location]]]:
    """The folders below that directly hold checkpoints, each with their paths."""
    try:
        listed = entries(folder)
        direct = [p for p in checkpoints(folder) if not _several(p) and not _is_part(p)]
    except CkptError:
        if depth == MAX_DEPTH:
            raise
        return
    deeper: list[Location] = []
    for entry in listed:
        path = folder / entry.name
        inside = is_folder(entry) and not is_link(entry) and not entry.name.startswith(".")
        if not inside or is_ours(entry.name):
            continue
        try:
            if not holds_one(path) or _several(path):
                (direct if _lost(path) else deeper).append(path)
        except CkptError:
            direct.append(path)  # it cannot be listed: whether it is a checkpoint is not known
    if direct:
        yield folder, direct
    for path in deeper if depth else ():
        yield from _runs(path, depth - 1)


def _lost(path: Location) -> bool:
    """Whether a framework's files are in a folder, and the weights that they were saved with are not."""
    if frameworks.unfinished(path):
        return True
    if not frameworks.wraps(path) or checkpoints(path):
        return False
    folder = Folder.of(path)
    return any(format.lacking(folder) is not None for format in FORMATS)


def _whole(path: Location) -> bool:
    """Whether the folder is one checkpoint, or what is left of one: DeepSpeed's save folder is not, unless a
    framework's files are in it (the Trainer's, accelerate's), or it is Lightning's."""
    names = {entry.name for entry in entries(path)}
    if "latest" not in names or is_tag(path):
        return holds_one(path) or frameworks.unfinished(path) is not None
    return frameworks.wraps(path)


def _is_part(path: Location) -> bool:
    return any(format.is_part(path.name) for format in FORMATS)


def _several(path: Location) -> bool:
    """Whether a folder is DeepSpeed's save folder with more than one tag in it, or the Trainer's output
    folder: the model that `save_model` left there at the end, beside checkpoint-N/."""
    if not is_folder(path):
        return False
    if _whole(path):
        folder = Folder.of(path)
        model = any(format.holds(folder) for format in FORMATS if not format.tagged)
        return model and any(map(NUMBERED.fullmatch, folder.folders))
    return sum(is_folder(e) and is_tag(path / e.name) for e in entries(path)) > 1


def _at(kinds: Kinds, place: tuple[Location, Location]) -> Entry:
    return _entry(*place, kinds)


def _entry(path: Location, run: Location, kinds: Kinds) -> Entry:
    time, nbytes = extent(path)
    make = partial(Entry, path=path, run=run, time=time, nbytes=nbytes)
    files: frameworks.Files | None = None
    try:
        if is_folder(path):
            entries(path)  # raises where it may not be listed
        if why := frameworks.unfinished(path):
            raise CkptError(
                "save-unfinished",
                "the save was not finished",
                where=path,
                why=why,
                hint="use an older checkpoint",
            )
        if (other := kinds.other((path, run))) is not None:
            source, checkpoint, files = other
        else:
            source = locate(path)
            checkpoint = read(source)
            kinds.learn((path, run), source, checkpoint)
    except CkptError as error:
        damage = _unless_written(path, (time, nbytes), _in_parts(path, error))
        return make(format=None, state=Training(), resumes=None, problem=damage)
    resumes: bool | None
    problem = _would_run(source, checkpoint)
    layout, state = checkpoint.layout, checkpoint.training
    try:
        brief = frameworks.brief(source, checkpoint, files)
        resumes, state = brief.resumes, brief.training
    except Unsupported as reason:
        resumes = False if reason.id == "weights-only" and not source.format.weights_alone else None
    except CkptError as error:
        resumes = None
        if problem is None and error.exit_code == 1:
            problem = _unless_written(path, (time, nbytes), error)
    losses = (("train_loss", state.train_loss), ("val_loss", state.val_loss), *state.losses)
    return make(
        format=layout.format,
        state=state,
        resumes=resumes,
        ranks=layout.ranks,
        metrics={name: value for name, value in losses if value is not None},
        best=state.best,
        model=_model(checkpoint),
        problem=problem,
    )


def _would_run(source: Source, checkpoint: Checkpoint) -> CkptError | None:
    """Nobody should go on from a file that runs something when it is loaded. `checkpoint` may be one whose
    files are called as those of this one are, and say the same.
    """
    found = [(file.path, what) for file in checkpoint.files for what in file.dangers or ()]
    if not found:
        judged = {file.path.name for file in checkpoint.files if file.dangers is not None}
        others = (path for path in beside_of(source) if path.name not in judged)
        found = [(path, what) for path in others for what in dangers_of(path)]
    return raised(dangerous(found[0][0], "", found[0][1])) if found else None


def _in_parts(path: Location, reason: CkptError) -> CkptError:
    """Why a checkpoint is not read: what its files show by themselves, where its layout is not read."""
    if not isinstance(reason, Unsupported):
        return reason
    from ckpttools.checks import verify

    try:
        bad = [f for f in verify(path, quick=True).findings if f.severity == ERROR]
    except CkptError:
        return reason
    # what only could not be read, for want of a permission, is no damage
    return raised(min(bad, key=lambda finding: finding.exit_code)) if bad else reason


def _unless_written(path: Location, before: tuple[int, int], problem: CkptError) -> CkptError:
    """The problem, unless a save is going on, which is no damage. `before` is its extent before it was
    read.
    """
    if problem.exit_code != 1:
        return problem
    from ckpttools.checks.changing import changing, in_a_moment

    def look() -> Location | None:
        with anew():
            return path if extent(path) != before else None

    return changing(path) if look() or in_a_moment(look, path, before[0]) else problem


def _model(checkpoint: Checkpoint) -> int | None:
    """A torch file of tensors may be anything, predictions for instance."""
    found = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    if not any(name.rpartition(".")[2] in ("weight", "bias") for name in found):
        return None
    return hash(frozenset(found.items()))


def extent(path: Location) -> tuple[int, int]:
    """When its newest file was written, in ns, and the bytes of all: a folder's own time also changes with
    what is put beside."""
    try:
        if not is_folder(path):
            found = stat(path)
            return found.mtime_ns, found.size
        time = nbytes = deeper = 0
        for entry in entries(path):
            if is_ours(entry.name):
                continue
            if is_file(entry):
                found = stat(path / entry.name)
                time, nbytes = max(time, found.mtime_ns), nbytes + found.size
            elif is_folder(entry) and not is_link(entry):
                below, more = extent(path / entry.name)
                deeper, nbytes = max(deeper, below), nbytes + more
        return time or deeper or stat(path).mtime_ns, nbytes
    except (OSError, CkptError):
        return 0, 0
