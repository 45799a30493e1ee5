"""The model file: names, shapes, dtypes, what must be in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from ckpttools.containers import fields
from ckpttools.containers.torch_file import size
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.formats.deepspeed import excludes_frozen
from ckpttools.formats.found import contradiction, found, missing
from ckpttools.formats.model_states import ModelStates
from ckpttools.formats.zero.decode import version_numbers
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.tensors import TensorRef


def shapes(folder: ZeroFolder) -> Iterator[Finding]:
    """Every trainable parameter is in module, with the shape that the optimizer knows.

    One that was frozen after the engine was built is still the optimizer's, with its master, while
    exclude_frozen_parameters leaves it out of module.
    """
    model = folder.model
    stage = next((rank.stage for rank in folder.ranks if rank.stage is not None), 1)
    # stage 1 does not say so; and a name that is new there is the missing one's
    excluded = (
        stage > 1
        and excludes_frozen(model.root, model.weights, stage)
        and not _stray(model, folder, frozenset())
    )
    later = [name for group in folder.shapes for name in group if name not in model.weights and excluded]
    if later:
        yield found(
            "frozen-excluded",
            model.file.path,
            later[0],
            f"{len(later)} parameters that the optimizer holds are not in module: they were frozen after the "
            "engine was built and left out (exclude_frozen_parameters)",
            severity=WARNING,
            hint="their fp32 masters are here: DeepSpeed restores them with load_module_strict=False, and "
            "ckpt extract writes them",
        )
    for g, group in enumerate(folder.shapes):
        for name, shape in group.items():
            if name not in model.weights:
                if excluded:
                    continue
                yield found(
                    "tensor-missing",
                    model.file.path,
                    name,
                    f"a trainable parameter of group {g} is not in module",
                )
            elif model.weights[name].shape != shape:
                yield found(
                    "shape-mismatch",
                    model.file.path,
                    name,
                    f"{list(model.weights[name].shape)} in module, {list(shape)} in the optimizer",
                )


def frozen_shapes(folder: ZeroFolder) -> Iterator[Finding]:
    """frozen_param_shapes against module."""
    model = folder.model
    stated = fields.as_mapping(model.root.get("frozen_param_shapes"))
    for name, node in stated.named() if stated is not None else ():
        if name in model.weights and size(node) != model.weights[name].shape:
            yield found(
                "shape-mismatch",
                model.file.path,
                name,
                f"{list(model.weights[name].shape)} in module, {list(size(node))} stated",
            )


def dtypes(folder: ZeroFolder) -> Iterator[Finding]:
    """Trainable weights are floating point, and of one dtype in all but deliberate cases."""
    weights = folder.model.weights
    names = [name for group in folder.shapes for name in group if name in weights]
    common = Counter(weights[name].dtype.short for name in names).most_common(1)
    for name in names:
        dtype = weights[name].dtype
        if not dtype.is_float or dtype.short != common[0][0]:
            yield found(
                "dtype-odd",
                folder.model.file.path,
                name,
                f"a trained weight of {dtype}, where most are {common[0][0]}",
                severity=WARNING if dtype.is_float else ERROR,
            )


# what each layout's optimizer files hold, and since which DeepSpeed
_COMMON = {"partition_count": (0, 5), "group_paddings": (0, 7), "param_slice_mappings": (0, 7, 4)}
RANK_FIELDS: dict[str, dict[str, tuple[int, ...]]] = {
    "rigid": {"loss_scaler": (0, 3), "zero_stage": (0, 3), "ds_version": (0, 4), **_COMMON},
    "elastic": {"loss_scaler": (0, 3), "zero_stage": (0, 3), "ds_version": (0, 4), **_COMMON},
    "bf16_optimizer": {"ds_version": (0, 6, 2), **_COMMON},
}


def required_fields(folder: ZeroFolder) -> Iterator[Finding]:
    """What every DeepSpeed since 0.6 writes, and what must not contradict itself."""
    model, path = folder.model, str(folder.model.file.path)
    for name in ("global_steps", "dp_world_size", "ds_version", "buffer_names"):
        if name not in model.root:
            yield missing(path, name)
    for rank in folder.ranks:
        for name, since in RANK_FIELDS[rank.variant].items():
            if name not in rank.state and since <= version_numbers(rank.ds_version):
                yield missing(rank.file.path, f"optimizer_state_dict.{name}")
    for rank in folder.ranks:
        if rank.ds_version and model.ds_version and rank.ds_version != model.ds_version:
            where = f"saved by DeepSpeed {rank.ds_version}, the model file by {model.ds_version}"
            yield contradiction(rank.file.path, "ds_version", where)
        inner = rank.state.get("ds_version")
        if isinstance(inner, str) and rank.ds_version and inner != rank.ds_version:
            yield contradiction(rank.file.path, "optimizer_state_dict.ds_version", f"is {inner}")
        config = fields.as_mapping(rank.root.get("ds_config"))
        zero = fields.as_mapping(config.get("zero_optimization")) if config is not None else None
        stated = fields.integer(zero.get("stage")) if zero is not None else None
        if stated is not None and rank.stage is not None and stated != rank.stage:
            what = f"is {rank.stage}, while ds_config asks for stage {stated}"
            yield contradiction(rank.file.path, "zero_stage", what)


def module_names(folder: ZeroFolder) -> Iterator[Finding]:
    """Whatever module holds is trainable, frozen, shared or a buffer."""
    model = folder.model
    stray = _stray(model, folder, model.frozen)
    if stray:
        yield found(
            "tensor-unknown",
            model.file.path,
            stray[0],
            f"{len(stray)} tensors of module are neither trainable, frozen, shared nor buffers",
            severity=INFO if model.root.get("frozen_param_shapes") is None else WARNING,
            hint="",
        )
    dropped = sorted(name for name in model.frozen if name not in model.weights)
    if dropped and len(dropped) < len(model.frozen):
        yield found(
            "tensor-missing",
            model.file.path,
            dropped[0],
            f"{len(dropped)} frozen parameters are not in module, while others are",
        )
    elif dropped:
        yield found(
            "frozen-excluded",
            model.file.path,
            dropped[0],
            f"{len(dropped)} frozen parameters are not in module (exclude_frozen_parameters)",
            severity=INFO,
            hint="",
        )
    for name in sorted(model.buffers - model.weights.keys()):
        yield found(
            "buffer-missing",
            model.file.path,
            name,
            "listed as a buffer, and not in module",
            severity=WARNING,
            hint="",
        )


def _stray(model: ModelStates, folder: ZeroFolder, frozen: frozenset[str]) -> list[str]:
    known = {name for group in folder.shapes for name in group}
    known |= frozen | model.buffers | set(model.shared)
    return [name for name in model.weights if name not in known and not name.endswith("_extra_state")]


def tied_weights(folder: ZeroFolder) -> Iterator[Finding]:
    """shared_params: an alias is its owner's tensor; the owner may be left out, as a frozen parameter is."""
    model = folder.model
    stated = fields.as_mapping(model.root.get("shared_params"))
    known = {name for group in folder.shapes for name in group} | model.weights.keys()
    # stage 2 writes frozen_param_shapes, unless exclude_frozen_parameters was asked for
    all_named = fields.as_mapping(model.root.get("frozen_param_shapes")) is not None
    for alias, owner in stated.named() if stated is not None else ():
        weight = model.weights.get(alias)
        if owner not in known:
            twins = weight is not None and weight.numel and _same_bytes(model.weights, alias)
            if all_named or twins:
                what = f", and is {twins[0]}" if twins else ""
                message = f"tied to {owner}, which does not exist{what}"
                yield found("tied-mismatch", model.file.path, alias, message)
            elif weight is not None:
                yield found(
                    "frozen-excluded",
                    model.file.path,
                    alias,
                    f"stands for {owner}, which is not in module (exclude_frozen_parameters)",
                    severity=INFO,
                    hint="",
                )
        elif weight is not None and isinstance(owner, str) and owner in model.weights:
            other = model.weights[owner]
            if (weight.shape, weight.dtype) != (other.shape, other.dtype):
                yield found(
                    "tied-mismatch",
                    model.file.path,
                    alias,
                    f"tied to {owner}, which has another shape or dtype",
                )


def _same_bytes(weights: Mapping[str, TensorRef], alias: str) -> list[str]:
    """The other names of one tensor: torch.save writes what shares a storage once."""
    own = weights[alias]
    return [name for name, ref in weights.items() if name != alias and ref.chunks == own.chunks]


def strays(folder: ZeroFolder) -> Iterator[Finding]:
    """Files that DeepSpeed takes for its own by a pattern: `mp_rank_*_model_states.pt` on a load, and
    `*_optim_states.pt` in zero_to_fp32.
    """
    for path in folder.files.others:
        if fnmatchcase(path.name, "mp_rank_*_model_states.pt"):
            yield found(
                "shard-extra",
                path,
                "",
                "DeepSpeed takes it for a second model file, and fails to load: it then counts two "
                "model-parallel ranks",
                hint="move it out of the folder, or rename it so that it does not end in model_states.pt",
            )
        elif path.name.endswith("_optim_states.pt"):
            yield found(
                "shard-extra",
                path,
                "",
                "zero_to_fp32 takes it for one rank more, and fails",
                severity=WARNING,
                hint="move it out of the folder",
            )
