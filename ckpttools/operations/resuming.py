"""The lines of Python with which training goes on from what convert wrote, in the order in which they run.

They see what training code has: `model`, `optimizer`, `scheduler`, or `ds_config` and the `engine` that
deepspeed.initialize makes of it. Lines that name `engine` come after it was made, the others before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from ckpttools.checkpoint import FP32, STEP, Checkpoint, Layout
from ckpttools.containers.pickles import Global, walk
from ckpttools.containers.pickles.names import name_of
from ckpttools.errors import escape, some
from ckpttools.formats.deepspeed import ADAM, scheduler_state, sub_group_size
from ckpttools.formats.format import Places
from ckpttools.location import Location
from ckpttools.operations import advice
from ckpttools.operations.deepspeed_folder import ORDERS
from ckpttools.tensors import TensorRef
from ckpttools.transforms.optimizers import BEFORE_THE_FIRST
from ckpttools.tree import Opaque, Path, Value, at, leaves, same

# what torch.load takes with weights_only=True (torch/_weights_only_unpickler.py, 2.13)
ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(bytearray|set|complex)|_codecs\.encode|torch\.(Size|Tensor|device"
    r"|nn\.parameter\.Parameter|serialization\._get_layout|_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2"
    r"|(storage\.)?\w+Storage|bool|q?u?int\d+|b?float\w+|complex\d+"
    r"|per_(tensor|channel)_(affine|symmetric)|per_channel_affine_float_qparams)"
)


def single_file(
    checkpoint: Checkpoint, dst: Location, keys: Places, *, optimizer: bool = True
) -> Iterator[str]:
    """torch.load and load_state_dict; without `optimizer` no line loads its state."""
    yield from _own_classes(checkpoint, dst)
    yield f"saved = torch.load({str(dst)!r}, weights_only=True)"
    loose = ", strict=False" if checkpoint.excludes_frozen or checkpoint.left_out else ""
    yield f"model.load_state_dict({_item('saved', keys.weights)}{loose})"
    if checkpoint.groups and optimizer:
        yield f"optimizer.load_state_dict({_item('saved', keys.optimizer)})"
    else:
        held = {key: checkpoint.client[key] for key in checkpoint.unnamed}
        yield from _by_position([f"saved{path}" for path in _paths(held)])
    yield from _schedule(checkpoint.training.scheduler, _item("saved", keys.scheduler))


def distributed(
    checkpoint: Checkpoint, variant: str | None, dst: Location, keys: Places, *, optimizer: bool = True
) -> Iterator[str]:
    """torch.distributed.checkpoint.load of the layout `variant`; without `optimizer` no line loads it."""
    partial = bool(checkpoint.left_out) or checkpoint.excludes_frozen
    optimizer = optimizer and finds_state(checkpoint)
    stateless = bool(without_state(checkpoint))
    yield advice.distributed(variant, dst, keys, partial=partial, optimizer=optimizer, stateless=stateless)
    scheduler = checkpoint.training.scheduler
    if variant in (None, "nested", "flat") and scheduler:  # the others keep it in files of their own
        item = _item("state", keys.scheduler)
        tensors = any(isinstance(leaf, TensorRef) for _, leaf in leaves(scheduler))
        asked = "scheduler.state_dict()" if tensors else _asked(scheduler)
        load = (
            f"state = {advice.nested({keys.scheduler: asked})}; "
            f"torch.distributed.checkpoint.load(state, checkpoint_id={str(dst)!r})"
        )
        yield from _schedule(scheduler, item, "; ".join((load, *_counters(scheduler, item))))


def _asked(value: Value) -> str:
    """The code of what torch is asked for: the keys that are there, as another torch has others, and as its
    planner flattens what holds dicts.
    """
    if isinstance(value, Mapping):
        if not any(_is_entered(inner) for inner in value.values()):
            return f"dict.fromkeys({[*map(str, value)]})"
        return f"{{{', '.join(f'{str(key)!r}: {_asked(inner)}' for key, inner in value.items())}}}"
    if _is_entered(value):
        return f"[{', '.join(map(_asked, value))}]"
    return "None"


def _is_entered(value: Value) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(map(_is_entered, value)))


def _counters(value: Value, item: str) -> Iterator[str]:
    """Back to numbers what are texts in a distributed checkpoint: MultiStepLR's milestones."""
    if isinstance(value, Counter):
        pairs = f"{{int(key): times for key, times in {item}.items()}}"
        yield f"{item} = collections.Counter({pairs})"
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _counters(inner, f"{item}[{key!r}]")


