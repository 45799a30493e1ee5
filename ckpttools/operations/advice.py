"""What to do with what was written: commands, and the line that makes each framework go on from it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError
from ckpttools.formats import Source
from ckpttools.formats.format import Places
from ckpttools.location import Location
from ckpttools.tree import Path


def verify(dst: Location) -> str:
    return f"ckpt verify {shlex.quote(str(dst))}"


def resume(
    source: Source, checkpoint: Checkpoint, dst: Location, ranks: int | None = None
) -> tuple[str, ...]:
    """How a run goes on from `dst`, a training checkpoint made from `source`, on `ranks` ranks."""
    on = f" --world-size {ranks}" if ranks is not None else ""
    check = f"ckpt resume-check {shlex.quote(str(dst))}{on}"
    return (verify(dst), check, _launch(source, checkpoint, dst, ranks))


def _launch(source: Source, checkpoint: Checkpoint, dst: Location, ranks: int | None) -> str:
    try:
        training = frameworks.read(source, checkpoint)
    except CkptError:
        return f"resume your training code from {str(dst)!r}"
    if checkpoint.layout.format == "dcp" and source.format.keys is not None:
        keys = source.format.keys(checkpoint, checkpoint.layout)
        return distributed(checkpoint.layout.variant, dst, keys)
    launch = frameworks.framework_of(training).launch
    return launch(dst, "N" if ranks is None else ranks, not source.inner)


def weights(
    dst: Location, form: str, *, single: bool, configured: bool, keyed: bool = False, fp32: bool = False
) -> tuple[str, ...]:
    """How weights are loaded: a folder by transformers where its configuration is there, else a file.

    transformers casts to the dtype of the configuration, which is the training's: `fp32` weights say theirs.
    """
    path = repr(str(dst))
    if single and form == "safetensors":
        load = f"safetensors.torch.load_file({path})"
    elif single:
        load = f"torch.load({path}, weights_only=True)" + ("['model_state_dict']" if keyed else "")
    elif configured:
        load = f"transformers.AutoModel.from_pretrained({path}{', dtype=torch.float32' * fp32})"
    else:
        return (verify(dst),)
    return (verify(dst), load)


def distributed(
    variant: str | None,
    dst: Location,
    keys: Places,
    *,
    partial: bool = False,
    optimizer: bool = True,
    stateless: bool = False,
) -> str:
    """The code that loads a distributed checkpoint, by the layout of its state (formats.dcp.roles), `partial`
    where what is frozen is not in it, `optimizer` where the state of one is, `stateless` where parameters of
    it have none.
    """
    path = repr(str(dst))
    planner = ", planner=torch.distributed.checkpoint.DefaultLoadPlanner(allow_partial_load=True)"
    planner = planner if stateless else ""
    strict = ", options=StateDictOptions(strict=False)" if partial else ""
    if variant == "accelerate":
        return (
            f"accelerator.load_state({path}), with its other files of your run in it (scheduler.bin ...); "
            "Trainer: the folder is what checkpoint-N holds of FSDP"
        )
    if variant == "titan":
        return f"torchtitan: its checkpoint.folder takes {path} under the name step-N"
    if not optimizer:  # torch asks for all that the optimizer has
        return (
            "model_state = get_model_state_dict(model); "
            f"torch.distributed.checkpoint.load({nested({keys.weights: 'model_state'})}, "
            f"checkpoint_id={path}); "
            f"set_model_state_dict(model, model_state{strict})  # with a new optimizer"
        )
    asked = {"flatten_optimizer_state_dict": variant == "flat", "ignore_frozen_params": partial}
    wanted = [f"{key}=True" for key, value in asked.items() if value] + ["strict=False"] * partial
    options = f", options=StateDictOptions({', '.join(wanted)})" if wanted else ""
    both = nested({keys.weights: "model_state", keys.optimizer: "optim_state"})
    return (
        f"model_state, optim_state = get_state_dict(model, optimizer{options}); "
        f"torch.distributed.checkpoint.load({both}, "
        f"checkpoint_id={path}{planner}); set_state_dict(model, optimizer, model_state_dict=model_state, "
        f"optim_state_dict=optim_state{options})"
    )


def nested(code: Mapping[Path, str]) -> str:
    """The code of a dict with these values at their paths, which differ in their last keys alone."""
    inner = ", ".join(f"{path[-1]!r}: {value}" for path, value in code.items())
    (above,) = {path[:-1] for path in code}
    for key in reversed(above):
        inner = f"{key!r}: {{{inner}}}"
    return f"{{{inner}}}"
