"""What went wrong in other people's runs and shows in names and shapes alone.

    weights without data        ZeRO-3's placeholders, tensors on the meta device, a file without a tensor
    experts missing             an exporter left experts out, and the model loads with fresh ones
    LoRA weights without size   ZeRO-3's placeholders were saved instead of the gathered weights
    buffers of [world_size]     a merger joined what every rank had a copy of
    no optimizer state          groups with settings, steps done, and not one moment
    leftovers of other ranks    random states of more ranks than the ZeRO folder has (its own: shard-extra)

Each is a warning that says what is odd, and what usually makes it so; weights without data are an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from itertools import islice

from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.containers.pickles import Object
from ckpttools.errors import some
from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.formats import Source
from ckpttools.frameworks import FRAMEWORKS
from ckpttools.stores.files import entries, is_file, is_folder
from ckpttools.tree import Opaque, Value

EXPERT = re.compile(r"(?P<layer>(?:.*\.)?(?:deepspeed_)?experts?)\.(?P<index>\d{1,9})\.(?P<rest>.+)")
ROUTER = ("gate", "router", "router.classifier", "gate.wg", "router.layer")
LORA = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
# whose optimizers keep a tensor for each parameter, by their settings
KEEPS = {"betas": None, "momentum": 0, "lr_decay": None, "alpha": None}


def check_incidents(source: Source, found: Checkpoint, said: Set[str] = frozenset()) -> Iterator[Finding]:
    """Warnings from headers alone."""
    path = str(found.path)
    shapes = {name: ref.shape for name, ref in found.tensors.items()}
    shapes |= {name: shape for name, shape in found.left_out.items() if name not in shapes}
    for layer, problem in _experts(shapes):
        yield Finding(
            id="experts-missing",
            severity=WARNING,
            file=path,
            where=layer,
            message=problem,
            why="the model would be loaded with fresh weights in their place, or not at all",
            hint="save or export again with all expert-parallel ranks",
        )
    gone = list(_without_data(found))
    for names, problem in gone:
        yield Finding(
            id="weights-empty",
            severity=ERROR,
            file=path,
            where=names[0] if names else "",
            message=problem,
            why="the values are not here: a model that loads this has none, or fresh ones",
            hint="save again with the weights gathered and loaded, or extract them from the run's own "
            "checkpoint: ckpt extract",
        )
    empty = [name for name, ref in found.tensors.items() if not ref.numel and LORA.search(name)]
    if empty and not gone:
        yield Finding(
            id="lora-empty",
            severity=WARNING,
            file=path,
            where=empty[0],
            message=f"{some(empty)}: adapters without a single element",
            why="under ZeRO-3 a parameter that was not gathered looks like this: its values are not here",
            hint="extract the weights from the ZeRO folder: ckpt extract",
        )
    for name, problem in _buffers(shapes):
        yield Finding(
            id="buffer-repeated",
            severity=WARNING,
            file=path,
            where=name,
            message=problem,
            why="mergers that join what every rank has a copy of leave one entry for each rank",
            hint="merge the ranks' files again with another tool, or take one entry of it",
        )
    if "moment-missing" not in said and _lacks_state(found):
        yield Finding(
            id="optimizer-empty",
            severity=WARNING,
            file=path,
            message=f"{len(found.groups)} parameter groups with settings after {found.training.step} "
            "steps, and no state of any parameter",
            why="a resume begins the optimizer anew, and the loss jumps",
            hint="use a checkpoint that holds it, unless it was left out on purpose",
        )
    stale = _stale(source, found)
    if stale:
        yield Finding(
            id="rank-files-stale",
            severity=WARNING,
            file=str(source.root / stale[0]),
            message=f"random states of other ranks than the {found.layout.ranks} that saved the "
            f"optimizer: {some(stale)}",
            why="they are left over from a save of another world size into the same folder",
            hint="move them away; look whether other files are older than the rest, too",
        )


def _without_data(found: Checkpoint) -> Iterator[tuple[list[str], str]]:
    """Names of weights that were saved without their values, and what is said of them."""
    if not found.tensors and found.layout.format in ("hf", "safetensors"):  # others are not read at all
        yield [], "not a single tensor is in it"
    left = [name for name, ref in found.tensors.items() if ref.dtype.is_float and ref.shape == (0,)]
    # what is small stays whole under ZeRO-3 (stage3_param_persistence_threshold): norms, biases
    names = [name for name in left if name.endswith(".weight") and not LORA.search(name)]
    if len(left) > 1 and not any(ref.numel for ref in found.tensors.values() if ref.dtype.is_float):
        names = left
    if len(names) > 1:
        shown = f"{some(names)}: weights without a single element"
        yield names, f"{shown}, as ZeRO-3 leaves what was not gathered"
    meta = [name for name, value in found.extra_state.items() if _is_meta(value)]
    if meta:
        yield meta, f"{some(meta)}: on the meta device: saved without data"


def _is_meta(value: Value) -> bool:
    """A tensor on the meta device, or a parameter made of one."""
    node = value.node if isinstance(value, Opaque) else None
    if isinstance(node, Object) and node.is_a("torch._utils", "_rebuild_parameter") and node.args:
        node = node.args[0]
    return isinstance(node, Object) and node.is_a("torch._utils", "_rebuild_meta_tensor_no_storage")


def _stale(source: Source, found: Checkpoint) -> list[str]:
    ranks = found.layout.ranks if found.layout.zero_stage is not None else None
    if ranks is None or not is_folder(source.root):
        return []
    names = [entry.name for entry in entries(source.root) if is_file(entry)]
    patterns = [framework.random for framework in FRAMEWORKS if framework.random]
    ranked = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
    return [name for name in ranked if int(re.findall(r"\d+", name)[-1]) >= ranks]


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    layers: dict[str, dict[int, set[str]]] = {}
    for name in shapes:
        match = EXPERT.fullmatch(name)
        if match is not None:
            layers.setdefault(match["layer"], {}).setdefault(int(match["index"]), set()).add(match["rest"])
    if all(EXPERT.fullmatch(name) for name in shapes):
        return  # DeepSpeed saves each expert in a file of its own
    usual = Counter(max(experts) + 1 for experts in layers.values()).most_common(1)
    for layer, experts in layers.items():
        stated = _router(layer, shapes)
        number = max(max(experts) + 1, usual[0][0] if usual[0][1] > 1 else 0, stated or 0)
        gone = number - len(experts)
        whole = max(experts.values(), key=len)
        parts = [f"{i}.{rest}" for i, held in sorted(experts.items()) for rest in sorted(whole - held)]
        if gone:
            first = islice((i for i in range(number) if i not in experts), 6)
            shown = ", ".join(map(str, first)) + (" ..." if gone > 6 else "")
            yield layer, f"{gone} of {number} experts are not there: {shown}"
        elif parts:
            yield layer, f"{len(parts)} tensors of experts are not there: {some(parts)}"


def _router(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of experts that the router beside them chooses from."""
    parent = layer.rpartition(".")[0]
    for name in ROUTER:
        shape = shapes.get(f"{parent}.{name}.weight" if parent else f"{name}.weight")
        if shape is not None and len(shape) == 2:
            return shape[0]
    return None


def _buffers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    """Counts of batch norms, which have no dimension, and their means, which are of the weight's shape."""
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        if last == "num_batches_tracked" and shape:
            yield name, f"one count, saved with the shape {list(shape)}"
        if last in ("running_mean", "running_var"):
            of = shapes.get(f"{module}.weight")
            flat = of is not None and len(of) == len(shape) == 1
            if of and flat and of[0] and shape[0] > of[0] and shape[0] % of[0] == 0:
                yield name, f"of the shape {list(shape)}, where the layer has {list(of)}"


def _lacks_state(found: Checkpoint) -> bool:
    """Whether groups have the settings of an optimizer that keeps state, and steps were made without any."""
    state = found.training
    done = (state.step or 0) - (state.skipped_steps or 0)
    if done < 1 or not any(group.params for group in found.groups):
        return False
    held = any(refs for group in found.groups for kind, refs in group.state.items() if kind != FP32)
    if held or any(values for group in found.groups for values in group.scalars.values()):
        return False
    return any(keeps_state(group.hyper) for group in found.groups)


def keeps_state(group: Mapping[str, object]) -> bool:
    """Whether an optimizer with the settings of this group keeps a tensor for each parameter."""
    return any(group.get(key, none) != none for key, none in KEEPS.items())