def _item(name: str, path: Path) -> str:
    return name + "".join(f"[{key!r}]" for key in path)


def _by_position(states: list[str]) -> Iterator[str]:
    """What loads the optimizers whose states these expressions are."""
    said = "  # by position: of the same parameters, in the same order"
    if len(states) == 1:
        yield f"optimizer.load_state_dict({states[0]}){said}"
    elif states:
        each = f"for optimizer, state in zip(optimizers, ({', '.join(states)}))"
        yield f"{each}: optimizer.load_state_dict(state){said}"


def _paths(value: Value, depth: int = 3) -> Iterator[str]:
    """The places, as code, of what Optimizer.load_state_dict takes: state and groups, both by numbers."""
    groups = at(value, "param_groups")
    if isinstance(groups, list) and isinstance(at(value, "state"), Mapping):
        if all(isinstance(at(group, "params"), list) for group in groups):
            yield ""
        return
    inner = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, each in inner if depth else ():
        yield from (f"[{key!r}]{path}" for path in _paths(each, depth - 1))


def _schedule(saved: Value, item: str, load: str = "") -> Iterator[str]:
    """What loads a schedule: `saved` is its state, `item` the code of it once the line `load` has run."""
    if isinstance(saved, Mapping) and saved.keys() == BEFORE_THE_FIRST.keys():
        first = f"{load}; " if load else ""
        yield (
            "# the schedule is one of deepspeed.runtime.lr_schedules, and torch's take its state without a "
            f"word and stay where they are: where yours is of DeepSpeed's class, {first}"
            f"scheduler.load_state_dict({item}); set one of torch's by hand"
        )
    elif saved:
        yield from [load] * bool(load)
        if isinstance(saved, list):
            yield f"for scheduler, state in zip(schedulers, {item}): scheduler.load_state_dict(state)"
        else:
            yield f"scheduler.load_state_dict({item})"


def engine(checkpoint: Checkpoint, layout: Layout, dst: Location) -> Iterator[str]:
    """load_checkpoint of DeepSpeed, with the settings that the folder asks for."""
    if layout.zero_stage is not None:
        yield f'ds_config.setdefault("zero_optimization", {{}})["stage"] = {layout.zero_stage}'
    if layout.zero_stage in (None, 1, 2):  # with another order DeepSpeed loads wrong weights without a word
        for key in ORDERS:
            if at(checkpoint.settings, "zero_optimization", key) is not None:
                yield f'ds_config.setdefault("zero_optimization", {{}})["{key}"] = False'
    if layout.zero_stage == 3:  # DeepSpeed refuses a folder with other sub-groups
        limit = sub_group_size(checkpoint.settings)
        yield f'ds_config["zero_optimization"]["sub_group_size"] = {limit}'
    if layout.dtype in ("bf16", "fp16"):  # the names of the files, and module
        yield f'ds_config.setdefault("{layout.dtype}", {{}})["enabled"] = True'
    if layout.zero_stage is None:
        yield 'ds_config["checkpoint"] = {"load_universal": True}'
        if checkpoint.frozen | checkpoint.buffers:
            file = dst / (layout.tag or "") / "mp_rank_00_model_states.pt"
            yield from _own_classes(checkpoint, file)
            load = f"torch.load({str(file)!r}, weights_only=True)['module']"
            yield f"model.load_state_dict({load}, strict=False)  # load_universal leaves out frozen, buffers"
    options = "" if scheduler_state(checkpoint)[0] else ", load_lr_scheduler_states=False"
    if checkpoint.excludes_frozen or checkpoint.left_out:
        options += ", load_module_strict=False"
    ranks = f"{layout.dp_degree} rank{'s' * (layout.dp_degree > 1)}"
    on = f"  # on {ranks}" if layout.zero_stage else ""
    yield f"path, client_state = engine.load_checkpoint({str(dst)!r}{options}){on}"
    if layout.zero_stage is None:
        yield from _stage3(checkpoint)


