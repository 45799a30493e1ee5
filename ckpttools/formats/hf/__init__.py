"""Hugging Face model folders: safetensors or pytorch_model.bin, single or sharded, PEFT adapters, and
the models of diffusers pipelines.

    model.safetensors | model-00001-of-0000N.safetensors + model.safetensors.index.json
    pytorch_model.bin | pytorch_model-00001-of-0000N.bin + pytorch_model.bin.index.json
    adapter_model.safetensors | adapter_model.bin              (PEFT)
    diffusion_pytorch_model[.VARIANT].safetensors | .bin, and their shards and indexes   (diffusers)
    config.json, tokenizer files, trainer_state.json           (carried as files)

The index is {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard name}}.
Tied weights are stored once; transformers ties them again from the model's configuration. A safetensors
header's `__metadata__` maps the other names to the stored one, as safetensors' own save_model does, and holds
the step, the epoch and the losses as strings. Nothing else of a training state has a place in the format.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.findings import Finding
from ckpttools.formats.format import Checked, Format, Source
from ckpttools.formats.hf import names
from ckpttools.formats.hf.names import BIN, holds
from ckpttools.formats.notes import not_read
from ckpttools.location import Location
from ckpttools.plan import Plan

__all__ = [
    "BIN",
    "FORMAT",
    "plan",
]


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    from ckpttools.formats.hf.write import plan  # of no use to headers

    return plan(checkpoint, layout)


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.hf.read import read  # of use to checkpoints of this format alone

    checkpoint = read(source.target)
    return replace(checkpoint, notes=(*checkpoint.notes, *not_read(checkpoint)))


def _check(source: Source) -> Checked:
    from ckpttools.formats.hf.checks import check

    return check(source)


def _beside(folder: Location, files: list[str]) -> Iterator[Finding]:
    from ckpttools.formats.hf.checks import leftovers

    return leftovers(folder, files)


FORMAT = Format(
    name="hf",
    holds=holds,
    names_it=lambda path: names.names_it(path.name),
    resumes=False,
    is_part=names.is_shard,
    is_weights=names.is_weights,
    beside=_beside,
    recognise=names.recognise,
    recognise_file=names.recognise_file,
    lacking=names.lacking,
    read=_read,
    check=_check,
    plan=plan,
    targets=("hf",),
)
