"""What may not go because something else names it or needs it, and what an interrupted prune left.

    latest, last_checkpoint, latest_universal, last_verified    in the run, above it, or beside the folder
    symbolic links               from anywhere below, or from beside, into a checkpoint
    adapter_config.json          base_model_name_or_path: an adapter is nothing without it
    *.index.json                 shards that lie in another checkpoint
    the best, as the framework says in the checkpoints themselves

A name is enough: a path that was true on another machine still keeps the checkpoint that is called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

from msgspec import Struct

from ckpttools.containers import jsons
from ckpttools.errors import CkptError, escape
from ckpttools.frameworks import POINTERS
from ckpttools.location import Entry as StoreEntry
from ckpttools.location import Location
from ckpttools.runs import pins
from ckpttools.runs.find import Entry
from ckpttools.siblings import GONE, PIN, VERIFIED
from ckpttools.stores.files import entries, is_file, is_link, local, small_text, walk
from ckpttools.stores.links import resolved

NAMING = (*POINTERS, "latest_universal", VERIFIED)
ADAPTER, INDEX = "adapter_config.json", ".index.json"


class Around(Struct, frozen=True, kw_only=True):
    """What lies below a folder, beside its checkpoints. `links` are (link, real target); `bases` are
    (file, the path that it states); `pinned` what pins keep; `left` is half deleted."""

    links: tuple[tuple[Path, Path], ...]
    bases: tuple[tuple[Path, str], ...]
    pinned: tuple[Path, ...]
    left: tuple[Path, ...]


def around(folder: Path) -> Around:
    """Look once through all of a folder, and at the links beside it."""
    links: list[tuple[Path, Path]] = []
    bases: list[tuple[Path, str]] = []
    pinned: list[Path] = []
    left: list[Path] = []
    for place, entry in walk(folder, into=lambda name: not GONE.fullmatch(name)):
        path = local(place)
        if GONE.fullmatch(entry.name):
            left.append(path)
            continue
        links += _link(path, entry)
        if entry.name.startswith(PIN):
            pinned += pins.kept_by(path)
        if entry.name == ADAPTER and (base := _stated(path).get("base_model_name_or_path")):
            bases.append((path, str(base)))
        if entry.name.endswith(INDEX) and isinstance(shards := _stated(path).get("weight_map"), dict):
            bases += [(path, shard) for shard in set(map(str, shards.values())) if "/" in shard]
    beside = resolved(folder).parent
    with suppress(CkptError):  # links from where nobody may look
        links += [link for entry in entries(beside) for link in _link(beside / entry.name, entry)]
    return Around(links=tuple(links), bases=tuple(bases), pinned=tuple(pinned), left=tuple(left))


def _link(path: Path, entry: StoreEntry) -> Iterator[tuple[Path, Path]]:
    if is_link(entry):
        try:
            yield path, resolved(path)
        except (OSError, RuntimeError):  # a link in circles
            return


def _stated(path: Location) -> Mapping[str, object]:
    try:
        return jsons.read(path, allow_nan=True)
    except CkptError:
        return {}


def stated_best(run: Sequence[Entry]) -> dict[str, str]:
    """What the checkpoints of a run, given newest first, call the best: a path, and the metric it is by.

    The newest that says it counts, for an older one does not know the later ones; and of those that state its
    score the best one, for a run that went on in another folder has forgotten what was before.
    """
    found: dict[str, str] = {}
    said = [best for entry in run if entry.problem is None for best in entry.best]
    for metric in dict.fromkeys(best.metric for best in said):
        told = [best for best in said if best.metric == metric]
        scored = [best for best in told if best.score is not None and best.less is not None]
        scored.sort(key=lambda best: (best.score or 0.0) if best.less else -(best.score or 0.0))
        found.update((best.path, metric) for best in (told[0], *scored[:1]))
    return found


def needed(path: Path, found: Around) -> str | None:
    """Why a checkpoint may not go, None where nothing around needs it."""
    whole = resolved(path)
    for link, target in found.links:
        home = resolved(link.parent)
        inside = whole in (home, *home.parents)
        if not inside and link != path and (whole in (target, *target.parents)):
            return f"{escape(link.name)} is a link to it"
    for file, base in found.bases:
        if names(base, path) and resolved(file.parent) != whole:
            what = "adapter" if file.name == ADAPTER else "index of shards"
            return f"the {what} in {escape(file.parent.name)} needs it"
    return None


def names(stated: str, path: Location) -> bool:
    """Whether a path that a file states can mean this checkpoint, or something in it."""
    return path.name in PurePath(stated).parts


def pointers(run: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """What each pointer names that may speak of this run. Raises CkptError where one cannot be read."""
    run, folder = resolved(run), resolved(folder)
    places = [
        place for place in (run, *run.parents) if place in (folder, folder.parent) or folder in place.parents
    ]
    for place in places:
        for name in NAMING:
            if any(entry.name == name and is_file(entry) for entry in entries(place)):
                yield place / name, small_text(place / name, 4096).strip()
