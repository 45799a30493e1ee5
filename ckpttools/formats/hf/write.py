"""The plan of a model folder, or of one file: the weights of any Checkpoint, and what has no place in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint, Layout
from ckpttools.containers.nodes import ordered
from ckpttools.containers.pickles import Dict, Node
from ckpttools.containers.safetensors import safetensors_file
from ckpttools.containers.torch_file import Storage, new_storage, tensor_node, write_torch_file
from ckpttools.errors import escape, some
from ckpttools.formats.configs import ADAPTER
from ckpttools.formats.hf.counters import FORMAT, WEIGHTS, FreeText, aliases, to_metadata, to_values
from ckpttools.formats.hf.names import BIN, shard_names
from ckpttools.formats.notes import counts, left_out, unread
from ckpttools.plan import Literal, OutputFile, Plan
from ckpttools.tensors import TensorRef

KEYED = "pt"  # that for one torch file with the keys of training code
NO_LIMIT = 1 << 62
Tensors = Mapping[str, TensorRef]
Ties = Mapping[str, str]  # alias -> owner


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    """A folder of shards, none larger than `layout.max_shard_size` bytes unless one tensor is; with
    `layout.single`, one file at the destination itself.

    `layout.variant` BIN is for torch files, in which tied names share a storage; else safetensors, in which
    they are stored once, as transformers does. KEYED puts what is known of counters and losses beside the
    weights, as training code does, and writes a bare state dict where nothing is. `layout.stem` begins the
    names of the files where it is not the usual one. The notes name what is not in the files.
    """
    layout = layout or checkpoint.layout
    binary = layout.variant in (BIN, KEYED)
    kept = to_values(checkpoint.training) if layout.variant == KEYED and layout.single else {}
    tensors = checkpoint.best_copies()
    ties = {a: o for a, o in checkpoint.shared.items() if a in tensors and o in tensors}
    if not binary:  # what a reader would not take for a tied name is stored itself
        ties = aliases(ties, {name: ref for name, ref in tensors.items() if name not in ties})
    stored = tensors if binary else {name: ref for name, ref in tensors.items() if name not in ties}
    about = {FORMAT: "pt", **to_metadata(checkpoint.training), **ties}
    if (checkpoint.excludes_frozen or checkpoint.left_out) and checkpoint.layout.stem != ADAPTER:
        about[EXCLUDES_FROZEN] = str(counts(checkpoint))

    def file(path: str, names: Sequence[str]) -> OutputFile:
        mine = {name: stored[name] for name in names}
        if binary:
            weights = _state_dict(mine, ties)
            return write_torch_file(path, Dict.of([(WEIGHTS, weights), *kept.items()]) if kept else weights)
        return safetensors_file(path, mine, about)

    if layout.single:
        files = [file("", list(stored))]
    else:
        kind, suffix = ("pytorch_model", ".bin") if binary else ("model", ".safetensors")
        stem = layout.stem or checkpoint.layout.stem or kind
        files = _folder(stored, ties, file, stem, suffix, layout.max_shard_size or NO_LIMIT)
    notes = () if binary else (f"{escape(a)} is tied to {escape(o)} and stored once" for a, o in ties.items())
    lost = _not_held(checkpoint, uncounted=binary and not kept)
    return Plan(files=tuple(files), notes=(*notes, *lost), checks=checkpoint.checks)


def _not_held(checkpoint: Checkpoint, *, uncounted: bool) -> Iterator[str]:
    """What the Checkpoint says and the files do not; `uncounted`: nor its counters."""
    state = checkpoint.training
    lost: list[str] = []
    if checkpoint.groups:
        named = f" ({escape(checkpoint.optimizer)})" if checkpoint.optimizer else ""
        lost.append(f"the optimizer's state{named}")
    if checkpoint.loss_scaler:
        lost.append("the loss scaler")
    if state.scheduler:
        lost.append("the scheduler")
    if uncounted:
        lost += [key.replace("_", " ") for key in to_metadata(state)]
    more = {"iteration": state.iteration, "samples": state.samples, "skipped steps": state.skipped_steps}
    lost += [what for what, value in more.items() if value is not None]
    if state.saved_batch:
        lost.append("the batch sizes")
    if checkpoint.frozen:
        or_buffers = " or buffers" if checkpoint.roles_guessed else ""
        lost.append(f"which weights are frozen{or_buffers} ({len(checkpoint.frozen)})")
    if checkpoint.buffers:
        lost.append(f"which tensors are buffers ({len(checkpoint.buffers)})")
    if checkpoint.settings:
        lost.append("the run's settings")
    if checkpoint.extra_state:
        lost.append(f"what the model's state holds beside plain tensors ({some(checkpoint.extra_state)})")
    said = {*to_metadata(state), EXCLUDES_FROZEN}
    client = [key for key in checkpoint.client if key not in said]
    if client:
        lost.append(f"the training code's {some(client, 12)}")
    held = checkpoint.template if isinstance(checkpoint.template, tuple) else ()
    if keys := [key for each in held if isinstance(each, FreeText) for key in each.keys]:
        yield f"not carried, as it may hold for the source alone: the text of its header under {some(keys)}"
    yield from left_out(checkpoint)
    yield from unread(checkpoint)
    if lost:
        yield f"not carried, as a model's files have no place for it: {', '.join(lost)}"


def _folder(
    tensors: Tensors,
    ties: Ties,
    file: Callable[[str, Sequence[str]], OutputFile],
    stem: str,
    suffix: str,
    limit: int,
) -> list[OutputFile]:
    """The shards, and their index where there are several."""
    found = shard(tensors, ties, limit)
    shards = dict(zip(shard_names(stem, suffix, len(found)), found, strict=True))
    files = [file(name, names) for name, names in shards.items()]
    if len(shards) > 1:
        files.append(_index(f"{stem}{suffix}.index.json", tensors, ties, shards))
    return files


def _state_dict(tensors: Tensors, ties: Ties) -> Node:
    pairs: list[tuple[Node, Node]] = []
    storages: dict[str, Storage] = {}
    for name, ref in tensors.items():
        owner = ties.get(name, name)
        if owner not in storages:
            storages[owner] = new_storage(ref.dtype, ref.numel, ref.chunks)
        pairs.append((name, tensor_node(TensorRef(ref.dtype, ref.shape, ()), storages[owner])))
    return ordered(pairs)


def shard(tensors: Tensors, ties: Ties, limit: int) -> list[list[str]]:
    """Names filled into shards in order; tied names go where their owner is and take no room."""
    shards: list[list[str]] = [[]]
    room = limit
    where: dict[str, list[str]] = {}
    for name, ref in tensors.items():
        owner = ties.get(name, name)
        if owner in where:
            where[owner].append(name)
            continue
        if shards[-1] and ref.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        where[owner] = shards[-1]
        room -= ref.nbytes
    return shards


def _index(name: str, tensors: Tensors, ties: Ties, shards: Mapping[str, Iterable[str]]) -> OutputFile:
    weight_map = {tensor: file for file, names in shards.items() for tensor in names}
    total = sum(tensors[tensor].nbytes for tensor in weight_map if tensor not in ties)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return OutputFile(path=name, segments=(Literal(json.dumps(index, indent=2).encode() + b"\n"),))
