"""ckpt inspect: what a checkpoint is. Header reads only; torch is never imported, nor numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ckpttools import tree
from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, JSON, KEY, QUIET, SRC, STATS, TAG
from ckpttools.containers.torch_file import scalar
from ckpttools.errors import counted, escape
from ckpttools.location import Location
from ckpttools.tensors import TensorRef

if TYPE_CHECKING:
    from ckpttools.frameworks.progress import Progress

STATE_FILES = 24  # files listed before the rest is only counted


@click.command("inspect")
@SRC
@click.option("--tensors", is_flag=True, help="List every tensor with its dtype, shape and size.")
@FOLLOW
@STATS
@TAG
@KEY
@JSON
@QUIET
def command(
    src: Location, tensors: bool, tag: str | None, key: str | None, as_json: bool, quiet: bool
) -> int:
    """What SRC is: format, tag, step, epoch, losses, ranks, dtypes, settings, and what each file is for.

    Only headers are read: it takes the same fraction of a second for 1 MB and for 1 TB.
    """
    from ckpttools.operations.dangers import dangers as dangers_in
    from ckpttools.operations.dangers import read_judged, warning

    source, checkpoint = read_judged(src, tag, key)
    dangers = dangers_in(source, checkpoint)
    if as_json:
        warnings = [{"file": str(path), "what": what} for path, what in dangers]
        render.document(_json(source, checkpoint, tensors) | {"dangers": warnings})
        return 1 if dangers else 0
    for path, what in dangers:
        click.echo(click.style(warning(path, what), fg="red", bold=True))
    if quiet:
        return 1 if dangers else 0
    from ckpttools.frameworks.progress import progress

    training = progress(source, checkpoint)
    click.echo(escape(src, 4000))
    for line in _progress(training):
        click.echo(escape(line, 1000))
    click.echo()
    rows = [(name, value) for name, value in _summary(source, checkpoint) if value not in (None, "")]
    click.echo(render.table(rows))
    if checkpoint.groups:
        click.echo("\noptimizer groups")
        click.echo(render.table(_groups(checkpoint), ("", "parameters", "elements", "state", "settings")))
    elif training.settings:
        click.echo("\noptimizer groups")
        click.echo(render.table([(g, _settings(each)) for g, each in enumerate(training.settings)]))
    click.echo("\nfiles")
    files = [(render.size(f.nbytes), f.path.name, f.role) for f in checkpoint.files]
    click.echo(render.table(files[:STATE_FILES]))
    if len(files) > STATE_FILES:
        click.echo(f"and {len(files) - STATE_FILES} more")
    if checkpoint.layout.zero_stage is not None:
        click.echo("(one optimizer file per rank is normal: ZeRO spreads the optimizer state over the ranks)")
    for note in (*training.notes, *checkpoint.notes):
        click.echo(f"note: {escape(note, 1000)}")
    if tensors:
        click.echo("\ntensors")
        click.echo(render.table(_tensors(checkpoint), ("name", "dtype", "shape", "size", "")))
    return 1 if dangers else 0


FORMATS = {
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "universal": "DeepSpeed universal",
    "pt": "torch file",
    "hf": "Hugging Face folder",
    "safetensors": "safetensors file",
}


def _progress(found: Progress) -> Iterator[str]:
    """What comes first: how far training is, and what its learning rate follows."""
    if str(found):
        yield str(found)
    for words in found.schedules:
        yield f"schedule {words}"


def _summary(source: Any, checkpoint: Any) -> Iterator[tuple[str, object]]:
    layout, state = checkpoint.layout, checkpoint.training
    kind = FORMATS.get(layout.format, layout.format)
    if layout.zero_stage is not None:
        kind += f", {layout.ranks or '?'} rank{'' if layout.ranks == 1 else 's'}"
    yield "format", kind + (f", {layout.variant}" if layout.variant else "")
    yield "found", source.how
    yield "tag", layout.tag
    yield "written by", layout.writer
    yield "skipped steps", state.skipped_steps or None
    yield "samples", state.samples
    yield "parameters", _parameters(checkpoint)
    yield "dtypes", _dtypes(checkpoint)
    yield "optimizer", checkpoint.optimizer
    yield (
        "size",
        f"{render.size(sum(f.nbytes for f in checkpoint.files))} in {counted(len(checkpoint.files), 'file')}",
    )


def _parameters(checkpoint: Any) -> str:
    buffers = _buffers(checkpoint)
    params = _own(checkpoint, buffers)
    total = _elements(checkpoint, params)
    parts = [f"{'?' if total is None else render.count(total)} in {counted(len(params), 'tensor')}"]
    if whole := [name for name in params if _is_whole(checkpoint.tensors[name])]:
        parts.append(f"{len(whole)} of whole numbers (packed weights, or buffers)")
    if checkpoint.frozen:
        parts.append(f"{len(checkpoint.frozen)} {_frozen(checkpoint)}")
    if checkpoint.shared:
        parts.append(f"{len(checkpoint.shared)} tied")
    if buffers:
        by = "" if checkpoint.buffers else " by type and name"
        parts.append(f"{len(buffers)} buffers{by}")
    return ", ".join(parts)


def _frozen(checkpoint: Any) -> str:
    """What no optimizer trains, and is no buffer by type or name; a file may not tell the two apart."""
    return "frozen or buffers" if checkpoint.roles_guessed else "frozen"


def _elements(checkpoint: Any, params: list[str]) -> int | None:
    """None where their names alone are there (ZeRO-3 that is not put together has tensors of no elements), or
    where they are packed: an element of a quantised model's integers holds several weights.
    """
    if any(_is_whole(checkpoint.tensors[name]) for name in params):
        return None
    total = sum(checkpoint.tensors[name].numel for name in params)
    return total if total or not params else None


def _is_whole(ref: Any) -> bool:
    return not ref.dtype.is_float and not ref.dtype.name.startswith("complex")


def _buffers(checkpoint: Any) -> frozenset[str]:
    """As the checkpoint has them; where no optimizer says what is trained, what no weight is named or typed
    like (those of quantized models are int8 and uint8).
    """
    from ckpttools.formats.buffers import NORMS

    if checkpoint.groups or checkpoint.buffers:
        return frozenset(checkpoint.buffers)
    refs = checkpoint.tensors.items()
    return frozenset(n for n, ref in refs if n.endswith(NORMS) or ref.dtype.name in ("int64", "bool"))


def _own(checkpoint: Any, buffers: frozenset[str]) -> list[str]:
    return [name for name in checkpoint.tensors if name not in checkpoint.shared and name not in buffers]


def _dtypes(checkpoint: Any) -> str:
    weights = sorted({ref.dtype.short for ref in checkpoint.tensors.values()})
    text = f"weights {', '.join(weights)}"
    kinds: dict[str, set[str]] = {}
    for group in checkpoint.groups:
        for kind, refs in group.state.items():
            kinds.setdefault(kind, set()).update(ref.dtype.short for ref in refs.values())
    for kind, found in kinds.items():
        text += f"; {'master' if kind == 'fp32' else kind} {', '.join(sorted(found))}"
    return text


def _mapping(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


SETTINGS = ("name", "lr", "initial_lr", "betas", "momentum", "eps", "weight_decay")


def _groups(checkpoint: Any) -> Iterator[tuple[object, ...]]:
    for g, group in enumerate(checkpoint.groups):
        numel = sum(math.prod(shape) for shape in group.params.values())
        yield g, len(group.params), render.count(numel), ", ".join(group.state), _settings(_hyper(group))


def _hyper(group: Any) -> dict[str, object]:
    """A group's settings, of which a learning rate may be a tensor of one element."""
    numbers = {key: scalar(value) for key, value in group.hyper.items() if isinstance(value, TensorRef)}
    return {**group.hyper, **{key: number for key, number in numbers.items() if number is not None}}


