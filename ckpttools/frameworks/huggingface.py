"""The Hugging Face Trainer: a folder of small files beside the weights.

It counts updates in trainer_state.json; its schedules are LambdaLR, whose functions are not saved: their kind
and constants are in training_args.bin. `epoch` in the log is the epoch plus the micro-batches done in it over
those of an epoch, from which that number can be found. A resume takes checkpoint-N with the largest N, and
nobody looks whether it is complete (transformers/trainer_utils.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from ckpttools.containers import jsons
from ckpttools.containers.archive import is_zip
from ckpttools.containers.archive.directory import read_directory
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError
from ckpttools.frameworks import parts
from ckpttools.frameworks.arguments import KIND, SETTINGS, configuration, read_arguments
from ckpttools.frameworks.framework import Brief, Framework, Saved, damage, shown
from ckpttools.frameworks.parts import MARKER_FILE, marked_beside, torch_optimizer
from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE, About, AutoResume, Lack, Rule
from ckpttools.location import Location
from ckpttools.numbered import by_number
from ckpttools.schedules.evidence import stated
from ckpttools.stores.files import entries, is_file, is_folder, opened
from ckpttools.training import (
    BatchField,
    Best,
    Counter,
    Place,
    SavedSchedule,
    StepList,
    Training,
    merge,
    noted_arguments,
)

STATE = "trainer_state.json"
ARGUMENTS = "training_args.bin"
OPTIMIZER = "optimizer.pt"
_SPEED = ("_runtime", "_per_second", "_preparation_time")  # of the evaluation, not of the model
MAX_ACCUMULATION = 100_000
NUMBERED = re.compile(r"checkpoint-(\d+)")
# its marks of a save that was not finished
UNFINISHED = re.compile(r"tmp-checkpoint-.*")
INCOMPLETE = "checkpoint-is-incomplete.txt"


def is_trainer(folder: Location) -> bool:
    return is_file(folder / STATE)


def read(saved: Saved) -> Training:
    """A checkpoint-N folder, with a ZeRO folder below where DeepSpeed was used."""
    folder = saved.place
    if saved.engine is None:
        return _read(folder, deepspeed=False)
    own = saved.engine
    noted = noted_arguments(own.marked, own.count)
    own = replace(own, schedules=_of_arguments(folder, own.schedules, noted))
    return merge(_read(folder, deepspeed=True), own)


def _read(folder: Location, *, deepspeed: bool) -> Training:
    """`deepspeed`: the optimizer is in a ZeRO folder below."""
    path = folder / STATE
    state = jsons.read(path, allow_nan=True)
    arguments = read_arguments(folder / ARGUMENTS)
    step, total = _whole(state.get("global_step")), _whole(state.get("max_steps"))
    marked = None if deepspeed else marked_beside(folder)
    restated = _restated(arguments, noted_arguments(marked, step))
    epochs = _epochs(_whole(state.get("num_train_epochs")), arguments)
    planned = arguments.get("max_steps")
    by_epochs = not (isinstance(planned, int) and planned > 0)
    if not arguments:  # max_steps may have been asked for, of which num_train_epochs says nothing
        by_epochs = _spans_epochs(step, total, epochs, state.get("epoch"))
    accumulation = _whole(arguments.get("gradient_accumulation_steps"))
    history = state.get("log_history")
    log = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    updates = _updates(total, epochs, accumulation, log) if by_epochs and total and epochs else None
    candidates = _batches(updates, accumulation, log)
    return Training(
        framework="hf-trainer",
        unit="update",
        epoch=_epoch(state),
        count=step,
        evidence=(
            *stated("micro", _whole(state.get("train_batch_size")), f"{STATE}'s train_batch_size"),
            *stated("accumulation", accumulation, f"{ARGUMENTS}'s gradient_accumulation_steps"),
            *stated("ranks", None if deepspeed else _ranks(folder), "the files of random states"),
        ),
        batches=candidates[0] if len(candidates) == 1 else None,
        updates=updates,
        epochs=epochs if by_epochs else None,
        total_count=total,
        lengths=(("num_train_epochs", "epochs", epochs), ("max_steps", "steps", total)),
        drop_last=arguments.get("dataloader_drop_last") is True,
        counters=tuple(_counters(path, state)),
        histories=tuple(_history(path, history)),
        losses=tuple(_losses(log)),
        best=_best(state),
        optimizers=() if deepspeed else tuple(torch_optimizer(folder / OPTIMIZER)),
        schedules=tuple(_schedule(folder / "scheduler.pt", restated, total)),
        batch_fields=tuple(_batch_field(path, state)),
        batch_names=(
            ("micro", "per_device_train_batch_size", "TrainingArguments"),
            ("accumulation", "gradient_accumulation_steps", "TrainingArguments"),
        ),
        configuration=configuration(restated),
        outside=("save_steps, eval_steps and logging_steps, where they are numbers of steps",),
        notes=() if arguments else (f"{ARGUMENTS} is not here: which schedule it was is not known",),
        # DeepSpeed's model file holds the note where there is one
        marker=None if deepspeed else Place(file=folder / MARKER_FILE, at=()),
        marked=marked,
    )


def _epochs(stated: int | None, arguments: Mapping[str, object]) -> int | float | None:
    """As they were asked for: trainer_state.json has them rounded up (1.5 epochs as 2)."""
    asked = arguments.get("num_train_epochs")
    if isinstance(asked, float) and math.isfinite(asked) and math.ceil(asked) == stated:
        return int(asked) if asked.is_integer() else asked
    return stated


def _updates(total: int, epochs: float, accumulation: int | None, log: list[dict[str, object]]) -> int | None:
    """The updates of an epoch of which ceil(epochs x updates) are `total`; None where several are."""
    if not math.isfinite(total / epochs):
        return None
    least, most = math.floor((total - 1) / epochs), math.ceil(total / epochs)
    if most - least > MAX_ACCUMULATION:
        return None
    found = [n for n in range(max(1, least), most + 1) if math.ceil(epochs * n) == total]
    if len(found) > 1:  # less than one epoch: the log may tell
        found = [n for n in found if _batches(n, accumulation, log)]
    return found[0] if len(found) == 1 else None


def _spans_epochs(step: int | None, total: int | None, epochs: float | None, epoch: object) -> bool:
    """Whether `max_steps` updates are the whole epochs: the saved epoch is that of the step, to an update."""
    if not (step and total and epochs and isinstance(epoch, int | float)):
        return False
    return abs(epoch * total / epochs - step) < 1


def _epoch(state: Mapping[str, object]) -> int | float | None:
    epoch = state.get("epoch")
    return epoch if isinstance(epoch, int | float) else None


def _whole(found: object) -> int | None:
    if isinstance(found, float) and found.is_integer() and abs(found) < 1e15:
        return int(found)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _counters(path: Location, state: Mapping[str, object]) -> Iterator[Counter]:
    for key, role in (("global_step", "position"), ("max_steps", "total")):
        found = _whole(state.get(key))
        if found is None:
            continue
        if not 0 <= found <= 10**15:
            raise CkptError("counter-wild", f"{key} is {found}", where=path, why="no run counts so")
        at = Place(file=path, at=(key,))
        yield Counter(name=key, value=found, unit="update", places=(at,), role=role)  # type: ignore[arg-type]


def _history(path: Location, history: object) -> Iterator[StepList]:
    found: list[tuple[int, Place]] = []
    for i, entry in enumerate(history if isinstance(history, list) else []):
        step = _whole(entry.get("step")) if isinstance(entry, dict) else None
        if step is not None and 0 <= step <= 10**15:
            found.append((step, Place(file=path, at=("log_history", i, "step"))))
    if found:
        steps, places = zip(*found, strict=True)
        yield StepList(name="log_history[].step", values=steps, places=places, unit="update")


def _losses(log: list[dict[str, object]]) -> Iterator[tuple[str, float]]:
    """The last of each loss that was logged."""
    for name in ("loss", "eval_loss"):
        found = [each for entry in log if isinstance(each := entry.get(name), int | float)]
        if found:
            yield name, float(found[-1])


def _batch_field(path: Location, state: Mapping[str, object]) -> Iterator[BatchField]:
    found = _whole(state.get("train_batch_size"))
    if found:
        place = Place(file=path, at=("train_batch_size",))
        yield BatchField(name="train_batch_size", which="micro", value=found, places=(place,))


def _ranks(folder: Location) -> int | None:
    """Processes, by their random states: rng_state.pth of one alone, else rng_state_N.pth of each. None where
    some are not here, as where each node saves its own.
    """
    names = [entry.name for entry in entries(folder)]
    found = {int(m[1]) for name in names if (m := re.fullmatch(r"rng_state_(\d{1,9})\.pth", name))}
    if not found:
        return 1 if "rng_state.pth" in names else None
    return len(found) if found == set(range(len(found))) else None


def _batches(updates: int | None, accumulation: int | None, log: list[dict[str, object]]) -> list[int]:
    """The micro-batches per epoch that agree with every `epoch` and `step` of the log.

    The Trainer logs epoch + done / batches; older ones rounded it, and then nothing agrees.
    """
    if not updates or not accumulation or accumulation > MAX_ACCUMULATION:
        return []
    points = [(_whole(entry.get("step")), entry.get("epoch")) for entry in log]
    known = [(s, float(e)) for s, e in points if s and isinstance(e, int | float)]
    if not known:
        return []

    def fits(batches: int) -> bool:
        for step, epoch in known[-2000:]:
            whole, rest = divmod(step - 1, updates)
            if whole + min((rest + 1) * accumulation, batches) / batches != epoch:
                return False
        return True

    return [n for n in range((updates - 1) * accumulation + 1, updates * accumulation + 1) if fits(n)]


def _schedule(path: Location, arguments: Mapping[str, object], total: int | None) -> Iterator[SavedSchedule]:
    if is_file(path):
        for found in parts.schedules(read_torch_file(path), "torch", "update"):
            yield _of_trainer(found, arguments, total)


def _of_arguments(
    folder: Location, saved: tuple[SavedSchedule, ...], noted: Mapping[str, object]
) -> tuple[SavedSchedule, ...]:
    """Schedules that DeepSpeed saved for the Trainer, with what the Trainer's arguments say of them."""
    arguments = _restated(read_arguments(folder / ARGUMENTS), noted)
    total = _whole(jsons.read(folder / STATE, allow_nan=True).get("max_steps"))
    return tuple(_of_trainer(each, arguments, total) for each in saved)


