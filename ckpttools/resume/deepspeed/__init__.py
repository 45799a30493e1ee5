"""The forecast for a folder that DeepSpeed's engine saved.

saved        what the folder holds, as the loader looks at it
case         the facts that the loader compares: then and now
rows         the form of the tables
build_table  what is refused while the engine is built; load_table: what happens while loading
optimizers   what a class reads of another's state; schedulers: the constructors and states
settings     every other setting of a ds_config
rates        the learning rates of the first two updates
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.errors import counted
from ckpttools.frameworks.rules import IMPOSSIBLE, About
from ckpttools.location import Location
from ckpttools.resume.deepspeed import build_table as build
from ckpttools.resume.deepspeed import load_table as load
from ckpttools.resume.deepspeed import optimizers, schedulers, settings
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.deepspeed.rates import rates
from ckpttools.resume.deepspeed.rows import ask
from ckpttools.resume.deepspeed.saved import Saved, is_engine, read_saved
from ckpttools.resume.fit import module
from ckpttools.resume.forecast import Check, Difference, Forecast, Moment, check
from ckpttools.resume.new_run import NewRun

__all__ = ["KNOWN", "OUTSIDE", "Saved", "forecast", "is_engine", "read_saved"]
OUTSIDE = "a scheduler that the code keeps outside DeepSpeed is not forecast"
KNOWN = "0.19.8"  # the DeepSpeed whose loader the tables describe
FIRST = (build.BATCH, load.RANKS, load.STAGE, load.DTYPE, load.GROUPS, load.ELASTIC)
THEN = (
    load.LEFT_OUT, load.TRAINED, build.OPTIMIZER_NAME, build.OPTIMIZER_SETTING, build.UNTESTED_OPTIMIZER,
    build.SCHEDULER, load.SCHEDULE_STATE, load.ROUND_ROBIN, load.ALIGNMENT, build.ACCUMULATION,
    build.UNIVERSAL, load.VERSIONS,
)  # fmt: skip


def forecast(path: Location, saved: Saved, run: NewRun) -> Forecast:
    """What DeepSpeed will do with a saved engine under the new run's settings."""
    case = Case(saved=saved, run=run)
    lr = rates(case)
    over = tuple(settings.overridden(case)) if case.configured else ()
    differences = [*ask(case, FIRST)]
    if case.fit is not None:
        differences += module(case.fit, strict=run.strict, empty=saved.stage == 3)
    differences += [*ask(case, THEN), *_other_optimizer(case)]
    if case.configured:
        before = rates(Case(saved=saved, run=NewRun(scheduler=run.scheduler)))
        differences += schedulers.constants(saved, case.config, before.next, lr.next)
        differences += [*settings.without_effect(over), *settings.others(case)]
    if saved.stage == 0 and case.stage != 0:  # the optimizer in the model file is then not looked at
        differences = [_without(d, Moment.WHOLE_OPTIMIZER) for d in differences]
    epoch, seen = saved.client.get("epoch"), saved.client.get("samples_seen")
    return Forecast(
        path=path,
        format=f"zero{saved.stage}" if saved.stage else "deepspeed, stage 0",
        step=saved.step,
        epoch=epoch if isinstance(epoch, int | float) else None,
        samples=seen if isinstance(seen, int) else saved.samples,
        rates=lr,
        loads=tuple(_loads(saved)),
        checks=tuple(_checks(case, differences)),
        differences=tuple(differences),
        tensors=case.fit.mismatches if case.fit is not None else (),
        overridden=over,
        notes=tuple(_notes(case)),
    )


def _without(difference: Difference, moment: Moment) -> Difference:
    """Without the error of a moment that the loader does not come to."""
    met = difference.refusal is None or difference.refusal.moment is not moment
    return difference if met else replace(difference, refusal=None)


def _other_optimizer(case: Case) -> Iterator[Difference]:
    """What becomes of the optimizer's state under another class."""
    saved, old, new = case.saved, case.old_optimizer, case.optimizer
    if old is None or new is None or new == old or not saved.hyper:
        return
    outcome = optimizers.changed(old, new, saved.hyper[0], saved.state[0])
    refusal = outcome.refusal
    if refusal is not None and saved.stage == 0 and refusal.moment < Moment.UPDATE:
        refusal = replace(refusal, moment=Moment.WHOLE_OPTIMIZER)
    yield Difference(
        about=About.OPTIMIZER,
        setting="optimizer.type",
        old=old,
        new=new,
        cls=outcome.cls,
        why=outcome.why,
        hint=f"go on with {old}" if outcome.cls == IMPOSSIBLE else "",
        refusal=refusal,
    )


def _loads(saved: Saved) -> Iterator[str]:
    yield f"{counted(len(saved.tensors), 'tensor')} of the model ({saved.dtype})"
    if saved.stage:
        yield (
            f"fp32 master weights and optimizer state of {len(saved.trainable)} parameters, "
            f"{saved.ranks} rank{'s' * (saved.ranks > 1)}"
        )
    elif saved.whole:
        yield "the optimizer's state, from the model file"
    if saved.scheduler is not None:
        yield "the scheduler's state"
    yield "counters" + (" and the client state" if saved.client else "")
    if saved.scaled or saved.whole == "scaled":
        yield "the loss scale"


def _checks(case: Case, differences: list[Difference]) -> Iterator[Check]:
    """The lines of R25 that settings decide; whether the files are whole is checked elsewhere."""
    saved, total = case.saved, case.was.total
    stated = f"{total} samples per update" if total is not None else "the checkpoint does not state it"
    yield check(About.BATCH, stated, differences, known=total is not None)
    ranks = f"{saved.ranks} rank{'s' * (saved.ranks > 1)}"
    yield check(About.ENGINE, f"{ranks}, stage {saved.stage}, {saved.dtype}", differences)
    kept = saved.scheduler is not None
    yield check(About.SCHEDULE, "as saved" if kept else "none is saved", differences, known=kept)
    given = case.run.model is not None
    model = "every tensor fits" if given else "taken as unchanged: no --model was given"
    yield check(About.MODEL, model, differences, known=given)
    yield check(About.OPTIMIZER, "as saved" if saved.hyper else "?", differences, known=bool(saved.hyper))


def _notes(case: Case) -> Iterator[str]:
    installed = case.run.versions.get("deepspeed")
    other = installed is not None and installed != KNOWN
    yield f"foretold as DeepSpeed {KNOWN} loads it" + (
        f"; installed is {installed}, whose errors may read otherwise" if other else ""
    )
    if case.dtype == "fp16":
        yield "in fp16 an update that overflows is skipped: the schedule then waits too"
    if case.scheduler is None and case.saved.scheduler is None:
        yield OUTSIDE
