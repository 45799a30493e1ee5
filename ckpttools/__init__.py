"""ckpttools: trust, understand and move training checkpoints without loading or executing them.

1. A `Checkpoint` is a logical, unpartitioned description: tensors by name, each a `TensorRef` (dtype,
   shape, and the byte ranges that hold it). Nothing is loaded.
2. A format reads a path into a `Checkpoint` and plans the files of one. Neither moves tensor bytes.
3. A `Plan` is data: output files, each a tuple of segments (literal bytes, byte ranges, zeros, casts,
   checksums). `--dry-run` prints it, `execute` carries it out.
4. What people ask for is `Checkpoint -> Checkpoint` in between: reshard changes one field.
5. How far training is, is a `Training`: counters, schedules, param_groups and the places that hold them. A
   rebase gives `Edit`s of those places, and a plan that copies everything else.

    errors, tensors, plan, checkpoint   values that everything speaks in
    stores/                             where bytes lie: the only code that opens and lists for reading
    containers/                         archives, pickles, torch files, safetensors, JSON, as data
    formats/                            locate a checkpoint; zero/, torch files, HF folders
    frameworks/                         each framework's counters and schedules
    schedules/                          clocks, batches, and the learning rates of every scheduler family
    training                            the values that frameworks/ and transforms/rebase share
    transforms/                         reshard, select: Checkpoint -> Checkpoint or Weights; rebase
    checks/                             headers, files against each other, every byte
    runs, resume/                       which is the newest; will DeepSpeed load it, and what goes on
    values, checksums                   the only code that computes on tensor bytes
    execute                             the only code that writes
    explain                             what each error and check means
    cli/, trainer/                      the command line; the reference trainer, which nothing imports

`formats.open_checkpoint(path)` is where to start; `checks.verify(path)` gives a verdict.
"""

from __future__ import annotations

__version__ = "0.1.0"
