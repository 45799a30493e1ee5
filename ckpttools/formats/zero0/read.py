"""Reading the one file of a stage 0 folder: weights, masters, the optimizer with names, counters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import FP32, Checkpoint, Layout, ParamGroup, common_dtype
from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import torch_optimizer
from ckpttools.formats.buffers import untrained
from ckpttools.formats.deepspeed import (
    NEW_SCALER,
    SLICED,
    client,
    counters,
    excludes_frozen,
    module_of,
    names_of,
    optimizer_class,
    settings_of,
    shapes_of,
    slices,
)
from ckpttools.formats.model_states import refuse_experts
from ckpttools.formats.rank_files import TagFolder, role_of, roles_of_others, unchecked
from ckpttools.formats.ties import tied
from ckpttools.location import Location
from ckpttools.tensors import Flat, TensorRef
from ckpttools.tree import Value

OPTIMIZER, INNER = "optimizer", "optimizer_state_dict"
SHAPES, FROZEN = "param_shapes", "frozen_param_shapes"
MASTERS = ("fp32_groups", "fp32_groups_flat")  # tensors of each group, or one vector of each
# of the wrapper in fp16 and bf16, whose names for them are the scaler's
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
DYNAMIC = "dynamic_loss_scale"
CONFIGURED = {"min_scale": "min_loss_scale", "delayed_shift": "hysteresis", "cur_hysteresis": "hysteresis"}


class Stage0(Struct, frozen=True):
    """The model file, as it was read."""

    file: TorchFile
    root: fields.Mapping


def read(folder: Location) -> Checkpoint:
    """Read a tag folder. Raises Unsupported where the optimizer is in no file."""
    found = TagFolder(folder)
    if not found.models:
        raise _no_optimizer(folder, folder)
    file = read_torch_file(found.models[0])
    root = fields.mapping(file.path, file.value, "the file's value")
    refuse_experts(file.path, root)
    if root.get(OPTIMIZER) is None:
        raise _no_optimizer(folder, file.path)
    tensors, extra = module_of(file, root)
    shared = tied(tensors)
    stated = shapes_of(file.path, root.get(FROZEN), FROZEN) if root.get(FROZEN) is not None else {}
    named = names_of(root.get("buffer_names"))
    buffers = named - stated.keys()
    params = {name: ref for name, ref in tensors.items() if name not in buffers}
    order = _order(file, root)
    groups, problem = _groups(file, root, params, shared, order)
    trained = {name for group in groups for name in group.params}
    frozen = frozenset(stated) & params.keys() if order else untrained(params, trained, shared)[0]
    settings = settings_of(file, root)
    notes = [*unchecked([file]), *slices(root.get(SLICED))]
    values = client(file, root)
    if problem is not None:
        notes.append(f"the optimizer's state has no names: {problem}; --to pt alone carries it, as it is")
        values |= {OPTIMIZER: decode(file, root.get(OPTIMIZER))}
    version = root.get("ds_version")
    ranks = fields.ranks(file.path, root.get("dp_world_size"), "dp_world_size")
    return Checkpoint(
        path=folder,
        layout=Layout(
            format="zero0",
            zero_stage=0,
            ranks=ranks,
            dp_degree=ranks or 1,
            tag=folder.name,
            dtype=common_dtype({name: tensors[name] for name in trained or params}),
            writer=f"DeepSpeed {version if isinstance(version, str) else '(version not recorded)'}",
        ),
        tensors=tensors,
        groups=groups,
        training=counters(file, root),
        shared=shared,
        frozen=frozen,
        buffers=buffers & tensors.keys(),
        roles_guessed=not named.isdisjoint(stated.keys() & tensors.keys()),
        left_out={name: shape for name, shape in stated.items() if name not in tensors},
        excludes_frozen=excludes_frozen(root, tensors, 0),
        extra_state=extra,
        files=(
            role_of(file, "weights, the whole optimizer, counters, client state"),
            *roles_of_others(found.others),
        ),
        checks=tuple(file.checks()),
        notes=tuple(notes),
        optimizer=optimizer_class(settings),
        loss_scaler=_loss_scaler(file, root.get(OPTIMIZER), settings.get("fp16")),
        client=values,
        settings=settings,
        template=Stage0(file, root),
    )


def _loss_scaler(file: TorchFile, wrapper: Node, config: Value) -> Mapping[str, Value]:
    """The scaler that the other stages have for the same: what the wrapper keeps of it, the rest as ds_config
    has it, or as DeepSpeed begins.
    """
    known = {key: decode(file, value) for key in SCALE if (value := at(wrapper, key)) is not None}
    if at(wrapper, DYNAMIC) is True:
        return {**first_scaler(config), **known}
    scale = known.get("cur_scale", 1)
    return {"class": "LossScaler", "cur_scale": scale, "dynamic": False} if scale != 1 else {}


def first_scaler(config: Value) -> dict[str, Value]:
    """The scaler that a run with such an fp16 section of ds_config begins with."""
    stated = config if isinstance(config, Mapping) else {}
    asked = {key: stated[name] for key, name in CONFIGURED.items() if isinstance(stated.get(name), int)}
    return {**NEW_SCALER, **asked}


def _no_optimizer(folder: Location, where: Location) -> CkptError:
    return Unsupported(
        "no-optimizer-shards",
        "there are no *_optim_states.pt files",
        where=folder,
        why="either the optimizer shards were not copied, or this is of ZeRO stage 0 without an optimizer",
        hint=f"the weights alone can be read: ckpt extract {escape(where)} --weights-only",
        layout="zero0",
    )


def _order(file: TorchFile, root: fields.Mapping) -> list[list[str]] | None:
    """The names of each group's parameters: only files that are written here say them."""
    shapes = root.get(SHAPES)
    if not isinstance(shapes, list):
        return None
    return [[*shapes_of(file.path, node, f"{SHAPES}[{g}]")] for g, node in enumerate(shapes)]


