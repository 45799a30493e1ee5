"""The new model's tensors against the saved ones, as load_state_dict and ZeRO's loader compare them."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from ckpttools.errors import some
from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE, About
from ckpttools.resume.forecast import Difference, Mismatch, Moment, Problem, Refusal
from ckpttools.resume.model import Model, Tensor


class Fit(Struct, frozen=True, kw_only=True):
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


def _mismatch(name: str, problem: Problem, saved: str, wanted: str) -> Mismatch:
    return Mismatch(name=name, problem=problem, saved=saved, wanted=wanted)


def module(found: Fit, *, strict: bool, empty: bool = False) -> Iterator[Difference]:
    """torch's load_state_dict. Under ZeRO-3 its tensors are `empty`: shapes meet in the partitions."""
    reshaped = found.reshaped
    if empty and reshaped:
        sizes = "The size of tensor a"  # stage3.py copies partition by partition
        yield _shapes(found, Refusal(moment=Moment.OPTIMIZER_STATE, error="RuntimeError", text=sizes))
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
            moment=Moment.MODULE,
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
                about=About.MODEL,
                setting=f"model: tensors {what}",
                old=None,
                new=f"{len(names)}: {some(names, 4)}",
                cls=IMPOSSIBLE if strict else CAREFUL,
                why="load_state_dict compares names strictly"
                if strict
                else "it is loaded without them"
                if names is found.unexpected
                else "they keep the values that the new model was made with; if they are trained, and not "
                "frozen, ZeRO finds another layout and refuses (say --freeze for those that are not)",
                hint="build the model that was saved, or start from its weights with strict=False"
                if strict
                else "",
                refusal=refusal if strict else None,
            )


def _shapes(found: Fit, refusal: Refusal | None) -> Difference:
    first = next(m for m in found.mismatches if m.problem == "shape")
    return Difference(
        about=About.MODEL,
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
