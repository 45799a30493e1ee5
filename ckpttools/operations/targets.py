"""What each format that convert writes gets: the plan, what it cannot hold, how the run goes on from it."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import STEP, Checkpoint, Layout, common_dtype
from ckpttools.errors import some
from ckpttools.formats import FORMATS, PLANS, Source
from ckpttools.formats.configs import DIFFUSERS
from ckpttools.formats.format import Places
from ckpttools.operations import advice, resuming
from ckpttools.operations.convertible import lacks
from ckpttools.operations.deepspeed_folder import moments, prepared
from ckpttools.operations.deepspeed_folder import plan as folder_plan
from ckpttools.operations.extract import is_configured, with_config
from ckpttools.operations.request import Request
from ckpttools.plan import Plan
from ckpttools.tensors import FLOAT32, DType, TensorRef
from ckpttools.transforms.cast import cast
from ckpttools.transforms.reshard import without_positions
from ckpttools.transforms.select import weights_only


class Planned(Struct, frozen=True):
    """A conversion before it is written."""

    checkpoint: Checkpoint  # as it is written
    plan: Plan
    notes: tuple[str, ...]  # what the format cannot hold, beside the plan's own
    lines: tuple[str, ...]  # of Python, with which training goes on


def planned(checkpoint: Checkpoint, source: Source, asked: Request) -> Planned:
    """The plan of a checkpoint that the target can take. Raises CkptError where it cannot be cut so."""
    match asked.to:
        case "pt":
            return _single_file(checkpoint, asked)
        case "dcp":
            return _distributed(checkpoint, asked)
        case "hf":
            return _weights(checkpoint, source, asked)
        case _:
            return _engine(checkpoint, asked)


def _single_file(checkpoint: Checkpoint, asked: Request) -> Planned:
    goes_on, notes = _goes_on(checkpoint, asked)
    checkpoint = _of_one_copy(checkpoint, asked.weights_dtype)
    layout = Layout(format="pt")
    plan = PLANS["pt"](checkpoint, layout)
    keys = _keys("pt", checkpoint, layout)
    lines = resuming.single_file(checkpoint, asked.dst, keys, optimizer=goes_on)
    return Planned(checkpoint, plan, tuple(notes), tuple(lines))


def _distributed(checkpoint: Checkpoint, asked: Request) -> Planned:
    goes_on, notes = _goes_on(checkpoint, asked)
    variant = asked.dcp_layout
    layout = Layout(format="dcp", dp_degree=asked.ranks or 1, mesh=asked.sizes, variant=variant)
    if asked.ranks is not None:
        rows = asked.sizes[0] if asked.sizes else asked.ranks
        checkpoint, left = without_positions(checkpoint, rows)
        notes += left
    if variant is not None:  # its own keys, not the source's
        checkpoint = replace(checkpoint, template=None)
    checkpoint = _of_one_copy(checkpoint, asked.weights_dtype)
    plan = PLANS["dcp"](checkpoint, layout)
    notes += _stateless(resuming.without_state(checkpoint), variant)
    keys = _keys("dcp", checkpoint, layout)
    lines = resuming.distributed(checkpoint, variant, asked.dst, keys, optimizer=goes_on)
    return Planned(checkpoint, plan, tuple(notes), tuple(lines))


def _weights(checkpoint: Checkpoint, source: Source, asked: Request) -> Planned:
    checkpoint = weights_only(checkpoint)
    dtype = asked.weights_dtype
    checkpoint = cast(checkpoint, dtype) if dtype is not None else checkpoint
    plan = with_config(PLANS["hf"](checkpoint, Layout(format="hf")), asked.hf_config, source.root)
    diffusers = checkpoint.layout.stem == DIFFUSERS
    configured = not diffusers and is_configured(plan)
    fp32 = common_dtype(checkpoint.tensors) == FLOAT32.short
    lines = advice.weights(asked.dst, "safetensors", single=False, configured=configured, fp32=fp32)
    return Planned(checkpoint, plan, (), lines[1:])


def _engine(checkpoint: Checkpoint, asked: Request) -> Planned:
    ranks = asked.ranks or checkpoint.layout.ranks or checkpoint.layout.dp_degree
    checkpoint, layout = prepared(checkpoint, asked.to, ranks, asked.weights_dtype)
    if asked.to == "zero0":
        layout = replace(layout, variant=asked.optimizer_class)
    plan = folder_plan(checkpoint, layout)
    lines = resuming.engine(checkpoint, layout, asked.dst)
    notes = _what_loads(checkpoint, asked.to, asked.optimizer_class)
    return Planned(checkpoint, plan, tuple(notes), tuple(lines))


def _goes_on(checkpoint: Checkpoint, asked: Request) -> tuple[bool, list[str]]:
    """Whether a torch optimizer goes on from the state that is there, and what there is to say of it."""
    notes = [*_replaced(checkpoint)]
    lacking = None if asked.reset_optimizer else lacks(checkpoint)
    if lacking is not None:
        notes.append(f"{lacking}: no torch optimizer goes on from that, and no line below loads it")
    return lacking is None, notes


def _replaced(checkpoint: Checkpoint) -> Iterator[str]:
    """A count of the training code's own that has the name of the one which takes its place."""
    own, step = checkpoint.client.get("global_step"), checkpoint.training.step
    if isinstance(own, int) and step is not None and own != step:
        yield f"the training code's global_step ({own}) gives way to the updates that were made ({step})"


