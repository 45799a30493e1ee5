"""A forecast against what DeepSpeed did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume.combos import Combo
from resume.net import Net

from ckpttools.resume import Forecast, NewRun, Target, foretell
from ckpttools.resume.model import Model, Tensor

# of the first two losses, relative: another order of the same sums rounds otherwise
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3, "fp16": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Every way in which a forecast was wrong; empty: it agrees."""

    combo: Combo
    forecast: Forecast
    wrong: tuple[str, ...]


def run_of(combo: Combo, folder: Path) -> NewRun:
    """What a user would tell `resume-check` about the new run."""
    run, model = combo.run, None
    if run["model"] != combo.base.run["model"]:
        net = Net(**run["model"])
        state = net.state_dict(keep_vars=True)
        owners: dict[int, str] = {}
        shared = {}
        for name, value in state.items():
            owner = owners.setdefault(id(value), name)
            if owner != name:
                shared[name] = owner
        dtype = "bf16" if "bf16" in run["config"] else "fp16" if "fp16" in run["config"] else "fp32"
        tensors = {name: Tensor(shape=tuple(value.shape), dtype=dtype) for name, value in state.items()}
        model = Model(tensors=tensors, shared=shared)
    frozen = run["model"].get("frozen", [])
    client, was = run.get("client_scheduler"), combo.base.run["client_scheduler"]
    if client is None and was is not None and "scheduler" not in run["config"]:
        client = "none"  # no file says that the code passes none any more
    elif client == was and "scheduler" not in run["config"]:
        client = None
    return NewRun(
        config=run["config"],
        world_size=combo.ranks,
        model=model,
        scheduler=client,
        groups=run["groups"],
        freeze=tuple(f"{prefix}*" for prefix in frozen),
        buffers=("scale",),
        strict=run["strict"],
    )


def foretold(combo: Combo, checkpoint: Path) -> Forecast:
    return foretell(Target.find(checkpoint), run_of(combo, checkpoint))


def compare(
    combo: Combo, forecast: Forecast, real: Mapping[str, Any], unchanged: Mapping[str, Any]
) -> Verdict:
    return Verdict(combo=combo, forecast=forecast, wrong=tuple(_wrong(combo, forecast, real, unchanged)))


def _wrong(
    combo: Combo, forecast: Forecast, real: Mapping[str, Any], unchanged: Mapping[str, Any]
) -> list[str]:
    refusal, out = forecast.refusal, []
    if real.get("error"):
        if forecast.resumes:
            out.append(f"said to resume, but {real['error']}: {real['text'][:90]}")
        elif refusal is None:
            out.append(f"no error foretold, but {real['error']}: {real['text'][:90]}")
        elif refusal.error != real["error"]:
            out.append(f"{refusal.error} foretold, {real['error']}: {real['text'][:90]}")
        elif refusal.text and _core(refusal.text) not in _core(real["text"]):
            out.append(f"text foretold: {refusal.text[:90]}, real: {real['text'][:120]}")
        return out
    if refusal is not None:
        return [f"{refusal.error} foretold, but it loads"]
    if forecast.step != real["step"]:
        out.append(f"step {forecast.step}, real {real['step']}")
    first, following = real["lr"][0], real["lr"][1]
    if not _close(forecast.rates.first, first):
        out.append(f"first lr {forecast.rates.first}, real {first}")
    if forecast.rates.next is not None and not _close(forecast.rates.next, following):
        out.append(f"next lr {forecast.rates.next}, real {following}")
    dtype = "bf16" if "bf16" in combo.run["config"] else "fp16" if "fp16" in combo.run["config"] else "fp32"
    same = all(
        abs(a - b) <= TOLERANCE[dtype] * abs(b)
        for a, b in zip(real["losses"][:2], unchanged["losses"][:2], strict=True)
    )
    if forecast.verdict == "safe" and not same:
        out.append(
            f"safe, but losses {real['losses'][:2]} where the unchanged run has {unchanged['losses'][:2]}"
        )
    return out


def _core(text: str) -> str:
    """Without the model's class name and the line breaks, and the path of a file."""
    text = " ".join(text.replace(" for Net", "").split())
    return text.rsplit("/", 1)[-1] if text.startswith("[Errno") else text


def _close(a: tuple[float, ...], b: list[float]) -> bool:
    return len(a) == len(b) and all(
        abs(x - y) <= 1e-9 * max(abs(y), 1e-12) for x, y in zip(a, b, strict=True)
    )


def outcome(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found
