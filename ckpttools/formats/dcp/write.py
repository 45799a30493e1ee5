"""The plan of a distributed checkpoint: the Checkpoint as one saved state, cut into parts, item by item.

Parts are whole tensors, or rows for a mesh of ranks as FSDP2 and tensor parallelism cut them; any mesh loads
either.
Values and what has no rows are in the first file. Equal contents give equal bytes: no time, no path, no id
of the save. `.metadata` comes last: a folder without it is an unfinished save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ckpttools.checkpoint import EXCLUDES_FROZEN, FP32, PARAM_NAMES, Checkpoint, Layout, ParamGroup
from ckpttools.errors import UsageError, escape, some
from ckpttools.formats.buffers import BUFFERS, told
from ckpttools.formats.dcp.counters import MILESTONES, scheduler_key, with_state
from ckpttools.formats.dcp.items import Writer
from ckpttools.formats.dcp.megatron import FILE, MEGATRON
from ckpttools.formats.dcp.metadata import Item, Metadata, Piece, Tensor, write_metadata
from ckpttools.formats.dcp.names import MODEL_FOLDER, NAME, OPTIMIZER_FOLDER
from ckpttools.formats.dcp.pieces import rows
from ckpttools.formats.dcp.read import LOSS_SCALER, Template
from ckpttools.formats.dcp.roles import (
    ACCELERATE,
    FLAT,
    GROUPS,
    NESTED,
    PARAMS,
    STATE,
    STYLES,
    TITAN,
    Names,
)
from ckpttools.formats.format import Places
from ckpttools.formats.notes import left_out, one_copy, unnamed, unread
from ckpttools.plan import Literal, OutputFile, Plan
from ckpttools.tensors import TensorRef
from ckpttools.tree import Path as Keys
from ckpttools.tree import Value


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    """The files of a distributed checkpoint. `layout.variant` is one of STYLES (nested where it is none of
    them), `layout.mesh`, else `layout.dp_degree`, the ranks that rows are cut for. Without a
    layout it is the source's, or whole tensors where that is another format.
    """
    if layout is None:
        layout = checkpoint.layout if checkpoint.layout.format == "dcp" else Layout(format="dcp")
    style = _style(layout)
    mesh = layout.mesh or (layout.dp_degree,)
    if min(mesh) < 1:
        raise UsageError(
            "bad-usage",
            f"parts for {' x '.join(map(str, mesh))} ranks make no sense",
            where=checkpoint.path,
            why="each part is a rank's",
            hint="give numbers of ranks from 1 on",
        )
    template = checkpoint.template if isinstance(checkpoint.template, Template) else None
    names = _names(style, template)
    notes: list[str] = []
    model: list[tuple[Keys, Value]] = [
        (_model_path(names, name), ref) for name, ref in _weights(checkpoint, notes)
    ]
    for name, value in checkpoint.extra_state.items():
        model += _flattened(_model_path(names, name), value, notes)
    optimizer = [
        ((*names.prefix, *path), value) for path, value in _optimizer(checkpoint, names, style, notes)
    ]
    client = [(_client_path(names, path), value) for path, value in _client(checkpoint, names, notes)]
    notes += _not_held(checkpoint)
    buffers = told(checkpoint) if style != ACCELERATE else None
    if checkpoint.frozen and buffers is None and not checkpoint.roles_guessed:  # which a reader does again
        notes.append(f"which {len(checkpoint.frozen)} weights are frozen has no place in the format")
    if style == ACCELERATE:
        # left_out says the one that is ours
        if lost := dict.fromkeys(str(path[0]) for path, _ in client if path != (EXCLUDES_FROZEN,)):
            notes.append(
                f"not written, as accelerate's two folders hold model and optimizer alone: {some(lost, 12)}; "
                "it keeps schedule and counters in files of its own"
            )
        files = [
            *_files(f"{MODEL_FOLDER}/", model, checkpoint, mesh),
            *(_files(f"{OPTIMIZER_FOLDER}/", optimizer, checkpoint, mesh) if optimizer else ()),
        ]
    else:
        if buffers is not None:
            client.append(((*names.prefix, BUFFERS), buffers))
        files = [*_files("", [*model, *optimizer, *client], checkpoint, mesh)]
    return Plan(files=tuple(files), notes=tuple(dict.fromkeys(notes)), checks=checkpoint.checks)


def keys_of(checkpoint: Checkpoint, layout: Layout) -> Places:
    """Where the parts lie in the folder that `plan` makes, but for accelerate's two."""
    template = checkpoint.template if isinstance(checkpoint.template, Template) else None
    names = _names(_style(layout), template)
    scheduler = scheduler_key(checkpoint.client)
    return Places(
        weights=names.prefix if names.model is None else (*names.prefix, names.model),
        optimizer=(*names.prefix, names.optimizer),
        scheduler=_client_path(names, (scheduler,)),
    )