def _restated(arguments: Mapping[str, object], noted: Mapping[str, object]) -> dict[str, object]:
    """The arguments that a rebase asks the new run to have: those of the old one are still in the file."""
    found = dict(arguments)
    for name, value in noted.items():
        key, _, inner = name.partition(".")
        old = found.get(key)
        found[key] = {**(old if isinstance(old, Mapping) else {}), inner: value} if inner else value
    return found


def _of_trainer(saved: SavedSchedule, arguments: Mapping[str, object], total: int | None) -> SavedSchedule:
    """A LambdaLR of one of the Trainer's own functions, whose constants are in its arguments."""
    names = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "learning_rate")
    about = {name: arguments.get(name) for name in names}
    if about["lr_scheduler_type"] is None or not all("lr_lambdas" in state for state in saved.states):
        return saved
    return replace(saved, framework="transformers", about={**about, "max_steps": total})


def brief(saved: Saved) -> Brief:
    """From the log in trainer_state.json. Raises CkptError where the optimizer's file is no whole archive."""
    folder = saved.place
    state = jsons.read(folder / STATE, allow_nan=True)
    history = state.get("log_history")
    metrics: dict[str, float] = {}
    for entry in history if isinstance(history, list) else []:
        for name, found in entry.items() if isinstance(entry, dict) else ():
            is_metric = name == "loss" or (name.startswith("eval_") and not name.endswith(_SPEED))
            if is_metric and isinstance(found, int | float):
                metrics[str(name)] = float(found)
    own = folder / OPTIMIZER
    if not saved.zero and is_file(own):
        with opened(own) as file:
            if is_zip(file.head(4)):
                read_directory(file)
    training = Training(epoch=_epoch(state), losses=tuple(metrics.items()), best=_best(state))
    return Brief(resumes=saved.zero or is_file(own), training=training)


