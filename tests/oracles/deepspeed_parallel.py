"""Tiny folders as DeepSpeed saves models that it has split: by tensors (AutoTP), experts (AutoEP) or both.

    torchrun --standalone --nproc_per_node=2 deepspeed_parallel.py KIND OUT

KIND is autotp, autoep or folded (both), with the ZeRO stage: autotp1, autoep3, folded2. OUT is DeepSpeed's
save folder.
"""

import faulthandler
import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_presets import base
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

# router outputs that are recorded: DeepSpeed 0.19.8 asks transformers 5.23 in the way of an older one
base._retarget_transformers_output_recorders_for_modules = lambda **kwargs: 0
faulthandler.dump_traceback_later(200, exit=True)
kind, out = sys.argv[1:]
stage = int(kind[-1])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: it is not compiled for this
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": stage},
    "zero_force_ds_cpu_optimizer": False,
}
if not kind.startswith("autoep"):
    config["tensor_parallel"] = {"autotp_size": 2}
if kind.startswith("folded"):
    config["tensor_parallel"]["preset_model"] = "mixtral"
if kind.startswith("autotp"):
    model = LlamaForCausalLM(LlamaConfig(**size, **heads))
else:
    model = MixtralForCausalLM(MixtralConfig(**size, **heads, num_local_experts=4, num_experts_per_tok=2))
    config["expert_parallel"] = {
        "enabled": True,
        "autoep_size": 2,
        "preset_model": "mixtral",
        "use_grouped_mm": False,
    }
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
for _ in range(2):
    tokens = torch.arange(12).reshape(2, 6) % 16
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
engine.save_checkpoint(out, client_state={"epoch": 1})
dist.barrier()
os._exit(0)
