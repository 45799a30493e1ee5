"""What a DeepSpeed folder saved, as its loader looks at it: any ZeRO stage, headers of rank 0 only.

Stages 1 and 2 keep the optimizer in `*_optim_states.pt` (`base_optimizer_state`), stage 3 likewise
(`optimizer_state_dict`), stage 0 in the model file (`optimizer`): torch's own dict in fp32, with scales and
masters around it in 16 bit. Source: deepspeed/runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.pickles import Node, Object, plain
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats.deepspeed import excludes_frozen, stage_of
from ckpttools.formats.model_states import read_model
from ckpttools.formats.rank_files import (
    MODEL,
    OPTIM,
    STAGE3_MODEL,
    refuse_other_layouts,
    tensor_parallel,
)
from ckpttools.location import Location
from ckpttools.resume.model import Shape, Tensor
from ckpttools.stores.files import entries, is_folder

STAGE3 = re.compile(r"zero_pp_rank_0_mp_rank_00_model_states\.pt")


class Saved(Struct, frozen=True, kw_only=True):
    """A saved engine. `groups` are trainable parameters by name, per group, in flat order."""

    folder: Location
    place: Location  # what a command is to name: the folder, or the checkpoint that it is a part of
    tensors: Mapping[str, Tensor]
    buffers: frozenset[str]
    frozen: frozenset[str]
    fragments: frozenset[str] | None  # frozen parameters that have a copy; None: DeepSpeed looks for none
    left_out: tuple[str, ...] | None  # by exclude_frozen_parameters, as far as names tell; None: nothing
    shared: Mapping[str, str]
    groups: tuple[Mapping[str, Shape], ...]
    ranks: int
    stage: int
    dtype: str  # "bf16", "fp16" or "fp32"
    prefix: str  # of the optimizer files: "bf16_" or ""
    whole: str | None  # stage 0: "torch" or "scaled", how the optimizer is kept; None: it is not
    variant: str  # "rigid", "bf16_optimizer" or "elastic"
    hyper: tuple[Mapping[str, object], ...]
    counts: tuple[int, ...]  # per group, its parameters as the optimizer sees them: one flat one under ZeRO
    state: tuple[frozenset[str] | None, ...]  # per group, the names in its state; None: no entry at all
    gaps: tuple[tuple[int, ...], ...] | None
    clip: float | None
    scaled: bool  # a loss scaler is saved
    scheduler: Mapping[str, object] | None
    step: int | None
    samples: int | None
    skipped: int
    config: Mapping[str, object]
    version: str | None
    client: Mapping[str, object]  # the top level's plain values: epoch, config ...

    @property
    def trainable(self) -> list[str]:
        return [name for group in self.groups for name in group]


def is_engine(folder: Location) -> bool:
    """Whether a folder holds the model file of a saved engine that is not tensor or pipeline parallel."""
    names = {entry.name for entry in entries(folder)} if is_folder(folder) else set()
    return any(STAGE3.fullmatch(n) or n == "mp_rank_00_model_states.pt" for n in names)


def read_saved(folder: Location) -> Saved:
    """Decode the model file and rank 0's optimizer file of a folder that `is_engine`.

    Raises CkptError where they are damaged, Unsupported for pipeline, expert and tensor parallel folders.
    """
    names = sorted(entry.name for entry in entries(folder))
    for name in names:
        if not STAGE3_MODEL.fullmatch(name):
            refuse_other_layouts(folder, name)
    stage3 = [n for n in names if STAGE3.fullmatch(n)]
    models = stage3 or [n for n in names if MODEL.fullmatch(n)]
    shards = [(n, m) for n in names if (m := OPTIM.fullmatch(n)) and int(m["dp"]) == 0]
    if len(models) > 1:
        raise tensor_parallel(folder)
    try:
        model = read_model(folder / models[0])
    except Unsupported as error:
        if error.layout != "pipeline":
            raise
        # a pipeline's model file is empty, but a pipeline's folder was refused above
        raise CkptError(
            "field-missing",
            "the model file's module is empty, and no layer has a file of its own",
            where=folder / models[0],
            why="DeepSpeed finds no weights to load",
            hint="use an older checkpoint",
        ) from None
    root = model.root
    config = _plain(root.get("ds_config"))
    optimizer: Node = root.get("optimizer")
    state: fields.Mapping | None = None
    if shards:
        file = read_torch_file(folder / shards[0][0])
        top = fields.mapping(file.path, file.value, "the file's value")
        state = fields.mapping(file.path, top.get("optimizer_state_dict"), "optimizer_state_dict")
        config = config or _plain(top.get("ds_config"))
        optimizer = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    stage = 3 if stage3 else (_stage(state, config) if state is not None else 0)
    whole = None
    if state is None:
        pairs = fields.as_mapping(optimizer)
        if pairs is not None:
            whole = "torch" if "param_groups" in pairs else "scaled"
            optimizer = pairs.get("optimizer_state_dict") if whole == "scaled" else optimizer
            state = pairs if whole == "scaled" else None
    tensors = {n: Tensor(shape=r.shape, dtype=r.dtype.short) for n, r in model.weights.items()}
    if stage == 3:  # module holds empty tensors: the shapes are beside them
        wanted = {n: s for group in model.shapes for n, s in group.items()} | _shapes(
            root.get("frozen_param_shapes")
        )
        tensors |= {n: Tensor(shape=wanted[n], dtype=t.dtype) for n, t in tensors.items() if n in wanted}
        wanted |= {a: wanted[o] for a, o in model.shared.items() if o in wanted}
        tensors |= {n: Tensor(shape=wanted[n], dtype=t.dtype) for n, t in tensors.items() if n in wanted}
    fragments = fields.as_mapping(root.get("frozen_param_fragments"))
    hyper, moments, counts = _optimizer(optimizer)
    prefix = (shards[0][1]["prefix"] or "") if shards else ""
    scheduler = fields.as_mapping(root.get("lr_scheduler"))
    return Saved(
        folder=folder,
        place=folder,
        tensors=tensors,
        buffers=model.buffers,
        frozen=model.frozen,
        fragments=frozenset(fragments.names()) if fragments is not None else None,
        left_out=_left_out(root, stage, tensors),
        shared=model.shared,
        groups=model.shapes,
        ranks=model.dp_world_size or max(1, sum(1 for n in names if OPTIM.fullmatch(n))),
        stage=stage,
        dtype=_dtype(config, tensors, [n for group in model.shapes for n in group]),
        prefix=prefix,
        whole=whole,
        variant=_variant(optimizer, state, stage),
        hyper=hyper,
        counts=counts,
        state=moments,
        gaps=_gaps(state.get("param_alignment_paddings") if state is not None else None),
        clip=fields.number(state.get("clip_grad")) if state is not None else None,
        scaled=state is not None and isinstance(state.get("loss_scaler"), Object),
        scheduler=_plain(scheduler) if scheduler is not None else None,
        step=fields.integer(root.get("global_steps")),
        samples=fields.integer(root.get("global_samples")),
        skipped=fields.integer(root.get("skipped_steps")) or 0,
        config=config,
        version=model.ds_version,
        client={
            k: v
            for k, v in ((k, plain(v)) for k, v in root.named() if k not in _TENSORS)
            if isinstance(v, int | float | str | dict)
        },
    )


_TENSORS = {"module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"}


def _left_out(root: fields.Mapping, stage: int, tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Stages 2 and 3 have no fragments then; at every stage a tied weight's owner may be missing."""
    shared = fields.as_mapping(root.get("shared_params"))
    owners = [owner for _, owner in shared.named() if isinstance(owner, str)] if shared is not None else []
    missing = tuple(dict.fromkeys(owner for owner in owners if owner not in tensors))
    return missing if missing or excludes_frozen(root, tensors, stage) else None


