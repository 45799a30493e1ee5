"""Lightning: `global_step` counts updates, the fit loop's batch_progress counts micro-batches.

`lr_schedulers` holds one state per scheduler; whether it is stepped per batch or per epoch is not saved.
The same keys lie at the top of a single file and of a DeepSpeed folder's model file, whose `lr_schedulers`
are the ones that Lightning restores (strategies/deepspeed.py). Source: loops/*, trainer/connectors.
ckpt_path="last" takes last*.ckpt, the newest by modification time (checkpoint_connector.py).

Each ModelCheckpoint keeps its state under `callbacks`: `monitor`, `best_model_path`, `best_model_score` and
`best_k_models` {path: score}; its mode is in the key alone (callbacks/model_checkpoint.py). Metrics in names
(`val_loss=0.12`) are rounded there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from msgspec.structs import replace

from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.torch_file import TorchFile
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved, damage, inner, shown
from ckpttools.frameworks.rules import AutoResume, Rule
from ckpttools.location import Location
from ckpttools.schedules.evidence import Fact
from ckpttools.schedules.lengths import Unit
from ckpttools.stores.files import entries, stat
from ckpttools.training import Best, Counter, OptimizerSettings, Role, SavedSchedule, Training

VERSION = "pytorch-lightning_version"
FIT = ("loops", "fit_loop")
BATCHES = (*FIT, "epoch_loop.batch_progress")
OPTIMIZER = (*FIT, "epoch_loop.automatic_optimization.optim_progress", "optimizer")
MANUAL = (*FIT, "epoch_loop.manual_optimization.optim_step_progress")
STEPPED = (*FIT, "epoch_loop.scheduler_progress")
SPANS: dict[str, Role] = {"total": "position", "current": "inside"}
MAX_ACCUMULATION = 100_000
MODE = re.compile(r"'mode': '(min|max)'")
VALUE = re.compile(r"([A-Za-z_][\w.]*)=(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
LAST = re.compile(r"last(-(\d+))?.*\.ckpt")
PROGRESS = ("ready", "started", "processed", "completed")


def is_lightning(saved: Saved) -> bool:
    file = saved.file
    if file is None:
        return False
    return isinstance(at(file.value, VERSION), str) and parts.mapping(file, "loops") is not None


def read(saved: Saved) -> Training:
    """A single file, or the model file of a DeepSpeed folder."""
    assert saved.file is not None
    best = tuple(_best(saved.file))
    own = _read(saved.file)
    return saved.over(replace(own, best=best, losses=tuple(_scores(saved.file, saved.place.name).items())))


def _read(file: TorchFile) -> Training:
    """The loops' counters, schedules, and (in a single file) the optimizers."""
    step = parts.integer(file, "global_step")
    total = parts.integer(file, *BATCHES, "total", "ready")
    inside = parts.integer(file, *BATCHES, "current", "ready")
    epoch = parts.integer(file, *FIT, "epoch_progress", "current", "completed")
    optimizers = tuple(_optimizers(file))
    # global_step adds the updates of all optimizers up; each of them made its share, if it does not say more
    updates = step // max(1, len(optimizers)) if step is not None else None
    rebased = parts.mapping(file, parts.MARKER) is not None  # which leaves an optimizer's own count alone
    if updates and len(optimizers) > 1 and not rebased:
        updates = optimizers[0].steps or updates
    batches = None
    if inside and at(file.value, *BATCHES, "is_last_batch") is True:
        batches = inside
    elif epoch and total is not None and inside is not None and (total - inside) % epoch == 0:
        batches = (total - inside) // epoch
    return Training(
        framework="lightning",
        unit="update",
        count=updates,
        epochs_done=epoch,
        evidence=tuple(_accumulation(total, inside, epoch, batches, updates)),
        batches=batches or None,
        counters=tuple(_counters(file, max(1, len(optimizers)), updates)),
        optimizers=optimizers,
        schedules=tuple(_schedules(file, optimizers)),
        batch_names=(
            ("micro", "the data loader's batch_size", "your training code"),
            ("accumulation", "accumulate_grad_batches", "the Trainer"),
        ),
        configuration=parts.mapping(file, "hyper_parameters") or {},
        outside=("max_steps, val_check_interval and log intervals of the Trainer, where they count steps",),
        **parts.marked(file),
    )


