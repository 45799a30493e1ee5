"""Faults of what a ZeRO-3 folder says about itself, saved again by torch with right checksums."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from .core import ZERO3, Copy, Expectation, bases, edited, fault, load, names_file, only_by_manifest, pick

LEVEL = "zero3"


def optims(copy: Copy) -> list[Path]:
    return [path for path in copy.files if path.name.endswith("optim_states.pt")]


def models(copy: Copy) -> list[Path]:
    return [path for path in copy.files if path.name.endswith("model_states.pt")]


def number(path: Path) -> str:
    return path.name.partition("pp_rank_")[2].partition("_")[0]


def _flat(root: Any) -> Any:
    return root["optimizer_state_dict"]["fp32_flat_groups"]


def _inner(root: Any) -> Any:
    return root["optimizer_state_dict"]["optimizer_state_dict"]


def _in_optim(
    name: str, change: Callable[[Any, Random], bool | None], *, one_rank: bool = True, warning: bool = False
) -> None:
    """A fault of one rank's optimizer file; `change` returns False where it does not apply. Without
    `one_rank` the ranks contradict each other: any of them may be named.
    """

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = rng.choice(optims(copy))
        if not one_rank and len(optims(copy)) < 2:
            return None  # nothing to contradict
        applied: list[bool] = []
        edited(path, lambda root: applied.append(change(root, rng) is not False))
        named = [path] if one_rank else [*optims(copy), copy.folder]
        return names_file(*named, warning=warning) if applied[0] else None

    damage.__name__ = f"zero3_{name}"
    fault(LEVEL, ZERO3)(damage)


def _sized(root: Any, rng: Random) -> int | None:
    return pick(rng, (i for i, flat in enumerate(_flat(root)) if flat.numel() > 1))


def _shorten(root: Any, rng: Random) -> bool:
    i = _sized(root, rng)
    if i is None:
        return False
    _flat(root)[i] = _flat(root)[i][: -rng.randrange(1, _flat(root)[i].numel())].clone()
    return True


def _nan(root: Any, rng: Random) -> bool:
    i = _sized(root, rng)
    if i is None:
        return False
    _flat(root)[i].data[0] = float("nan")  # the last elements may be padding
    return True


def _moments(root: Any) -> list[tuple[Any, str]]:
    states = _inner(root)["state"]
    return [
        (state, key)
        for state in states.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() > 1
    ]


def _moment(change: Callable[[Any, str], object]) -> Callable[[Any, Random], bool]:
    def edit(root: Any, rng: Random) -> bool:
        found = pick(rng, _moments(root))
        if found is None:
            return False
        change(*found)
        return True

    return edit


def _steps(root: Any, rng: Random) -> bool:
    states = [state for state in _inner(root)["state"].values() if "step" in state]
    for state in states:
        state["step"] = state["step"] + rng.choice([-1, 1, 1000])
    return bool(states)


_in_optim("masters_shortened", _shorten)
_in_optim("masters_of_a_group_lost", lambda root, rng: _flat(root).pop() is not None)
_in_optim("masters_nan", _nan)
_in_optim(
    "masters_doubles",
    lambda root, rng: _flat(root).__setitem__(0, _flat(root)[0].double()),
    one_rank=False,
)
_in_optim("masters_no_tensor", lambda root, rng: _flat(root).__setitem__(0, "lost"))
_in_optim("moment_lost", _moment(lambda state, key: state.pop(key)))
_in_optim("moment_shortened", _moment(lambda state, key: state.update({key: state[key][:-1].clone()})))
_in_optim("moment_nan", _moment(lambda state, key: state[key].__setitem__(0, float("nan"))))
_in_optim("moment_of_integers", _moment(lambda state, key: state.update({key: state[key].long()})))
_in_optim("step_of_a_rank_changed", _steps, one_rank=False, warning=True)
_in_optim("groups_lost", lambda root, rng: _inner(root)["param_groups"].clear())
_in_optim("rate_of_a_rank_changed", lambda r, _: _inner(r)["param_groups"][0].update(lr=9.0), one_rank=False)
_in_optim(
    "partition_count_changed",
    lambda root, rng: root["optimizer_state_dict"].update(partition_count=77),
    one_rank=False,
)
_in_optim("optimizer_state_removed", lambda root, rng: root.pop("optimizer_state_dict") is not None)


def _in_model(name: str, change: Callable[[Any, Random], str | None], *, warning: bool = False) -> None:
    """A fault of one rank's model file; `change` returns what must be named, None where it does not apply."""

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = rng.choice(models(copy))
        said: list[str | None] = []
        edited(path, lambda root: said.append(change(root, rng)))
        if said[0] is None:
            return None
        return names_file(*copy.files, copy.folder, parts=(said[0],) if said[0] else (), warning=warning)

    damage.__name__ = f"zero3_{name}"
    fault(LEVEL, ZERO3)(damage)


def _trained(root: Any) -> list[tuple[Any, str]]:
    return [(group, name) for group in root["param_shapes"] for name, size in group.items() if size.numel()]


def _shape(root: Any, rng: Random) -> str | None:
    found = pick(rng, _trained(root))
    if found is None:
        return None
    found[0][found[1]] = torch.Size([found[0][found[1]].numel() + 1])
    return ""


def _lost(root: Any, rng: Random) -> str | None:
    found = pick(rng, _trained(root))
    return "" if found is not None and found[0].pop(found[1]) is not None else None


