"""ckpttools: trust, understand and move training checkpoints without loading or executing them.

    import ckpttools

    run = ckpttools.open("run/checkpoint-20")        # headers only
    run["lm_head.weight"]                            # a numpy array, mapped from its file
    run.torch("lm_head.weight")                      # where torch is installed
    ckpttools.verify("run/checkpoint-20").ok         # every byte
    ckpttools.ls("runs")                             # every checkpoint below, by run
    ckpttools.experiments("runs").differing          # runs side by side: settings that are not the same
    ckpttools.report("run", dst="run.html")          # a page for a colleague
    ckpttools.prune("run", keep_last=3)              # headers of what stays are checked first
    ckpttools.pin("run/checkpoint-20", "the paper's")
    ckpttools.latest("run").path                     # what a resume would take, and .why
    ckpttools.extract("run/checkpoint-20", "weights", dtype="bf16")
    ckpttools.reshard("run/checkpoint-20", "four", world_size=4)
    ckpttools.rebase("run/checkpoint-20", "half", new_bs=32)
    ckpttools.resume_check("run/checkpoint-20", config="ds.json").verdict
    ckpttools.digest("run/checkpoint-20").digests.state    # the same for "four"
    ckpttools.diff("run/checkpoint-10", "run/checkpoint-20").tensors
    ckpttools.prove("run/checkpoint-20", "four").verdict
    ckpttools.average("run", last=3, dst="mean")

1. A `Checkpoint` is a logical, unpartitioned description: tensors by name, each a `TensorRef` (dtype,
   shape, and the byte ranges that hold it). Nothing is loaded.
2. A format reads a path into a `Checkpoint` and plans the files of one. Neither moves tensor bytes.
3. A `Plan` is data: output files, each a tuple of segments (literal bytes, byte ranges, zeros, checksums).
   `--dry-run` prints it, `execute` carries it out.
4. What people ask for is `Checkpoint -> Checkpoint` in between: reshard changes one field.
5. How far training is, is a `Training`: counters, schedules, param_groups and the places that hold them. A
   rebase gives `Edit`s of those places, and a plan that copies everything else.

    location                            a path, or a key in a store
    errors, tensors, plan, checkpoint   values that everything speaks in
    siblings, numbered                  names: of what is written beside a checkpoint; by their numbers
    stores/                             where bytes lie: the only code that opens and lists for reading;
                                        disk, remote
    containers/                         archives, pickles, torch files, safetensors, JSON, as data
    formats/                            locate a checkpoint; zero/, torch files, HF folders
    frameworks/                         each framework's counters and schedules
    schedules/                          clocks, batches, and the learning rates of every scheduler family
    training                            the values that frameworks/ and transforms/rebase share
    transforms/                         select, rename, cast, reshard: Checkpoint -> Checkpoint; rebase
    compare/                            what two checkpoints hold, whatever their layouts
    checks/                             headers, files against each other, every byte
    runs/, resume/                      which is the newest; will DeepSpeed load it, and what goes on
    values, passes/, checksums          the only code that computes on tensor bytes, and that reads them
    execute/                            the only code that writes
    charts/, pages/                     pictures and a page, as data; SVG and HTML
    explain                             what each error and check means
    operations/                         one function for each command
    cli/, trainer/                      the command line; the reference trainer, which nothing imports
    integrations/                       callbacks for other trainers, which nothing imports

The command line speaks this library: every command is one of these calls. Importing it imports neither
numpy nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckpttools.checkpoint import Checkpoint, ParamGroup
    from ckpttools.checks import Finding, Verdict
    from ckpttools.errors import CkptError, Unsupported, UsageError
    from ckpttools.operations.average import average
    from ckpttools.operations.convert import convert
    from ckpttools.operations.copy import copy
    from ckpttools.operations.diff import Diff, diff
    from ckpttools.operations.digest import Digested, digest
    from ckpttools.operations.experiments import Experiment, Experiments, experiments
    from ckpttools.operations.extract import extract
    from ckpttools.operations.inspect import inspect
    from ckpttools.operations.latest import latest
    from ckpttools.operations.ls import ls
    from ckpttools.operations.opened import Opened, open
    from ckpttools.operations.pin import pin, unpin
    from ckpttools.operations.prove import Proof, prove
    from ckpttools.operations.prune import prune
    from ckpttools.operations.rebase import rebase
    from ckpttools.operations.report import Report, report
    from ckpttools.operations.reshard import reshard
    from ckpttools.operations.resume_check import resume_check
    from ckpttools.operations.verify import verify
    from ckpttools.operations.writing import Writing, Written
    from ckpttools.plan import Plan
    from ckpttools.runs import Choice, Entry
    from ckpttools.tensors import TensorRef
    from ckpttools.transforms.rebase import Rebased

_PLACES = {
    "Checkpoint": "checkpoint",
    "Choice": "runs",
    "CkptError": "errors",
    "Diff": "operations.diff",
    "Digested": "operations.digest",
    "Entry": "runs",
    "Experiment": "operations.experiments",
    "Experiments": "operations.experiments",
    "Finding": "checks",
    "Opened": "operations.opened",
    "ParamGroup": "checkpoint",
    "Plan": "plan",
    "Proof": "operations.prove",
    "Rebased": "transforms.rebase",
    "Report": "operations.report",
    "TensorRef": "tensors",
    "Unsupported": "errors",
    "UsageError": "errors",
    "Verdict": "checks",
    "Writing": "operations.writing",
    "Written": "operations.writing",
    "average": "operations.average",
    "convert": "operations.convert",
    "copy": "operations.copy",
    "diff": "operations.diff",
    "digest": "operations.digest",
    "experiments": "operations.experiments",
    "extract": "operations.extract",
    "inspect": "operations.inspect",
    "latest": "operations.latest",
    "ls": "operations.ls",
    "open": "operations.opened",
    "prove": "operations.prove",
    "pin": "operations.pin",
    "prune": "operations.prune",
    "rebase": "operations.rebase",
    "report": "operations.report",
    "reshard": "operations.reshard",
    "resume_check": "operations.resume_check",
    "unpin": "operations.pin",
    "verify": "operations.verify",
}

__all__ = [
    "Checkpoint",
    "Choice",
    "CkptError",
    "Diff",
    "Digested",
    "Entry",
    "Experiment",
    "Experiments",
    "Finding",
    "Opened",
    "ParamGroup",
    "Plan",
    "Proof",
    "Rebased",
    "Report",
    "TensorRef",
    "Unsupported",
    "UsageError",
    "Verdict",
    "Writing",
    "Written",
    "__version__",
    "average",
    "convert",
    "copy",
    "diff",
    "digest",
    "experiments",
    "extract",
    "inspect",
    "latest",
    "ls",
    "open",
    "pin",
    "prove",
    "prune",
    "rebase",
    "report",
    "reshard",
    "resume_check",
    "unpin",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'ckpttools' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ckpttools.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
