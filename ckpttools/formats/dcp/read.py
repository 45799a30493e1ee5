"""A torch distributed checkpoint as a Checkpoint: the metadata, the objects, and each item's header."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint, FileRole, Layout, common_dtype
from ckpttools.containers.pickles.judge import dangers
from ckpttools.errors import CkptError, escape
from ckpttools.formats.buffers import BUFFERS, untrained
from ckpttools.formats.dcp.counters import training, with_numbers
from ckpttools.formats.dcp.items import Data, Items, Wanted
from ckpttools.formats.dcp.megatron import with_common
from ckpttools.formats.dcp.metadata import Item, Metadata, read_metadata
from ckpttools.formats.dcp.names import (
    DATA,
    MODEL_FOLDER,
    NAME,
    OPTIMIZER_FOLDER,
    SUFFIX,
    has_shards,
    parts,
)
from ckpttools.formats.dcp.pieces import assembled, check_pieces
from ckpttools.formats.dcp.roles import ACCELERATE, FLAT, TITAN, Names, guessed, roles, tree
from ckpttools.formats.dcp.shards import read_shards
from ckpttools.formats.format import Folder
from ckpttools.formats.notes import holds_for
from ckpttools.location import Location
from ckpttools.stores.files import exists, size_of
from ckpttools.stores.links import inside
from ckpttools.tree import Path as Keys
from ckpttools.tree import Value

LOSS_SCALER = "loss_scaler"


class Part(Struct, frozen=True, kw_only=True):
    """One folder with a `.metadata`; `values` has what each key stands for."""

    folder: Location
    metadata: Metadata
    data: Mapping[Item, Data | Value]
    values: Mapping[str, Value]


class Template(Struct, frozen=True, kw_only=True):
    """What writing a distributed checkpoint again can take from the one that was read."""

    names: Names
    parts: tuple[Part, ...]


def read(path: Location) -> Checkpoint:
    """Read a folder: headers and objects only. Raises CkptError for the first thing that is wrong."""
    with inside(path):
        folders = parts(path)
        if not folders and has_shards(path):
            return read_shards(path)
        if not folders:
            raise no_metadata(path)
        return checkpoint(path, tuple(read_part(folder) for folder in folders))


def no_metadata(path: Location) -> CkptError:
    return CkptError(
        "metadata-missing",
        f"data files of a distributed checkpoint, and no {NAME}",
        where=path,
        why="it is written last, when all ranks are done: this save did not finish, or it was not copied",
        hint=f"copy {NAME} (a hidden file) from where the folder was saved, or use an older checkpoint",
    )


def read_part(folder: Location) -> Part:
    """Raises CkptError."""
    if not exists(folder / NAME):
        raise no_metadata(folder)
    metadata = read_metadata(folder)
    for key, tensor in metadata.tensors.items():
        try:
            check_pieces(key, tensor)
        except CkptError as error:
            error.where = error.where or str(folder / NAME)
            raise
    return part(folder, metadata, Items(folder).read(wanted(folder, metadata)))


def wanted(folder: Location, metadata: Metadata) -> Iterator[Wanted]:
    """Every item that holds elements or an object. Raises CkptError for an object that lies nowhere."""
    for key, tensor in metadata.tensors.items():
        for piece in tensor.pieces:
            if piece.numel and piece.item is not None:
                yield Wanted(key, piece.item, tensor.dtype, piece.shape)
    for key, item in metadata.objects.items():
        if item is None:
            raise object_lost(folder, key)
        yield Wanted(key, item)


def object_lost(folder: Location, key: str) -> CkptError:
    return CkptError(
        "entry-missing",
        f"'{escape(key)}': no entry says where it lies",
        where=folder / NAME,
        why="torch would fail to load the checkpoint",
        hint="copy .metadata and all data files again, from one save",
    )


def part(folder: Location, metadata: Metadata, data: Mapping[Item, Data | Value]) -> Part:
    """The values of a folder's keys from its items."""
    values: dict[str, Value] = {}
    for key in metadata.keys:
        if key in metadata.tensors:
            values[key] = assembled(key, metadata.tensors[key], data)
        else:
            item = metadata.objects[key]
            assert item is not None
            values[key] = data[item]
    return Part(folder=folder, metadata=metadata, data=data, values=values)


