"""What DeepSpeed's files have in common, whatever the ZeRO stage: keys, counters, settings, the client's
values.

Source: deepspeed/runtime/engine.py (_save_checkpoint, _common_checkpoint_state), fp16/loss_scaler.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint, Layout
from ckpttools.containers import fields
from ckpttools.containers.nodes import decode, encode, encode_tensor, ordered
from ckpttools.containers.pickles import Dict, Global, Node, Object
from ckpttools.containers.torch_file import Storage, TorchFile, size, size_node
from ckpttools.formats.buffers import listed
from ckpttools.formats.counters import BATCH, training
from ckpttools.formats.notes import holds_for
from ckpttools.location import Location
from ckpttools.tensors import TensorRef
from ckpttools.training import Training
from ckpttools.tree import Opaque, Value, at, put

# what a model file holds beside the client's own keys
OWN_KEYS = frozenset(
    (
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
        "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
        "csr_tensor_module_names", "skipped_steps", "global_steps", "global_samples", "dp_world_size",
        "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    )
)  # fmt: skip
LR_SCHEDULER = ("lr_scheduler",)
SUB_GROUP_SIZE = 1_000_000_000  # zero_optimization.sub_group_size by default
VERSION = "0.19.8"  # of DeepSpeed, whose layout this is: what new folders state
STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")
SCALER = "deepspeed.runtime.fp16.loss_scaler"
# the scaler that an engine of fp16 begins with by default
NEW_SCALER: Mapping[str, Value] = {
    "class": "DynamicLossScaler",
    "cur_scale": 65536.0,
    "dynamic": True,
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 2,
    "cur_hysteresis": 2,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
    "dtype": Opaque(Global("torch", "float16"), "torch.float16"),
}
ADAM = {"exp_avg", "exp_avg_sq"}  # the state that load_universal takes under stage 3, and all that it takes
SLICED = "mp_world_size"  # how many ranks the model is sliced over


def shapes_of(path: Location, node: Node, field: str) -> dict[str, tuple[int, ...]]:
    """A dict of names and torch.Size, as param_shapes holds them."""
    return {name: size(value) for name, value in fields.mapping(path, node, field).named()}


def names_of(node: Node) -> frozenset[str]:
    return frozenset(x for x in node if isinstance(x, str)) if isinstance(node, list | tuple) else frozenset()


def stage_of(node: Node) -> int | None:
    """The ZeRO stage: an int, ZeroStageEnum(2), or as Python 3.11.0 to 3.11.3 pickled it, by getattr."""
    if isinstance(node, Object) and node.how == "reduce":
        if isinstance(node.cls, Global) and node.cls.name == "ZeroStageEnum" and len(node.args) == 1:
            return fields.integer(node.args[0])
        if isinstance(node.cls, Global) and node.cls.name == "getattr" and len(node.args) == 2:
            names = ["disabled", "optimizer_states", "gradients", "weights"]
            return names.index(node.args[1]) if node.args[1] in names else None
    return fields.integer(node)


def module_of(file: TorchFile, root: fields.Mapping) -> tuple[dict[str, TensorRef], dict[str, Value]]:
    """The tensors of `module` by name, and what it holds beside them."""
    tensors: dict[str, TensorRef] = {}
    extra: dict[str, Value] = {}
    for name, node in fields.mapping(file.path, root.get("module"), "module").named():
        if view := file.view(node):
            tensors[name] = view.ref
        else:
            extra[name] = decode(file, node)
    return tensors, extra


def excludes_frozen(root: fields.Mapping, tensors: Collection[str], stage: int) -> bool:
    """Whether save_checkpoint left out what is frozen, which no file names then, as far as they tell it: what
    ckpt writes says it.

    Stages 2 and 3 hold its fragments, none of them as an empty dict. The others never do: there a tied weight
    without its owner tells, and adapters without what they adapt.
    """
    if holds_for(root.get(EXCLUDES_FROZEN), tensors):
        return True
    if stage >= 2:
        return root.get("frozen_param_fragments", 0) is None
    shared = fields.as_mapping(root.get("shared_params"))
    owners = {owner for _, owner in shared.named()} if shared is not None else set()
    adapted = {name.partition(".lora_A")[0] for name in tensors if ".lora_A" in name}
    bases = (name for name in tensors if ".lora_" not in name) if adapted else ()
    return bool(owners - set(tensors) or (adapted and not any(_parents(name) & adapted for name in bases)))


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def slices(ranks: object) -> Iterator[str]:
    """A note where the tensors of a model file are those of one rank, by its `mp_world_size`."""
    if isinstance(ranks, int) and ranks > 1:
        yield f"the weights are the slices of one model-parallel rank: the model lies on {ranks}"


def settings_of(file: TorchFile, root: fields.Mapping) -> Mapping[str, Value]:
    """ds_config, as saved."""
    found = decode(file, root.get("ds_config"))
    return found if isinstance(found, dict) else {}


def kept_batch(checkpoint: Checkpoint, layout: Layout) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """The batch settings of ds_config that keep the global batch over the new ranks, and what to say about
    them. DeepSpeed never reads these copies on load; they are for people and tools.
    """
    # the schedules are a heavy import, which only a reshard needs
    from ckpttools.schedules.evidence import kept, known, of_deepspeed, of_samples

    state, ranks = checkpoint.training, checkpoint.layout.dp_degree
    batch = known((*of_deepspeed(dict(state.saved_batch), ranks), *of_samples(state.samples, state.step)))
    iteration = at(checkpoint.client, "meta", "iter")  # MMEngine's, which counts micro-batches
    counted = type(iteration) is int
    new = kept(batch, layout.dp_degree, "micro" if counted else "update", iteration if counted else None)
    values = {"micro": new.micro, "accumulation": new.accumulation}
    had = dict(state.saved_batch)
    if "micro" in had and "global" not in had:
        had.setdefault("accumulation", 1)  # what DeepSpeed takes for none
    changed = {BATCH[k]: v for k, v in values.items() if v is not None and k in had and v != had[k]}
    return changed, new.notes


def optimizer_class(settings: Mapping[str, Value]) -> str | None:
    """The class that ds_config names; a client's own optimizer leaves no name in the files."""
    section = settings.get("optimizer")
    name = section.get("type") if isinstance(section, dict) else None
    return name if isinstance(name, str) else None


