"""Faults of values: a flipped exponent, a hole of zeros, NaN, an edit, with checksums that are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from .core import HF, PT, ZERO, Copy, Expectation, edited, fault, load, names_file, only_by_manifest, pick
from .fields import _osd, _states, some_rank, trainable
from .layout import safetensors_header, safetensors_spans

LEVEL = "values"
BAD = (float("nan"), float("inf"), float("-inf"))
HOLE = 1024  # elements: 4 KiB of fp32


def _spot(copy: Copy, rng: Random, path: Path) -> tuple[int, int, str] | None:
    """A group, an element of the rank's partition that belongs to a parameter, and the parameter."""
    state = _osd(load(path))
    if "param_slice_mappings" not in state or _round_robin(copy):
        # the mappings are of the optimizer's order: any element that is no padding
        groups = [(g, len(t) // 2) for g, t in enumerate(state["single_partition_of_fp32_groups"])]
        found = pick(rng, (x for x in groups if x[1]))
        return (found[0], rng.randrange(found[1]), "") if found else None
    fragments = [
        (g, name, address)
        for g, group in enumerate(state["param_slice_mappings"])
        for name, address in group.items()
        if address.numel
    ]
    chosen = pick(rng, fragments)
    if chosen is None:
        return None
    g, name, address = chosen
    return g, address.start + rng.randrange(address.numel), name


def _round_robin(copy: Copy) -> bool:
    config = load(copy.ranks[0]).get("ds_config") or {}
    return bool((config.get("zero_optimization") or {}).get("round_robin_gradients"))


def _parts(copy: Copy, name: str) -> list[str]:
    return [name] if name else trainable(load(copy.model))


def _master(copy: Copy, rng: Random, change: Callable[[torch.Tensor, int], None]) -> Expectation | None:
    path = some_rank(copy, rng)
    spot = _spot(copy, rng, path)
    if spot is None:
        return None
    g, at, name = spot
    edited(path, lambda root: change(_osd(root)["single_partition_of_fp32_groups"][g].data, at))
    return names_file(*copy.files, parts=_parts(copy, name))


def _no_module(copy: Copy) -> bool:
    """Trainable weights left out of the model file: nothing to compare the master weights with."""
    root = load(copy.model)
    return any(name not in root["module"] for name in trainable(root))


def _set(value: float) -> Callable[[torch.Tensor, int], None]:
    def change(flat: torch.Tensor, at: int) -> None:
        flat[at] = value

    return change


@fault(LEVEL, ZERO)
def nonfinite_master_weight(copy: Copy, rng: Random) -> Expectation | None:
    return _master(copy, rng, _set(rng.choice(BAD)))


@fault(LEVEL, ZERO)
def wild_master_weight(copy: Copy, rng: Random) -> Expectation | None:
    return None if _no_module(copy) else _master(copy, rng, _set(1e30))


@fault(LEVEL, ZERO)
def master_weight_edited(copy: Copy, rng: Random) -> Expectation | None:
    def change(flat: torch.Tensor, at: int) -> None:
        flat[at] = flat[at] * 1.5 + 0.25

    return None if _no_module(copy) else _master(copy, rng, change)


@fault(LEVEL, ZERO)
def sign_of_master_weight_flipped(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    spot = _spot(copy, rng, path)
    if spot is None or _no_module(copy):
        return None
    g, at, name = spot
    if not _osd(load(path))["single_partition_of_fp32_groups"][g][at]:
        return None

    def edit(root: Any) -> None:
        _osd(root)["single_partition_of_fp32_groups"][g].data[at] *= -1

    edited(path, edit)
    return names_file(*copy.files, parts=_parts(copy, name))


@fault(LEVEL, ZERO)
def hole_in_master_weights(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    groups = _osd(load(path))["single_partition_of_fp32_groups"]
    g = max(range(len(groups)), key=lambda i: len(groups[i]))
    at = rng.randrange(max(len(groups[g]) - HOLE, 1))
    hole = slice(at, at + HOLE)
    # a weight that rounds to 0 in the model's dtype is no difference
    if _no_module(copy) or not (groups[g][hole].abs() > 1e-6).any():
        return None

    def edit(root: Any) -> None:
        _osd(root)["single_partition_of_fp32_groups"][g].data[hole] = 0

    edited(path, edit)
    return names_file(*copy.files, parts=trainable(load(copy.model)))


def _moment(copy: Copy, rng: Random, path: Path, kinds: tuple[str, ...] = ()) -> tuple[int, str, int] | None:
    """A group, one of its moments and an element that belongs to a parameter."""
    spot = _spot(copy, rng, path)
    states = _states(load(path))
    if spot is None or spot[0] >= len(states):
        return None
    own = states[spot[0]]
    keys = [k for k, v in own.items() if isinstance(v, torch.Tensor) and v.dim() == 1 and len(v) > spot[1]]
    key = pick(rng, (k for k in keys if not kinds or k in kinds))
    return (spot[0], key, spot[1]) if key else None


@fault(LEVEL, ZERO)
def nonfinite_moment(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None:
        return None
    g, key, at = found
    edited(path, lambda root: _states(root)[g][key].__setitem__(at, rng.choice(BAD)))
    return names_file(path, parts=[key])


@fault(LEVEL, ZERO)
def negative_second_moment(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path, ("exp_avg_sq", "max_exp_avg_sq"))
    if found is None:
        return None
    g, key, at = found
    edited(path, lambda root: _states(root)[g][key].__setitem__(at, -1e-4))
    return names_file(path, parts=[key])


@fault(LEVEL, ZERO)
def wild_moment(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None:
        return None
    g, key, at = found
    edited(path, lambda root: _states(root)[g][key].__setitem__(at, 1e30))
    return names_file(path, parts=[key], warning=True)


@fault(LEVEL, ZERO)
def hole_in_second_moment(copy: Copy, rng: Random) -> Expectation | None:
    """exp_avg_sq of 0 where exp_avg is not: Adam would divide by its epsilon."""
    path = some_rank(copy, rng)
    states = _states(load(path))
    groups = [g for g, own in enumerate(states) if {"exp_avg", "exp_avg_sq"} <= own.keys()]
    g = pick(rng, groups)
    if g is None:
        return None
    at = rng.randrange(max(len(states[g]["exp_avg"]) - HOLE, 1))
    hole = slice(at, at + HOLE)
    if not (states[g]["exp_avg"][hole].abs() > 1e-12).any():
        return None
    edited(path, lambda root: _states(root)[g]["exp_avg_sq"].__setitem__(hole, 0))
    return names_file(path, parts=["exp_avg_sq", "exp_avg"], warning=True)


@fault(LEVEL, ZERO)
def hole_in_first_moment(copy: Copy, rng: Random) -> Expectation | None:
    """Nothing but a manifest tells it from gradients that cancelled out."""
    path = some_rank(copy, rng)
    states = _states(load(path))
    g = pick(rng, (g for g, own in enumerate(states) if "exp_avg" in own and own["exp_avg"].any()))
    if g is None:
        return None
    edited(path, lambda root: _states(root)[g]["exp_avg"].zero_())
    return only_by_manifest(path)


@fault(LEVEL, ZERO)
def moment_edited(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None:
        return None
    g, key, at = found
    old = float(_states(load(path))[g][key][at])
    edited(path, lambda root: _states(root)[g][key].__setitem__(at, old * 1.01 + 1e-9))
    return only_by_manifest(path)


@fault(LEVEL, ZERO)
def moments_swapped_between_kinds(copy: Copy, rng: Random) -> Expectation | None:
    """exp_avg stored as exp_avg_sq and the other way round."""
    path = some_rank(copy, rng)
    states = _states(load(path))
    groups = [g for g, own in enumerate(states) if {"exp_avg", "exp_avg_sq"} <= own.keys()]
    g = pick(rng, (g for g in groups if (states[g]["exp_avg"] < -1e-9).any()))
    if g is None:
        return None

    def edit(root: Any) -> None:
        own = _states(root)[g]
        own["exp_avg"], own["exp_avg_sq"] = own["exp_avg_sq"], own["exp_avg"]

    edited(path, edit)
    return names_file(path, parts=["exp_avg_sq"])


# --- weights of every format --------------------------------------------------------------------------


def _state_dict(root: Any) -> Any:
    for key in ("module", "model_state_dict", "state_dict", "model", "model_state"):
        value = root.get(key)
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            return value
    return root


def _weight(copy: Copy, rng: Random) -> tuple[Path, str] | None:
    """A file and a trainable float weight in it; any float tensor where nothing says what is trainable."""
    path = copy.model if copy.kind == ZERO else rng.choice(copy.files)
    if path.suffix == ".safetensors":
        header = safetensors_header(path.read_bytes())
        names = [n for n, start, end in safetensors_spans(path.read_bytes()) if end > start]
        name = pick(rng, (n for n in names if header[n]["dtype"] in NUMPY))
    else:
        root = load(path)
        tensors = _state_dict(root)
        names = trainable(root) if copy.kind == ZERO else list(tensors)
        floats = [
            n
            for n in names
            if isinstance(tensors.get(n), torch.Tensor)
            and tensors[n].is_floating_point()
            and tensors[n].numel()
            and "running" not in n
        ]
        name = pick(rng, floats)
    return (path, name) if name else None


NUMPY = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _change(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a weight, flattened, by what `change` makes of it."""
    if path.suffix == ".safetensors":
        raw = bytearray(path.read_bytes())
        dtype = TORCH[str(safetensors_header(bytes(raw))[name]["dtype"])]
        start, end = next((a, b) for n, a, b in safetensors_spans(bytes(raw)) if n == name)
        old = torch.frombuffer(bytearray(raw[start:end]), dtype=dtype)
        raw[start:end] = change(old).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        path.write_bytes(raw)
        return

    def edit(root: Any) -> None:
        tensors = _state_dict(root)
        old = tensors[name]
        tensors[name] = change(old.detach().clone().flatten()).to(old.dtype).reshape(old.shape)

    edited(path, edit)


def _at(rng: Random, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(flat: torch.Tensor) -> torch.Tensor:
        flat[rng.randrange(len(flat))] = value
        return flat

    return change


@fault(LEVEL)
def nan_in_a_weight(copy: Copy, rng: Random) -> Expectation | None:
    found = _weight(copy, rng)
    if found is None:
        return None
    path, name = found
    _change(path, name, _at(rng, float("nan")))
    return names_file(path, parts=[_bare(name)])


@fault(LEVEL)
def inf_in_a_weight(copy: Copy, rng: Random) -> Expectation | None:
    """Only a warning where weights and buffers cannot be told apart: masks are made of -Inf."""
    found = _weight(copy, rng)
    if found is None:
        return None
    path, name = found
    _change(path, name, _at(rng, rng.choice(BAD[1:])))
    return names_file(path, parts=[_bare(name)], warning=copy.kind != ZERO)


@fault(LEVEL)
def wild_value_in_a_weight(copy: Copy, rng: Random) -> Expectation | None:
    found = _weight(copy, rng)
    if found is None:
        return None
    path, name = found
    if path.suffix != ".safetensors" and _state_dict(load(path))[name].dtype is torch.float16:
        return None
    _change(path, name, _at(rng, 1e30))
    return names_file(path, *copy.ranks, parts=[_bare(name)], warning=copy.kind != ZERO)


def _bare(name: str) -> str:
    """Without the prefixes of DDP and torch.compile, which the reader removes."""
    return name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module.")


@fault(LEVEL, ZERO)
def model_weight_edited(copy: Copy, rng: Random) -> Expectation | None:
    found = _weight(copy, rng)
    if found is None:
        return None
    path, name = found

    def change(flat: torch.Tensor) -> torch.Tensor:
        at = rng.randrange(len(flat))
        flat[at] = flat[at] * 1.5 + 0.25
        return flat

    _change(path, name, change)
    return names_file(*copy.files, parts=[name])


@fault(LEVEL, ZERO)
def hole_in_a_model_weight(copy: Copy, rng: Random) -> Expectation | None:
    found = _weight(copy, rng)
    if found is None or not _state_dict(load(found[0]))[found[1]].any():
        return None
    path, name = found
    _change(path, name, torch.zeros_like)
    return names_file(*copy.files, parts=[name])


@fault(LEVEL, ZERO)
def frozen_weight_edited(copy: Copy, rng: Random) -> Expectation | None:
    """Since DeepSpeed 0.8, ZeRO-2 keeps a second copy in frozen_param_fragments."""
    root = load(copy.model)
    known = {*trainable(root), *(root.get("buffer_names") or ()), *(root.get("shared_params") or ())}
    frozen = [n for n, t in root["module"].items() if n not in known and t.is_floating_point() and t.numel()]
    name = pick(rng, frozen)
    if name is None:
        return None
    fragments = root.get("frozen_param_fragments") or {}
    copied = fragments.get(name) is not None

    def change(flat: torch.Tensor) -> torch.Tensor:
        at = rng.randrange(len(flat))
        flat[at] = flat[at] * 1.5 + 0.25
        return flat

    _change(copy.model, name, change)
    return names_file(copy.model, parts=[name]) if copied else only_by_manifest(copy.model)


@fault(LEVEL, PT, HF)
def weight_edited(copy: Copy, rng: Random) -> Expectation | None:
    found = _weight(copy, rng)
    if found is None:
        return None
    path, name = found

    def change(flat: torch.Tensor) -> torch.Tensor:
        at = rng.randrange(len(flat))
        flat[at] = flat[at] * 1.5 + 0.25
        return flat

    _change(path, name, change)
    return only_by_manifest(path)


@fault(LEVEL, PT, HF)
def hole_in_a_weight(copy: Copy, rng: Random) -> Expectation | None:
    found = _weight(copy, rng)
    if found is None:
        return None
    path, name = found
    before = path.read_bytes()
    _change(path, name, torch.zeros_like)
    return only_by_manifest(path) if path.read_bytes() != before else None


@fault(LEVEL, PT, HF)
def bit_flipped_without_checksums(copy: Copy, rng: Random) -> Expectation | None:
    """In the data of safetensors and of torch's older serialization."""
    path = pick(rng, [*copy.safetensors, *copy.legacy])
    if path is None:
        return None
    raw = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(raw[:8], "little") if path in copy.safetensors else len(raw) // 2
    raw[rng.randrange(first, len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return only_by_manifest(path)
