"""Hugging Face model folders: safetensors or pytorch_model.bin, single or sharded, and PEFT adapters.

    model.safetensors | model-00001-of-0000N.safetensors + model.safetensors.index.json
    pytorch_model.bin | pytorch_model-00001-of-0000N.bin + pytorch_model.bin.index.json
    adapter_model.safetensors | adapter_model.bin              (PEFT)
    config.json, tokenizer files, trainer_state.json           (carried as files)

The index is {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard name}}.
Tied weights are stored once; transformers ties them again from the model's configuration. A safetensors
header's `__metadata__` maps the other names to the stored one, as safetensors' own save_model does, and holds
the step, the epoch and the losses as strings. Nothing else of a training state has a place in the format.
"""

from __future__ import annotations

from ckpttools.formats.format import Checked, Format, Source
from ckpttools.formats.hf import names
from ckpttools.formats.hf.configs import config_files
from ckpttools.formats.hf.names import CONFIG_FILES, HEADS, INDEX, ROLES, SHARD, holds, weight_files
from ckpttools.formats.hf.read import read
from ckpttools.formats.hf.write import BIN, plan

__all__ = [
    "BIN",
    "CONFIG_FILES",
    "FORMAT",
    "HEADS",
    "INDEX",
    "ROLES",
    "SHARD",
    "config_files",
    "holds",
    "plan",
    "read",
    "weight_files",
]


def _check(source: Source) -> Checked:
    from ckpttools.formats.hf.checks import check

    return check(source)


FORMAT = Format(
    name="hf",
    holds=holds,
    recognise=names.recognise,
    recognise_file=names.recognise_file,
    lacking=names.lacking,
    read=lambda source: read(source.target),
    check=_check,
    plan=plan,
    targets=("hf",),
)
