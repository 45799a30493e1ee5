"""The batch of a run out of everything that speaks of it: settings, counters, the number of ranks.

    total = micro x ranks x accumulation

A `Fact` is what one source says. Settings decide, a framework's own before DeepSpeed's, then what counters
prove, then arithmetic. All the rest is held against what was decided, and a contradiction is said. What
nothing decides is None: it is not 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from msgspec import Struct, field

from ckpttools.schedules.lengths import Unit

What = Literal["micro", "accumulation", "ranks", "total"]
PARTS: tuple[What, ...] = ("micro", "ranks", "accumulation")
NAMES = {
    "micro": "the batch per rank",
    "accumulation": "the accumulation",
    "ranks": "the number of ranks",
    "total": "the effective batch",
}


class Fact(Struct, frozen=True):
    """`source` says that `what` is `least` to `most`. Counters, which hold the past, overrule no setting."""

    what: What
    least: int
    most: int
    source: str
    counted: bool = False

    @property
    def value(self) -> int | None:
        return self.least if self.least == self.most else None

    def __str__(self) -> str:
        shown = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{self.source} says {shown}"


def stated(what: What, value: int | None, source: str) -> Iterator[Fact]:
    """A setting, where it is one."""
    if value is not None and value > 0:
        yield Fact(what, value, value, source)


def of_counters(iterations: int, updates: int) -> Iterator[Fact]:
    """What the numbers of micro-batches and of updates say, where accumulations run over ends of epochs."""
    if 0 < updates <= iterations:
        source = f"the count of {iterations} micro-batches and {updates} updates"
        least = iterations // (updates + 1) + 1
        yield Fact("accumulation", least, iterations // updates, source, counted=True)


def of_samples(samples: int | None, updates: int | None) -> Iterator[Fact]:
    """What DeepSpeed's own count of samples says: it grows by the effective batch with each update."""
    if samples and updates and samples % updates == 0:
        each = samples // updates
        yield Fact("total", each, each, f"the count of {samples} samples in {updates} updates", counted=True)


def of_deepspeed(settings: Mapping[str, int], ranks: int) -> tuple[Fact, ...]:
    """A ds_config's batch ("global", "micro", "accumulation"), completed as DeepSpeed does.

    Source: DeepSpeedConfig._set_batch_related_parameters. Where one of the first two stands alone, DeepSpeed
    takes an accumulation of 1.
    """
    total, micro, accumulation = (settings.get(key) for key in ("global", "micro", "accumulation"))
    found = [Fact("ranks", ranks, ranks, "the optimizer files")]
    found += stated("micro", micro, "ds_config.train_micro_batch_size_per_gpu")
    found += stated("accumulation", accumulation, "ds_config.gradient_accumulation_steps")
    found += stated("total", total, "ds_config.train_batch_size")
    if accumulation is None and (total is None) != (micro is None):
        found += stated("accumulation", 1, "ds_config, where DeepSpeed takes 1 for none")
    return tuple(found)


class Known(Struct, frozen=True, kw_only=True):
    """A batch as far as it is known; `by` names what decided each part, `notes` what contradicts it."""

    micro: int | None = None
    accumulation: int | None = None
    ranks: int | None = None
    total: int | None = None
    by: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """Samples that all ranks together see in one micro-batch."""
        return None if self.micro is None or self.ranks is None else self.micro * self.ranks

    def __str__(self) -> str:
        total, micro, ranks, steps = (
            "?" if n is None else n for n in (self.total, self.micro, self.ranks, self.accumulation)
        )
        return f"{total} = {micro} x {ranks} rank{'' if ranks == 1 else 's'} x {steps} accumulated"


def known(facts: Sequence[Fact]) -> Known:
    """The batch that `facts` make. Where settings contradict each other in the product, total is None."""
    found: dict[str, int] = {}
    by: dict[str, str] = {}
    for counted in (False, True):
        for fact in facts:
            if fact.counted == counted and fact.value is not None and fact.what not in found:
                found[fact.what], by[fact.what] = fact.value, fact.source
    _complete(found, by)
    notes = [
        f"{NAMES[fact.what]} is taken as {found[fact.what]}, from {by[fact.what]}; {fact}"
        for fact in facts
        if fact.what in found and not fact.least <= found[fact.what] <= fact.most
    ]
    whole = [found[part] for part in PARTS if part in found]
    if len(whole) == 3 and (product := whole[0] * whole[1] * whole[2]) != found["total"]:
        notes.append(
            f"{whole[0]} per rank x {whole[1]} ranks x {whole[2]} accumulated make {product}, not "
            f"{found['total']} as {by['total']} says: which of them holds is not known"
        )
        del found["total"], by["total"]
    return Known(**found, by=by, notes=tuple(dict.fromkeys(notes)))


