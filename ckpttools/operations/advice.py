"""What to do with what was written: commands, and the line that makes each framework go on from it."""

from __future__ import annotations

import shlex
from pathlib import Path

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError
from ckpttools.formats import Source


def verify(dst: Path) -> str:
    return f"ckpt verify {shlex.quote(str(dst))}"


def resume(source: Source, checkpoint: Checkpoint, dst: Path, ranks: int | None = None) -> tuple[str, ...]:
    """How a run goes on from `dst`, a training checkpoint made from `source`, on `ranks` ranks."""
    on = f" --world-size {ranks}" if ranks is not None else ""
    check = f"ckpt resume-check {shlex.quote(str(dst))}{on}"
    return (verify(dst), check, _launch(_framework(source, checkpoint), source, checkpoint, dst, ranks))


def _framework(source: Source, checkpoint: Checkpoint) -> str:
    try:
        return frameworks.read(source, checkpoint).framework
    except CkptError:
        return "?"


def _launch(framework: str, source: Source, checkpoint: Checkpoint, dst: Path, ranks: int | None) -> str:
    path, nproc = repr(str(dst)), "N" if ranks is None else ranks
    match framework:
        case "ckpt train":
            at = shlex.quote(str(dst))
            return f"ckpt train CONFIG --nproc {nproc} --resume --resume-from {at}"
        case "hf-trainer":
            return f"torchrun --nproc-per-node {nproc} ...: trainer.train(resume_from_checkpoint={path})"
        case "accelerate":
            return f"accelerate launch --num_processes {nproc} ...: accelerator.load_state({path})"
        case "lightning":
            return f"Trainer(devices={nproc}).fit(model, ckpt_path={path})"
        case "mmengine":
            return f"load_from = {path} and resume = True in the configuration, on {nproc} ranks"
        case "openpcdet":
            return f"python train.py --ckpt {shlex.quote(str(dst))}"
        case "deepspeed" if source.inner:
            return f"deepspeed --num_gpus {nproc} ...: engine.load_checkpoint({path})"
        case "deepspeed":
            folder = repr(str(dst.parent))
            return f"deepspeed --num_gpus {nproc} ...: engine.load_checkpoint({folder}, tag={dst.name!r})"
    if checkpoint.layout.format == "dcp":
        return distributed(checkpoint.layout.variant, dst)
    return f"resume your training code from {path}"


def weights(dst: Path, form: str, *, single: bool, configured: bool) -> tuple[str, ...]:
    """How weights are loaded: a folder by transformers where its configuration is there, else a file."""
    path = repr(str(dst))
    if single and form == "safetensors":
        load = f"safetensors.torch.load_file({path})"
    elif single:
        load = f"torch.load({path}, weights_only=True)"
    elif configured:
        load = f"transformers.AutoModel.from_pretrained({path})"
    else:
        return (verify(dst),)
    return (verify(dst), load)


def converted(to: str, dst: Path, ranks: int, variant: str | None = None) -> tuple[str, ...]:
    """The code that loads a converted checkpoint."""
    path = repr(str(dst))
    match to:
        case "pt":
            load = (
                f"saved = torch.load({path}, weights_only=True); "
                "model.load_state_dict(saved['model_state_dict']); "
                "optimizer.load_state_dict(saved['optimizer_state_dict'])"
            )
        case "dcp":
            load = distributed(variant, dst)
        case "hf":
            load = f"transformers.AutoModel.from_pretrained({path})"
        case _:
            load = f"deepspeed --num_gpus {ranks} ...: engine.load_checkpoint({path})"
    return (verify(dst), load)


def distributed(variant: str | None, dst: Path) -> str:
    """The code that loads a distributed checkpoint, by the layout of its state (formats.dcp.roles)."""
    path = repr(str(dst))
    if variant == "accelerate":
        return f"accelerator.load_state({path}); Trainer: the folder is what checkpoint-N holds of FSDP"
    if variant == "titan":
        return f"torchtitan: its checkpoint.folder takes {path} under the name step-N"
    options = ", options=StateDictOptions(flatten_optimizer_state_dict=True)" if variant == "flat" else ""
    return (
        f"model_state, optim_state = get_state_dict(model, optimizer{options}); "
        f"torch.distributed.checkpoint.load({{'model': model_state, 'optimizer': optim_state}}, "
        f"checkpoint_id={path}); set_state_dict(model, optimizer, model_state_dict=model_state, "
        f"optim_state_dict=optim_state{options})"
    )
