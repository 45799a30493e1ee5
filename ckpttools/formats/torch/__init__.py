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

from ckpttools.formats.torch.names import OPTIMIZER, WEIGHTS, find_weights, strip
from ckpttools.formats.torch.read import read
from ckpttools.formats.torch.write import plan

__all__ = ["OPTIMIZER", "WEIGHTS", "find_weights", "plan", "read", "strip"]
