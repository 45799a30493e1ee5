"""The reference ZeRO-2 trainer behind `ckpt train`: a small causal LM, real DeepSpeed, real text.

It exists to produce checkpoints as training teams have them, and to prove that a resharded or edited
checkpoint trains on exactly where the original would have. One file per idea:

    typed, config      YAML -> frozen Structs, by msgspec; an error carries the path into the data
    batch, order       who computes which sample of which update: pure arithmetic
    text, model        bytes of real text as tokens; Llama or GPT-2 from a config
    ds_config          our config -> DeepSpeed's
    folders, search, startup   run folders, tags, which checkpoint a launch continues from
    compared           what is different from the run that saved it, in the words of resume-check
    resume_check       what `ckpt resume-check` asks of this trainer
    state              what a checkpoint says about progress: written and read side by side
    engine, engines, plain, loop   DeepSpeed's engine or plain torch's, and the training loop
    output, failures   a terse console, a full log, and errors that cross processes
    options, launch, exchange, worker    the command line, torchrun, the folder between them, and one rank

torch, deepspeed and transformers are imported only by the modules that a rank runs. Nothing else in
ckpttools imports this package, except the commands `train`, `demo` and `resume-check`.
"""

from __future__ import annotations

# the names at the top of a configuration, for those who tell one without decoding it
SETTINGS = (
    "experiment", "work_dirs", "seed", "epochs", "precision", "freeze", "model", "data", "batch", "optimizer",
    "schedule", "zero", "save", "training", "deepspeed",
)  # fmt: skip