def _groups(
    file: TorchFile,
    root: fields.Mapping,
    params: Mapping[str, TensorRef],
    shared: Mapping[str, str],
    order: list[list[str]] | None,
) -> tuple[tuple[ParamGroup, ...], str | None]:
    """The parameter groups with masters; or why their parameters have no names."""
    node = root.get(OPTIMIZER)
    path = (OPTIMIZER, INNER) if at(node, INNER) is not None else (OPTIMIZER,)
    flat = decode(file, at(node, MASTERS[1]))
    if isinstance(flat, list):
        return _fused(decode(file, at(file.value, *path)), flat, params, shared, order)
    saved = torch_optimizer.read(file, params, shared, order, path)
    if saved is None or saved.problem is not None:
        return (), saved.problem if saved is not None else "it is not one of torch.optim"
    masters = decode(file, at(node, MASTERS[0]))
    if masters is None:
        return saved.groups, None
    lists = masters if isinstance(masters, list) else []
    if [[*map(_shape, each)] if isinstance(each, list) else None for each in lists] != [
        [*group.params.values()] for group in saved.groups
    ]:
        raise fields.bad_field(file.path, "optimizer.fp32_groups", "is not of the optimizer's parameters")
    return tuple(
        replace(group, state={FP32: dict(zip(group.params, refs, strict=True)), **group.state})
        for group, refs in zip(saved.groups, lists, strict=True)
    ), None


def _shape(value: Value) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, TensorRef) else None


def _fused(
    saved: Value,
    flat: list[Value],
    params: Mapping[str, TensorRef],
    shared: Mapping[str, str],
    order: list[list[str]] | None,
) -> tuple[tuple[ParamGroup, ...], str | None]:
    """One flat vector for each group: known where the names are, or where one holds the whole model in its
    order.
    """
    settings = saved.get("param_groups") if isinstance(saved, dict) else None
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(settings, list) or not isinstance(state, dict) or len(settings) != len(flat):
        return (), "it is not one of torch.optim"
    names = order or [[n for n, ref in params.items() if n not in shared and ref.dtype.is_float]]
    models = [{name: params[name].shape for name in group if name in params} for group in names]
    if [(sum(map(math.prod, model.values())),) for model in models] != [*map(_shape, flat)]:
        return (), "the masters of a group are one flat vector, and which parameters it holds is not said"
    return tuple(
        _cut(model, master, state.get(number), hyper)
        for number, (model, master, hyper) in enumerate(zip(models, flat, settings, strict=True))
    ), None


def _cut(model: Mapping[str, tuple[int, ...]], master: Value, state: Value, hyper: Value) -> ParamGroup:
    """The group of one flat vector, and of vectors of the same length in its state."""
    starts, numel = {}, 0
    for name, shape in model.items():
        starts[name], numel = numel, numel + math.prod(shape)

    def cut(ref: TensorRef) -> dict[str, TensorRef]:
        whole = Flat(ref)
        return {name: whole.cut(starts[name], math.prod(model[name]), model[name]) for name in model}

    held = {FP32: master, **{str(k): v for k, v in (state.items() if isinstance(state, dict) else ())}}
    return ParamGroup(
        params=model,
        state={str(k): cut(v) for k, v in held.items() if isinstance(v, TensorRef) and v.shape == (numel,)},
        scalars={str(k): dict.fromkeys(model, v) for k, v in held.items() if _shape(v) != (numel,)},
        hyper={k: v for k, v in (hyper if isinstance(hyper, dict) else {}).items() if k != "params"},
    )
