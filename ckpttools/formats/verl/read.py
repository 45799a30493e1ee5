"""The weights of a verl folder: the ranks' parts joined along the first dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from ckpttools.checkpoint import Checkpoint, Layout, common_dtype
from ckpttools.containers import fields, jsons
from ckpttools.containers.edit import at
from ckpttools.containers.pickles import Global, Node, Object
from ckpttools.containers.torch_file import TorchFile, read_torch_file, slots
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats.format import Copy, Folder
from ckpttools.formats.rank_files import role_of, unchecked
from ckpttools.formats.ties import tied
from ckpttools.formats.verl.names import CONFIG, NAME
from ckpttools.location import Location
from ckpttools.tensors import TensorRef, cat

ROLES = {
    "model": "rank {} of {}: its part of the weights",
    "optim": "rank {} of {}: its part of the optimizer's state, not joined",
    "extra_state": "rank {} of {}: schedule and random states",
}
REBUILD = Global("torch._tensor", "_rebuild_from_type_v2")


class Files(Struct, frozen=True):
    """The files of a folder, by kind and rank."""

    ranks: int
    paths: dict[str, dict[int, Location]]


def find(path: Location) -> Files:
    """Raises CkptError where files are missing, or of several numbers of ranks."""
    names = Folder.of(path).names
    found = [match for name in names if (match := NAME.fullmatch(name))]
    sizes = {int(match["ranks"]) for match in found}
    stated = fields.integer(jsons.read(path / CONFIG).get("world_size")) if CONFIG in names else None
    if len(sizes) != 1:
        raise CkptError(
            "shard-mixed",
            f"files of {' and '.join(map(str, sorted(sizes)))} ranks lie in one folder",
            where=path,
            why="they come from several saves, and which one is meant is not known",
            hint="keep the files of one save and move the others out of the folder",
        )
    paths: dict[str, dict[int, Location]] = {}
    for match in found:
        paths.setdefault(match["kind"], {})[int(match["rank"])] = path / match.string
    (ranks,) = sizes
    if stated not in (None, ranks):
        raise CkptError(
            "shard-mixed",
            f"{CONFIG} is of {stated} ranks, and the other files of {ranks}",
            where=path,
            why="a save by another number of ranks began in this folder, or files were moved",
            hint="copy the files of one save to a folder of their own",
        )
    fields.ranks(path, ranks, "world_size in the files' names")
    for kind, of_kind in paths.items():
        missing = sorted(set(range(ranks)) - set(of_kind))
        if missing or len(of_kind) != ranks:
            raise CkptError(
                "shard-missing",
                f"{kind}_world_size_{ranks}_rank_{missing[0] if missing else 'N'}.pt is missing"
                if missing
                else f"there are {len(of_kind)} {kind} files of {ranks} ranks",
                where=path,
                why="every rank writes its own part, and the others do not have it",
                hint="copy the missing files from the nodes that wrote them",
            )
    return Files(ranks, {kind: dict(sorted(of_kind.items())) for kind, of_kind in paths.items()})


def read(path: Location) -> Checkpoint:
    """Raises Unsupported for weights that are split in another way than along their first dimension."""
    files = find(path)
    every = [each for of_kind in files.paths.values() for each in of_kind.values()]
    return checkpoint(path, files, {each: read_torch_file(each) for each in every})


def checkpoint(path: Location, files: Files, read: dict[Location, TorchFile]) -> Checkpoint:
    """The whole from files that were read."""
    models = [read[each] for each in files.paths["model"].values()]
    roots = [fields.mapping(file.path, file.value, "the file's value") for file in models]
    wholes = {
        name: [*_wholes(models, [root.get(name) for root in roots], name)] for name, _ in roots[0].named()
    }
    tensors = {name: each[0] for name, each in wholes.items()}
    every = [(kind, rank, read[p]) for kind, of_kind in files.paths.items() for rank, p in of_kind.items()]
    return Checkpoint(
        path=path,
        layout=Layout(
            format="verl",
            ranks=files.ranks,
            dp_degree=files.ranks,
            dtype=common_dtype(tensors),
            writer="verl",
        ),
        tensors=tensors,
        shared=tied(tensors),
        files=tuple(role_of(file, ROLES[kind].format(rank, files.ranks)) for kind, rank, file in every),
        checks=tuple(check for _, _, file in every for check in file.checks()),
        notes=(
            *unchecked([file for _, _, file in every]),
            "of the weights alone: the optimizer's state of the ranks is checked, and not joined",
        ),
        several=any(len(each) > 1 for each in wholes.values()),
        template=tuple(file for _, _, file in every),
    )


def copies(files: Files, read: dict[Location, TorchFile]) -> Iterator[Copy]:
    """The weights that more ranks have than the first ones that make them up. Raises as `checkpoint` does."""
    models = [read[each] for each in files.paths["model"].values()]
    roots = [fields.mapping(file.path, file.value, "the file's value") for file in models]
    for name, _ in roots[0].named():
        first, *more = _wholes(models, [root.get(name) for root in roots], name)
        for other in more:
            for part, like in zip(other.chunks, first.chunks, strict=True):
                shape = (part.nbytes // first.dtype.itemsize,)
                tensor, copy = (TensorRef(first.dtype, shape, (each,)) for each in (part, like))
                yield Copy(name=name, tensor=tensor, twin="that of the first ranks", copy=copy)


def _wholes(models: Sequence[TorchFile], nodes: Sequence[Node], name: str) -> Iterator[TensorRef]:
    """A weight from every rank's node of it, once for each set of ranks that has all of it: a DTensor, or a
    plain tensor that all ranks have.
    """
    first = nodes[0]
    if not (isinstance(first, Object) and first.cls == REBUILD):
        view = models[0].view(first)
        if view is None:
            raise fields.bad_field(models[0].path, name, "is no tensor")
        yield view.ref
        return
    whole = _shape(models[0], first, name)
    parts = [_local(file, node, name) for file, node in zip(models, nodes, strict=True)]
    placements = _placements(first)
    is_replica = bool(placements) and not any(each is not None for each in placements)
    for file, part in zip(models, parts, strict=True):
        if part.dtype is not parts[0].dtype:
            raise fields.bad_field(
                file.path, name, f"is {part.dtype}, and {parts[0].dtype} on the first rank"
            )
        if is_replica and part.shape != whole:
            raise fields.bad_field(file.path, name, f"is {list(part.shape)} where {list(whole)} belongs")
    if is_replica:
        yield from parts
        return
    *outer, last = placements or [-1]
    if last != 0 or any(each is not None for each in outer) or not whole:
        raise Unsupported(
            "layout-unsupported",
            f"{escape(name)} is split in another way than along its first dimension",
            where=models[0].path,
            why="the pieces of other meshes are not put together",
            hint="merge it with verl's own model merger",
            layout="verl",
        )
    shown = [part.shape[0] if part.shape else 0 for part in parts]
    sizes = [n for n in range(1, len(parts) + 1) if len(parts) % n == 0] if outer else []
    shards = next((n for n in sizes if shown == _rows(whole[0], len(parts), n)), len(parts))
    for file, part, own in zip(models, parts, _rows(whole[0], len(parts), shards), strict=True):
        if part.shape != (own, *whole[1:]) and (own or part.numel):
            raise fields.bad_field(
                file.path, name, f"is {list(part.shape)} where {[own, *whole[1:]]} belongs"
            )
    for i in range(0, len(parts), shards):
        yield cat(parts[i : i + shards], parts[0].dtype).view(whole)


def _rows(rows: int, ranks: int, shards: int) -> list[int]:
    """How many each rank has where every `shards` of them have all."""
    each = -(-rows // shards)
    return [max(0, min(each, rows - rank % shards * each)) for rank in range(ranks)]


def _placements(node: Node) -> list[int | None]:
    """For each dimension of the mesh the one that is split, None where nothing is, -1 for what is unknown."""
    own = slots(node)
    spec = own.get("_spec") if own is not None else None
    found = at(spec.state, "placements") if isinstance(spec, Object) and spec.has_state else None
    out: list[int | None] = []
    for each in found if isinstance(found, tuple) else ():
        kind = each.cls.name if isinstance(each, Object) and isinstance(each.cls, Global) else ""
        dim = at(each.state, "dim") if isinstance(each, Object) and each.has_state else None
        out.append(None if kind == "Replicate" else dim if kind == "Shard" and isinstance(dim, int) else -1)
    return out


def _shape(file: TorchFile, node: Object, name: str) -> tuple[int, ...]:
    """Of the whole weight: the third of the arguments that make the wrapper."""
    made = node.args[2]
    shape = made[2] if isinstance(made, tuple) and len(made) > 2 else None
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise fields.bad_field(file.path, name, "does not state its shape")
    return tuple(n for n in shape if isinstance(n, int))


def _local(file: TorchFile, node: Node, name: str) -> TensorRef:
    own = slots(node)
    view = file.view(own.get("_local_tensor")) if own is not None else None
    if view is None:
        raise fields.bad_field(file.path, name, "is no tensor of this rank")
    return view.ref