def checkpoint(path: Location, found: tuple[Part, ...]) -> Checkpoint:
    """Put the parts together. Raises CkptError where their keys make no sense."""
    root = tree(path, ((keys, value) for each in found for keys, value in _paths(each)))
    held = roles(path, root)
    trained = {name: bool(group.state) for group in held.groups for name in group.params}
    ties = list(_tied(found, held.tensors, trained))
    shared = {name: owner for name, owner, _ in ties}
    alike = [
        f"{escape(name)} is taken for another name of {escape(owner)}: the same bytes, and only one of them "
        "is trained; a frozen copy that is one matrix alone looks the same"
        for name, owner, sure in ties
        if not sure
    ]
    tensors = {name: held.tensors[shared.get(name, name)] for name in held.tensors}
    frozen, buffers = untrained(tensors, trained, shared)
    shards = [sum(p.numel > 0 for p in t.pieces) for each in found for t in each.metadata.tensors.values()]
    client = {key: with_numbers(value) for key, value in held.client.items()}
    stated = client.get(BUFFERS)
    if isinstance(stated, list) and trained:
        del client[BUFFERS]
        buffers = frozenset(name for name in stated if name in tensors)
        frozen = frozenset(tensors.keys() - trained.keys() - buffers - shared.keys())
    scaler = client.get(LOSS_SCALER)
    if isinstance(scaler, Mapping):
        del client[LOSS_SCALER]
    made = Checkpoint(
        path=path,
        layout=Layout(
            format="dcp",
            ranked=True,
            ranks=_ranks(found),
            dp_degree=max(shards, default=1) or 1,
            dtype=common_dtype(held.tensors),
            writer="torch.distributed.checkpoint",
            variant=ACCELERATE if any(p.folder.name == OPTIMIZER_FOLDER for p in found) else held.style,
        ),
        tensors=tensors,
        groups=held.groups,
        training=training(client),
        shared=shared,
        frozen=frozen,
        buffers=buffers,
        excludes_frozen=holds_for(client.get(EXCLUDES_FROZEN), tensors),
        roles_guessed=not isinstance(stated, list),
        text_keys=True,
        groups_guessed=bool(held.groups) and held.style in (FLAT, TITAN),
        extra_state=held.extra,
        files=tuple(role for each in found for role in _files(each)),
        checks=tuple(
            data.check
            for each in found
            for data in each.data.values()
            if isinstance(data, Data) and data.check
        ),
        notes=(*held.notes, *alike),
        loss_scaler=scaler if isinstance(scaler, Mapping) else {},
        client=client,
        template=Template(names=held.names, parts=found),
    )
    return with_common(made)


def _ranks(found: Iterable[Part]) -> int | None:
    """How many ranks wrote it, by the names of their files; None for one alone, to which
    `dedup_save_to_lowest_rank` of torch's planner leaves all that the others hold too.
    """
    files = {item.file for each in found for item in each.data}
    numbers = [int(name[1]) for name in map(DATA.fullmatch, files) if name is not None]
    return max(numbers) + 1 if max(numbers, default=0) else None


def _paths(each: Part) -> Iterable[tuple[Keys, Value]]:
    known = each.metadata.paths
    paths = guessed(each.values) if known is None else known
    for key, value in each.values.items():
        yield paths.get(key, (key,)), value


