"""What the readers of all containers share: param_groups, schedule states and counters by their places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from ckpttools.containers import jsons
from ckpttools.containers.edit import alike, at, place, value
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Node, as_mapping
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import CkptError
from ckpttools.frameworks.rules import CAREFUL, About, Lack
from ckpttools.location import Location
from ckpttools.schedules.lengths import Unit
from ckpttools.stores.files import is_file
from ckpttools.training import Counter, Held, OptimizerSettings, Role, SavedSchedule
from ckpttools.tree import Key, dotted, leaves

MARKER = "ckpttools_rebase"
MARKER_FILE = "ckpt-rebase.json"  # where a folder has no file that could hold the note
MOST = 10**15  # that any run counts


def integer(file: TorchFile, *keys: Key) -> int | None:
    """A whole number at a place; None where there is none. A tensor or numpy scalar of one element counts."""
    found = value(file, at(file.value, *keys))
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def finite(found: object) -> float | None:
    """A number that says something, None for anything else."""
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return float(found) if is_number and math.isfinite(found) else None  # type: ignore[arg-type]


def counter(
    file: TorchFile,
    unit: Unit,
    *keys: Key,
    role: Role = "position",
    offset: int = 0,
    repeats: int = 1,
) -> Iterator[Counter]:
    """The counter at a place, where there is one. Raises CkptError for one that cannot be."""
    found = integer(file, *keys)
    if found is None:
        return
    name = ".".join(map(str, keys))
    if found + offset < 0 or found > MOST:
        raise CkptError(
            "counter-wild",
            f"{name} is {found}",
            where=file.path,
            why="no run counts so: the checkpoint is damaged, or the key means something else",
            hint="ckpt inspect shows the counters",
        )
    at_place = (place(file, *keys),)
    yield Counter(
        name=name, value=found, unit=unit, places=at_place, role=role, offset=offset, repeats=repeats
    )


def mapping(file: TorchFile, *keys: Key) -> dict[str, object] | None:
    """A dict at a place as plain values, None where there is none."""
    found = value(file, at(file.value, *keys))
    return found if isinstance(found, dict) else None


def optimizer(file: TorchFile, name: str, *keys: Key) -> OptimizerSettings | None:
    """The settings of a torch optimizer's state_dict at a place, None where there is none."""
    nodes = at(file.value, *keys, "param_groups")
    if not isinstance(nodes, list):
        return None
    groups: list[Mapping[str, object]] = []
    for node in nodes:
        pairs = as_mapping(node)
        if pairs is None:
            return None
        groups.append({key: value(file, item) for key, item in pairs.named() if key != "params"})
    return OptimizerSettings(
        name=name,
        groups=tuple(groups),
        places=(place(file, *keys, "param_groups"),),
        counts=partial(_counts, file, *keys),
        held=partial(_held, file, *keys),
    )


def is_optimizer(node: Node) -> bool:
    """Whether it is a torch optimizer's state_dict, under whatever name."""
    return isinstance(at(node, "param_groups"), list) and at(node, "state") is not None


def is_schedule(node: Node) -> bool:
    """Whether it is the state of one of torch's schedulers."""
    pairs = as_mapping(node)
    names = pairs.names() if pairs is not None else []
    return "last_epoch" in names and not {"_last_lr", "_schedulers", "num_bad_epochs"}.isdisjoint(names)


def _held(file: TorchFile, *keys: Key) -> Held:
    groups, state = (decode(file, at(file.value, *keys, key)) for key in ("param_groups", "state"))
    listed = groups if isinstance(groups, list) else []
    found = [each.get("params") for each in listed if isinstance(each, Mapping)]
    kept = state.items() if isinstance(state, Mapping) else ()
    return Held(
        params=tuple(
            tuple(n for n in numbers if isinstance(n, str | int)) if isinstance(numbers, list) else ()
            for numbers in found
        ),
        state={
            i: {dotted(path): each for path, each in leaves(own)} if own else {}
            for i, own in kept
            if isinstance(own, Mapping)
        },
    )


