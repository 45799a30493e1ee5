"""Torch distributed checkpoints (DCP), as FSDP2, HSDP, FSDP with tensor parallelism and DDP write them.

    <folder>/.metadata              a pickle: which tensors and objects there are, and where their parts lie
    <folder>/__R_I.distcp           the I-th file of rank R: one torch file after another
    <folder>/{pytorch_model_fsdp_0,optimizer_0}/    accelerate and the HF Trainer: one such folder each
    <folder>/shard-R-model-I-of-N.safetensors       HuggingFaceStorageWriter: the model alone, read only

There are no ranks to match: a reader takes the parts that it needs, however many ranks wrote them. Every
name is read through the path that the key was joined from. Nothing says which tensors are buffers or frozen,
which class the optimizer has, or, where its state was flattened, which groups it had.
Source: torch/distributed/checkpoint of torch 2.13.
"""

from __future__ import annotations

from ckpttools.formats.dcp.names import looks_like_dcp
from ckpttools.formats.dcp.read import read
from ckpttools.formats.dcp.write import plan

__all__ = ["looks_like_dcp", "plan", "read"]
