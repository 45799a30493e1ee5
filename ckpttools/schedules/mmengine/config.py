"""The schedules as an MMEngine configuration wrote them: lengths in epochs, where it converts them itself.

A checkpoint holds the configuration as Python text (`meta.cfg`). It is parsed, never run: only literals and
calls of dict() are understood, everything else is None.

    param_scheduler = [dict(type='LinearLR', begin=0, end=1, convert_to_iter_based=True), ...]

With convert_to_iter_based and L iterations per epoch, MMEngine computes int(begin * L), int(end * L) and
T_max * L, milestone * L, step_size * L, period * L, total_steps * L. Source: build_iter_from_epoch of
mmengine/optim/scheduler/param_scheduler.py.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from ckpttools.schedules.mmengine.steps import NEVER
from ckpttools.schedules.program import State

TEXT = 5_000_000  # characters that are still parsed
# class names of the configuration without LR, Momentum or ParamScheduler
SUFFIXES = ("ParamScheduler", "Momentum", "LR")


def settings(text: object) -> dict[str, Any]:
    """The top-level assignments of a configuration's text; {} for a text that cannot be parsed."""
    if not isinstance(text, str) or len(text) > TEXT:
        return {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= dict.fromkeys(names, _value(node.value)) if names else {}
    return found


def written_schedulers(text: object) -> list[dict[str, Any]]:
    """The entries of `param_scheduler`; [] where there is none that can be understood."""
    found: Any = settings(text).get("param_scheduler")
    entries: list[Any] = found if isinstance(found, list) else [found]
    return entries if all(isinstance(e, dict) for e in entries) else []


def _value(node: ast.expr, depth: int = 0) -> Any:
    if depth > 20:
        return None
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_value(item, depth + 1) for item in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {k.value: _value(v, depth + 1) for k, v in pairs if isinstance(k, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {k.arg: _value(k.value, depth + 1) for k in node.keywords if k.arg is not None}
        case ast.UnaryOp(op=ast.USub()):
            inner = _value(node.operand, depth + 1)
            return -inner if type(inner) in (int, float) else None
    return None


def kind_named(entry: Mapping[str, Any]) -> str:
    """`CosineAnnealing` for CosineAnnealingLR, CosineAnnealingMomentum and mmengine.optim's full names."""
    name = str(entry.get("type", "")).rpartition(".")[2]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def converted(entry: Mapping[str, Any], epoch: int) -> dict[str, Any] | None:
    """The lengths that MMEngine makes of an entry at `epoch` iterations per epoch; else None."""
    if entry.get("convert_to_iter_based") is not True or entry.get("by_epoch", True) is not True:
        return None
    out: dict[str, Any] = {}
    try:
        out["begin"] = int(entry.get("begin", 0) * epoch)
        end = entry.get("end")
        if end is not None:
            out["end"] = end if end == NEVER else int(end * epoch)
        for key in ("T_max", "step_size", "total_steps"):
            if entry.get(key) is not None:
                out[key] = entry[key] * epoch
        for key in ("milestones", "periods"):
            if entry.get(key) is not None:
                out[key] = [x * epoch for x in entry[key]]
    except (TypeError, ValueError, OverflowError):
        return None
    return out


def agrees(lengths: Mapping[str, Any], state: State) -> bool:
    """Whether the lengths of the configuration are those of the saved state."""
    for key, value in lengths.items():
        if key == "milestones":
            counted: dict[Any, int] = {}
            for stone in value:
                counted[stone] = counted.get(stone, 0) + 1
            if state.get("milestones") != counted:
                return False
        elif state.get(key) != value:
            return False
    return True


def matching(
    entries: Sequence[dict[str, Any]], states: Sequence[State], kinds: Sequence[str], epoch: int
) -> list[Any]:
    """For each state its entry, where the configuration's lengths at `epoch` are its own; else None."""
    if len(entries) != len(states):
        return [None for _ in states]
    out: list[Any] = []
    for entry, state, kind in zip(entries, states, kinds, strict=True):
        lengths = converted(entry, epoch)
        fits = lengths is not None and kind_named(entry) == kind and agrees(lengths, state)
        out.append(entry if fits else None)
    return out
