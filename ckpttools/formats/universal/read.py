"""Reading a universal checkpoint: headers of every parameter's files, joined into one logical checkpoint.

`tensors` are the weights as the model file has them; of one that was made from ZeRO-3, which has none, the
master weights rounded to the engine's dtype, as it makes them itself on every load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import FP32, STEP, Checkpoint, FileRole, Layout, ParamGroup, common_dtype
from ckpttools.containers import fields
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, escape
from ckpttools.formats.deepspeed import loss_scaler
from ckpttools.formats.model_states import ModelStates, Shapes, described, frozen_weights, read_stated
from ckpttools.formats.rank_files import role_of
from ckpttools.formats.universal.decode import Settings, State, read_settings, read_state
from ckpttools.formats.universal.names import SETTINGS, ZERO, UniversalFiles, find
from ckpttools.location import Location
from ckpttools.stores.files import size_of
from ckpttools.tensors import FLOAT32, TensorRef
from ckpttools.tree import Value

T = TypeVar("T")
ONE_SAVE = "copy the whole folder again from where it was made, or convert the ZeRO folder anew"
Report = Callable[[CkptError], None]


class Attempt(Protocol):
    def __call__(self, path: Location, action: Callable[[], T]) -> T | None: ...


class Universal(Struct, frozen=True, kw_only=True):
    """A whole tag folder, decoded. `models` are that of stages 1 and 2 where there is one, then those of
    stage 3 by rank; `states` what was read, by parameter and kind.
    """

    files: UniversalFiles
    models: tuple[ModelStates, ...]
    settings: Settings
    shapes: tuple[Shapes, ...]  # per parameter group
    members: tuple[tuple[int, ...], ...] | None  # per parameter group: its sub-groups of ZeRO-3
    states: Mapping[str, Mapping[str, State]]

    @property
    def torch_files(self) -> Iterator[TorchFile]:
        yield from (model.file for model in self.models)
        yield self.settings.file
        yield from (state.file for kinds in self.states.values() for state in kinds.values())


def read(folder: Location) -> Checkpoint:
    """Read a tag folder. Raises CkptError where a file is missing, damaged or contradicts the others."""

    def refuse(error: CkptError) -> None:
        raise error

    found = assemble(find(folder), lambda path, action: action(), refuse)
    assert found is not None  # else something was refused
    return checkpoint(found)


def assemble(files: UniversalFiles, attempt: Attempt, report: Report) -> Universal | None:
    """Every file decoded and fit together; None where so much is wrong that there is nothing to fit.

    `attempt` reads the file at a path, and returns None where it has reported that it cannot be; what
    `report` returns from leaves a hole.
    """
    paths = [*([files.model] if files.model is not None else []), *files.stage3.values()]
    read_models = [attempt(p, lambda p=p: read_stated(p)) for p in paths]  # type: ignore[misc]
    models = tuple(model for model in read_models if model is not None)
    if files.settings is None:
        report(_no_settings(files))
        return None
    at = files.settings
    settings = attempt(at, lambda: read_settings(at))
    if settings is None or len(models) < len(paths):
        return None
    grouped = attempt(at, lambda: _grouped(models[0], settings))
    if grouped is None:
        return None
    shapes, members = grouped
    states: dict[str, dict[str, State]] = {}
    for group in shapes:
        kinds = dict.fromkeys(kind for name in group for kind in files.params.get(name, ()))
        for name, shape in group.items():
            held = states.setdefault(name, {})
            for kind in (FP32, *(k for k in kinds if k != FP32)):
                path = files.params.get(name, {}).get(kind)
                if path is None:
                    report(_no_state(files, name, kind))
                elif state := attempt(path, lambda p=path, k=kind: read_state(p, k)):  # type: ignore[misc]
                    wrong = _wrong_size(state, name, shape, kind)
                    if wrong is None:
                        held[kind] = state
                    else:
                        report(wrong)
    return Universal(
        files=files, models=models, settings=settings, shapes=shapes, members=members, states=states
    )


def _grouped(
    model: ModelStates, settings: Settings
) -> tuple[tuple[Shapes, ...], tuple[tuple[int, ...], ...] | None]:
    """The parameters of each group, from the sub-groups of ZeRO-3 where the model file lists those."""
    members = settings.members
    if members is not None:
        if sorted(s for group in members for s in group) != list(range(len(model.shapes))):
            raise fields.bad_field(
                settings.file.path,
                "param_groups",
                f"does not name each of the {len(model.shapes)} sub-groups once",
            )
        shapes = tuple({n: x for s in group for n, x in model.shapes[s].items()} for group in members)
    else:
        shapes = tuple(dict(group) for group in model.shapes)
    if len(shapes) != len(settings.groups):
        raise CkptError(
            "group-count",
            f"the model file describes {len(shapes)} parameter groups, {SETTINGS} {len(settings.groups)}",
            where=settings.file.path,
            why="the files do not belong to one save",
            hint=ONE_SAVE,
        )
    return shapes, members


def _no_settings(files: UniversalFiles) -> CkptError:
    return CkptError(
        "shard-missing",
        f"there is no {ZERO}/{SETTINGS}",
        where=files.folder / ZERO / SETTINGS,
        why="the settings of the parameter groups are in that file, and DeepSpeed does not load without it",
        hint=ONE_SAVE,
    )


def _no_state(files: UniversalFiles, name: str, kind: str) -> CkptError:
    lost = "its master weights are lost" if kind == FP32 else "other parameters of its group have it"
    return CkptError(
        "tensor-missing" if kind == FP32 else "moment-missing",
        f"{escape(name)} has no {escape(kind)}",
        where=files.place(name, kind),
        why=lost,
        hint=ONE_SAVE,
    )


def _wrong_size(state: State, name: str, shape: tuple[int, ...], kind: str) -> CkptError | None:
    ref = state.value
    if kind == STEP or not isinstance(ref, TensorRef):
        return None
    numel = math.prod(shape)
    if ref.shape == shape or (len(ref.shape) == 1 and ref.numel == numel):
        return None
    return CkptError(
        "shape-mismatch" if kind == FP32 else "moment-size",
        f"{escape(kind)} of {escape(name)} is {list(ref.shape)}, where the parameter is {list(shape)}",
        where=state.file.path,
        why="the file is of another model, or was cut short",
        hint=ONE_SAVE,
    )


def checkpoint(found: Universal) -> Checkpoint:
    """The whole; what was not found is not in it."""
    model, settings = found.models[0], found.settings
    tensors = _tensors(found)
    layout = Layout(
        format="universal",
        zero_stage=settings.stage,
        ranks=model.dp_world_size,
        dp_degree=model.dp_world_size or 1,
        tag=found.files.folder.name,
        dtype=common_dtype({n: tensors[n] for group in found.shapes for n in group if n in tensors}),
        writer=f"DeepSpeed {model.ds_version or '(version not recorded)'}",
    )
    return replace(
        described(model, tensors, layout, settings.stage or 2),
        frozen=_frozen(found, tensors),
        groups=tuple(_group(found, g) for g in range(len(found.shapes))),
        files=tuple(_roles(found)),
        checks=tuple(check for file in found.torch_files for check in file.checks()),
        notes=tuple(_notes(found)),
        loss_scaler=loss_scaler(settings.file, settings.root.get("loss_scaler")),
        template=found,
    )


def _frozen(found: Universal, tensors: Mapping[str, TensorRef]) -> frozenset[str]:
    """As stated; stage 1 states none: whatever module holds beside the rest."""
    model = found.models[0]
    if model.root.get("frozen_param_shapes") is not None:
        return model.frozen & tensors.keys()
    trained = {name for group in found.shapes for name in group}
    return frozenset(tensors.keys() - trained - model.buffers - model.shared.keys())


def _tensors(found: Universal) -> dict[str, TensorRef]:
    """Every name of module in its order, then trained parameters that it lacks."""
    model = found.models[0]
    if found.files.model is not None:
        return dict(model.weights)
    masters = {
        name: _whole(found, name, FP32, shape)
        for group in found.shapes
        for name, shape in group.items()
        if FP32 in found.states[name]
    }
    # from the ranks' parts, where the files of all ranks are there
    everyone = list(found.files.stage3) == list(range(model.dp_world_size or 1))
    frozen = frozen_weights(found.models) if everyone else {}
    dtype = next((model.weights[name].dtype for name in masters if name in model.weights), FLOAT32)
    out: dict[str, TensorRef] = {}
    for name, ref in model.weights.items():
        owner = model.shared.get(name, name)
        if owner in masters:
            out[name] = masters[owner].cast(ref.dtype)
        elif owner in frozen or owner in model.buffers or owner not in model.frozen:
            out[name] = frozen.get(owner, ref)
    return out | {name: ref.cast(dtype) for name, ref in masters.items() if name not in out}


def _group(found: Universal, g: int) -> ParamGroup:
    params = found.shapes[g]
    state: dict[str, dict[str, TensorRef]] = {}
    scalars: dict[str, dict[str, Value]] = {}
    for name, shape in params.items():
        for kind, each in found.states[name].items():
            if kind == STEP:
                scalars.setdefault(kind, {})[name] = each.value
            else:
                state.setdefault(kind, {})[name] = _whole(found, name, kind, shape)
    if found.members is not None and STEP not in scalars:
        model, steps = found.models[0], found.settings.steps
        made = {n: steps[s] for s in found.members[g] for n in model.shapes[s] if steps[s] is not None}
        scalars |= {STEP: made} if made else {}
    return ParamGroup(params=params, state=state, scalars=scalars, hyper=found.settings.groups[g])


def _whole(found: Universal, name: str, kind: str, shape: tuple[int, ...]) -> TensorRef:
    ref = found.states[name][kind].value
    assert isinstance(ref, TensorRef)  # all but step are
    return ref if ref.shape == shape else ref.view(shape)


def _roles(found: Universal) -> Iterator[FileRole]:
    for model in found.models:
        of = "weights, buffers" if model.file.path == found.files.model else "for stage 3: shapes, buffers"
        yield role_of(model.file, f"{of}, counters, client state")
    yield role_of(found.settings.file, "settings of the parameter groups, loss scaler")
    for name, kinds in found.states.items():
        for kind, state in kinds.items():
            what = {FP32: "fp32 master weights", STEP: "the optimizer's step"}.get(kind, escape(kind))
            yield role_of(state.file, f"{what} of {escape(name)}")
    for path in found.files.others:
        yield FileRole(path=path, nbytes=size_of(path), role="not part of the universal layout")


def _notes(found: Universal) -> Iterator[str]:
    without = [f.path.name for f in found.torch_files if f.archive is None or not f.has_checksums]
    if without:
        yield f"{len(without)} files have no checksums, the first {escape(without[0])}"
    model = found.models[0]
    lost = [name for name in (*model.frozen_shapes, *sorted(model.buffers)) if not name.startswith("_")]
    if lost:
        yield (
            f"load_universal restores neither frozen parameters nor buffers: {len(lost)} of them, the first "
            f"{escape(lost[0])}"
        )