def loss_scaler(file: TorchFile, node: Node) -> dict[str, Value]:
    """The loss scaler's class and fields, where the layout has one."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or not node.has_state:
        return {}
    state = decode(file, node.state)
    return {"class": node.cls.name, **state} if isinstance(state, dict) else {}


def counters(file: TorchFile, root: fields.Mapping) -> Training:
    return training(file, root, step_keys=("global_steps",))


def client(file: TorchFile, root: fields.Mapping) -> dict[str, Value]:
    """What training code saved beside DeepSpeed's own keys; counters at its top level are in Training."""
    read = {path[0] for path in counters(file, root).keys.values() if len(path) == 1}
    return {key: decode(file, node) for key, node in root.named() if key not in OWN_KEYS and key not in read}


# --- written anew, from a Checkpoint alone --------------------------------------------------------------


def new_root(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorRef],
    *,
    ranks: int,
    settings: Mapping[str, Value],
    **own: Node,
) -> Dict:
    """The value of a model file, in DeepSpeed's order, whose module holds `tensors`; `own` is what a stage
    has in place of the usual.
    """
    storages: dict[object, Storage] = {}
    pairs: list[tuple[Node, Node]] = [(name, encode_tensor(ref, storages)) for name, ref in tensors.items()]
    pairs += [(name, encode(value, storages)) for name, value in checkpoint.extra_state.items()]
    fragments = {key: own[key] for key in ("frozen_param_fragments",) if key in own}
    values: dict[str, Node] = {
        "module": ordered(pairs),
        "buffer_names": [*listed(checkpoint)],
        "optimizer": None,
        "param_shapes": [shapes_node(group.params) for group in checkpoint.groups],
        "frozen_param_shapes": shapes_node(frozen_shapes(checkpoint)),
        "shared_params": encode(dict(checkpoint.shared)),
        **fragments,
        "lr_scheduler": encode(scheduler_state(checkpoint)[0]),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": 0,
        **counter_values(checkpoint),
        "dp_world_size": ranks,
        "mp_world_size": 1,
        **({"ds_config": encode(dict(settings))} if settings else {}),
        "ds_version": version_of(checkpoint),
    }
    client = {key: encode(value, storages) for key, value in client_values(checkpoint).items()}
    return Dict.of({**values, **own, **client}.items())