def _stage3(checkpoint: Checkpoint) -> Iterator[str]:
    """What stage 3 gets wrong: settings of the first group for all, one tensor as the step of all."""
    if {kind for group in checkpoint.groups for kind in group.state} - {FP32} != ADAM:
        return  # it takes no other state
    hypers = [group.hyper for group in checkpoint.groups]
    keys = dict.fromkeys(key for hyper in hypers for key in hyper)
    unlike = [
        key
        for key in keys
        if any(key not in hyper or not same(hyper[key], hypers[0].get(key)) for hyper in hypers)
    ]
    own = [{key: hyper[key] for key in unlike if key in hyper} for hyper in hypers]
    if unlike and all(_is_literal(value) for hyper in own for value in hyper.values()):
        yield (
            f"for group, saved in zip(engine.optimizer.param_groups, {own}): "
            "group.update(saved)  # stage 3 alone needs it"
        )
    elif unlike:
        yield (
            f"# stage 3 takes the first group's {escape(', '.join(unlike))} for all groups: set them in "
            "engine.optimizer.param_groups as your run's configuration has them"
        )
    steps = [value for group in checkpoint.groups for value in group.scalars.get(STEP, {}).values()]
    if any(isinstance(step, TensorRef) for step in steps):
        yield (
            "for state in engine.optimizer.optimizer.state.values(): "
            "state['step'] = state['step'].clone()  # stage 3 shares one tensor, which counts for each group"
        )


def _own_classes(checkpoint: Checkpoint, file: Location) -> Iterator[str]:
    """What to do first where weights_only=True refuses the client's values: no line loads without it."""
    held = (checkpoint.client, checkpoint.extra_state, checkpoint.training.scheduler)
    objects = (leaf for value in held for _, leaf in leaves(value) if isinstance(leaf, Opaque))
    names = dict.fromkeys(name for each in objects for name in _names(each) if not ALLOWED.fullmatch(name))
    if names:
        yield (
            f"# it holds {some(names)}, which weights_only=True refuses: "
            f"torch.serialization.get_unsafe_globals_in_checkpoint({str(file)!r}) names all, and "
            "torch.serialization.add_safe_globals takes those that you know"
        )


def _names(value: Opaque) -> Iterator[str]:
    """The classes and functions in an object of a torch file."""
    node: Any = value.node
    yield from (name_of(each) for each in walk(node) if isinstance(each, Global))


def _is_literal(value: Value) -> bool:
    """Whether its repr is the value in Python's syntax."""
    return not any(
        isinstance(leaf, Opaque | TensorRef) or (isinstance(leaf, float) and not isfinite(leaf))
        for _, leaf in leaves(value)
    )


def without_state(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The parameters for which the optimizer has kept nothing, where it keeps something for others like them:
    they never got a gradient.
    """
    out: list[str] = []
    for group in checkpoint.groups if finds_state(checkpoint) else ():
        kinds = (*group.scalars.values(), *(refs for kind, refs in group.state.items() if kind != FP32))
        held = {name for names in kinds for name in names}
        # SGD without momentum keeps none
        out += [n for n in group.params if n not in held and (held or group.hyper.get("momentum") != 0)]
    return tuple(out)


def finds_state(checkpoint: Checkpoint) -> bool:
    """Whether an optimizer of its class finds all that it has: SGD without momentum keeps no state."""
    groups = checkpoint.groups
    held = any(group.scalars or group.state.keys() - {FP32} for group in groups)
    return held or (bool(groups) and all(group.hyper.get("momentum") == 0 for group in groups))