def _stateless(names: tuple[str, ...], variant: str | None) -> Iterator[str]:
    """What torch makes of a folder without the state of parameters that its optimizer trains."""
    if names:
        partly = "allow_partial_load, which leaves what a new optimizer has there, with a step of 1"
        ours = variant in (None, "nested", "flat")
        yield (
            f"no optimizer state for {some(names)}, without a gradient so far: torch asks for it, "
            + (f"and the line below has {partly}" if ours else f"and fails without {partly}")
        )


def _what_loads(checkpoint: Checkpoint, to: str, optimizer_class: str | None) -> Iterator[str]:
    """What DeepSpeed must load a folder with."""
    steps = (step for group in checkpoint.groups for step in group.scalars.get(STEP, {}).values())
    if optimizer_class is None and any(isinstance(step, TensorRef) for step in steps):
        yield (
            "steps are tensors, as torch's optimizers keep them; for DeepSpeed's own: "
            "--optimizer-class FusedAdam or DeepSpeedCPUAdam"
        )
    if checkpoint.groups and (others := checkpoint.unnamed):
        yield (
            f"an engine has one optimizer: what lies under {some(others)} goes on as a value of training "
            "code, which load_checkpoint gives back in client_state"
        )
    if to != "zero0" and any("ns_coefficients" in group.hyper for group in checkpoint.groups):
        yield (
            "torch's Muon updates matrices, and stages 1 to 3 give an optimizer flat vectors: it stops at "
            "its first update there; pt, dcp and zero0 keep the matrices"
        )


def _keys(to: str, checkpoint: Checkpoint, layout: Layout) -> Places:
    """Where the parts lie in what is made."""
    (keys,) = (format.keys for format in FORMATS if format.keys is not None and to in format.targets)
    return keys(checkpoint, layout)


def _of_one_copy(checkpoint: Checkpoint, dtype: DType | None) -> Checkpoint:
    """One copy of each weight in the dtype that is asked for, where one is."""
    if dtype is None:
        return checkpoint
    made, masters = cast(checkpoint, dtype), checkpoint.master.values()
    note = f"the fp32 master weights are left out: one copy of each weight, in {dtype.short}, as asked for"
    return replace(
        made,
        groups=tuple(replace(group, state=moments(group)) for group in made.groups),
        notes=(*made.notes, *([note] if any(ref.dtype is not dtype for ref in masters) else [])),
    )
