"""The new model's tensors against the saved ones, as load_state_dict and ZeRO's loader compare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpttools.resume import report
from ckpttools.resume.engine import Saved
from ckpttools.resume.report import CAREFUL, IMPOSSIBLE, Difference, Mismatch, Refusal
from ckpttools.resume.rules import ALIGNMENT
from ckpttools.resume.run import NewRun
from ckpttools.resume.shapes import Model, Tensor, matches

PARTITION = Refusal(moment=report.OPTIMIZER_STATE, error="RuntimeError", text="The size of tensor a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How two sets of tensors differ; `aliases` are tied names of the new model."""

    missing: tuple[str, ...]  # in the checkpoint
    unexpected: tuple[str, ...]  # in the checkpoint, and not in the model
    reshaped: tuple[str, ...]
    mismatches: tuple[Mismatch, ...]


def fit(saved: dict[str, Tensor], shared: dict[str, str], model: Model) -> Fit:
    """Names, shapes and dtypes. A tied name that a file stores once is no difference."""
    wanted = dict(model.tensors)
    for alias, owner in shared.items():  # safetensors leaves out what is tied
        if alias not in wanted and owner in wanted:
            wanted[alias] = wanted[owner]
        if owner not in wanted and alias in wanted:
            wanted[owner] = wanted[alias]
    if model.ties and "lm_head.weight" in saved and "lm_head.weight" not in wanted:
        wanted["lm_head.weight"] = saved["lm_head.weight"]
    missing = tuple(name for name in wanted if name not in saved)
    unexpected = tuple(name for name in saved if name not in wanted)
    both = [name for name in wanted if name in saved]
    reshaped = tuple(name for name in both if wanted[name].shape != saved[name].shape)
    found = [
        *(_mismatch(n, "missing", "", str(wanted[n])) for n in missing),
        *(_mismatch(n, "unexpected", str(saved[n]), "") for n in unexpected),
        *(_mismatch(n, "shape", str(saved[n]), str(wanted[n])) for n in reshaped),
    ]
    if model.dtypes_known:
        found += [
            _mismatch(n, "dtype", str(saved[n]), str(wanted[n]))
            for n in both
            if n not in reshaped and wanted[n].dtype != saved[n].dtype
        ]
    return Fit(missing=missing, unexpected=unexpected, reshaped=reshaped, mismatches=tuple(found))


def _mismatch(name: str, problem: str, saved: str, wanted: str) -> Mismatch:
    return Mismatch(name=name, problem=problem, saved=saved, wanted=wanted)


def compare(saved: Saved, run: NewRun, *, compared: bool) -> tuple[list[Difference], tuple[Mismatch, ...]]:
    """What a changed model, or another choice of what is trained, does to a DeepSpeed load.

    `compared`: see `rules.compares_layout`.
    """
    if run.model is None:
        return list(_trained(saved, run, list(saved.tensors), dict(saved.shared), compared=compared)), ()
    found = fit(dict(saved.tensors), dict(saved.shared), run.model)
    differences = list(module(found, strict=run.strict, empty=saved.stage == 3))
    shared = dict(run.model.shared)
    names = list(run.model.tensors)
    for alias, owner in saved.shared.items():
        if alias not in run.model.tensors or owner not in run.model.tensors:
            shared[alias] = owner
            names += [n for n in (alias, owner) if n not in names]
    if run.model.ties and "lm_head.weight" in saved.tensors and "lm_head.weight" not in names:
        names.append("lm_head.weight")
        shared.setdefault("lm_head.weight", "model.embed_tokens.weight")
    refused = any(d.refusal is not None for d in differences)
    if not refused or saved.stage == 3:
        differences += _trained(saved, run, names, shared, compared=compared)
    return differences, found.mismatches


def module(found: Fit, *, strict: bool, empty: bool = False) -> Iterator[Difference]:
    """torch's load_state_dict. Under ZeRO-3 its tensors are `empty`: shapes meet in the partitions."""
    reshaped = found.reshaped
    if empty and reshaped:
        yield _shapes(found, PARTITION)
        reshaped = ()
    text = []
    if strict and found.missing:
        text.append(f"Missing key(s) in state_dict: {_quoted(found.missing)}.")
    if strict and found.unexpected:
        text.append(f"Unexpected key(s) in state_dict: {_quoted(found.unexpected)}.")
    if reshaped:
        text.append(f"size mismatch for {reshaped[0]}")
    refusal = (
        Refusal(
            moment=report.MODULE,
            error="RuntimeError",
            text="Error(s) in loading state_dict: " + " ".join(text),
        )
        if text
        else None
    )
    if reshaped:
        yield _shapes(found, refusal)
    for names, what in (
        (found.missing, "not in the checkpoint"),
        (found.unexpected, "only in the checkpoint"),
    ):
        if names:
            yield Difference(
                setting=f"model: tensors {what}",
                old=None,
                new=f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}",
                cls=IMPOSSIBLE if strict else CAREFUL,
                why="load_state_dict compares names strictly"
                if strict
                else "it is loaded without them"
                if names is found.unexpected
                else "they keep the values that the new model was made with; if they are trained, "
                "and not frozen, "
                "ZeRO finds another layout and refuses (say --freeze for those that are not)",
                hint="build the model that was saved, or start from its weights with strict=False"
                if strict
                else "",
                refusal=refusal if strict else None,
            )


