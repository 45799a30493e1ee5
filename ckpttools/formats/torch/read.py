"""Reading a single file: weights, the optimizer with names, counters, and all else that was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint, FileRole, Layout, common_dtype
from ckpttools.containers import fields
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Dict, plain
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.containers.torch_file.modules import under
from ckpttools.containers.torch_file.views import is_rebuilt
from ckpttools.errors import UsageError, escape, some
from ckpttools.formats import torch_optimizer as optimizer
from ckpttools.formats.buffers import BUFFERS, untrained
from ckpttools.formats.counters import training
from ckpttools.formats.deepspeed import SLICED, names_of, slices
from ckpttools.formats.notes import holds_for, of_other_kinds
from ckpttools.formats.ties import tied
from ckpttools.formats.torch.names import find_weights, strip
from ckpttools.location import Location
from ckpttools.tree import Opaque, Value, leaves, put


def read(
    path: Location, wanted: str | None = None, order: Sequence[Sequence[str]] | None = None
) -> Checkpoint:
    """Read a single file; `wanted` is the key of the weights, with dots below the first one, `order` the
    names of the parameters of each of the optimizer's groups, where they are known from elsewhere.

    Raises UsageError where no weights are found in it, or its optimizer does not fit the order.
    """
    file = read_torch_file(path)
    key, found = find_weights(file, wanted)
    tensors, prefix = strip(found)
    shared = tied(tensors)
    root = fields.as_mapping(file.value)
    keys = [name for name in (root.names() if root is not None and key else ()) if name != key]
    saved = optimizer.read(file, tensors, shared, order) if root is not None and key else None
    if order is not None and saved is not None and saved.problem is not None:
        raise UsageError(
            "model-differs",
            f"its optimizer is not that of the other run: {saved.problem}",
            where=path,
            why="the order of parameters of another optimizer would put its state on the wrong ones",
            hint="name a checkpoint of a run with the same model and the same parameter groups; where this "
            "optimizer was made in the model's order, convert to dcp without --like, and that with it",
        )
    groups = saved.groups if saved is not None else ()
    state = training(file, root) if root is not None and key else training(file, Dict())
    client: dict[str, Value] = {}
    if root is not None and key:
        above = key if key in root else next((n for n in root.names() if key.startswith(f"{n}.")), key)
        beside = {above}
        beside |= {BUFFERS} if buffers_of(root) is not None else set()
        beside |= {path[0] for path in state.keys.values() if len(path) == 1}
        if groups and saved is not None and not saved.rest:
            beside.add(str(saved.path[0]))  # it is in the groups
        client = {name: decode(file, node) for name, node in root.named() if name not in beside}
        if above != key and (rest := _beside(decode(file, root.get(above)), key[len(above) + 1 :])):
            client[above] = rest
    notes = [f"the prefix '{prefix}' of every name was removed"] if prefix else []
    extra = _extra_state(file, key, prefix)
    inside = ((name, leaf) for name, value in extra.items() for _, leaf in leaves(value))
    odd = [name for name, leaf in inside if isinstance(leaf, Opaque) and is_rebuilt(leaf.node)]
    notes += of_other_kinds(list(dict.fromkeys(odd)))
    notes += slices(root.get(SLICED)) if root is not None else ()
    unread = list(dict.fromkeys(_unread(file, key)))
    if unread:
        fate = "are kept by a change of this file alone" if key else "are in nothing that is written"
        notes.append(f"keys of the file that are no text ({some(unread)}) {fate}")
    if saved is not None and groups:
        if saved.rest:
            client = dict(put(client, (saved.path[0],), dict(saved.rest)))
    elif saved is not None:
        notes.append(f"the optimizer's state under '{saved.path[0]}' has no names: {saved.problem}")
    if file.archive is None:
        notes.append("in torch's older serialization, which has no checksums")
    elif not file.has_checksums:
        notes.append("saved without checksums (compute_crc32=False)")
    held = (
        f"weights under '{escape(key)}'"
        if key
        else "a bare state dict"
        if root is not None
        else "weights by name"
    )
    also = f", with {some(keys, 12)}" if keys else ""
    # where there is no optimizer with names, what was trained is not known
    trained = {name for group in groups for name in group.params}
    frozen, buffers = untrained(tensors, trained, shared)
    stated = buffers_of(root)
    if stated is not None and trained:
        buffers = stated & tensors.keys()
        frozen = frozenset(tensors.keys() - trained - buffers - shared.keys())
    return Checkpoint(
        path=path,
        layout=Layout(
            format="pt",
            dtype=common_dtype(tensors),
            prefix=prefix,
            writer="torch.save" + (" (older serialization)" if file.archive is None else ""),
        ),
        tensors=tensors,
        groups=groups,
        shared=shared,
        frozen=frozen,
        buffers=buffers,
        roles_guessed=stated is None,
        excludes_frozen=holds_for(client.get(EXCLUDES_FROZEN), tensors),
        training=state,
        extra_state=extra,
        unread=tuple(unread),
        client=client,
        files=(FileRole(path=path, nbytes=file.size, role=held + also, dangers=file.dangers),),
        checks=tuple(file.checks()),
        notes=tuple(notes),
        template=file,
    )


def _beside(value: Value, key: str) -> Value:
    """What a value holds beside what a dotted path leads to, whose keys may have dots; None for nothing."""
    if not isinstance(value, dict):
        return None
    out = {}
    for name, inner in value.items():
        if isinstance(name, str) and key.startswith(f"{name}."):
            inner = _beside(inner, key[len(name) + 1 :])
        if name != key and inner is not None:
            out[name] = inner
    return out or None


def buffers_of(root: fields.Mapping | None) -> frozenset[str] | None:
    """The buffers as far as the file names them; None where they can only be guessed."""
    found = root.get(BUFFERS) if root is not None else None
    return names_of(found) if isinstance(found, list) else None


def _extra_state(file: TorchFile, key: str | None, prefix: str) -> Mapping[str, Value]:
    """What a state dict holds beside plain tensors: modules may keep anything there."""
    pairs = fields.as_mapping(under(file.value, key) if key is not None else file.value)
    if pairs is None:
        return {}
    rest = {name: node for name, node in pairs.named() if file.view(node) is None}
    return {name.removeprefix(prefix): decode(file, node) for name, node in rest.items()}


def _unread(file: TorchFile, key: str | None) -> Iterator[str]:
    """The keys that are no text, of the weights' own dict and, where that lies in another, of the whole."""
    held = [("", file.value)] + ([(key, under(file.value, key))] if key is not None else [])
    for place, node in held:
        pairs = fields.as_mapping(node)
        for name, _ in pairs.pairs if pairs is not None else ():
            if not isinstance(name, str):
                yield f"{place}[{plain(name)}]"
