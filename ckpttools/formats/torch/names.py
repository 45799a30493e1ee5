"""Where a single file keeps its weights and its optimizer, and what the weights are called."""

from __future__ import annotations

import shlex

from ckpttools.containers import fields
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile
from ckpttools.containers.torch_file.modules import candidates, named_views, state_of, under, what_it_is
from ckpttools.containers.torch_file.views import is_rebuilt
from ckpttools.errors import UsageError, escape
from ckpttools.formats.notes import of_other_kinds
from ckpttools.formats.torch_optimizer import PREFIXES
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
        odd = [key for key, value in root.named() if is_rebuilt(value)] if root is not None else []
        return UsageError(
            "not-a-checkpoint",
            f"a torch file without model weights: {detail}",
            where=file.path,
            why=next(of_other_kinds(odd), "nothing in it holds named tensors"),
            hint="name the file that holds the model",
        )
    return UsageError(
        "no-weights",
        f"the weights lie under no name that training code usually gives: {detail}",
        where=file.path,
        why=f"named tensors lie under {shown}; the names looked for are {', '.join(WEIGHTS)}",
        hint=f"say which ones: --key {shlex.quote(escape(found[0][0]))}",
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