def takes(folder: Location) -> Iterator[AutoResume]:
    found = [e.name for e in entries(folder) if is_folder(e) and NUMBERED.fullmatch(e.name)]
    if not found:
        return
    last = max(found, key=by_number)
    inside = {e.name for e in entries(folder / last)}
    problem = ""
    if INCOMPLETE in inside:
        problem = f"{INCOMPLETE} says that the save was not finished"
    elif STATE not in inside:
        problem = f"{STATE}, which is written last, is missing: the save was not finished"
    yield AutoResume(
        framework=TITLE,
        path=folder / last,
        why=f"the largest number of {len(found)}",
        problem=problem or damage(folder / last),
        found=shown(found),
    )


def unfinished(path: Location) -> str | None:
    if UNFINISHED.fullmatch(path.name) or is_file(path / INCOMPLETE):
        return "the Trainer gives the folder its name, or takes the mark away, when all is written"
    return f"{STATE}, which the Trainer writes last, is missing" if _lacks_state(path) else None


def _lacks_state(path: Location) -> bool:
    """Whether a checkpoint-N has files of training state, and not the last one."""
    if NUMBERED.fullmatch(path.name) is None or not is_folder(path):
        return False
    names = {entry.name for entry in entries(path)}
    begun = not names.isdisjoint((OPTIMIZER, "scheduler.pt")) or any(n.startswith("rng_state") for n in names)
    return begun and STATE not in names


