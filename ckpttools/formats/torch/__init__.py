"""Single files of torch.save: `.pt`, `.pth`, `.ckpt`, `.bin`, `.pth.tar`.

    model_state_dict        weights and buffers by name, or one of the other names that training code uses
    optimizer_state_dict    {"state": {id: {kind: value}}, "param_groups": [{lr, ..., "params": [ids]}]}
    scheduler_state_dict, epoch, global_step, train_loss, val_loss, and whatever else the code saved

The weights may also be the file's value itself (a bare state dict, a pickled module, a list) or lie under the
key that is asked for. DDP's and torch.compile's prefixes are removed where every name carries them. The
optimizer names its parameters by their place; `ids` finds out which they are, where one answer is possible.
Source: torch/optim/optimizer.py (state_dict, load_state_dict) of torch 2.13.
"""

from __future__ import annotations

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers.torch_file import TorchFile, is_torch_file
from ckpttools.formats.format import Checked, Format, Found, Places, Source
from ckpttools.location import Location
from ckpttools.plan import Plan
from ckpttools.training import Training

__all__ = ["FORMAT", "plan"]


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    from ckpttools.formats.torch.write import plan  # of no use to headers

    return plan(checkpoint, layout)


def _keys(checkpoint: Checkpoint, layout: Layout) -> Places:
    from ckpttools.formats.torch.write import keys_of

    return keys_of(checkpoint)


def _recognise(path: Location) -> Found | None:
    return Found(path, "a torch file") if is_torch_file(path) else None


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.torch.read import read  # of use to checkpoints of this format alone

    return read(source.target, source.key, source.order)


def _check(source: Source) -> Checked:
    from ckpttools.formats.counters import OPTIMIZER
    from ckpttools.formats.files import check_read
    from ckpttools.formats.torch.read import read

    return replace(check_read(read(source.target, source.key)), state=OPTIMIZER)


def _files(checkpoint: Checkpoint) -> tuple[TorchFile | None, tuple[TorchFile, ...]]:
    return (checkpoint.template if isinstance(checkpoint.template, TorchFile) else None), ()


def _state(file: TorchFile) -> Training:
    from ckpttools.containers import fields
    from ckpttools.containers.pickles import Dict
    from ckpttools.formats.counters import training

    return training(file, fields.as_mapping(file.value) or Dict())


FORMAT = Format(
    name="pt",
    holds=lambda folder: False,
    names_it=lambda path: False,
    recognise=lambda folder: None,
    recognise_file=_recognise,
    read=_read,
    check=_check,
    plan=plan,
    targets=("pt",),
    keyed=True,
    keys=_keys,
    torch_files=_files,
    state=_state,
)