def _plain(node: object) -> dict[str, object]:
    shown = _bare(plain(node))
    return shown if isinstance(shown, dict) else {}


def _bare(shown: object) -> object:
    """Without the classes that stand for a dict: MMEngine's ConfigDict({...}) pickles one as its argument."""
    if not isinstance(shown, dict):
        return shown
    args = shown.get("args")
    if shown.keys() == {"$class", "args"} and isinstance(args, list) and len(args) == 1:
        return _bare(args[0])
    return {key: _bare(value) for key, value in shown.items()}


def _stage(state: fields.Mapping, config: Mapping[str, object]) -> int:
    stated = stage_of(state.get("zero_stage"))
    if stated is not None:
        return stated
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return stage if isinstance(stage, int) and stage in (1, 2) else 1


def _shapes(node: Node) -> dict[str, Shape]:
    from ckpttools.containers.torch_file import size

    pairs = fields.as_mapping(node)
    return {name: size(value) for name, value in pairs.named()} if pairs is not None else {}


def _dtype(config: Mapping[str, object], tensors: Mapping[str, Tensor], trainable: list[str]) -> str:
    found = next((tensors[name].dtype for name in trainable if name in tensors), None)
    if found in ("bf16", "fp16", "fp32"):
        return found
    for name in ("bf16", "fp16"):
        part = config.get(name)
        if isinstance(part, dict) and part.get("enabled") is True:
            return name
    return "fp32"


def _variant(optimizer: Node, state: fields.Mapping | None, stage: int) -> str:
    if isinstance(optimizer, list):
        return "elastic"
    if stage == 1 and state is not None and "zero_stage" not in state and "loss_scaler" not in state:
        return "bf16_optimizer"
    return "rigid"


def _optimizer(
    node: Node,
) -> tuple[tuple[Mapping[str, object], ...], tuple[frozenset[str] | None, ...], tuple[int, ...]]:
    """param_groups without `params`, the names in the state of each group's first parameter, their
    numbers."""
    pairs = fields.as_mapping(node)
    groups = pairs.get("param_groups") if pairs is not None else None
    state = fields.as_mapping(pairs.get("state")) if pairs is not None else None
    hyper: list[Mapping[str, object]] = []
    moments: list[frozenset[str] | None] = []
    counts: list[int] = []
    for group in groups if isinstance(groups, list) else []:
        shown = _plain(group)
        params = shown.pop("params", None)
        hyper.append(shown)
        counts.append(len(params) if isinstance(params, list) else 0)
        first = params[0] if isinstance(params, list) and params else None
        own = state.get(first) if state is not None and isinstance(first, int) else None
        entry = fields.as_mapping(own)
        moments.append(frozenset(entry.names()) if entry is not None else None)
    return tuple(hyper), tuple(moments), tuple(counts)


def _gaps(node: Node) -> tuple[tuple[int, ...], ...] | None:
    if not isinstance(node, list):
        return None
    return tuple(
        tuple(x for x in group if isinstance(x, int)) if isinstance(group, list) else () for group in node
    )
