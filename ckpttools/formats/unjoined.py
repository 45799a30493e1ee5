"""Layouts whose weights ckpt does not put together: each file by itself, and whether any is missing.

ZeRO-3, pipeline, tensor- and expert-parallel folders, and ZeRO stage 0. What these
checks can see: missing, renamed, swapped and damaged files, changed bytes, code that would run, NaN. What
they cannot: whether the shards belong to one step.

    universal    zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt: the same files for every parameter
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice, product

from ckpttools.checkpoint import Checkpoint, FileRole, Layout
from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.pickles import Dict
from ckpttools.containers.torch_file import TorchFile, labelled, read_torch_file
from ckpttools.errors import CkptError, Unsupported, some
from ckpttools.findings import ERROR, INFO, Finding, of_error
from ckpttools.formats.counters import training
from ckpttools.formats.files import archive_roots, check_files, dangers_at
from ckpttools.formats.format import Checked, Format, Source, no_file
from ckpttools.formats.rank_files import LAYER, MODEL, OPTIM, PADDED, STAGE3_MODEL
from ckpttools.formats.tags import ANY
from ckpttools.location import Location, below
from ckpttools.stores.files import entries, is_file, is_folder, is_link, size_of

NUMBERS = re.compile(r"(?<=rank_)\d+|(?<=layer_)\d+|(?<=expert_)\d+|(?<=model_)\d+(?=-model)")
EXPERT = re.compile(
    r"(layer_(?P<layer>\d{1,6})_)?expert_(?P<expert>\d{1,6})_mp_rank_(?P<mp>\d{2,6})_model_states\.pt"
)
AXIS = re.compile(r"(expp_rank|pp_rank|rank|layer|expert|model)_#")  # expp: as many as hold other experts
RANKS = {"pp_rank": "dp_world_size", "rank": "mp_world_size"}  # by the word before the number: who counts it
MODEL_STATES = "_model_states.pt"
IN_PARTS = "layout-in-parts"
MOST = 65_536  # experts or layers that are counted
ZERO = "zero"  # of a universal checkpoint: a folder for each parameter
CUT = "zero3_partitioned"  # how AutoEP keeps the experts under ZeRO-3: cut over the ranks, like all else
COUNTERS = ("global_steps", "dp_world_size", "mp_world_size", "ds_version")


def in_parts(path: Location, reason: Unsupported) -> Source:
    """A layout that is recognised and not read, as a format that has checks and nothing else."""

    def read(source: Source) -> Checkpoint:
        raise reason

    format = Format(
        name="parts",
        holds=lambda folder: False,
        names_it=lambda path: False,
        recognise=lambda folder: None,
        recognise_file=no_file,
        read=read,
        check=lambda source: check_parts(source.target, reason),
    )
    return Source(format=format, target=path, root=path, how=reason.message)


def check_parts(folder: Location, reason: Unsupported) -> Checked:
    """Check what can be checked. `reason` says which layout it is."""
    findings = [
        Finding(
            id=IN_PARTS,
            severity=INFO,
            file=str(folder),
            message=f"{reason.message}: its files are checked one by one, and that none is missing",
        )
    ]
    paths = list(_torch_paths(folder))
    files: list[TorchFile] = []
    for path in paths:
        try:
            files.append(read_torch_file(path))
        except CkptError as error:
            findings += [*dangers_at(path), of_error(error)]
    known = {str(path) for path in paths}
    findings += [each for each in dangers_at(folder) if each.file not in known]
    findings += check_files(files)
    findings += archive_roots([file for file in files if ANY.fullmatch(file.path.name)])
    roots = [fields.as_mapping(f.value) for f in files if f.path.name.endswith("model_states.pt")]
    first = next((root for root in roots if root is not None and "global_steps" in root), None)
    here = [path for path in paths if path.parent == folder]
    findings += _gaps(folder, here, first)
    findings += _layers(folder, here, roots)
    findings += _counters(files)
    findings += _experts(folder, files)
    findings += _no_module(folder, files)
    states = [path for path in paths if folder / ZERO in path.parents]
    findings += _states(folder, states, roots)
    if not states and not any(path.name.endswith("optim_states.pt") for path in here):
        findings += _no_optimizer(files)
    found = Checkpoint(
        path=folder,
        layout=Layout(format=reason.layout or "deepspeed"),
        tensors={
            f"{file.path.name}: {label}": view.ref
            for file in files
            for label, view in labelled(file)
            if file.path.name.endswith("model_states.pt")
            and (label.startswith("module") or _is_piece(file.path.name))
        },
        training=training(None, first if first is not None else Dict(), step_keys=("global_steps",)),
        files=tuple(FileRole(path=path, nbytes=size_of(path), role=_role(path.name)) for path in paths),
        checks=tuple(check for file in files for check in file.checks()),
    )
    return Checked(findings, found, files, padded=PADDED if reason.layout == "zero3" else ())


def _is_piece(name: str) -> bool:
    """Whether a file has the weights of one layer or expert, by their own names."""
    return LAYER.fullmatch(name) is not None or EXPERT.fullmatch(name) is not None


def _role(name: str) -> str:
    """What a file is, for people."""
    if match := EXPERT.fullmatch(name):
        return f"weights of expert {match['expert']} of MoE layer {match['layer'] or '?'}"
    if LAYER.fullmatch(name):
        return "weights of a pipeline layer"
    if MODEL.fullmatch(name):
        return "counters, client state, and the weights where they are not in files of their own"
    if STAGE3_MODEL.fullmatch(name):
        return "names and shapes of the weights, buffers, counters, client state"
    return "a rank's part of the optimizer's state" if OPTIM.fullmatch(name) else ""


def _torch_paths(folder: Location, depth: int = 6) -> Iterator[Location]:
    for entry in entries(folder):
        path = folder / entry.name
        if is_file(entry) and path.suffix in (".pt", ".pth", ".bin"):
            yield path
        elif is_folder(entry) and not is_link(entry) and depth:
            yield from _torch_paths(path, depth - 1)


def _gaps(folder: Location, paths: Iterable[Location], model: fields.Mapping | None) -> Iterator[Finding]:
    """Files of one kind are numbered from 0 without gaps, along each of their numbers, as far as the model
    file states.
    """
    stated = {
        axis: (fields.integer(model.get(key)) if model is not None else None) or 1
        for axis, key in RANKS.items()
    }
    folded = _folded(model) if model is not None else None
    kinds: dict[str, set[tuple[int, ...]]] = {}
    for path in paths:
        if ANY.fullmatch(path.name):
            kind = NUMBERS.sub("#", path.name)
            kinds.setdefault(kind, set()).add(tuple(int(n) for n in NUMBERS.findall(path.name)))
    for kind, found in kinds.items():
        axes = AXIS.findall(kind)
        sizes = [
            max(1 + max(numbers[i] for numbers in found), stated.get(axis, 1)) for i, axis in enumerate(axes)
        ]
        wanted = list(islice(product(*(range(min(n, 65_536)) for n in sizes)), 1_000_000))
        missing = [numbers for numbers in wanted if numbers not in found]
        if folded is not None and kind.startswith("expp_rank_"):
            missing = [(expp, mp) for expp, mp in missing if (mp, expp) in folded[1]]
        if missing and not kind.startswith("layer_"):  # not every layer has weights
            yield Finding(
                id="shard-missing",
                severity=ERROR,
                file=str(folder),
                where=kind.replace("#", "N"),
                message=f"{len(missing)} of {len(wanted)} files are missing, the first numbered {missing[0]}",
                hint="copy the missing files from the nodes that wrote them",
            )
    ranks = {
        len(found) for kind, found in kinds.items() if kind.startswith(("zero_pp", "bf16_zero", "fp16_zero"))
    }
    if len(ranks) > 1:
        yield Finding(
            id="shard-missing",
            severity=ERROR,
            file=str(folder),
            where="zero_pp_rank_*",
            message=f"every rank writes them, and there are {' and '.join(map(str, sorted(ranks)))}",
            hint="copy the missing files from the nodes that wrote them",
        )


def _layers(
    folder: Location, paths: Iterable[Location], roots: list[fields.Mapping | None]
) -> Iterator[Finding]:
    """Each layer of a pipeline that has parameters has files, and as many slices as the others."""
    held: dict[int, set[tuple[int, ...]]] = {}
    for path in paths:
        if LAYER.fullmatch(path.name):
            layer, *part = map(int, NUMBERS.findall(path.name))
            held.setdefault(layer, set()).add(tuple(part))
    shapes = (root.get("param_shapes") for root in roots if root is not None)
    groups = (fields.as_mapping(group) for each in shapes if isinstance(each, list) for group in each)
    names = (name.partition(".")[0] for group in groups if group is not None for name in group.names())
    wanted = {int(name) for name in names if name.isdecimal() and len(name) < 6} if held else set()
    parts = {part for each in held.values() for part in each}
    missing = [layer for layer in sorted(wanted | held.keys()) if parts - held.get(layer, set())]
    if missing:
        yield Finding(
            id="shard-missing",
            severity=ERROR,
            file=str(folder),
            where=f"layer_{missing[0]:02d}-*",
            message=f"{len(missing)} of {len(wanted | held.keys())} pipeline layers: {some(missing)}",
            hint="copy the missing files from the pipeline stages that wrote them",
        )


def _experts(folder: Location, files: list[TorchFile]) -> Iterator[Finding]:
    """Each expert is in a file of its own, for each model-parallel rank: as many as the model file states, or
    as the fullest layer has. AutoEP under ZeRO-3 writes none: its experts are in the optimizer files.
    """
    held: dict[tuple[int, int], set[int]] = {}  # by model-parallel rank and layer
    for file in files:
        if match := EXPERT.fullmatch(file.path.name):
            held.setdefault((int(match["mp"]), int(match["layer"] or 0)), set()).add(int(match["expert"]))
    roots = (fields.as_mapping(file.value) for file in files if not EXPERT.fullmatch(file.path.name))
    root = next((each for each in roots if each is not None and "num_experts" in each), Dict())
    layers = root.get("ds_autoep_layers")
    layers = layers if isinstance(layers, list) and not held else []
    if layers and all(at(each, "checkpoint_format") == CUT for each in layers):
        return
    found, most = root.get("num_experts"), max((layer + 1 for _, layer in held), default=1)
    numbers = found if isinstance(found, list) else [found] * most
    stated = [number if type(number) is int else 0 for number in numbers]
    fullest = max((1 + max(experts) for experts in held.values()), default=0)
    ranks = max((mp + 1 for mp, _ in held), default=1)
    ranks = max(ranks, fields.integer(root.get("mp_world_size")) or 1)
    layers_of, folded = range(min(max(len(stated), most), MOST)), _folded(root)
    for mp, layer in islice(product(range(min(ranks, MOST)), layers_of), MOST):
        said = stated[layer] if layer < len(stated) else 0
        experts, wanted = held.get((mp, layer), set()), range(min(said or fullest, MOST))
        missing = [
            n
            for n in wanted
            if n not in experts and (folded is None or (mp, n * folded[0] // len(wanted)) in folded[1])
        ]
        if missing:
            yield Finding(
                id="experts-missing",
                severity=ERROR,
                file=str(folder),
                where=f"layer_{layer}_expert_{missing[0]}_mp_rank_{mp:02d}_*",
                message=f"{len(missing)} of {said or fullest} experts of MoE layer {layer} are in no file: "
                f"{some(missing)}",
                hint="copy the missing files from the expert-parallel ranks that wrote them",
            )


def _folded(root: fields.Mapping) -> tuple[int, set[tuple[int, int]]] | None:
    """Of AutoEP folded into AutoTP: how many expert-parallel ranks there are, and for which of them each
    model-parallel rank writes, as (model-parallel, expert-parallel). Ranks are numbered through both, and the
    first data-parallel ones write (expected_folding_group_tables, _save_moe_checkpoint of DeepSpeed 0.19.8).
    """
    folding = fields.as_mapping(root.get("folding")) or Dict()
    tp, ep = (fields.integer(folding.get(key)) or 1 for key in ("tp_size", "ep_size"))
    if min(tp, ep) < 2:
        return None
    writers = min(tp * min(fields.integer(root.get("dp_world_size")) or 1, ep), MOST)
    return ep, {(rank % tp, rank % ep) for rank in range(writers)}


def _states(folder: Location, paths: list[Location], roots: list[fields.Mapping | None]) -> Iterator[Finding]:
    """Of a universal checkpoint: each trained parameter of the model files has a folder below zero/, with the
    files that others have.
    """
    held: dict[str, set[str]] = {}
    for path in paths:
        if path.parent != folder / ZERO:
            held.setdefault(below(path.parent, folder / ZERO), set()).add(path.name)
    shapes = (root.get("param_shapes") for root in roots if root is not None and paths)
    groups = (fields.as_mapping(group) for each in shapes if isinstance(each, list) for group in each)
    wanted = {name: None for group in groups if group is not None for name in group.names()}
    every = {name for names in held.values() for name in names}
    expected = wanted or held  # a frozen one is copied, too, and has no state
    lacking = {name: sorted(every - held.get(name, set())) for name in expected}
    lacking = {name: names for name, names in lacking.items() if names}
    if lacking:
        first, names = next(iter(lacking.items()))
        yield Finding(
            id="shard-missing",
            severity=ERROR,
            file=str(folder),
            where=f"{ZERO}/{first}",
            message=f"{len(lacking)} of {len(expected)} parameters have not all files that others "
            f"have: the first lacks {some(names)}",
            hint="make the universal checkpoint again from the folder that it was made from",
        )


def _no_optimizer(files: list[TorchFile]) -> Iterator[Finding]:
    """Without ZeRO the model file holds the optimizer; with it, every rank's file is gone."""
    for file in files:
        root = fields.as_mapping(file.value)
        if root is not None and "module" in root and root.get("optimizer") is None:
            yield Finding(
                id="shard-missing",
                severity=ERROR,
                file=str(file.path.parent),
                where="*_optim_states.pt",
                message="the optimizer state is in no file: those of all ranks are missing",
                hint="copy them from the nodes that ran the ranks",
            )


