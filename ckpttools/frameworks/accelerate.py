"""accelerate's save_state: a folder of small files beside the weights.

It steps a scheduler once per process and update, unless the loader splits its batches. It saves no counter of
its own. A resume takes the entry of checkpoints/ with the largest number in its name (accelerator.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from ckpttools.containers.torch_file import is_torch_file, read_torch_file
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved, damage, inner, shown
from ckpttools.frameworks.parts import MARKER_FILE, marked_beside, torch_optimizer
from ckpttools.frameworks.rules import AutoResume, Rule
from ckpttools.location import Location
from ckpttools.numbered import by_number
from ckpttools.schedules.evidence import stated
from ckpttools.stores.files import entries, is_file, is_folder
from ckpttools.training import Counter, Place, SavedSchedule, Training

ASSUMED = (
    "the scheduler is taken to have been stepped once per process and update, as accelerate does unless the "
    "loader splits its batches"
)
RANDOM = re.compile(r"random_states_\d+\.pkl")
# of each prepared model, optimizer, scheduler and registered object, in the order of preparing
SEVERAL = (
    re.compile(r"(?:pytorch_)?model(?:_(\d{1,4}))?\.(?:safetensors|bin)(?:\.index\.json)?"),
    re.compile(r"optimizer(?:_(\d{1,4}))?\.bin"),
    re.compile(r"scheduler(?:_(\d{1,4}))?\.bin"),
    re.compile(r"custom_checkpoint_(\d{1,4})\.pkl"),
)
STATE = re.compile(r"checkpoint_(\d+)")


def is_accelerate(folder: Location) -> bool:
    return any(RANDOM.fullmatch(entry.name) for entry in entries(folder))


def read(saved: Saved) -> Training:
    """The folder, with a ZeRO folder below where DeepSpeed was used."""
    if saved.engine is None:
        return saved.over(_read(saved.place))
    skipped = sum(c.value for c in saved.engine.counters if c.role == "skipped")
    return saved.over(_read(saved.place, updates=saved.engine.count, skipped=skipped))


def _read(folder: Location, *, updates: int | None = None, skipped: int = 0) -> Training:
    """accelerate's save_state. `updates` are those that DeepSpeed counted, None where it was not used, of
    which `skipped` overflowed and did not step the scheduler.
    """
    names = [entry.name for entry in entries(folder) if is_file(entry)]
    ranks = sum(RANDOM.fullmatch(name) is not None for name in names)
    files = [] if updates is not None else _numbered(folder, names, "optimizer")
    optimizers = [each for path in files for each in torch_optimizer(path)]
    marked = None if updates is not None else marked_beside(folder)
    own = optimizers[0].steps if optimizers else None
    made = updates if updates is not None else _since(own, marked)
    known = made is not None
    saved: list[SavedSchedule] = []
    for i, path in enumerate(_numbered(folder, names, "scheduler")):
        for found in parts.schedules(read_torch_file(path), "torch", "update"):
            usual = min(i, max(0, len(optimizers) - 1))
            found = replace(found, optimizer=parts.acts_on(found.states[0], optimizers, usual))
            steps = found.states[0].get("last_epoch")
            repeats = _repeats(steps, made, skipped, ranks) if marked is None else _noted(marked, i)
            if repeats is None:  # stepped otherwise: by epoch, say, which nothing here counts
                saved.append(replace(found, unit=None))
                continue
            follows = known and (marked is None or _noted_unit(marked, i) == "update")
            saved.append(replace(found, unit="update" if follows else None, repeats=repeats))
    return Training(
        framework="accelerate",
        unit="update",
        count=made,
        evidence=tuple(stated("ranks", None if updates is not None else ranks, "the files of random states")),
        counters=tuple(_accumulated(folder, names)),
        optimizers=tuple(optimizers),
        schedules=tuple(saved),
        batch_names=(
            ("micro", "the data loader's batch_size", "your training code"),
            ("accumulation", "gradient_accumulation_steps", "Accelerator"),
        ),
        outside=("your own counters of steps and epochs",),
        notes=() if known or ranks < 2 or not saved else (ASSUMED,),
        marker=None if updates is not None else Place(file=folder / MARKER_FILE, at=()),
        marked=marked,
    )


def _accumulated(folder: Location, names: list[str]) -> Iterator[Counter]:
    """The micro-batches of the running epoch, by which every process tells when to make an update."""
    for name in names:
        if RANDOM.fullmatch(name) and is_torch_file(folder / name):
            yield from parts.counter(read_torch_file(folder / name), "micro", "step", role="inside")


def _repeats(steps: object, updates: int | None, skipped: int, ranks: int) -> int | None:
    """How often the scheduler was stepped for each update: once per process, or just once; None for neither.

    Where no optimizer counted its updates, it is accelerate's default: once per process. Whether it was
    stepped for each update at all is not known then.
    """
    if updates is None or not isinstance(steps, int):
        return 1 if not isinstance(steps, int) or steps % ranks else ranks
    each = (n for n in (ranks, 1) if (updates - skipped) * n <= steps <= updates * n)
    return next(each, None)


def _since(own: int | None, marked: Mapping[str, object] | None) -> int | None:
    """The updates of the run, from those that its optimizer counted itself: no rebase moves these."""
    if marked is None:
        return own
    # without `counted`: a note of the first rebase, and nothing was trained since
    position, then = marked.get("count"), marked.get("counted", marked.get("old_count"))
    if own is None or type(position) is not int or type(then) is not int:
        return None
    if "counted" not in marked and then != own:
        return None
    return position + own - then if 0 <= then <= own and 0 <= position <= parts.MOST else None


def _noted(marked: Mapping[str, object], i: int) -> int:
    """How often the scheduler is stepped for each update, as a rebase noted it."""
    found = marked.get("schedule_repeats")
    noted = found[i] if isinstance(found, list) and i < len(found) else 1
    return noted if isinstance(noted, int) and 1 <= noted <= 1 << 20 else 1


def _noted_unit(marked: Mapping[str, object], i: int) -> object:
    """What the schedule follows, as a rebase noted it."""
    found = marked.get("schedule_units")
    return found[i] if isinstance(found, list) and i < len(found) else None


def _numbered(folder: Location, names: list[str], stem: str) -> list[Location]:
    """stem.bin, stem_1.bin ... in the order of their numbers."""
    pattern = re.compile(rf"{stem}(?:_(\d{{1,4}}))?\.(?:bin|pt)")
    found = [(int(match[1] or 0), folder / match[0]) for name in names if (match := pattern.fullmatch(name))]
    return [path for _, path in sorted(found)]


def unfinished(path: Location) -> str | None:
    """One of several is gone: each kind is numbered without gaps, the first without a number."""
    names = {entry.name for entry in entries(path)} if is_folder(path) else set()
    if not any(name.startswith(("optimizer", "random_states")) for name in names):
        return None
    for pattern in SEVERAL:
        kept = {int(match[1] or 0): match[0] for name in names if (match := pattern.fullmatch(name))}
        gone = max(kept, default=-1) + 1 - len(kept)
        if gone:
            return f"{kept[max(kept)]} is here, and of those numbered before it {gone} not"
    return None


def takes(folder: Location) -> Iterator[AutoResume]:
    place = inner(folder, "checkpoints")
    found = [e.name for e in entries(place) if is_folder(e) and STATE.fullmatch(e.name)]
    if found:
        last = place / max(found, key=by_number)
        yield AutoResume(
            framework="accelerate",
            path=last,
            why=f"the largest number of {len(found)}; it counts saves, not steps",
            problem=damage(last),
            found=shown(found),
        )


FRAMEWORK = Framework(
    name="accelerate",
    title="accelerate",
    recognise=lambda saved: saved.is_folder(is_accelerate),
    read=read,
    rule=Rule(
        batch="the scheduler's counter goes on as it is; it counts per process, so another number of "
        "processes with the same batch each needs no change",
        constants="as the scheduler's class has it",
    ),
    launch=lambda dst, n, tag: (
        f"accelerate launch --num_processes {n} ...: accelerator.load_state({str(dst)!r})"
    ),
    takes=takes,
    wraps=is_accelerate,
    unfinished=unfinished,
    lacks=lambda names: parts.random_lacks(names, "random_states"),
    random=RANDOM.pattern,
)
