"""The forecast for a DeepSpeed folder: every rule asked, the check-list filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckpttools.resume import building, leftover, models, rates, report, rules, schedule
from ckpttools.resume.engine import Saved
from ckpttools.resume.report import CAREFUL, IMPOSSIBLE, SAFE, Check, Difference, Forecast, Refusal, worst
from ckpttools.resume.run import NewRun

KNOWN = "0.19.8"  # the DeepSpeed whose loader the rules describe


def forecast(path: Path, saved: Saved, run: NewRun) -> Forecast:
    """What DeepSpeed will do with a saved engine under the new run's settings."""
    config = saved.config if run.config is None else run.config
    new_ranks = run.world_size or saved.ranks
    stage, dtype = rules.stage_of(config, saved.stage), rules.dtype_of(config)
    if run.config is None or not saved.config:
        stage, dtype = saved.stage, saved.dtype
    compared = rules.compares_layout(saved, config, stage, dtype)
    differences: list[Difference] = []
    if run.config is not None:
        differences += rules.batch(saved, config, new_ranks)
    differences += rules.ranks(saved, new_ranks)
    differences += rules.stage_and_dtype(saved, stage, dtype)
    differences += rules.groups(saved, run.groups, compared=compared)
    differences += rules.elastic(saved, config)
    lr = rates.rates(saved, run, config)
    tensors: tuple[report.Mismatch, ...] = ()
    found, tensors = models.compare(saved, run, compared=compared)
    differences += found
    differences += building.optimizer(saved, run, config)
    differences += schedule.schedule(saved, run, config)
    over: list[report.Overridden] = []
    if run.config is not None:
        differences += rules.layout(saved, config, stage, dtype)
        differences += building.accumulation_dtype(config, stage, dtype)
        differences += rules.universal(config)
        before = rates.rates(saved, NewRun(scheduler=run.scheduler), saved.config)
        differences += schedule.constants(saved, config, before.next, lr.next)
        settings, over = leftover.overridden(saved, run, config)
        differences += settings
        differences += leftover.leftover(saved, config)
    differences += _versions(saved, run)
    if saved.stage == 0 and stage != 0:  # the optimizer in the model file is then not looked at
        differences = [_unreached(d, report.WHOLE_OPTIMIZER) for d in differences]
    epoch = saved.client.get("epoch")
    return Forecast(
        path=path,
        format=f"zero{saved.stage}" if saved.stage else "deepspeed, stage 0",
        step=saved.step,
        epoch=epoch if isinstance(epoch, int | float) else None,
        samples=_samples(saved),
        rates=lr,
        loads=tuple(_loads(saved)),
        checks=tuple(_checks(saved, run, differences)),
        differences=tuple(differences),
        tensors=tensors,
        overridden=tuple(over),
        notes=tuple(_notes(saved, run, config)),
    )


def _unreached(difference: Difference, moment: int) -> Difference:
    """Without the error of a moment that the loader does not come to."""
    met = difference.refusal is None or difference.refusal.moment != moment
    return difference if met else replace(difference, refusal=None)


def _samples(saved: Saved) -> int | None:
    seen = saved.client.get("samples_seen")
    return seen if isinstance(seen, int) else saved.samples


def _loads(saved: Saved) -> list[str]:
    out = [f"{len(saved.tensors)} tensors of the model ({saved.dtype})"]
    if saved.stage:
        out.append(
            f"fp32 master weights and optimizer state of {len(saved.trainable)} parameters, "
            f"{saved.ranks} ranks"
        )
    elif saved.whole:
        out.append("the optimizer's state, from the model file")
    if saved.scheduler is not None:
        out.append("the scheduler's state")
    out.append("counters" + (" and the client state" if saved.client else ""))
    if saved.scaled or saved.whole == "scaled":
        out.append("the loss scale")
    return out


def _checks(saved: Saved, run: NewRun, differences: list[Difference]) -> list[Check]:
    """The lines of R25 that settings decide; whether the files are whole is checked elsewhere."""

    def line(name: str, good: str, *starts: str) -> Check:
        own = [d for d in differences if d.setting.startswith(starts)]
        cls = worst(d.cls for d in own)
        if cls == SAFE:
            return Check(name=name, ok=True, text=good)
        bad = next(d for d in own if d.cls == cls)
        return Check(
            name=name, ok=False, text=f"{bad.setting}: {_shown(bad.old)} -> {_shown(bad.new)}: {bad.why}"
        )

    total = rules.triple(saved.config, saved.ranks).total
    known = f"{total} samples per update" if total else "not stated in the checkpoint"
    out = [
        line("effective batch", known, "train_batch_size"),
        line("ranks, stage and dtype", f"{saved.ranks} ranks, stage {saved.stage}, {saved.dtype}",
             "ranks", "zero_optimization", "dtype", "data_types"),
        line("schedule", "as saved" if saved.scheduler is not None else "none is saved", "scheduler"),
        line("model", "every tensor fits" if run.model else "taken as unchanged: no --model was given",
             "model", "trained"),
        line("optimizer", "as saved", "optimizer", "parameter groups", "zero_allow"),
    ]  # fmt: skip
    if run.model is None and all(c.ok for c in out if c.name == "model"):
        out = [Check(name=c.name, ok=None, text=c.text) if c.name == "model" else c for c in out]
    return out


def _shown(value: object) -> str:
    return "nothing" if value is None else str(value)


def _notes(saved: Saved, run: NewRun, config: Mapping[str, object]) -> list[str]:
    out = [f"foretold as DeepSpeed {KNOWN} loads it"]
    installed = run.versions.get("deepspeed")
    if installed is not None and installed != KNOWN:
        out[0] += f"; installed is {installed}, whose errors may read otherwise"
    if rules.dtype_of(config) == "fp16":
        out.append("in fp16 an update that overflows is skipped: the schedule then waits too")
    if run.scheduler is None and saved.scheduler is None and config.get("scheduler") is None:
        out.append("a scheduler that the code keeps outside DeepSpeed is not forecast")
    return out


def _versions(saved: Saved, run: NewRun) -> list[Difference]:
    """DeepSpeed before 0.16 lets torch 2.6 refuse the classes in its own optimizer files."""
    deepspeed, torch = _numbers(run.versions.get("deepspeed")), _numbers(run.versions.get("torch"))
    if not deepspeed or not torch or not saved.stage or deepspeed >= (0, 16) or torch < (2, 6):
        return []
    return [
        Difference(
            setting="installed DeepSpeed",
            old=saved.version,
            new=run.versions["deepspeed"],
            cls=IMPOSSIBLE,
            why="torch from 2.6 on loads weights only, and the optimizer files hold objects of DeepSpeed",
            hint="install DeepSpeed 0.16 or newer, or set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1",
            refusal=Refusal(moment=report.SHARDS, error="UnpicklingError", text="Weights only load failed"),
        )
    ]


def _numbers(version: str | None) -> tuple[int, ...]:
    parts = (version or "").split("+")[0].split(".")[:2]
    return tuple(int(p) for p in parts if p.isdigit())


__all__ = ["CAREFUL", "forecast"]