def _no_module(folder: Location, files: list[TorchFile]) -> Iterator[Finding]:
    """A pipeline's model file has no module: each layer's weights are in a file of their own."""
    names = [entry.name for entry in entries(folder)]
    if any(map(ANY.fullmatch, names)) and not any(
        "rank_" in n and MODEL_STATES in n and "expert_" not in n for n in names
    ):
        yield Finding(
            id="shard-missing",
            severity=ERROR,
            file=str(folder),
            where="mp_rank_*_model_states.pt",
            message="no model file is here: the counters, and what is in no file of its own, are missing",
            hint="copy it from the nodes that wrote it",
        )
    layers = any(name.startswith("layer_") for name in names)
    for file in files:
        root = fields.as_mapping(file.value)
        if root is not None and "module" in root and root.get("module") is None and not layers:
            yield Finding(
                id="field-missing",
                severity=ERROR,
                file=str(file.path),
                where="module",
                message="is None, and no layer_* files are here: the model's weights are in no file",
                hint="copy the file again; the fp32 weights may still be whole in the optimizer files",
            )


def _counters(files: list[TorchFile]) -> Iterator[Finding]:
    """Every model file of a save states the same counters."""
    first: dict[str, tuple[object, Location]] = {}
    for file in files:
        root = fields.as_mapping(file.value)
        if root is None or not file.path.name.endswith("model_states.pt") or "global_steps" not in root:
            continue
        for name in COUNTERS:
            value = root.get(name)
            if not isinstance(value, int | str):
                continue
            stated, where = first.setdefault(name, (value, file.path))
            if stated != value:
                yield Finding(
                    id="ranks-differ",
                    severity=ERROR,
                    file=str(file.path),
                    where=name,
                    message=f"says {value}, {where.name} says {stated}: they come from different saves",
                    hint="copy all files of the folder again from one save",
                )