def _shapes(found: Fit, refusal: Refusal | None) -> Difference:
    first = next(m for m in found.mismatches if m.problem == "shape")
    return Difference(
        setting="model: shapes",
        old=f"{first.name} {first.saved}",
        new=f"{first.wanted}" + (f" and {len(found.reshaped) - 1} more" if len(found.reshaped) > 1 else ""),
        cls=IMPOSSIBLE,
        why="tensors of another shape cannot be loaded",
        hint="build the model that was saved",
        refusal=refusal,
    )


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _trained(
    saved: Saved, run: NewRun, names: list[str], shared: dict[str, str], *, compared: bool
) -> Iterator[Difference]:
    """Another set of trainable parameters: ZeRO's flat groups are cut by it, or torch's counts differ."""
    frozen = [
        name
        for name in names
        if (matches(name, run.freeze) if run.freeze is not None else name in saved.frozen)
        and name not in shared
    ]
    if run.freeze is None:  # nobody said whether what is new is trained: see `module`
        names = [name for name in names if name in saved.tensors or run.strict]
    buffers = {name for name in names if name in saved.buffers or matches(name, run.buffers)}
    now = [name for name in names if name not in shared and name not in buffers and name not in frozen]
    before = saved.trainable
    if saved.stage == 0 and saved.hyper:
        yield from _counted(saved, run, now)
        return
    if not before or set(now) == set(before):
        return
    frozen = [name for name in frozen if name not in buffers]
    lost = [name for name in frozen if saved.fragments is not None and name not in saved.fragments]
    if lost:
        yield _other(
            before,
            now,
            "DeepSpeed looks for the frozen parameter among those that were frozen when it saved",
            Refusal(moment=report.FROZEN, error="KeyError", text=f"'{lost[0]}'"),
        )
    elif len(now) != len(before):
        refusal: Refusal | None
        if saved.stage == 3:
            refusal = PARTITION
        else:
            refusal = ALIGNMENT if compared else PARTITION if saved.variant == "bf16_optimizer" else None
        why = "the optimizer's state is laid out for the parameters that were trained"
        if refusal is None:
            why += ": it loads without an error, and the values land in other parameters"
        yield _other(before, now, why, refusal)
    elif _shapes_of(run, saved, now) == [s for group in saved.groups for s in group.values()]:
        yield Difference(
            setting="trained parameters",
            old=", ".join(n for n in before if n not in now)[:200],
            new=", ".join(n for n in now if n not in before)[:200],
            cls=CAREFUL,
            why="their master weights and moments are loaded by place, not by name: the first "
            "forward pass is made "
            "with fresh values, and after the first update they are the saved ones",
        )
    else:
        yield _other(before, now, "the values would land in other parameters, without an error", None)


def _counted(saved: Saved, run: NewRun, now: list[str]) -> Iterator[Difference]:
    """Without ZeRO nothing names the trained parameters; torch compares their number."""
    held = sum(saved.counts)
    if len(now) == held or (run.model is None and run.freeze is None):
        return
    yield Difference(
        setting="trained parameters",
        old=held,
        new=len(now),
        cls=IMPOSSIBLE,
        why="the optimizer's state is saved for each parameter that was trained",
        hint="train the parameters that were trained",
        refusal=Refusal(
            moment=report.WHOLE_OPTIMIZER,
            error="ValueError",
            text="loaded state dict contains a parameter group that doesn't match the size of "
            "optimizer's group",
        ),
    )


def _shapes_of(run: NewRun, saved: Saved, names: list[str]) -> list[tuple[int, ...]]:
    tensors = run.model.tensors if run.model is not None else saved.tensors
    return [tensors[name].shape for name in names if name in tensors]


def _other(before: list[str], now: list[str], why: str, refusal: Refusal | None) -> Difference:
    return Difference(
        setting="trained parameters",
        old=f"{len(before)}",
        new=f"{len(now)}: " + ", ".join(sorted(set(now) ^ set(before))[:4]) + " differ",
        cls=IMPOSSIBLE,
        why=why,
        hint="train the parameters that were trained",
        refusal=refusal,
    )