def _style(layout: Layout) -> str:
    return layout.variant if layout.variant in STYLES else NESTED


def _names(style: str, template: Template | None) -> Names:
    """The keys of the source's own where it has the same style, else the usual ones."""
    if style == TITAN:
        return Names(model=None)
    names = template.names if template else Names()
    if names.model is None or style == ACCELERATE:
        return Names()
    return names


def _model_path(names: Names, name: str) -> Keys:
    return (*names.prefix, name) if names.model is None else (*names.prefix, names.model, name)


def _client_path(names: Names, path: Keys) -> Keys:
    return path if path[0] in names.beside else (*names.prefix, *path)


def _weights(checkpoint: Checkpoint, notes: list[str]) -> Iterator[tuple[str, TensorRef]]:
    """One tensor for each name: the fp32 master where there is one. Tied names get the same object."""
    best = checkpoint.best_copies()
    notes += one_copy(checkpoint)
    for name, ref in best.items():
        owner = best.get(checkpoint.shared.get(name, name), ref)
        yield name, owner if owner.shape == ref.shape else ref


def _optimizer(
    checkpoint: Checkpoint, names: Names, style: str, notes: list[str]
) -> Iterator[tuple[Keys, Value]]:
    flat = style in (FLAT, TITAN)
    for group in checkpoint.groups:
        for name in group.params:
            for kind, value in _state(group, name):
                path = group.paths.get(kind, (kind,))
                if flat:
                    yield (names.optimizer, ".".join((STATE, name, *map(str, path)))), value
                else:
                    yield from _flattened((names.optimizer, STATE, name, *map(str, path)), value, notes)
    all_named = all(_is_named(group) for group in checkpoint.groups if group.params)
    # a run whose optimizer has no names does not ask for them: nested, where they cost a list for each group,
    # a checkpoint that comes from elsewhere has them for either kind of run
    spare = style == NESTED and checkpoint.layout.format != "dcp"
    for g, group in enumerate(checkpoint.groups):
        hyper = {key: value for key, value in group.hyper.items() if key not in (PARAMS, PARAM_NAMES)}
        if spare or _is_named(group):
            hyper[PARAM_NAMES] = list(group.params)
        if flat:
            for name in group.params:
                for key, value in hyper.items():
                    yield (names.optimizer, f"{GROUPS}.{name}.{key}"), value
        else:
            for key, value in hyper.items():
                yield from _flattened((names.optimizer, GROUPS, g, key), value, notes)
            yield (names.optimizer, GROUPS, g, PARAMS), list(group.params)
    if flat and not all(group.params for group in checkpoint.groups):
        notes.append(
            "a parameter group without parameters is not kept, and torch cannot load the flat layout into an "
            "optimizer that has one: --dcp-layout nested"
        )
    if flat and not all_named and checkpoint.layout.variant not in (FLAT, TITAN):
        notes.append("the optimizer's state is flattened: which parameters make a group is not kept")
    if checkpoint.groups and not all_named and not spare and checkpoint.layout.format != "dcp":
        notes.append(
            f"the groups have no {PARAM_NAMES}: a run that made its optimizer from model.named_parameters() "
            "needs them (--like a checkpoint of it)"
        )


def _is_named(group: ParamGroup) -> bool:
    return group.named or PARAM_NAMES in group.hyper  # DeepSpeed's folders keep what the optimizer had


def _state(group: ParamGroup, name: str) -> Iterator[tuple[str, Value]]:
    for kinds in (group.scalars, group.state):
        for kind, values in kinds.items():
            if name in values and kind != FP32:
                yield kind, values[name]