def _complete(found: dict[str, int], by: dict[str, str]) -> None:
    """The fourth number out of three, where it is whole."""
    missing = [what for what in (*PARTS, "total") if what not in found]
    if len(missing) != 1:
        return
    (what,) = missing
    if what == "total":
        found[what] = found["micro"] * found["ranks"] * found["accumulation"]
    else:
        one, two = (found[part] for part in PARTS if part != what)
        value, rest = divmod(found["total"], one * two)
        if rest or not value:
            return
        found[what] = value
    by[what] = "the other three"


# --- another number of ranks --------------------------------------------------------------------------


class Kept(Struct, frozen=True, kw_only=True):
    """Settings that keep an effective batch on other ranks (None where none do), and what to say."""

    micro: int | None = None
    accumulation: int | None = None
    notes: tuple[str, ...] = ()


def kept(batch: Known, ranks: int, unit: Unit = "update", count: int | None = None) -> Kept:
    """How the effective batch stays on another number of ranks, or what changes where it cannot.

    `unit` is what the framework's own counter counts. Where it counts micro-batches per rank, samples per
    micro-batch over all ranks are kept as well, if they can be: then `count` keeps its meaning.
    """
    if batch.ranks == ranks:
        return Kept()
    total, micro, step = batch.total, batch.micro, batch.step
    if total is None or micro is None:
        return Kept(notes=(_unknown(batch, ranks), *batch.notes))
    if total % ranks:
        near = sorted({total - total % ranks, total + ranks - total % ranks} - {0})
        return Kept(
            notes=(
                f"the global batch of {total} does not divide by {ranks} ranks: choose one that does "
                f"({' or '.join(map(str, near))}) in the new run's configuration, and move the counters with "
                f"ckpt rebase-schedule DST --old-gpus {batch.ranks} --new-gpus {ranks} --new-bs N; "
                "ds_config is left as saved",
            )
        )
    per_rank = total // ranks
    if unit == "micro" and step is not None and step % ranks == 0:
        new_micro = step // ranks
    else:  # the largest micro batch that was known to fit
        new_micro = next(m for m in range(min(micro, per_rank), 0, -1) if per_rank % m == 0)
    new_steps = per_rank // new_micro
    pairs = (
        ("batch per rank", micro, new_micro),
        ("accumulation", batch.accumulation, new_steps),
    )
    said = ", ".join(f"{name} {'?' if a is None else a} -> {b}" for name, a, b in pairs if a != b)
    notes = [f"the global batch stays {total}: {said}; set the same in the new run's configuration"]
    if unit == "micro" and step is not None and new_micro * ranks != step:
        seen = "" if count is None else f" (iteration {count} was {count * step} samples, and would be "
        seen += "" if count is None else f"{count * new_micro * ranks})"
        notes.append(
            f"iterations count batches of {step} samples, and {new_micro * ranks} on {ranks} ranks{seen}: "
            f"move the counters and the schedule with ckpt rebase-schedule DST --old-gpus {batch.ranks} "
            f"--old-bs {micro} --old-accum {batch.accumulation} --new-gpus {ranks} --new-bs {new_micro} "
            f"--new-accum {new_steps} --batch-is per-gpu"
        )
    return Kept(micro=new_micro, accumulation=new_steps, notes=tuple(notes))


def _unknown(batch: Known, ranks: int) -> str:
    return (
        f"the effective batch is not known ({batch}): the same settings on {ranks} instead of "
        f"{batch.ranks or '?'} ranks change it; keep batch per rank x ranks x accumulation, or move the "
        f"counters with ckpt rebase-schedule DST --old-gpus {batch.ranks or 'N'} --new-gpus {ranks} "
        "--old-bs BATCH --new-bs BATCH"
    )
