"""A `torch_dist` folder as Megatron-Core saves it on two ranks, with the whole tensors beside it.

    torchrun --standalone --nproc_per_node=2 megatron_samples.py OUT

OUT/iter_0000003 and OUT/truth.pt: rows and columns over two tensor-parallel ranks, stacked layers, the
optimizer's state as its distributed optimizer names it (fully_sharded_model_space), an object of each rank,
common.pt. Needs megatron-core; made with 0.16.1.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

SPLIT = {  # the shape, and the dimension that is cut
    "embedding.word_embeddings.weight": ((8, 4), 0),
    "decoder.layers.mlp.linear_fc1.weight": ((2, 12, 4), 1),  # layers are stacked
    "decoder.layers.mlp.linear_fc2.weight": ((2, 4, 12), 2),
    "decoder.final_layernorm.weight": ((4,), None),
}


def main(out: Path) -> None:
    # the library asks CUDA for a device to send one flag from, also where gloo has none
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = out / "iter_0000003"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    whole = {
        f"optimizer.state.{kind}.{name}": torch.rand(shape)
        for kind in ("fp32_param", "exp_avg", "exp_avg_sq")
        for name, (shape, _) in SPLIT.items()
    }
    whole |= {name: whole[f"optimizer.state.fp32_param.{name}"].bfloat16() for name in SPLIT}
    state: dict[str, object] = {}
    for name, tensor in whole.items():
        dim = SPLIT[name.split(".", 3)[3] if name.startswith("optimizer") else name][1]
        if dim is None:
            state[name] = ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank)
        else:
            part = tensor.chunk(ranks, dim)[rank].contiguous()
            state[name] = ShardedTensor.from_rank_offsets(name, part, (dim, rank, ranks))
    state["rng"] = ShardedObject("rng_state", {"cpu": torch.get_rng_state()[:8]}, (ranks,), (rank,))
    group = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "wd_mult": 1.0, "step": 3}
    state |= {
        "iteration": 3,
        "checkpoint_version": 3.0,
        "args": Namespace(hidden_size=4, num_layers=2),
        "optimizer": {"optimizer": {"param_groups": [group, {**group, "wd_mult": 0.0}]}},
        "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 24},
        "num_floating_point_operations_so_far": 12,
    }
    dist_checkpointing.save(state, str(folder))
    if rank == 0:
        torch.save(whole, out / "truth.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":  # its writers are started as processes that import this file
    main(Path(sys.argv[1]))
