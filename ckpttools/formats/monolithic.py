"""Single files of torch.save: `.pt`, `.pth`, `.ckpt`, `.bin`, `.pth.tar`.

The weights are the file's value itself (a bare state dict, a pickled module, a list), lie under one of the
names that training code uses, or under the key that is asked for. DDP's and torch.compile's prefixes are
removed where every name carries them.
"""

from __future__ import annotations

from pathlib import Path

from ckpttools.checkpoint import Checkpoint, FileRole, Layout
from ckpttools.containers import fields
from ckpttools.containers.pickles import Dict, Node
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.containers.torch_file.modules import candidates, named_views, state_of, under, what_it_is
from ckpttools.errors import UsageError, escape
from ckpttools.formats.counters import train_state
from ckpttools.formats.ties import tied
from ckpttools.tensors import TensorRef

WEIGHTS = (
    "model_state_dict",
    "state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "params",
    "weights",
    "module_state_dict",
)
OPTIMIZER = ("optimizer_state_dict", "optimizer", "optim", "optimizer_state", "optimizer_states")
PREFIXES = ("module.", "_orig_mod.")


def read(path: Path, wanted: str | None = None) -> Checkpoint:
    """Read a single file; `wanted` is the key of the weights, with dots below the first one.

    Raises UsageError where no weights are found in it.
    """
    file = read_torch_file(path)
    key, found = find_weights(file, wanted)
    tensors, prefix = strip(found)
    root = fields.as_mapping(file.value)
    keys = [name for name in (root.names() if root is not None and key else ()) if name != key]
    notes = [f"the prefix '{prefix}' of every name was removed"] if prefix else []
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
    also = f", with {', '.join(map(escape, keys[:12]))}" if keys else ""
    dtypes = {ref.dtype.short for ref in tensors.values() if ref.dtype.is_float}
    return Checkpoint(
        path=path,
        layout=Layout(
            format="pt",
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            writer="torch.save" + (" (older serialization)" if file.archive is None else ""),
        ),
        tensors=tensors,
        shared=tied(tensors),
        train_state=train_state(file, root) if root is not None and key else train_state(file, Dict()),
        files=(FileRole(path=path, nbytes=file.size, role=held + also, dangers=file.dangers),),
        checks=tuple(file.checks()),
        notes=tuple(notes),
        template=file,
    )


def find_weights(file: TorchFile, wanted: str | None = None) -> tuple[str | None, dict[str, TensorRef]]:
    """The weights and the key they lie under, None where they are the file's value itself."""
    root = fields.as_mapping(file.value)
    if wanted is not None:
        tensors = _tensors(file, under(file.value, wanted))
        if not tensors:
            raise no_weights(file, f"nothing under '{escape(wanted)}' holds named tensors")
        return wanted, tensors
    for key in WEIGHTS:
        tensors = _tensors(file, root.get(key)) if root is not None else {}
        if tensors:
            return key, tensors
    tensors = {} if root is not None and state_of(root) else _tensors(file, file.value)
    if not tensors:
        raise no_weights(file, what_it_is(file))
    return None, tensors


def _tensors(file: TorchFile, node: Node) -> dict[str, TensorRef]:
    return {name: view.ref for name, view in named_views(file, node).items()}


def no_weights(file: TorchFile, detail: str) -> UsageError:
    """Nothing is damaged: the file holds something else, or its weights lie where only the user can say."""
    root = fields.as_mapping(file.value)
    found = [] if root is not None and state_of(root) else candidates(file)
    shown = ", ".join(f"{escape(key)} ({n} tensors)" for key, n in found[:12])
    if not found:
        return UsageError(
            "not-a-checkpoint",
            f"a torch file without model weights: {detail}",
            where=file.path,
            why="nothing in it holds named tensors",
            hint="name the file that holds the model",
        )
    return UsageError(
        "no-weights",
        f"the weights lie under no name that training code usually gives: {detail}",
        where=file.path,
        why=f"named tensors lie under {shown}; the names looked for are {', '.join(WEIGHTS)}",
        hint=f"say which ones: --key {escape(found[0][0])}",
    )


def strip(tensors: dict[str, TensorRef]) -> tuple[dict[str, TensorRef], str]:
    """Remove DDP's `module.` and torch.compile's `_orig_mod.` where every name starts with it."""
    removed = ""
    while True:
        prefix = next((p for p in PREFIXES if tensors and all(n.startswith(p) for n in tensors)), "")
        if not prefix or any(name == prefix for name in tensors):
            return tensors, removed
        tensors = {name[len(prefix) :]: ref for name, ref in tensors.items()}
        removed += prefix
