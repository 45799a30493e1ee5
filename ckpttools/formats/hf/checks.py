"""A model's configuration against its weights: does config.json describe the tensors that are there?

Only what a mismatch of which makes transformers fail or train on random weights is looked at, and only
where the configuration says it in the plain way; nested and multi-modal ones are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import jsons
from ckpttools.errors import CkptError, counted
from ckpttools.findings import INFO, WARNING, Finding, of_error
from ckpttools.formats.configs import ADAPTER
from ckpttools.formats.files import check_read
from ckpttools.formats.format import Checked, Source
from ckpttools.formats.hf.names import INDEX, SHARD, VARIANT
from ckpttools.formats.hf.read import read
from ckpttools.location import Location
from ckpttools.stores.files import entries, is_file, is_folder

LAYER = re.compile(r"(?P<prefix>.*?)(?:^|\.)(?:layers|h|layer|blocks)\.(?P<number>\d+)\..+")
EMBEDDING = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
LAYERS, VOCABULARY, WIDTH = ("num_hidden_layers", "n_layer"), ("vocab_size",), ("hidden_size", "n_embd")
# models whose embedding is narrower than the rest say so
OTHER_WIDTH = ("embedding_size", "word_embed_proj_dim", "text_config", "vision_config")


def check(source: Source) -> Checked:
    """Every finding: of the files by themselves, and of the configuration against the weights."""
    found = read(source.target)
    checked = check_read(found)
    if is_folder(source.target):
        checked.findings.extend(check_configs(found, source.target))
        checked.findings.extend(_below(found, source.target))
    return checked


def _below(found: Checkpoint, folder: Location) -> Iterator[Finding]:
    """The weights in folders of the model's: their headers and configurations. sentence-transformers saves
    further layers there, and PEFT the other adapters beside the one called default.
    """
    for entry in entries(folder):
        inner = folder / entry.name
        lost = found.layout.stem == ADAPTER and is_folder(entry) and is_file(inner / "adapter_config.json")
        if entry.name not in found.below and not lost:
            continue
        try:
            other = read(inner)
        except CkptError as error:
            yield of_error(error)
            continue
        yield from check_configs(other, inner)
        what = "another adapter" if other.layout.stem == ADAPTER else "other weights"
        yield Finding(
            id="note",
            severity=INFO,
            file=str(inner),
            message=f"{what} of {counted(len(other.tensors), 'tensor')}, whose headers alone were looked at",
            hint="ckpt verify of its folder reads every byte of it",
        )


def check_configs(found: Checkpoint, folder: Location) -> Iterator[Finding]:
    """config.json, adapter_config.json and the index's total size against the weights of the folder."""
    if is_file(folder / "adapter_config.json"):
        yield from _adapter(found, folder / "adapter_config.json")
    elif found.layout.stem == ADAPTER:
        yield _without(folder / "adapter_config.json", "an adapter", "PEFT")
    elif is_file(folder / "config.json"):
        yield from _model(found, folder / "config.json")
    elif is_file(folder / "generation_config.json"):
        yield _without(folder / "config.json", "a language model", "transformers")
    for entry in entries(folder):
        if entry.name.endswith(".index.json") and not VARIANT.fullmatch(entry.name):  # of other weights
            yield from _total_size(found, folder / entry.name)


def _read(path: Location) -> Mapping[str, object]:
    try:
        return jsons.read(path, allow_nan=True)
    except CkptError:
        return {}  # reported by itself


def _without(config: Location, what: str, library: str) -> Finding:
    return Finding(
        id="config-mismatch",
        severity=WARNING,
        file=str(config),
        message=f"{what} without its {config.name}, which {library} needs to load it",
        hint=f"copy it from where the {what.split()[-1]} was saved",
    )


def _differs(path: Location, field: str, stated: object, there: object) -> Finding:
    return Finding(
        id="config-mismatch",
        severity=WARNING,
        file=str(path),
        where=field,
        message=f"says {stated}, the weights have {there}",
        hint="the configuration is of another model, or the weights are not complete",
    )


def _number(config: Mapping[str, object], keys: tuple[str, ...]) -> tuple[str, int] | None:
    return next(((key, value) for key in keys if isinstance(value := config.get(key), int)), None)


def _model(found: Checkpoint, path: Location) -> Iterator[Finding]:
    config = _read(path)
    if any(key in config for key in ("text_config", "vision_config", "decoder", "encoder")):
        return
    layers: dict[str, set[int]] = {}
    for name in found.tensors:
        if match := LAYER.fullmatch(name):
            layers.setdefault(match["prefix"], set()).add(int(match["number"]))
    stated = _number(config, LAYERS)
    if stated is not None and len(layers) == 1:
        (numbers,) = layers.values()
        more = _number(config, ("num_nextn_predict_layers",)) or ("", 0)
        if not stated[1] <= len(numbers) <= stated[1] + more[1]:
            yield _differs(path, stated[0], stated[1], f"{len(numbers)} layers")
    tables = [ref for name, ref in found.tensors.items() if name.endswith(EMBEDDING) and len(ref.shape) == 2]
    if len(tables) == 1:
        for axis, keys in ((0, VOCABULARY), (1, WIDTH)):
            stated = _number(config, keys)
            if axis == 1 and any(key in config for key in OTHER_WIDTH):
                continue
            if stated is not None and stated[1] != tables[0].shape[axis]:
                yield _differs(path, stated[0], stated[1], tables[0].shape[axis])


def _adapter(found: Checkpoint, path: Location) -> Iterator[Finding]:
    config = _read(path)
    stated = _number(config, ("r",))
    ranks = {
        ref.shape[0] for name, ref in found.tensors.items() if ".lora_A." in name and len(ref.shape) == 2
    }
    if stated is not None and ranks and not config.get("rank_pattern") and ranks != {stated[1]}:
        yield _differs(path, "r", stated[1], f"rank {', '.join(map(str, sorted(ranks)))}")


def _total_size(found: Checkpoint, path: Location) -> Iterator[Finding]:
    metadata = _read(path).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(stated, int):
        return
    every = sum(ref.nbytes for ref in found.tensors.values())
    once = every - sum(found.tensors[alias].nbytes for alias in found.shared)
    if stated not in (every, once):
        yield _differs(path, "metadata.total_size", stated, f"{every} bytes")


def leftovers(folder: Location, names: list[str]) -> Iterator[Finding]:
    """Shards that look like weights and that no index names: of an earlier, larger save."""
    for index in (name for name in INDEX if name in names):
        try:
            weight_map = jsons.read(folder / index).get("weight_map")
        except CkptError:
            continue  # reported by itself
        if not isinstance(weight_map, dict):
            continue
        kind = index.split(".")[1]
        used = {shard for shard in weight_map.values() if isinstance(shard, str)}
        single = f"{index.split('.')[0]}.{kind}"
        if single in names and single not in used:
            yield Finding(
                id="shard-unused",
                severity=WARNING,
                file=str(folder / index),
                message=f"an index lies beside {single}, which is what transformers loads",
                hint="move away the one that is left over from another save",
            )
        for name in names:
            if name not in used and SHARD.fullmatch(name) and name.endswith(kind):
                yield Finding(
                    id="shard-unused",
                    severity=WARNING,
                    file=str(folder / name),
                    message=f"looks like a shard of the model, and {index} does not name it",
                    hint="move it away if it is left over from another save",
                )