def _counts(file: TorchFile, *keys: Key) -> list[int | float]:
    """The updates that the optimizer itself has counted, of a few parameters from all of the model: those of
    a part that not every batch goes through have counted less.
    """
    state = as_mapping(at(file.value, *keys, "state"))
    pairs = state.pairs if state is not None else []
    few = [as_mapping(node) for _, node in (*pairs[:: max(1, len(pairs) // 8)], *pairs[-1:])]
    numbers = [value(file, own.get("step")) for own in few if own is not None]
    return [number for number in numbers if isinstance(number, int | float)]


def schedules(
    file: TorchFile, framework: str, unit: Unit | None, *keys: Key, optimizer: int = 0
) -> Iterator[SavedSchedule]:
    """The scheduler state at a place: a dict, or a list stepped in its order. Nothing where there is none."""
    found = value(file, at(file.value, *keys))
    states = [found] if isinstance(found, dict) else found
    if not isinstance(states, list) or not states or not all(isinstance(s, dict) and s for s in states):
        return
    base = place(file, *keys)
    yield SavedSchedule(
        name=".".join(map(str, keys)) or file.path.name,
        framework=framework,
        states=tuple(states),
        places=(base,) if isinstance(found, dict) else tuple(base.below(i) for i in range(len(states))),
        unit=unit,
        optimizer=optimizer,
    )


def acts_on(state: Mapping[str, Any], optimizers: Sequence[OptimizerSettings], usual: int) -> int:
    """The optimizer that a scheduler is of, which no file says: the `usual` one, unless the rates that the
    scheduler wrote last are those of another.
    """
    last = state.get("_last_lr")
    if not isinstance(last, list) or not last:
        return usual
    alike = [i for i, each in enumerate(optimizers) if [group.get("lr") for group in each.groups] == last]
    return alike[0] if alike and usual not in alike else usual


def shared_out(
    found: SavedSchedule, optimizers: Sequence[OptimizerSettings], usual: int = 0
) -> Iterator[SavedSchedule]:
    """A list of schedulers by their optimizers. One for each is the rule; with other numbers the `usual` one
    has them all, but for those that are at the rates of another.
    """
    each = len(found.states) == len(optimizers) > 1
    of = [acts_on(state, optimizers, i if each else usual) for i, state in enumerate(found.states)]
    for one in dict.fromkeys(of):
        own = [i for i, optimizer in enumerate(of) if optimizer == one]
        yield replace(
            found,
            states=tuple(found.states[i] for i in own),
            places=tuple(found.places[i] for i in own),
            optimizer=one,
        )


def marked(file: TorchFile) -> dict[str, Any]:
    """The rebase that the file itself notes, and where it does: fields of a Training."""
    return {"marker": place(file, MARKER), "marked": mapping(file, MARKER)}


def same_groups(found: Sequence[OptimizerSettings]) -> OptimizerSettings:
    """The one optimizer whose settings every rank holds. Raises CkptError where they disagree."""
    first = found[0]
    for other in found[1:]:
        if not alike(other.groups, first.groups):
            raise CkptError(
                "ranks-disagree",
                "the ranks hold different optimizer settings",
                where=other.places[0].file,
                why="each rank resumes with its own learning rate: the parts of the model would drift apart",
                hint="ckpt verify says more; use an older checkpoint",
            )
    return replace(first, places=tuple(place for each in found for place in each.places))


def random_lacks(names: set[str], stem: str) -> Iterator[Lack]:
    """No file of random states among the names of a folder."""
    if not any(name.startswith(stem) for name in names):
        yield Lack(
            about=About.DATA,
            setting="random states",
            cls=CAREFUL,
            why="none are saved here: dropout and data order go on from fresh ones",
        )


def marked_beside(folder: Location) -> dict[str, object] | None:
    """The rebase that a folder's own file notes."""
    path = folder / MARKER_FILE
    return jsons.read(path) if is_file(path) else None


def torch_optimizer(path: Location) -> Iterator[OptimizerSettings]:
    """The settings in a file that is an optimizer's state_dict, where it is there."""
    if is_file(path):
        found = optimizer(read_torch_file(path), "the optimizer")
        if found is not None:
            yield found