def shapes_node(shapes: Mapping[str, tuple[int, ...]]) -> Object:
    """The inverse of `shapes_of`."""
    return ordered((name, size_node(shape)) for name, shape in shapes.items())


def frozen_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the frozen parameters, those that are left out of the files included."""
    frozen = (name for name in checkpoint.tensors if name in checkpoint.frozen)
    return {name: checkpoint.tensors[name].shape for name in frozen} | dict(checkpoint.left_out)


def client_values(checkpoint: Checkpoint) -> dict[str, Value]:
    """The client's values, with losses and the like under the keys where they were found."""
    state = checkpoint.training
    values: dict[str, Value] = dict(checkpoint.client)
    for field in ("iteration", "epoch", "train_loss", "val_loss", "scheduler"):
        value = state.stated[field]
        path = _scheduler_key(state) if field == "scheduler" else state.keys.get(field, (field,))
        if value not in (None, {}, []) and path[0] not in OWN_KEYS:
            values = put(values, path, value)
    return values


def _scheduler_key(state: Training) -> tuple[str, ...]:
    """Where the schedule's state goes: DeepSpeed's own schedulers are the engine's, wherever it was found."""
    if isinstance(state.scheduler, Mapping) and set(state.scheduler) == {"last_batch_iteration"}:
        return LR_SCHEDULER
    return state.keys.get("scheduler", LR_SCHEDULER)


def counter_values(checkpoint: Checkpoint) -> dict[str, int]:
    """DeepSpeed's own counters, as far as they are known; it loads nothing without skipped_steps."""
    state = checkpoint.training
    counters = {
        "skipped_steps": state.skipped_steps or 0,
        "global_steps": state.step,
        "global_samples": state.samples,
    }
    return {key: number for key, number in counters.items() if number is not None}


def scheduler_state(checkpoint: Checkpoint) -> tuple[Value, bool]:
    """What the engine's own lr_scheduler gets, and whether the schedule is the engine's, not the client's."""
    state = checkpoint.training
    own = _scheduler_key(state) == LR_SCHEDULER
    return state.scheduler or None if own else None, own


def new_scaler(scaler: Mapping[str, Value]) -> Object:
    """A LossScaler, or the class and fields that were read."""
    wanted = dict(scaler)
    name = wanted.pop("class", "LossScaler")
    made = Object("newobj", Global(SCALER, str(name)), ())
    made.state = encode(wanted or {"cur_scale": 1.0, "dynamic": False})
    return made


def version_of(checkpoint: Checkpoint) -> str:
    """The version that the files state: the source's where DeepSpeed wrote it; load requires one."""
    writer = checkpoint.layout.writer or ""
    version = writer.removeprefix("DeepSpeed ")
    return version if version != writer and version[:1].isdigit() else VERSION


def sub_group_size(settings: Mapping[str, Value]) -> int:
    """zero_optimization.sub_group_size of a ds_config; DeepSpeed's default where it has none."""
    section = settings.get("zero_optimization")
    stated = section.get("sub_group_size") if isinstance(section, Mapping) else None
    if isinstance(stated, int | float) and 0 < stated < math.inf:
        return int(stated)
    return SUB_GROUP_SIZE  # "auto" too


def round_robin_order(count: int, ranks: int) -> list[int]:
    """Which parameter stands at each place of a round-robin group: all i = 0 (mod ranks) first, then 1 ...

    Source: DeepSpeedZeroOptimizer._round_robin_reorder.
    """
    return [i for j in range(ranks) for i in range(j, count, ranks)]


def reordered(names: Sequence[str], ranks: int) -> list[str]:
    """Parameter names in the order of a round-robin flat group."""
    return [names[i] for i in round_robin_order(len(names), ranks)]


def original(names: Sequence[str], ranks: int) -> list[str]:
    """The inverse of `reordered`: the optimizer's own parameter order."""
    out = [""] * len(names)
    for place, i in enumerate(round_robin_order(len(names), ranks)):
        out[i] = names[place]
    return out
