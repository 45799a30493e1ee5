"""Faults of a universal checkpoint: a folder for each parameter, a file for each kind, what they share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from .core import UNIVERSAL, Copy, Expectation, edited, fault, load, names_file, only_by_manifest, pick

LEVEL = "universal"


def zero(copy: Copy) -> Path:
    return copy.folder / "zero"


def tensors(copy: Copy, *kinds: str) -> list[Path]:
    """The files of trained parameters that have more than one element; of others no load reads any."""
    model = next(p for p in copy.files if p.name.endswith("model_states.pt"))
    trained = {name for group in load(model)["param_shapes"] for name in group}
    found = [path for path in zero(copy).glob("*/*.pt") if not kinds or path.stem in kinds]
    found = [path for path in found if path.parent.name in trained]
    return [path for path in sorted(found) if path.stem != "step" and _of(path).numel() > 1]


def _of(path: Path) -> Any:
    value = load(path)
    return value["param"] if isinstance(value, dict) else value


def _expected(path: Path) -> Expectation:
    return names_file(path, path.parent, parts=(path.parent.name,))


def _has_weights(copy: Copy) -> bool:
    """Whether the engine's own weights are there too; ZeRO-3, with a model file for each rank, keeps none."""
    return (copy.folder / "mp_rank_00_model_states.pt").exists()


def _in_tensor(
    name: str,
    change: Callable[[Any, Random], Any],
    *kinds: str,
    shown: Callable[[Copy], bool] = lambda _: True,
) -> None:
    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = pick(rng, tensors(copy, *kinds))
        if path is None:
            return None
        value = load(path)
        new = change(_of(path).detach(), rng)
        if isinstance(new, torch.Tensor) and isinstance(value, dict):
            new = {**value, "param": new}
        torch.save(new, path)
        return _expected(path) if shown(copy) else only_by_manifest(path)

    damage.__name__ = f"universal_{name}"
    fault(LEVEL, UNIVERSAL)(damage)


def _with(value: float) -> Callable[[Any, Random], Any]:
    def change(tensor: Any, rng: Random) -> Any:
        new = tensor.clone()
        new.view(-1)[rng.randrange(new.numel())] = value
        return new

    return change


_in_tensor("tensor_shortened", lambda t, rng: t.reshape(-1)[:-1].clone())
_in_tensor("tensor_lengthened", lambda t, rng: torch.cat([t.reshape(-1), torch.ones(1)]))
_in_tensor("tensor_nan", _with(float("nan")))
_in_tensor("tensor_inf", _with(float("inf")))
_in_tensor("tensor_of_integers", lambda t, rng: t.long())
_in_tensor("tensor_no_dict", lambda t, rng: [1, 2])
_in_tensor("tensor_no_param", lambda t, rng: {"cat_dim": 0})
_in_tensor("tensor_is_text", lambda t, rng: {"param": "lost"})
_in_tensor("master_edited", _with(1e4), "fp32", shown=_has_weights)
_in_tensor("second_moment_negative", _with(-1.0), "exp_avg_sq")
_in_tensor("first_moment_edited", lambda t, rng: t * 1.5 + 1e-3, "exp_avg", shown=lambda _: False)


@fault(LEVEL, UNIVERSAL)
def universal_kind_missing(copy: Copy, rng: Random) -> Expectation:
    path = rng.choice(sorted(zero(copy).glob("*/*.pt")))
    path.unlink()
    return _expected(path)


@fault(LEVEL, UNIVERSAL)
def universal_parameter_missing(copy: Copy, rng: Random) -> Expectation:
    folder = pick(rng, sorted({path.parent for path in tensors(copy, "fp32")}))  # no load reads a frozen one
    assert folder is not None
    shutil.rmtree(folder)
    return names_file(folder, *(folder / n for n in ("fp32.pt", "exp_avg.pt")), parts=(folder.name,))


@fault(LEVEL, UNIVERSAL)
def universal_kinds_swapped(copy: Copy, rng: Random) -> Expectation:
    folder = rng.choice(sorted(p for p in zero(copy).iterdir() if (p / "exp_avg.pt").is_file()))
    one, two = (folder / f"{kind}.pt" for kind in rng.sample(["fp32", "exp_avg", "exp_avg_sq"], 2))
    spare = folder / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    return names_file(one, two, parts=(folder.name,))


