"""Torch distributed checkpoints (DCP), as FSDP2, HSDP, FSDP with tensor parallelism and DDP write them.

    <folder>/.metadata              a pickle: which tensors and objects there are, and where their parts lie
    <folder>/__R_I.distcp           the I-th file of rank R: one torch file after another
    <folder>/{pytorch_model_fsdp_0,optimizer_0}/    accelerate and the HF Trainer: one such folder each
    <folder>/shard-R-model-I-of-N.safetensors       HuggingFaceStorageWriter: the model alone, read only

There are no ranks to match: a reader takes the parts that it needs, however many ranks wrote them. Every
name is read through the path that the key was joined from. Nothing says which tensors are buffers, frozen
or tied (what no group has is one of these: by its type, its name, its checksums), which class the optimizer
has, or, where its state was flattened, which groups it had.
Source: torch/distributed/checkpoint of torch 2.13.
"""

from __future__ import annotations

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.formats.dcp import names
from ckpttools.formats.format import Checked, Format, Places, Source
from ckpttools.plan import Plan

__all__ = ["FORMAT", "plan"]


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    from ckpttools.formats.dcp.write import plan

    return plan(checkpoint, layout)


def _keys(checkpoint: Checkpoint, layout: Layout) -> Places:
    from ckpttools.formats.dcp.write import keys_of

    return keys_of(checkpoint, layout)


def _read(source: Source) -> Checkpoint:
    from ckpttools.formats.dcp.read import read  # of use to checkpoints of this format alone

    return read(source.target)


def _check(source: Source) -> Checked:
    from ckpttools.formats.dcp.checks import check_folder  # of use to verify alone

    findings, found = check_folder(source.target)
    return Checked(findings, found, [])


FORMAT = Format(
    name="dcp",
    holds=names.holds,
    names_it=lambda path: names.names_it(path.name),
    recognise=names.recognise,
    recognise_file=names.recognise_file,
    read=_read,
    check=_check,
    inner=lambda target: [part for part in names.parts(target) if part != target],
    plan=plan,
    targets=("dcp",),
    keys=_keys,
)