def _tied(
    found: tuple[Part, ...], tensors: Mapping[str, object], trained: Mapping[str, bool]
) -> Iterator[tuple[str, str, bool]]:
    """Alias, owner and whether it is sure: their pieces are the same items, as ckpt writes tied weights.

    torch writes the data for each name and the optimizer's state for the first: a matrix that is in no group
    and has the checksums of one that was trained (the value is whether it has state) is the other name of it,
    unless it is part of a network in which nothing is trained: a frozen copy of another (a target network, a
    reference model).
    """
    names = {id(ref): name for name, ref in tensors.items()}
    for each in found:
        owners: dict[tuple[object, ...], str] = {}
        alike: dict[tuple[object, ...], str] = {}
        known = [(key, names[id(value)]) for key, value in each.values.items() if id(value) in names]
        for key, name in known:
            if trained.get(name) and (sums := _checksums(each, key)):
                alike.setdefault(sums, name)
        for key, name in known:
            tensor = each.metadata.tensors[key]
            if not any(piece.numel for piece in tensor.pieces):
                continue
            owner = owners.setdefault((tensor.dtype.name, tensor.shape, *tensor.pieces), name)
            sure = owner != name
            if not sure and name not in trained:
                owner = alike.get(_checksums(each, key), name)
                owner = name if _is_copy(name, owner, tensors, trained) else owner
            if owner != name:
                yield name, owner, sure


def _is_copy(name: str, owner: str, tensors: Mapping[str, object], trained: Mapping[str, bool]) -> bool:
    """Whether everything beside `name`, below the part of it that `owner` does not end in, is untrained too
    and has its like beside the owner: `target.0.bias`, where `online.0.weight` is trained.
    """
    mine, other = name.split("."), owner.split(".")
    while mine and other and mine[-1] == other[-1]:
        mine, other = mine[:-1], other[:-1]
    below, there = (".".join(part) + "." if part else "" for part in (mine, other))
    beside = [n for n in tensors if n.startswith(below) and n != name and n != owner] if below else []
    like = (there + n.removeprefix(below) for n in beside)
    return bool(beside) and not any(n in trained for n in beside) and all(n in tensors for n in like)


def _checksums(each: Part, key: str) -> tuple[object, ...]:
    """What the pieces of a matrix state for their bytes; () where it is none, or they state nothing."""
    tensor = each.metadata.tensors[key]
    data = [(piece, each.data.get(piece.item)) for piece in tensor.pieces if piece.item and piece.numel]
    sums = [(p.offsets, p.shape, d.check.crc32) for p, d in data if isinstance(d, Data) and d.check]
    if len(tensor.shape) < 2 or not sums or len(sums) < len(data):
        return ()
    return (tensor.dtype.name, tensor.shape, *sorted(sums))


def _files(each: Part) -> Iterator[FileRole]:
    kinds: dict[str, list[int]] = {}
    mine = each.metadata
    for key, item in mine.items:
        kinds.setdefault(item.file, [0, 0])[key in mine.objects] += 1
    what = {MODEL_FOLDER: " of the model", OPTIMIZER_FOLDER: " of the optimizer"}.get(each.folder.name, "")
    yield FileRole(
        path=each.folder / NAME,
        nbytes=mine.nbytes,
        role=f"says where each part{what} lies; written last",
        dangers=dangers(mine.judgements),
    )
    for name, (tensors, objects) in sorted(kinds.items()):
        path = each.folder / name
        named = DATA.fullmatch(name)
        by = f" written by rank {named[1]}" if named else ""
        held = [f"{tensors} parts of tensors"] * bool(tensors) + [f"{objects} values"] * bool(objects)
        yield FileRole(path=path, nbytes=size_of(path), role=f"{' and '.join(held)}{by}")
    for name in Folder.of(each.folder).names:
        if name.endswith(SUFFIX) and name not in kinds:
            nbytes = size_of(each.folder / name)
            role = f"{NAME} does not name it" if nbytes else "empty: of a rank that had nothing to save"
            yield FileRole(path=each.folder / name, nbytes=nbytes, role=role)