@fault(LEVEL, UNIVERSAL)
def universal_parameters_swapped(copy: Copy, rng: Random) -> Expectation | None:
    """The same file of two parameters in each other's place."""
    kind = rng.choice(["fp32", "exp_avg", "exp_avg_sq"])
    found = tensors(copy, kind)
    pairs = [(a, b) for a in found for b in found if a < b and not torch.equal(_flat(a), _flat(b))]
    pair = pick(rng, pairs)
    if pair is None:
        return None
    a, b = pair
    same = _of(a).shape == _of(b).shape and kind != "fp32"
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    return only_by_manifest(a, b) if same else names_file(a, b, parts=(a.parent.name, b.parent.name))


def _flat(path: Path) -> Any:
    return _of(path).reshape(-1)


@fault(LEVEL, UNIVERSAL)
def universal_step_changed(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, sorted(zero(copy).glob("*/step.pt")))
    if path is None:
        return None
    old = load(path)
    torch.save(old + 4 if not isinstance(old, dict) else {**old, "param": old["param"] + 4}, path)
    return _expected(path)


@fault(LEVEL, UNIVERSAL)
def universal_step_is_text(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, sorted(zero(copy).glob("*/step.pt")))
    if path is None:
        return None
    torch.save("three", path)
    return _expected(path)


@fault(LEVEL, UNIVERSAL)
def universal_left_over(copy: Copy, rng: Random) -> Expectation:
    """A folder of a parameter that the model has not."""
    stale = zero(copy) / "stale.weight"
    shutil.copytree(rng.choice(sorted(p for p in zero(copy).iterdir() if p.is_dir())), stale)
    return names_file(stale, *stale.iterdir(), parts=("stale.weight",))


@fault(LEVEL, UNIVERSAL)
def universal_settings_of_a_group_lost(copy: Copy, rng: Random) -> Expectation:
    path = zero(copy) / "optimizer_state.pt"
    edited(path, lambda root: root["param_groups"].pop())
    return names_file(path)


@fault(LEVEL, UNIVERSAL)
def universal_settings_are_no_dict(copy: Copy, rng: Random) -> Expectation:
    path = zero(copy) / "optimizer_state.pt"
    torch.save(rng.choice([[1], None, "x", {"param_groups": 3}]), path)
    return names_file(path)


def _model(name: str, change: Callable[[Any, Random], str | None], *, warning: bool = False) -> None:
    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = copy.folder / "mp_rank_00_model_states.pt"
        if not _has_weights(copy):
            return None
        said: list[str | None] = []
        edited(path, lambda root: said.append(change(root, rng)))
        if said[0] is None:
            return None
        return names_file(*copy.files, copy.folder, parts=(said[0],) if said[0] else (), warning=warning)

    damage.__name__ = f"universal_{name}"
    fault(LEVEL, UNIVERSAL)(damage)


def _weight(root: Any, rng: Random) -> str | None:
    return pick(rng, (n for group in root["param_shapes"] for n in group if n in root["module"]))


def _shape(root: Any, rng: Random) -> str | None:
    group = rng.choice([g for g in root["param_shapes"] if g])
    name = rng.choice(sorted(group))
    group[name] = torch.Size([group[name].numel() + 1])
    return str(name)


def _lost_weight(root: Any, rng: Random) -> str | None:
    name = _weight(root, rng)
    return name if name is not None and root["module"].pop(name) is not None else None


def _added(root: Any, rng: Random) -> str:
    root["param_shapes"][-1]["stray.weight"] = torch.Size([3])
    return "stray.weight"


def _removed(key: str) -> Callable[[Any, Random], str | None]:
    def change(root: Any, rng: Random) -> str | None:
        shown = "" if key == "module" else key  # each of its weights is missed
        return shown if root.pop(key, None) is not None else None

    return change


_model("shape_changed", _shape)
_model("weight_lost", _lost_weight, warning=True)
_model("shape_added", _added)
for _key in ("module", "param_shapes", "global_steps"):
    _model(f"{_key}_removed", _removed(_key), warning=True)


@fault(LEVEL, UNIVERSAL)
def universal_conversion_killed(copy: Copy, rng: Random) -> Expectation:
    """ds_to_universal's own working folder is still there."""
    (copy.folder / "tmp").mkdir()
    return names_file(copy.folder, parts=["tmp"], warning=True)


@fault(LEVEL, UNIVERSAL)
def universal_pointer_dangling(copy: Copy, rng: Random) -> Expectation | None:
    path = next(iter(copy.top.glob("latest_universal")), None)
    if path is None:
        return None
    path.write_text(f"global_step{rng.randrange(100, 999)}_universal")
    return names_file(path)