def _fragment(change: Callable[[Any, str], object]) -> Callable[[Any, Random], str | None]:
    def edit(root: Any, rng: Random) -> str | None:
        fragments = root.get("frozen_param_fragments") or {}
        name = pick(rng, (n for n, t in fragments.items() if t is not None and t.numel() > 1))
        if name is None:
            return None
        change(fragments, name)
        return name

    return edit


def _whole(root: Any, rng: Random) -> str | None:
    found = pick(rng, ((g, n) for g, n in _trained(root) if n in root["module"]))
    if found is None:
        return None
    root["module"][found[1]] = torch.ones(found[0][found[1]])
    return found[1]


def _frozen_shape(root: Any, rng: Random) -> str | None:
    shapes = root.get("frozen_param_shapes") or {}
    name = pick(rng, shapes)
    if name is None:
        return None
    shapes[name] = torch.Size([*shapes[name], 7])
    return name


def _removed(key: str) -> Callable[[Any, Random], str | None]:
    return lambda root, rng: key if root.pop(key, None) is not None else None


_in_model("shape_changed", _shape)
_in_model("shape_lost", _lost)
_in_model("shape_added", lambda r, _: r["param_shapes"][0].update({"stray": torch.Size([99])}) or "")
_in_model("shapes_of_a_group_lost", lambda root, rng: "" if root["param_shapes"].pop() is not None else None)
_in_model("frozen_part_lost", _fragment(lambda parts, name: parts.pop(name)))
_in_model(
    "frozen_part_shortened", _fragment(lambda parts, name: parts.update({name: parts[name][:-1].clone()}))
)
_in_model("frozen_shape_changed", _frozen_shape)
_in_model("parameter_whole_in_module", _whole)
_in_model("parameter_lost_in_module", lambda root, rng: _popped(root, rng))
for _key in ("module", "param_shapes", "global_steps", "dp_world_size"):
    _in_model(f"{_key}_removed", _removed(_key), warning=True)


def _popped(root: Any, rng: Random) -> str | None:
    found = pick(rng, (name for _, name in _trained(root) if name in root["module"]))
    return found if found is not None and root["module"].pop(found) is not None else None


# --- the right file in the wrong place ----------------------------------------------------------------


def _two(copy: Copy, rng: Random) -> tuple[Path, Path] | None:
    kind = rng.choice([optims(copy), models(copy)])
    return tuple(rng.sample(kind, 2)) if len(kind) > 1 else None  # type: ignore[return-value]


@fault(LEVEL, ZERO3)
def zero3_ranks_swapped(copy: Copy, rng: Random) -> Expectation | None:
    pair = _two(copy, rng)
    if pair is None:
        return None
    spare = pair[0].with_name("spare")
    pair[0].rename(spare)
    pair[1].rename(pair[0])
    spare.rename(pair[1])
    return names_file(*pair)


@fault(LEVEL, ZERO3)
def zero3_rank_copied_over_another(copy: Copy, rng: Random) -> Expectation | None:
    pair = _two(copy, rng)
    if pair is None:
        return None
    shutil.copyfile(*pair)
    return names_file(pair[1])


@fault(LEVEL, ZERO3)
def zero3_extra_rank(copy: Copy, rng: Random) -> Expectation:
    path = rng.choice(rng.choice([optims(copy), models(copy)]))
    new = len(optims(copy)) + rng.randrange(3)
    stale = path.with_name(path.name.replace(f"pp_rank_{number(path)}_", f"pp_rank_{new}_"))
    shutil.copyfile(path, stale)
    return Expectation(parts=(stale.name, f"dp rank {new}", f"dp ranks {new}", f"ranks {new}"))


@fault(LEVEL, ZERO3)
def zero3_last_rank_missing(copy: Copy, rng: Random) -> Expectation | None:
    if len(optims(copy)) < 2:
        return None
    last = str(len(optims(copy)) - 1)
    gone = [path for path in (*optims(copy), *models(copy)) if number(path) == last]
    for path in gone:
        path.unlink()
    return Expectation(parts=(*(path.name for path in gone), f"dp rank {last}"))


@fault(LEVEL, ZERO3)
def zero3_model_and_optimizer_exchanged(copy: Copy, rng: Random) -> Expectation:
    one, two = rng.choice(optims(copy)), rng.choice(models(copy))
    shutil.copyfile(one, two)
    return names_file(two)


@fault(LEVEL, ZERO3)
def zero3_rank_of_another_checkpoint(copy: Copy, rng: Random) -> Expectation | None:
    """The same name from another run: nothing but what is in it can tell, if anything differs."""
    path = rng.choice(optims(copy))
    found = [
        other
        for base in bases()
        if base.kind == ZERO3 and base != copy.base
        for other in base.path.rglob(path.name)
    ]
    theirs = pick(rng, found)
    if theirs is None:
        return None
    mine, new = _flat(load(path)), _flat(load(theirs))
    shapes = [[tuple(t.shape) for t in flats] for flats in (mine, new)]
    shutil.copyfile(theirs, path)
    return names_file(*copy.files, copy.folder) if shapes[0] != shapes[1] else only_by_manifest(path)


@fault(LEVEL, ZERO3)
def zero3_of_another_stage(copy: Copy, rng: Random) -> Expectation:
    """A model file of stage 1 or 2 beside them."""
    stale = copy.folder / "mp_rank_00_model_states.pt"
    shutil.copyfile(models(copy)[0], stale)
    return names_file(stale, copy.folder)
