"""Writing a universal checkpoint from the Checkpoint alone: one folder for the stages 1, 2 and 3.

Both model files are written, of which each stage reads its own, and settings and step stand where each looks
for them. Stage 3 gives the settings of the first group to all: there the file has what all groups share, so
that the others keep those that the new run's own optimizer was made with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from ckpttools.checkpoint import FP32, STEP, Checkpoint, Layout, ParamGroup
from ckpttools.containers.nodes import encode
from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.containers.torch_file import tensor_node, write_torch_file
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats.cutting import equal, no_groups
from ckpttools.formats.deepspeed import ADAM, STAGE, new_root, new_scaler, version_of
from ckpttools.formats.notes import unsaid
from ckpttools.formats.rank_files import MODEL_NAME
from ckpttools.formats.universal.decode import PARAM
from ckpttools.formats.universal.names import SETTINGS, STAGE3_NAME, SUFFIX, ZERO, folder_of
from ckpttools.plan import OutputFile, Plan
from ckpttools.tensors import FLOAT32, TensorRef
from ckpttools.tree import Value


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    """The files of a tag folder. `layout` says nothing that it can show: any number of ranks loads it.

    Raises Unsupported for state that is not of its parameter's shape, and names that cannot be folders.
    """
    if not checkpoint.groups:
        raise no_groups(checkpoint, "a universal checkpoint")
    states = [file for group in checkpoint.groups for file in _group(checkpoint, group)]
    files = (
        write_torch_file(MODEL_NAME, _model(checkpoint, whole=True)),
        write_torch_file(STAGE3_NAME, _model(checkpoint, whole=False)),
        write_torch_file(f"{ZERO}/{SETTINGS}", _settings(checkpoint)),
        *states,
    )
    return Plan(files=files, notes=tuple(_notes(checkpoint)), checks=checkpoint.checks)


# --- parameters -----------------------------------------------------------------------------------------


def _group(checkpoint: Checkpoint, group: ParamGroup) -> Iterator[OutputFile]:
    """The files of all parameters of a group."""
    for kind in dict.fromkeys((*group.state, *group.scalars)):
        if group.paths.get(kind, (kind,)) != (kind,):
            raise _unfit(checkpoint, kind, "is nested, and load_universal sets it by a single name")
        if kind in group.scalars and kind != STEP:  # the optimizer would stop without it
            raise _unfit(checkpoint, kind, "is no tensor of its parameter's shape")
        folder_of(kind, checkpoint.path)
    steps = group.scalars.get(STEP, {})
    first = next(iter(steps.values()), None)
    for name, shape in group.params.items():
        place = f"{ZERO}/{folder_of(name, checkpoint.path)}"
        kinds = {FP32: _master(checkpoint, group, name)}
        kinds |= {kind: refs[name] for kind, refs in group.state.items() if kind != FP32 and name in refs}
        for kind, ref in kinds.items():
            if ref.numel != math.prod(shape) or not ref.dtype.is_float:
                raise _unfit(checkpoint, kind, f"of {name} is {ref.dtype.short} {list(ref.shape)}")
            node = Dict.of([("cat_dim", 0), (PARAM, tensor_node(ref.view(shape)))])
            yield write_torch_file(f"{place}/{kind}{SUFFIX}", node)
        if name in steps:
            if not equal(steps[name], first):
                raise _unfit(checkpoint, STEP, "differs between the parameters of a group")
            yield write_torch_file(f"{place}/{STEP}{SUFFIX}", encode(steps[name], {}))
    for kind, refs in (*group.state.items(), (STEP, steps)):
        lacking = next((name for name in group.params if name not in refs), None)
        if lacking is not None and refs and kind != FP32:
            raise Unsupported(
                "state-incomplete",
                f"{escape(lacking)} has no '{escape(kind)}', which other parameters of its group have",
                where=checkpoint.path,
                why="load_universal joins a group's state, and stops at a parameter without it",
                hint="never trained, or of a shape for which its class keeps other state? "
                "--reset-optimizer leaves the state out",
            )


def _master(checkpoint: Checkpoint, group: ParamGroup, name: str) -> TensorRef:
    found = group.state.get(FP32, {}).get(name)
    if found is not None:
        return found
    if name not in checkpoint.tensors:
        raise _unfit(checkpoint, FP32, f"is missing for {name}")
    return checkpoint.tensors[name].cast(FLOAT32)


def _unfit(checkpoint: Checkpoint, kind: str, problem: str) -> CkptError:
    return Unsupported(
        "state-not-flat",
        f"optimizer state '{escape(kind)}' {escape(problem)}",
        where=checkpoint.path,
        why="load_universal takes tensors of the parameter's shape by name, and one step for a group",
        hint="convert to a format that keeps state per parameter (pt, dcp), or --reset-optimizer",
    )


# --- settings -------------------------------------------------------------------------------------------


def _settings(checkpoint: Checkpoint) -> Dict:
    groups = [{**group.hyper, "params": [g]} for g, group in enumerate(checkpoint.groups)]
    steps = checkpoint.groups[0].scalars.get(STEP, {})
    # stage 3 takes the step of the first group for all
    state = {0: {STEP: next(iter(steps.values()))}} if steps else {}
    scaler, stage = checkpoint.loss_scaler, checkpoint.layout.zero_stage
    values: dict[str, Node] = {
        "loss_scaler": new_scaler(scaler),
        "dynamic_loss_scale": scaler.get("class") == "DynamicLossScaler",
        "overflow": False,
        **({"zero_stage": Object("reduce", STAGE, (stage,))} if stage is not None else {}),
        "ds_version": version_of(checkpoint),
        "param_groups": encode(groups),
        "optimizer_state_dict": encode(
            {"state": state, "param_groups": [{**shared_settings(checkpoint.groups), "params": [0]}]}, {}
        ),
    }
    return Dict.of(values.items())


def shared_settings(groups: Iterable[ParamGroup]) -> dict[str, Value]:
    """The settings that all groups have alike."""
    every = [group.hyper for group in groups]
    return {
        key: value
        for key, value in every[0].items()
        if all(key in other and equal(value, other[key]) for other in every[1:])
    }


# --- model files ----------------------------------------------------------------------------------------


def _model(checkpoint: Checkpoint, *, whole: bool) -> Dict:
    """The model file of stages 1 and 2, or that of stage 3, whose parameters have no elements."""
    tensors = {
        name: ref if whole or name in checkpoint.buffers else TensorRef(ref.dtype, (0,), ())
        for name, ref in checkpoint.tensors.items()
    }
    return new_root(checkpoint, tensors, ranks=checkpoint.layout.dp_degree, settings=checkpoint.settings)


# --- what it cannot hold, or its loader does not read ---------------------------------------------------


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    yield from unsaid(checkpoint)
    kinds = {kind for group in checkpoint.groups for kind in group.state} - {FP32}
    if kinds != ADAM:
        held = ", ".join(map(escape, sorted(kinds))) or "none"
        yield f"stages 1 and 2 alone load it: stage 3 takes exp_avg and exp_avg_sq, the state here is {held}"
    shared = shared_settings(checkpoint.groups)
    differ = dict.fromkeys(k for group in checkpoint.groups for k in group.hyper if k not in shared)
    if differ:
        yield f"stage 3 loads the settings that all groups share: {', '.join(map(escape, differ))} are apart"
    trained = (group for group in checkpoint.groups if group.params)
    steps = [next(iter(group.scalars.get(STEP, {}).values()), None) for group in trained]
    if not all(equal(step, steps[0]) for step in steps):
        yield "stage 3 loads one step for all, the first group's, and the groups' steps differ"
    lost = [n for n in checkpoint.tensors if n in checkpoint.frozen | checkpoint.buffers]
    if lost:
        yield (
            f"load_universal restores neither frozen parameters nor buffers ({len(lost)}, the first "
            f"{escape(lost[0])}): load them into the model first, as below"
        )
