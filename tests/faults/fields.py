"""Faults of what a ZeRO folder says about itself, saved again by torch with right checksums."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from .core import ZERO, Copy, Expectation, edited, fault, load, names_file, only_by_manifest, pick
from .files import rank_of

MODEL, RANK = "model field", "rank field"


def some_rank(copy: Copy, rng: Random) -> Path:
    return rng.choice(copy.ranks)


def _in_model(copy: Copy, edit: Callable[[Any], object], *parts: str, warning: bool = False) -> Expectation:
    edited(copy.model, edit)
    return names_file(*copy.files, copy.folder, parts=parts, warning=warning)


def trainable(root: Any) -> list[str]:
    return [name for group in root["param_shapes"] for name in group]


def first_group(root: Any, at_least: int = 1) -> Any:
    return next((group for group in root["param_shapes"] if len(group) >= at_least), None)


# --- the model file -----------------------------------------------------------------------------------


@fault(MODEL, ZERO)
def dp_world_size_changed(copy: Copy, rng: Random) -> Expectation:
    n = len(copy.ranks)
    new = rng.choice([n + 1, 2 * n, max(n - 1, 0), 0, -1])
    new = n + 1 if new == n else new
    return _in_model(copy, lambda root: root.update(dp_world_size=new), "rank", "dp_world_size")


@fault(MODEL, ZERO)
def dp_world_size_removed(copy: Copy, rng: Random) -> Expectation:
    return _in_model(copy, lambda root: root.pop("dp_world_size"), "dp_world_size", warning=True)


def _required(key: str) -> None:
    """A fault for each field that every DeepSpeed since 0.6 writes and needs."""

    def lost(copy: Copy, rng: Random) -> Expectation | None:
        if key not in load(copy.model):
            return None
        return _in_model(copy, lambda root: root.pop(key), key, warning=True)

    lost.__name__ = f"{key}_removed"
    fault(MODEL, ZERO)(lost)


for _key in ("module", "param_shapes", "global_steps", "buffer_names", "ds_version"):
    _required(_key)


@fault(MODEL, ZERO)
def param_shapes_in_another_order(copy: Copy, rng: Random) -> Expectation | None:
    """Two neighbours of one group change places: every weight between them would be read elsewhere."""
    root = load(copy.model)
    g = pick(rng, (g for g, group in enumerate(root["param_shapes"]) if len(group) > 1))
    if g is None:
        return None
    items = list(root["param_shapes"][g].items())
    at = rng.randrange(len(items) - 1)
    if not (items[at][1].numel() and items[at + 1][1].numel()):
        return None  # parameters without elements may stand anywhere
    items[at : at + 2] = [items[at + 1], items[at]]
    return _in_model(copy, lambda root: root["param_shapes"].__setitem__(g, OrderedDict(items)))


@fault(MODEL, ZERO)
def param_shapes_names_swapped(copy: Copy, rng: Random) -> Expectation | None:
    """Two parameters of one shape: sizes and offsets stay what they were."""
    root = load(copy.model)
    pairs = [
        (g, a, b)
        for g, group in enumerate(root["param_shapes"])
        for i, a in enumerate(group)
        for b in list(group)[i + 1 :]
        if group[a] == group[b] and group[a].numel()
    ]
    chosen = pick(rng, pairs)
    if chosen is None:
        return None
    g, a, b = chosen
    swap = {a: b, b: a}
    items = [(swap.get(name, name), shape) for name, shape in root["param_shapes"][g].items()]
    module = root["module"]
    if not load(copy.ranks[0])["optimizer_state_dict"].get("param_slice_mappings") and torch.equal(
        module[a], module[b]
    ):
        return None
    return _in_model(copy, lambda root: root["param_shapes"].__setitem__(g, OrderedDict(items)), a, b)


@fault(MODEL, ZERO)
def param_shape_changed(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    name = pick(rng, trainable(root))
    if name is None:
        return None

    def edit(root: Any) -> None:
        for group in root["param_shapes"]:
            if name in group:
                old = group[name]
                new = [*old[:-1], old[-1] + 1] if len(old) else [2]
                group[name] = torch.Size(rng.choice([new, [old.numel(), 1, 1]]))

    return _in_model(copy, edit)


@fault(MODEL, ZERO)
def param_removed_from_shapes(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    name = pick(rng, (n for group in root["param_shapes"] for n, shape in group.items() if shape.numel()))
    if name is None:
        return None
    return _in_model(copy, lambda root: [group.pop(name, None) for group in root["param_shapes"]])


@fault(MODEL, ZERO)
def param_added_to_shapes(copy: Copy, rng: Random) -> Expectation:
    shape = torch.Size(rng.choice([(1,), (3, 3), (1000,)]))
    return _in_model(copy, lambda root: root["param_shapes"][-1].update({"model.stray.weight": shape}))


@fault(MODEL, ZERO)
def param_moved_to_another_group(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    if len(root["param_shapes"]) < 2:
        return None
    name = rng.choice([n for n, shape in root["param_shapes"][0].items() if shape.numel()] or [""])
    if not name:
        return None

    def edit(root: Any) -> None:
        root["param_shapes"][1][name] = root["param_shapes"][0].pop(name)

    return _in_model(copy, edit)


@fault(MODEL, ZERO)
def group_removed_from_shapes(copy: Copy, rng: Random) -> Expectation:
    return _in_model(copy, lambda root: root["param_shapes"].pop())


@fault(MODEL, ZERO)
def weight_missing(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    names = [name for name in trainable(root) if name in root["module"]]
    name = pick(rng, names)
    if name is None:
        return None
    # after exclude_frozen_parameters it may have been frozen later, and its master is there
    later = root.get("frozen_param_fragments", 0) is None
    return _in_model(copy, lambda root: root["module"].pop(name), name, warning=later)


@fault(MODEL, ZERO)
def frozen_weight_missing(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    frozen = [name for name in root.get("frozen_param_shapes") or {} if name in root["module"]]
    if len(frozen) < 2:  # all frozen weights left out is what exclude_frozen_parameters does
        return None
    name = rng.choice(frozen)
    return _in_model(copy, lambda root: root["module"].pop(name), name)


@fault(MODEL, ZERO)
def weight_renamed(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    name = pick(rng, (n for n in trainable(root) if n in root["module"]))
    if name is None:
        return None

    def edit(root: Any) -> None:
        root["module"][name + "_old"] = root["module"].pop(name)

    return _in_model(copy, edit, name)


@fault(MODEL, ZERO)
def weight_extra(copy: Copy, rng: Random) -> Expectation | None:
    """A tensor that is neither trainable, frozen nor a buffer; stage 1 does not record frozen ones."""
    root = load(copy.model)
    if not isinstance(root.get("frozen_param_shapes"), dict):
        return None
    return _in_model(
        copy, lambda root: root["module"].update({"stray.weight": torch.ones(3, 3)}), "stray", warning=True
    )


@fault(MODEL, ZERO)
def weight_of_wrong_shape(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    name = pick(rng, (n for n in trainable(root) if n in root["module"] and root["module"][n].numel() > 1))
    if name is None:
        return None

    def edit(root: Any) -> None:
        tensor = root["module"][name]
        wrong = tensor.flatten()[:-1].clone() if rng.random() < 0.5 else tensor.reshape(1, *tensor.shape)
        root["module"][name] = wrong

    return _in_model(copy, edit, name)


@fault(MODEL, ZERO)
def weight_of_wrong_dtype(copy: Copy, rng: Random) -> Expectation | None:
    """One weight of another float type than all others."""
    root = load(copy.model)
    names = [n for n in trainable(root) if n in root["module"] and root["module"][n].numel()]
    name = pick(rng, names)
    if name is None or len(names) < 3:
        return None
    dtypes = {torch.bfloat16, torch.float16, torch.float32, torch.int32} - {root["module"][name].dtype}
    dtype = rng.choice(sorted(dtypes, key=str))

    def edit(root: Any) -> None:
        root["module"][name] = root["module"][name].to(dtype)

    return _in_model(copy, edit, name, warning=True)


@fault(MODEL, ZERO)
def weight_is_no_tensor(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    name = pick(rng, (n for n in trainable(root) if n in root["module"]))
    if name is None:
        return None
    return _in_model(copy, lambda root: root["module"].update({name: None}), name)


@fault(MODEL, ZERO)
def frozen_shape_changed(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    name = pick(rng, (n for n in root.get("frozen_param_shapes") or {} if n in root["module"]))
    if name is None:
        return None

    def edit(root: Any) -> None:
        root["frozen_param_shapes"][name] = torch.Size([*root["frozen_param_shapes"][name], 2])

    return _in_model(copy, edit, name)


@fault(MODEL, ZERO)
def frozen_fragment_edited(copy: Copy, rng: Random) -> Expectation | None:
    """Frozen weights are in module and in frozen_param_fragments: the copies must be equal."""
    root = load(copy.model)
    fragments = root.get("frozen_param_fragments") or {}
    names = [n for n, t in fragments.items() if n in root["module"] and t is not None and t.numel()]
    name = pick(rng, names)
    if name is None:
        return None

    def edit(root: Any) -> None:
        tensor = root["frozen_param_fragments"][name].clone()
        tensor.flatten()[rng.randrange(tensor.numel())] += 1
        root["frozen_param_fragments"][name] = tensor

    return _in_model(copy, edit, name)


@fault(MODEL, ZERO)
def shared_params_of_unknown_names(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    shared = root.get("shared_params")
    if not shared:
        return None
    alias = rng.choice(sorted(shared))
    module = root["module"]
    alone = alias not in module or all(
        name == alias or tensor.data_ptr() != module[alias].data_ptr() for name, tensor in module.items()
    )
    said = _in_model(copy, lambda root: root["shared_params"].update({alias: "no.such.weight"}), alias)
    # exclude_frozen_parameters leaves out an owner, and its name: nobody can tell whether there is one
    return only_by_manifest(copy.model) if alone and root.get("frozen_param_shapes") is None else said


@fault(MODEL, ZERO)
def tied_weights_differ(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    shared = {a: o for a, o in (root.get("shared_params") or {}).items() if {a, o} <= root["module"].keys()}
    alias = pick(rng, (a for a in shared if root["module"][a].numel()))
    if alias is None:
        return None

    def edit(root: Any) -> None:
        tensor = root["module"][alias].clone()
        tensor.flatten()[0] += 1
        root["module"][alias] = tensor

    return _in_model(copy, edit, alias)


@fault(MODEL, ZERO)
def buffer_name_without_buffer(copy: Copy, rng: Random) -> Expectation | None:
    if "buffer_names" not in load(copy.model):
        return None
    return _in_model(
        copy, lambda root: root["buffer_names"].append("lost.running_mean"), "lost.running_mean", warning=True
    )


@fault(MODEL, ZERO)
def global_steps_changed(copy: Copy, rng: Random) -> Expectation | None:
    """Only where the optimizer counts its steps too."""
    if _step_of(load(copy.ranks[0])) is None:
        return None
    change = rng.choice([-2, 2, 1000])
    return _in_model(
        copy,
        lambda root: root.update(global_steps=root["global_steps"] + change),
        "global_steps",
        warning=True,
    )


@fault(MODEL, ZERO)
def skipped_steps_changed(copy: Copy, rng: Random) -> Expectation | None:
    if _step_of(load(copy.ranks[0])) is None or "skipped_steps" not in load(copy.model):
        return None
    return _in_model(
        copy, lambda root: root.update(skipped_steps=root["skipped_steps"] + 3), "steps", warning=True
    )


@fault(MODEL, ZERO)
def version_of_the_model_file_changed(copy: Copy, rng: Random) -> Expectation:
    return _in_model(copy, lambda root: root.update(ds_version="0.12.3"), "ds_version", warning=True)


@fault(MODEL, ZERO)
def mp_world_size_changed(copy: Copy, rng: Random) -> Expectation | None:
    if "mp_world_size" not in load(copy.model):
        return None
    return _in_model(copy, lambda root: root.update(mp_world_size=2), "mp_world_size")


@fault(MODEL, ZERO)
def model_file_is_no_dict(copy: Copy, rng: Random) -> Expectation:
    torch.save([load(copy.model)], copy.model)
    return names_file(copy.model)


def _own_scheduler(root: Any) -> Any:
    """The state of one of DeepSpeed's own schedulers, None for a client's."""
    state = root.get("lr_scheduler")
    return state if isinstance(state, dict) and set(state) == {"last_batch_iteration"} else None


@fault(MODEL, ZERO)
def scheduler_of_another_step(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.model)
    if _own_scheduler(root) is None:
        return None
    # before the first step, -1 and 0 mean the same
    ahead = rng.choice([-2, -1, 1, 3, 1000] if root["global_steps"] else [-2, 2, 3, 1000])
    return _in_model(
        copy,
        lambda root: root["lr_scheduler"].update(
            last_batch_iteration=root["lr_scheduler"]["last_batch_iteration"] + ahead
        ),
        "last_batch_iteration",
        warning=True,
    )


@fault(MODEL, ZERO)
def scheduler_restarted(copy: Copy, rng: Random) -> Expectation | None:
    state = _own_scheduler(load(copy.model))
    if state is None or state["last_batch_iteration"] <= 0:
        return None
    return _in_model(
        copy,
        lambda root: root["lr_scheduler"].update(last_batch_iteration=-1),
        "last_batch_iteration",
        warning=True,
    )


@fault(MODEL, ZERO)
def scheduler_of_another_learning_rate(copy: Copy, rng: Random) -> Expectation | None:
    state = load(copy.model).get("lr_scheduler")
    if not isinstance(state, dict) or not state.get("_last_lr"):
        return None
    g = rng.randrange(len(state["_last_lr"]))

    def change(root: Any) -> None:
        root["lr_scheduler"]["_last_lr"][g] = root["lr_scheduler"]["_last_lr"][g] * 0.9 + 1e-4

    return _in_model(copy, change, f"_last_lr[{g}]", warning=True)


# --- the optimizer files ------------------------------------------------------------------------------


def _step_of(root: Any) -> float | None:
    for own in _states(root):
        if "step" in own:
            return float(own["step"])
    return None


def _states(root: Any) -> list[Any]:
    base = root["optimizer_state_dict"]["base_optimizer_state"]
    return list(base["state"].values()) if isinstance(base, dict) else base


def _in_rank(
    copy: Copy,
    rng: Random,
    edit: Callable[[Any], object],
    *parts: str,
    warning: bool = False,
    path: Path | None = None,
) -> Expectation | None:
    path = path or some_rank(copy, rng)
    edited(path, edit)
    # of two ranks that differ, either may be the one that is named
    return names_file(*copy.ranks, copy.folder, parts=parts, warning=warning)


def _osd(root: Any) -> Any:
    return root["optimizer_state_dict"]


def _has(copy: Copy, key: str, *, several: bool = False) -> bool:
    if several and len(copy.ranks) < 2:
        return False
    return all(_osd(load(path)).get(key) is not None for path in copy.ranks)


@fault(RANK, ZERO)
def partition_count_changed(copy: Copy, rng: Random) -> Expectation | None:
    if not _has(copy, "partition_count"):
        return None
    n = len(copy.ranks)

    def edit(root: Any) -> None:
        old = _osd(root)["partition_count"]
        _osd(root)["partition_count"] = [n + 1] * len(old) if isinstance(old, list) else n + 1

    return _in_rank(copy, rng, edit)


@fault(RANK, ZERO)
def group_paddings_changed(copy: Copy, rng: Random) -> Expectation | None:
    if not (_has(copy, "group_paddings") and _osd(load(copy.ranks[0]))["group_paddings"]):
        return None
    change = rng.choice([-1, 1, 2, 64])

    def edit(root: Any) -> None:
        paddings = _osd(root)["group_paddings"]
        paddings[rng.randrange(len(paddings))] += change

    return _in_rank(copy, rng, edit, "padding")


@fault(RANK, ZERO)
def alignment_paddings_changed(copy: Copy, rng: Random) -> Expectation | None:
    if not _has(copy, "param_alignment_paddings"):
        return None

    def edit(root: Any) -> None:
        gaps = rng.choice([g for g in _osd(root)["param_alignment_paddings"] if g])
        gaps[rng.randrange(len(gaps))] += rng.choice([1, 4])

    return _in_rank(copy, rng, edit)


def _with_mapping(copy: Copy, rng: Random) -> tuple[Path, int, str] | None:
    """A rank, group and parameter that the rank holds a fragment of."""
    if not _has(copy, "param_slice_mappings"):
        return None
    path = some_rank(copy, rng)
    mappings = _osd(load(path))["param_slice_mappings"]
    found = pick(rng, ((g, name) for g, group in enumerate(mappings) for name in group))
    return (path, *found) if found else None


@fault(RANK, ZERO)
def slice_mapping_changed(copy: Copy, rng: Random) -> Expectation | None:
    found = _with_mapping(copy, rng)
    if found is None:
        return None
    path, g, name = found
    field = rng.choice(["numel", "start"])

    def edit(root: Any) -> None:
        address = _osd(root)["param_slice_mappings"][g][name]
        setattr(address, field, getattr(address, field) + 1)

    return _in_rank(copy, rng, edit, name, "param_slice_mappings", path=path)


@fault(RANK, ZERO)
def slice_mapping_removed(copy: Copy, rng: Random) -> Expectation | None:
    found = _with_mapping(copy, rng)
    if found is None:
        return None
    path, g, name = found
    return _in_rank(
        copy, rng, lambda root: _osd(root)["param_slice_mappings"][g].pop(name), name, "mappings", path=path
    )


@fault(RANK, ZERO)
def slice_mapping_renamed(copy: Copy, rng: Random) -> Expectation | None:
    found = _with_mapping(copy, rng)
    if found is None:
        return None
    path, g, name = found

    def edit(root: Any) -> None:
        group = _osd(root)["param_slice_mappings"][g]
        renamed = [(n + "x" if n == name else n, address) for n, address in group.items()]
        _osd(root)["param_slice_mappings"][g] = OrderedDict(renamed)

    return _in_rank(copy, rng, edit, name, "mappings", path=path)


@fault(RANK, ZERO)
def slice_mappings_of_one_rank_removed(copy: Copy, rng: Random) -> Expectation | None:
    if not _has(copy, "param_slice_mappings", several=True):
        return None
    return _in_rank(copy, rng, lambda root: _osd(root).pop("param_slice_mappings"), "mappings", warning=True)


def _changed_on_one_rank(name: str, key: str, value: object, *, warning: bool = False) -> None:
    def change(copy: Copy, rng: Random) -> Expectation | None:
        if not _has(copy, key, several=True) or _osd(load(copy.ranks[0]))[key] == value:
            return None
        return _in_rank(copy, rng, lambda root: _osd(root).update({key: value}), key, warning=warning)

    change.__name__ = name
    fault(RANK, ZERO)(change)


_changed_on_one_rank("zero_stage_of_one_rank_changed", "zero_stage", 1)
_changed_on_one_rank("version_of_one_rank_changed", "ds_version", "0.12.3", warning=True)
_changed_on_one_rank("clip_grad_of_one_rank_changed", "clip_grad", 77.0)
_changed_on_one_rank("overflow_of_one_rank_changed", "overflow", True)


@fault(RANK, ZERO)
def zero_stage_of_all_ranks_changed(copy: Copy, rng: Random) -> Expectation | None:
    """Against the stage in ds_config."""
    root = load(copy.ranks[0])
    stage = _osd(root).get("zero_stage")
    if stage is None or "ds_config" not in root:
        return None
    new = 1 if int(getattr(stage, "value", stage)) == 2 else 2
    for path in copy.ranks:
        edited(path, lambda root: _osd(root).update(zero_stage=new))
    return names_file(*copy.ranks, copy.folder, copy.model, parts=["stage"], warning=True)


@fault(RANK, ZERO)
def loss_scale_of_one_rank_changed(copy: Copy, rng: Random) -> Expectation | None:
    if not _has(copy, "loss_scaler", several=True):
        return None
    return _in_rank(
        copy, rng, lambda root: setattr(_osd(root)["loss_scaler"], "cur_scale", 12345.0), "loss_scaler"
    )


@fault(RANK, ZERO)
def loss_scale_impossible(copy: Copy, rng: Random) -> Expectation | None:
    """0, negative, NaN or Inf on all ranks: every gradient would be lost."""
    if not _has(copy, "loss_scaler"):
        return None
    scale = rng.choice([0.0, -1.0, float("nan"), float("inf")])
    for path in copy.ranks:
        edited(path, lambda root: setattr(_osd(root)["loss_scaler"], "cur_scale", scale))
    return names_file(*copy.ranks, copy.folder, parts=["loss_scaler", "cur_scale"], warning=True)


def _hyper(root: Any) -> Any:
    base = _osd(root)["base_optimizer_state"]
    return base["param_groups"] if isinstance(base, dict) else None


@fault(RANK, ZERO)
def lr_of_one_rank_changed(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2 or _hyper(load(copy.ranks[0])) is None:
        return None
    return _in_rank(copy, rng, lambda root: rng.choice(_hyper(root)).update(lr=123e-6), "param_groups", "lr")


@fault(RANK, ZERO)
def weight_decay_of_one_rank_changed(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2 or _hyper(load(copy.ranks[0])) is None:
        return None
    return _in_rank(
        copy, rng, lambda root: rng.choice(_hyper(root)).update(weight_decay=0.77), "param_groups"
    )


@fault(RANK, ZERO)
def lr_impossible(copy: Copy, rng: Random) -> Expectation | None:
    """Negative, NaN or Inf on all ranks."""
    if not _hyper(load(copy.ranks[0])):
        return None
    lr = rng.choice([-1e-3, float("nan"), float("inf")])
    for path in copy.ranks:
        edited(path, lambda root: _hyper(root)[0].update(lr=lr))
    return names_file(*copy.ranks, copy.folder, parts=["lr"], warning=True)


@fault(RANK, ZERO)
def step_of_one_rank_changed(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2 or _step_of(load(copy.ranks[0])) is None:
        return None

    def edit(root: Any) -> None:
        for own in _states(root):
            own["step"] = own["step"] + 1

    path = some_rank(copy, rng)
    return _in_rank(copy, rng, edit, "step", path=path)


@fault(RANK, ZERO)
def step_of_all_ranks_changed(copy: Copy, rng: Random) -> Expectation | None:
    if _step_of(load(copy.ranks[0])) is None:
        return None

    def edit(root: Any) -> None:
        for own in _states(root):
            own["step"] = own["step"] + 100

    for path in copy.ranks:
        edited(path, edit)
    return names_file(*copy.files, copy.folder, parts=["step"], warning=True)


@fault(RANK, ZERO)
def step_of_one_group_changed(copy: Copy, rng: Random) -> Expectation | None:
    """All ranks agree; two groups of one optimizer do not."""
    if sum("step" in own for own in _states(load(copy.ranks[0]))) < 2:
        return None

    def edit(root: Any) -> None:
        _states(root)[0]["step"] = _states(root)[0]["step"] + 100

    for path in copy.ranks:
        edited(path, edit)
    return names_file(*copy.files, copy.folder, parts=["step"], warning=True)


def _moment(copy: Copy, rng: Random, path: Path) -> tuple[int, str] | None:
    """A group's place in the state and a moment of it."""
    found = [
        (g, key)
        for g, own in enumerate(_states(load(path)))
        for key, value in own.items()
        if isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() > 2
    ]
    return pick(rng, found)