def _settings(group: Mapping[str, object]) -> str:
    return _mapping({key: group[key] for key in SETTINGS if key in group})


def _tensors(checkpoint: Any) -> Iterator[tuple[object, ...]]:
    buffers = _buffers(checkpoint)
    for name, ref in checkpoint.tensors.items():
        role = (
            f"tied to {checkpoint.shared[name]}"
            if name in checkpoint.shared
            else "buffer"
            if name in buffers
            else _frozen(checkpoint)
            if name in checkpoint.frozen
            else ""
        )
        yield name, ref.dtype.short, list(ref.shape), render.size(ref.nbytes), role


def _progress_json(found: Progress) -> dict[str, object]:
    batch = found.batch
    return {
        "framework": found.framework,
        "unit": found.unit,
        "count": found.count,
        "total": found.total,
        "epoch": found.epoch,
        "epochs": found.epochs,
        "lr": list(found.rates),
        "batch": {
            "total": batch.total,
            "micro": batch.micro,
            "gpus": batch.ranks,
            "accumulation": batch.accumulation,
            "from": dict(batch.by),
        },
        "losses": dict(found.losses),
        "schedules": list(found.schedules),
        "notes": list(found.notes),
    }


def _json(source: Any, checkpoint: Any, tensors: bool) -> dict[str, object]:
    from ckpttools.frameworks.progress import progress

    layout, reached = checkpoint.layout, progress(source, checkpoint)
    state, buffers = reached.state, _buffers(checkpoint)
    out: dict[str, object] = {
        "path": str(source.root),
        "target": str(source.target),
        "found": source.how,
        "format": layout.format,
        "tag": layout.tag,
        "zero_stage": layout.zero_stage,
        "ranks": layout.ranks,
        "variant": layout.variant,
        "round_robin": layout.round_robin,
        "dtype": layout.dtype,
        "writer": layout.writer,
        "step": state.step,
        "iteration": state.iteration,
        "skipped_steps": state.skipped_steps,
        "epoch": state.epoch,
        "samples": state.samples,
        "train_loss": state.train_loss,
        "val_loss": state.val_loss,
        "batch": dict(state.saved_batch),
        "scheduler": _schedulers(state.scheduler),
        "parameters": _elements(checkpoint, _own(checkpoint, buffers)),
        "frozen": sorted(checkpoint.frozen),
        "frozen_or_buffers": checkpoint.roles_guessed and bool(checkpoint.frozen),
        "shared": dict(checkpoint.shared),
        "buffers": sorted(buffers),
        "groups": [
            {"parameters": len(g.params), "state": list(g.state), "settings": tree.plain(_hyper(g))}
            for g in checkpoint.groups
        ],
        "files": [{"path": str(f.path), "nbytes": f.nbytes, "role": f.role} for f in checkpoint.files],
        "notes": list(checkpoint.notes),
        "progress": _progress_json(reached),
    }
    if tensors:
        out["tensors"] = [
            {"name": name, "dtype": ref.dtype.name, "shape": list(ref.shape), "nbytes": ref.nbytes}
            for name, ref in checkpoint.tensors.items()
        ]
    return out


def _schedulers(state: tree.Value) -> object:
    """A scheduler's state; several are shown under one key."""
    return tree.plain({"schedulers": state} if isinstance(state, list) and state else dict(state or {}))
