"""transformers' Trainer with PEFT and ZeRO-2 resumes a checkpoint of fixtures/hf-trainer/peft.

    torchrun --standalone --nproc-per-node=N trainer_peft.py CHECKPOINT RESULT

RESULT gets, as JSON, the step at which training went on, the step at which it ended, and a digest of the fp32
master weights that DeepSpeed had right after it loaded them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_fp32_param
from peft import LoraConfig, get_peft_model
from transformers import training_args

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "fixtures"))
import make

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its kernels need a compiler


class Watch(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                digest.update(name.encode() + safe_get_full_fp32_param(parameter).numpy().tobytes())
        self.seen = {"step": state.global_step, "digest": digest.hexdigest()}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen["end"] = state.global_step


def main(checkpoint: str, result: str) -> None:
    training_args.is_torch_bf16_gpu_available = lambda: True  # it asks for a GPU, and needs none
    watch = Watch()
    arguments = make.trainer_arguments(make.DEEPSPEED, bf16=True, save_strategy="no")
    model = get_peft_model(make.llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=make.LORA))
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=make.samples(), callbacks=[watch]
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(watch.seen))
    dist.barrier()
    os._exit(0)  # process groups of several libraries do not always shut down cleanly


if __name__ == "__main__":
    main(*sys.argv[1:])