@fault(RANK, ZERO)
def moment_missing_on_one_rank(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None or len(copy.ranks) < 2:
        return None
    g, key = found
    return _in_rank(copy, rng, lambda root: _states(root)[g].pop(key), key, path=path)


@fault(RANK, ZERO)
def moment_missing_in_one_group(copy: Copy, rng: Random) -> Expectation | None:
    """On all ranks alike, while another group has it."""
    found = _moment(copy, rng, copy.ranks[0])
    groups = _states(load(copy.ranks[0]))
    if found is None or sum(found[1] in own for own in groups) < 2:
        return None
    g, key = found
    for path in copy.ranks:
        edited(path, lambda root: _states(root)[g].pop(key))
    return names_file(*copy.files, copy.folder, parts=[key], warning=True)


@fault(RANK, ZERO)
def second_moment_missing(copy: Copy, rng: Random) -> Expectation | None:
    """exp_avg without exp_avg_sq on all ranks and groups, by an optimizer with two betas."""
    root = load(copy.ranks[0])
    hyper = _hyper(root)
    # Lion has two betas and one moment, and says so nowhere: those that have eps are Adam's
    if not hyper or "eps" not in hyper[0] or not any("exp_avg_sq" in own for own in _states(root)):
        return None
    for path in copy.ranks:
        edited(path, lambda root: [own.pop("exp_avg_sq", None) for own in _states(root)])
    return names_file(*copy.files, copy.folder, parts=["exp_avg_sq"], warning=True)


@fault(RANK, ZERO)
def moment_of_wrong_size(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None:
        return None
    g, key = found

    def edit(root: Any) -> None:
        tensor = _states(root)[g][key]
        extra = torch.cat([tensor, tensor[:1], tensor[:2], torch.zeros(128)])
        _states(root)[g][key] = rng.choice([tensor[:1].clone(), extra])

    return _in_rank(copy, rng, edit, key, path=path)


@fault(RANK, ZERO)
def moment_of_wrong_size_on_all_ranks(copy: Copy, rng: Random) -> Expectation | None:
    found = _moment(copy, rng, copy.ranks[0])
    if found is None:
        return None
    g, key = found

    def edit(root: Any) -> None:
        _states(root)[g][key] = torch.cat([_states(root)[g][key], torch.zeros(200)])

    for path in copy.ranks:
        if key not in _states(load(path))[g]:
            return None
        edited(path, edit)
    return names_file(*copy.ranks, parts=[key])


@fault(RANK, ZERO)
def moment_of_wrong_dtype(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None:
        return None
    g, key = found
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32])

    def edit(root: Any) -> None:
        _states(root)[g][key] = _states(root)[g][key].to(dtype)

    return _in_rank(copy, rng, edit, key, path=path)


@fault(RANK, ZERO)
def moment_is_no_tensor(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    found = _moment(copy, rng, path)
    if found is None:
        return None
    g, key = found
    return _in_rank(copy, rng, lambda root: _states(root)[g].update({key: None}), key, path=path)


@fault(RANK, ZERO)
def state_of_one_group_missing(copy: Copy, rng: Random) -> Expectation | None:
    """An optimizer that has stepped, with no state for one group on one rank."""
    root = load(copy.ranks[0])
    if len(copy.ranks) < 2 or len(_states(root)) < 1 or _hyper(root) is None:
        return None
    path = some_rank(copy, rng)

    def edit(root: Any) -> None:
        state = _osd(root)["base_optimizer_state"]["state"]
        del state[rng.choice(list(state))]

    return _in_rank(copy, rng, edit, "group", path=path)


@fault(RANK, ZERO)
def partition_of_wrong_size(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    groups = _osd(load(path))["single_partition_of_fp32_groups"]
    g = pick(rng, (g for g, t in enumerate(groups) if t.numel() > 2))
    if g is None:
        return None

    def edit(root: Any) -> None:
        flat = _osd(root)["single_partition_of_fp32_groups"][g].detach()
        wrong = rng.choice([flat[: len(flat) // 2].clone(), torch.cat([flat, torch.zeros(128)])])
        _osd(root)["single_partition_of_fp32_groups"][g] = wrong

    edited(path, edit)
    return names_file(path, parts=["group", "rank"])


@fault(RANK, ZERO)
def partition_of_wrong_dtype(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    g = rng.randrange(len(_osd(load(path))["single_partition_of_fp32_groups"]))
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float64])

    def edit(root: Any) -> None:
        groups = _osd(root)["single_partition_of_fp32_groups"]
        groups[g] = groups[g].detach().to(dtype)

    edited(path, edit)
    return names_file(path, parts=["single_partition_of_fp32_groups"])


@fault(RANK, ZERO)
def group_missing_on_one_rank(copy: Copy, rng: Random) -> Expectation | None:
    path = some_rank(copy, rng)
    edited(path, lambda root: _osd(root)["single_partition_of_fp32_groups"].pop())
    return names_file(path, copy.folder, parts=["group", path.name, rank_of(path)])


@fault(RANK, ZERO)
def ds_config_of_one_rank_changed(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2 or "ds_config" not in load(copy.ranks[0]):
        return None

    def edit(root: Any) -> None:
        root["ds_config"]["train_batch_size"] = 7777

    return _in_rank(copy, rng, edit, "ds_config", warning=True)


@fault(RANK, ZERO)
def optimizer_state_dict_removed(copy: Copy, rng: Random) -> Expectation:
    path = some_rank(copy, rng)
    edited(path, lambda root: root.pop("optimizer_state_dict"))
    return names_file(path, parts=["optimizer_state_dict"])


def _rank_required(key: str) -> None:
    def lost(copy: Copy, rng: Random) -> Expectation | None:
        if not _has(copy, key):
            return None
        path = some_rank(copy, rng)
        edited(path, lambda root: _osd(root).pop(key))
        return names_file(path, *copy.ranks, parts=[key], warning=True)

    lost.__name__ = f"{key}_removed"
    fault(RANK, ZERO)(lost)


for _key in ("single_partition_of_fp32_groups", "base_optimizer_state", "partition_count", "zero_stage"):
    _rank_required(_key)


@fault(RANK, ZERO)
def client_state_changed(copy: Copy, rng: Random) -> Expectation:
    """What a program stores beside the weights: nobody else knows what it should be."""
    edited(copy.model, lambda root: root.update(note="changed"))
    return only_by_manifest(copy.model)