def _client(checkpoint: Checkpoint, names: Names, notes: list[str]) -> Iterator[tuple[Keys, Value]]:
    own = checkpoint.layout.format == "dcp"
    values = with_state(checkpoint.client, checkpoint.training, own=own)
    if checkpoint.loss_scaler:
        values[LOSS_SCALER] = dict(checkpoint.loss_scaler)
    for key, value in values.items():
        if names.model is None and isinstance(value, TensorRef):
            notes.append(f"'{escape(key)}' is not written: tensors at the top are the model's in this layout")
        elif key == names.model or (key == names.optimizer and checkpoint.groups):
            notes.append(f"'{key}' among the client's values is not written: the name is taken")
        else:
            yield from _flattened((key,), value, notes)


def _flattened(path: Keys, value: Value, notes: list[str]) -> Iterator[tuple[Keys, Value]]:
    """The leaves that torch's planner makes: dicts are entered, lists where they hold tensors or dicts."""
    if isinstance(value, Mapping):
        if not value:
            notes.append(f"'{escape(_dotted(path))}' is an empty dict, which the format cannot hold")
        if path[-1] != MILESTONES and not all(isinstance(key, str) for key in value):
            notes.append(f"the keys of '{escape(_dotted(path))}' that are no text are written as text")
        for key, inner in value.items():
            yield from _flattened((*path, str(key)), inner, notes)
    elif isinstance(value, list) and not _terminal(value):
        for i, inner in enumerate(value):
            yield from _flattened((*path, i), inner, notes)
    else:
        yield path, value


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))


def _terminal(value: Value) -> bool:
    """As torch/distributed/checkpoint/_traverse.py has it."""
    if isinstance(value, Mapping):
        return False
    if not isinstance(value, list):
        return True
    return not any(
        isinstance(inner, TensorRef) or (isinstance(inner, Mapping | list) and not _terminal(inner))
        for inner in value
    )


def _not_held(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.optimizer:
        yield f"the optimizer's class ({escape(checkpoint.optimizer)}) has no place in the format"
    if checkpoint.layout.variant == MEGATRON:
        yield f"Megatron's own keys and {FILE} are not written: Megatron does not load the result"
    if any(group.state and not group.hyper for group in checkpoint.groups):
        yield "no optimizer settings (lr, betas ...): the source does not have them"
    yield from unnamed(checkpoint)
    yield from left_out(checkpoint)
    yield from unread(checkpoint)
    if checkpoint.settings:
        yield "the run's settings have no place in the format"
    if checkpoint.training.saved_batch:
        yield "the batch sizes have no place in the format"


def _files(
    folder: str, state: list[tuple[Keys, Value]], checkpoint: Checkpoint, mesh: tuple[int, ...]
) -> Iterator[OutputFile]:
    """The data files of one folder, and its `.metadata` last."""
    writers = [Writer(f"__{rank}_0.distcp") for rank in range(math.prod(mesh))]
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Item | None] = {}
    paths: dict[str, Keys] = {}
    placed: dict[int, Tensor] = {}  # by the identity of the reference: tied names share their items
    for path, value in state:
        key = _dotted(path)
        if key in paths:
            raise UsageError(
                "names-collide",
                f"two values would get the key '{escape(key)}'",
                where=checkpoint.path,
                why="a distributed checkpoint joins names by dots, and a reader could not tell them apart",
                hint="rename one of them with --rename",
            )
        paths[key] = path
        if not isinstance(value, TensorRef):
            objects[key] = writers[0].value(value)
            continue
        if id(value) not in placed:
            placed[id(value)] = _pieces(value, writers, mesh)
        tensors[key] = placed[id(value)]
    metadata = write_metadata(Metadata(tensors=tensors, objects=objects, paths=paths))
    for writer in writers:
        if writer.segments:
            yield OutputFile(path=f"{folder}{writer.name}", segments=tuple(writer.segments))
    yield OutputFile(path=f"{folder}{NAME}", segments=(Literal(metadata),))


def _pieces(ref: TensorRef, writers: list[Writer], mesh: tuple[int, ...]) -> Tensor:
    pieces = []
    for rank, first, part in rows(ref, mesh):
        offsets = (first, *(0 for _ in ref.shape[1:])) if ref.shape else ()
        pieces.append(Piece(offsets, part.shape, writers[rank].tensor(part)))
    return Tensor(ref.dtype, ref.shape, tuple(pieces))