def _accumulation(
    total: int | None, inside: int | None, epoch: int | None, batches: int | None, updates: int | None
) -> Iterator[Fact]:
    """The accumulations under which so many micro-batches make so many updates; epochs end with one."""
    if not total or not updates or inside is None or epoch is None or updates > total:
        return
    if total != inside and not batches:
        return

    def made(steps: int) -> int:
        whole = -(-batches // steps) if batches else 0
        epochs, rest = divmod(total, batches) if batches else (0, total)
        return epochs * whole + rest // steps

    # fewer updates with every step more
    fits = [steps for steps in range(1, min(total, MAX_ACCUMULATION) + 1) if made(steps) == updates]
    if fits:
        source = f"the count of {total} micro-batches and {updates} updates"
        yield Fact("accumulation", fits[0], fits[-1], source, counted=True)


def _monitors(file: TorchFile) -> Iterator[tuple[str, str, Mapping[str, object]]]:
    """The states of ModelCheckpoints that look at a metric: its name, the callback's key, the state."""
    for key, state in (parts.mapping(file, "callbacks") or {}).items():
        if isinstance(state, dict) and "best_model_path" in state and isinstance(state.get("monitor"), str):
            yield state["monitor"], str(key), state


def _best(file: TorchFile) -> Iterator[Best]:
    for metric, key, state in _monitors(file):
        mode = MODE.search(key)
        if isinstance(path := state["best_model_path"], str) and path:
            yield Best(
                metric=metric,
                path=path,
                score=parts.finite(state.get("best_model_score")),
                less=mode[1] == "min" if mode is not None else None,
            )


def _scores(file: TorchFile, name: str) -> dict[str, float]:
    """What is known of the checkpoint of this name itself, by the names of the metrics. `current_score` is
    not: it is of the last checkpoint that the callback saved."""
    found = {key: float(text) for key, text in VALUE.findall(name) if key not in ("epoch", "step")}
    for metric, _, state in _monitors(file):
        scores = {str(state["best_model_path"]): state.get("best_model_score")}
        known = state.get("best_k_models")
        for path, score in {**scores, **(known if isinstance(known, dict) else {})}.items():
            if PurePath(str(path)).name == name and (value := parts.finite(score)) is not None:
                found[metric] = value
    return found


def _counters(file: TorchFile, optimizers: int, updates: int | None) -> Iterator[Counter]:
    yield from parts.counter(file, "update", "global_step", repeats=optimizers)
    yield from parts.counter(file, "update", *FIT, "epoch_loop.state_dict", "_batches_that_stepped")
    trees: tuple[tuple[Unit, tuple[str, ...]], ...] = (
        ("micro", BATCHES),
        ("update", STEPPED),
        ("update", (*OPTIMIZER, "step")),
        ("update", MANUAL),
        ("update", (*OPTIMIZER, "zero_grad")),
    )
    for unit, keys in trees:
        if keys == STEPPED and parts.integer(file, *keys, "total", "ready") != updates:
            continue  # schedules that are stepped per epoch, or every few updates
        repeats = optimizers if keys == MANUAL else 1
        for which, role in SPANS.items():
            ready = parts.integer(file, *keys, which, "ready")
            for key in PROGRESS:
                own = parts.integer(file, *keys, which, key)
                # saved from a callback, `completed` is one behind, and Lightning looks at that on a restart
                behind = ready - own if ready is not None and own is not None and ready - own == 1 else 0
                yield from parts.counter(
                    file, unit, *keys, which, key, role=role, offset=behind, repeats=repeats
                )


def _optimizers(file: TorchFile) -> Iterator[OptimizerSettings]:
    states = at(file.value, "optimizer_states")
    for i in range(len(states) if isinstance(states, list) else 0):
        found = parts.optimizer(file, f"optimizer {i}", "optimizer_states", i)
        if found is not None:
            yield found


def _schedules(file: TorchFile, optimizers: Sequence[OptimizerSettings]) -> Iterator[SavedSchedule]:
    for found in parts.schedules(file, "torch", None, "lr_schedulers"):
        yield from parts.shared_out(found, optimizers)


def keys(root: fields.Mapping) -> Iterator[str]:
    """dump_checkpoint writes optimizer_states, lr_schedulers and callbacks all or none."""
    names = set(root.names())
    if VERSION in names:
        needed = {"epoch", "global_step", "state_dict"}
        if {"optimizer_states", "lr_schedulers"} & names:
            needed |= {"optimizer_states", "lr_schedulers", "callbacks"}
        yield from sorted(needed - names)


def takes(folder: Location) -> Iterator[AutoResume]:
    place = inner(folder, "checkpoints")
    files = [e for e in entries(place) if e.name.endswith(".ckpt")]
    if not files:
        return
    last = sorted((e for e in files if LAST.fullmatch(e.name)), key=lambda e: stat(place / e.name).mtime_ns)
    if not last:
        yield AutoResume(
            framework="Lightning",
            path=None,
            why='ckpt_path="last" finds no last*.ckpt',
            problem="the run would start anew: name the file itself",
            found=shown([e.name for e in files]),
        )
        return
    path = place / last[-1].name
    yield AutoResume(
        framework="Lightning",
        path=path,
        why=f"the newest of {len(last)} last*.ckpt by modification time",
        problem=damage(path),
        found=shown([e.name for e in files]),
    )


FRAMEWORK = Framework(
    name="lightning",
    title="Lightning",
    recognise=is_lightning,
    read=read,
    rule=Rule(
        batch="the saved schedule goes on in old steps: it ends too early or too late",
        constants="the checkpoint",
        prefix=False,
        needs_optimizer=True,
    ),
    launch=lambda dst, n, tag: f"Trainer(devices={n}).fit(model, ckpt_path={str(dst)!r})",
    keys=keys,
    takes=takes,
    wraps=lambda folder: folder.suffix == ".ckpt",
)
