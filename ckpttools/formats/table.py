"""Every format, in the order in which they are asked whose a folder is."""

from __future__ import annotations

from ckpttools.formats import dcp, hf, torch, universal, verl, zero, zero0, zero3
from ckpttools.formats.format import Format

FORMATS: tuple[Format, ...] = (
    dcp.FORMAT,
    verl.FORMAT,
    universal.FORMAT,  # which holds a model file of ZeRO, too
    zero3.FORMAT,  # before zero, which knows every tag folder
    zero0.FORMAT,
    zero.FORMAT,
    hf.FORMAT,  # a run may lie in a folder with a model
    torch.FORMAT,
)

# what a Checkpoint can be written as, by the name that `ckpt convert --to` has for it
PLANS = {name: format.plan for format in FORMATS if format.plan for name in format.targets}
