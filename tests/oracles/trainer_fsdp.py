"""transformers' Trainer with FSDP2 on the CPU, under torchrun with gloo.

    torchrun --nproc-per-node 2 trainer_fsdp.py FOLDER LOSSES [CHECKPOINT]

Six steps with a save after the third one, or on from CHECKPOINT; the losses of all steps are written as JSON.
accelerate takes FSDP for accelerators alone: its state is told that the CPU is one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType
from dcp_job import leave
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

FSDP = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "state_dict_type": "SHARDED_STATE_DICT",
}


class State(state.AcceleratorState):
    def __init__(self, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def main(folder: str, out: str, checkpoint: str | None = None) -> None:
    import accelerate.accelerator

    accelerate.accelerator.AcceleratorState = State
    torch.manual_seed(0 if checkpoint is None else 1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    draws = [torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i)) for i in range(24)]
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=6,
        save_strategy="steps" if checkpoint is None else "no",
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        fsdp=True,
        fsdp_config=FSDP,
        max_grad_norm=0.0,
    )
    samples: Any = [{"input_ids": tokens, "labels": tokens} for tokens in draws]
    trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=samples)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert "FSDP" in type(trainer.model_wrapped).__name__
    if dist.get_rank() == 0:
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        Path(out).write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