def _best(state: Mapping[str, object]) -> tuple[Best, ...]:
    """By metric_for_best_model, which is in the arguments alone."""
    path = state.get("best_model_checkpoint")
    return (Best(metric="metric_for_best_model", path=path),) if isinstance(path, str) else ()


def lacks(names: set[str]) -> Iterator[Lack]:
    if INCOMPLETE in names:
        yield Lack(
            about=About.STATE,
            setting=INCOMPLETE,
            cls=IMPOSSIBLE,
            why="the Trainer did not finish this save",
            hint="resume from an older checkpoint",
        )
    if "scheduler.pt" not in names:
        yield Lack(
            about=About.SCHEDULE,
            setting="scheduler.pt",
            cls=CAREFUL,
            why="it is not here: neither optimizer nor scheduler is then loaded, and nothing says so",
        )
    yield from parts.random_lacks(names, "rng_state")


TITLE = "Hugging Face Trainer"
FRAMEWORK = Framework(
    name="hf-trainer",
    title=TITLE,
    recognise=lambda saved: saved.is_folder(is_trainer),
    read=read,
    brief=brief,
    rule=Rule(
        batch="the schedule is computed anew for the new number of steps and continued at the old step: the "
        "learning rate jumps, and data is repeated or left out",
        constants="the new arguments; the base learning rate is the saved one",
        saved=False,
        strict=False,
        recounts=True,
        apart=True,
        looks_after=True,
    ),
    launch=lambda dst, n, tag: (
        f"torchrun --nproc-per-node {n} ...: trainer.train(resume_from_checkpoint={str(dst)!r})"
    ),
    config=KIND,
    settings=SETTINGS,
    takes=takes,
    wraps=lambda folder: is_trainer(folder) or _lacks_state(folder),
    unfinished=unfinished,
    stated=(STATE,),
    lacks=lacks,
    random=r"rng_state_\d+\.pth",
)
