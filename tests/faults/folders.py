"""Faults of what holds the files together: latest, indexes, configurations, safetensors headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .core import HF, ZERO, Copy, Expectation, bases, fault, names_file, only_by_manifest, pick
from .layout import safetensors_header, safetensors_spans

LEVEL = "folder"


def latest_of(copy: Copy) -> Path | None:
    return next(iter(sorted(copy.top.rglob("latest"))), None)


def _latest(name: str, content: Callable[[str, Random], bytes | None]) -> None:
    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = latest_of(copy)
        if path is None:
            return None
        new = content(path.read_text().strip(), rng)
        if new is None:
            if (path.parent / "last_checkpoint").is_file():
                return None  # a folder of MMEngine's kind, which has no latest
            path.unlink()
            return names_file(path, parts=["latest"], warning=True)
        path.write_bytes(new)
        return names_file(path, path.parent)

    damage.__name__ = name
    fault(LEVEL, ZERO)(damage)


_latest("latest_missing", lambda tag, rng: None)
_latest("latest_empty", lambda tag, rng: rng.choice([b"", b"\n", b"  "]))
_latest("latest_dangling", lambda tag, rng: f"{tag}{rng.randrange(100)}".encode())
_latest("latest_outside", lambda tag, rng: f"../{tag}".encode() if rng.random() < 0.5 else b"/tmp")
_latest("latest_inside_deeper", lambda tag, rng: f"./{tag}".encode())
_latest("latest_with_a_newline", lambda tag, rng: f"{tag}\n{tag}".encode())
_latest(
    "latest_with_control_characters", lambda tag, rng: tag.encode() + rng.choice([b"\0", b"\x1b[2J", b"\x07"])
)
_latest("latest_not_text", lambda tag, rng: b"\xff\xfe" + rng.randbytes(10))
_latest("latest_far_too_long", lambda tag, rng: tag.encode() * 100)
_latest("latest_of_zeros", lambda tag, rng: bytes(len(tag)))
_latest("latest_cut_short", lambda tag, rng: tag[: rng.randrange(1, len(tag))].encode())


@fault(LEVEL, ZERO)
def tag_folder_emptied(copy: Copy, rng: Random) -> Expectation | None:
    if latest_of(copy) is None:
        return None
    shutil.rmtree(copy.folder)
    copy.folder.mkdir()
    return names_file(copy.folder, "latest")


@fault(LEVEL, ZERO)
def tag_folder_missing(copy: Copy, rng: Random) -> Expectation | None:
    if latest_of(copy) is None:
        return None
    shutil.rmtree(copy.folder)
    return names_file(copy.folder, "latest")


@fault(LEVEL, ZERO)
def all_ranks_missing(copy: Copy, rng: Random) -> Expectation:
    for path in copy.ranks:
        path.unlink()
    return Expectation(parts=("optim_states",))


# --- Hugging Face folders -----------------------------------------------------------------------------


def index_of(copy: Copy) -> Path | None:
    return next(iter(copy.folder.glob("*.index.json")), None)


def _index(
    name: str, edit: Callable[[Any, Copy, Random], list[str] | None], *, warning: bool = False
) -> None:
    """A fault of the index; `edit` returns what must be named beside the index, None where it cannot be."""

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = index_of(copy)
        if path is None:
            return None
        index = json.loads(path.read_text())
        parts = edit(index, copy, rng)
        if parts is None:
            return None
        path.write_text(json.dumps(index, indent=2))
        return names_file(path, copy.folder, *copy.files, parts=parts, warning=warning)

    damage.__name__ = name
    fault(LEVEL, HF)(damage)


def _some_tensor(index: Any, rng: Random) -> str:
    return rng.choice(sorted(index["weight_map"]))


def _name_missing_shard(index: Any, copy: Copy, rng: Random) -> list[str]:
    index["weight_map"][_some_tensor(index, rng)] = "model-00009-of-00009.safetensors"
    return ["model-00009-of-00009.safetensors"]


def _lose_tensor(index: Any, copy: Copy, rng: Random) -> list[str]:
    name = _some_tensor(index, rng)
    del index["weight_map"][name]
    return [name]


def _add_tensor(index: Any, copy: Copy, rng: Random) -> list[str]:
    index["weight_map"]["no.such.weight"] = rng.choice(sorted(index["weight_map"].values()))
    return ["no.such.weight"]


def _wrong_shard(index: Any, copy: Copy, rng: Random) -> list[str] | None:
    name = _some_tensor(index, rng)
    others = sorted(set(index["weight_map"].values()) - {index["weight_map"][name]})
    if not others:
        return None
    index["weight_map"][name] = rng.choice(others)
    return [name]


def _outside(index: Any, copy: Copy, rng: Random) -> list[str]:
    name = rng.choice(["../model.safetensors", "/etc/passwd", "a/../b", "model\0.safetensors", ""])
    index["weight_map"][_some_tensor(index, rng)] = name
    return []


def _wrong_total(index: Any, copy: Copy, rng: Random) -> list[str] | None:
    if "total_size" not in index.get("metadata", {}):
        return None
    index["metadata"]["total_size"] += rng.choice([-4096, 4096, 2])
    return ["total_size"]


def _no_map(index: Any, copy: Copy, rng: Random) -> list[str]:
    del index["weight_map"]
    return ["weight_map"]


def _empty_map(index: Any, copy: Copy, rng: Random) -> list[str]:
    index["weight_map"] = {}
    return ["weight_map"]


def _map_of_numbers(index: Any, copy: Copy, rng: Random) -> list[str]:
    index["weight_map"][_some_tensor(index, rng)] = rng.choice([7, None, ["a"]])
    return ["weight_map"]


_index("index_names_a_missing_shard", _name_missing_shard)
_index("index_lacks_a_tensor", _lose_tensor)
_index("index_names_an_unknown_tensor", _add_tensor)
_index("index_names_the_wrong_shard", _wrong_shard)
_index("index_leads_outside", _outside)
_index("index_total_size_wrong", _wrong_total, warning=True)
_index("index_without_weight_map", _no_map)
_index("index_with_empty_weight_map", _empty_map)
_index("index_with_odd_weight_map", _map_of_numbers)


@fault(LEVEL, HF)
def index_missing(copy: Copy, rng: Random) -> Expectation | None:
    path = index_of(copy)
    if path is None:
        return None
    path.unlink()
    return names_file(path, copy.folder, *copy.files)


@fault(LEVEL, HF)
def shards_swapped(copy: Copy, rng: Random) -> Expectation | None:
    if index_of(copy) is None:
        return None
    a, b = copy.files[:2]
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)
    return names_file(a, b, copy.folder, "index.json")


@fault(LEVEL, HF)
def shard_of_another_model(copy: Copy, rng: Random) -> Expectation | None:
    """Other tensors, or the same names in other shapes, under a name that the index or config knows."""
    path = rng.choice(copy.files)
    mine = _signature(path)
    found = [
        other
        for base in bases()
        if base.kind == HF and base.path.is_dir()
        for other in sorted(base.path.glob(f"*{path.suffix}"))
        if path.suffix == ".safetensors" and _signature(other).keys() != mine.keys()
    ]
    if index_of(copy) is None or not found:
        return None
    shutil.copyfile(rng.choice(found), path)
    return names_file(path, copy.folder, *copy.folder.glob("*.json"))


def _signature(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    header = safetensors_header(path.read_bytes())
    return {name: str(entry.get("shape")) for name, entry in header.items() if name != "__metadata__"}


@fault(LEVEL, HF)
def tensor_in_two_shards(copy: Copy, rng: Random) -> Expectation | None:
    if index_of(copy) is None or len(copy.safetensors) < 2:
        return None
    a, b = copy.files[:2]
    shutil.copyfile(a, b)
    return names_file(b)


@fault(LEVEL, HF)
def shard_left_over(copy: Copy, rng: Random) -> Expectation | None:
    """From a save with more shards: loaders that glob the folder would read it."""
    if index_of(copy) is None:
        return None
    stem, suffix = ("model", ".safetensors") if copy.safetensors else ("pytorch_model", ".bin")
    stale = copy.folder / f"{stem}-00003-of-00003{suffix}"
    shutil.copyfile(copy.files[0], stale)
    return names_file(stale, warning=True)


@fault(LEVEL, HF)
def single_file_beside_the_index(copy: Copy, rng: Random) -> Expectation | None:
    """transformers prefers model.safetensors and never looks at the shards."""
    if index_of(copy) is None or not copy.safetensors:
        return None
    single = copy.folder / "model.safetensors"
    shutil.copyfile(copy.files[0], single)
    return names_file(single, index_of(copy) or single, warning=True)


# --- JSON ---------------------------------------------------------------------------------------------

KNOWN = ("config.json", "adapter_config.json", "generation_config.json", "trainer_state.json")


def json_files(copy: Copy) -> list[Path]:
    found = [*copy.folder.glob("*.json"), *copy.top.glob("*.json"), *copy.top.glob("hf_*/*.json")]
    return sorted({path for path in found if path.name in KNOWN or path.name.endswith(".index.json")})


def _json(name: str, damage: Callable[[bytes, Random], bytes]) -> None:
    def damaged(copy: Copy, rng: Random) -> Expectation | None:
        path = pick(rng, json_files(copy))
        if path is None:
            return None
        path.write_bytes(damage(path.read_bytes(), rng))
        return names_file(path)

    damaged.__name__ = name
    fault("json", HF, ZERO)(damaged)


_json("json_truncated", lambda raw, rng: raw.rstrip()[: rng.randrange(1, len(raw.rstrip()))])
_json("json_empty", lambda raw, rng: b"")
_json("json_of_zeros", lambda raw, rng: bytes(len(raw)))
_json("json_not_utf8", lambda raw, rng: raw.replace(b'"', b'"\xff', 1))
_json("json_no_object", lambda raw, rng: rng.choice([b"[]", b"null", b"3", b'"text"']))
_json("json_with_a_repeated_key", lambda raw, rng: raw.replace(b"{", b'{"x": 1, "x": 2, ', 1))
_json("json_nested_too_deep", lambda raw, rng: b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
_json("json_is_html", lambda raw, rng: b"<html>404</html>")
_json("json_appended", lambda raw, rng: raw + raw)


@fault("json", HF)
def json_changed_on_purpose(copy: Copy, rng: Random) -> Expectation | None:
    path = copy.folder / "generation_config.json"
    if not path.is_file() or not copy.path.is_dir():
        return None
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"eos_token_id": 12345}))
    return only_by_manifest(path)


def _config(name: str, file: str, edit: Callable[[Any, Random], bool], *parts: str) -> None:
    """A configuration that contradicts the weights: transformers would fill the rest at random."""

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = copy.folder / file
        if not path.is_file():
            return None
        value = json.loads(path.read_text())
        if not edit(value, rng):
            return None
        path.write_text(json.dumps(value, indent=2))
        return names_file(path, *copy.files, parts=parts, warning=True)

    damage.__name__ = name
    fault("json", HF)(damage)


def _add(keys: tuple[str, ...], by: Callable[[Random], int]) -> Callable[[Any, Random], bool]:
    def edit(value: Any, rng: Random) -> bool:
        key = next((k for k in keys if isinstance(value.get(k), int)), None)
        if key is not None:
            value[key] += by(rng)
        return key is not None

    return edit


LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
_config("config_with_another_layer", "config.json", _add(LAYERS, lambda rng: 1), "layer")
_config("config_with_fewer_layers", "config.json", _add(LAYERS, lambda rng: -1), "layer")
_config("config_with_another_vocabulary", "config.json", _add(("vocab_size",), lambda rng: 64), "vocab")
_config("config_with_another_hidden_size", "config.json", _add(HIDDEN, lambda rng: 8), *HIDDEN)
_config("adapter_of_another_rank", "adapter_config.json", _add(("r",), lambda rng: 3), "r ", "rank", "lora")


@fault("json", HF)
def config_missing(copy: Copy, rng: Random) -> Expectation | None:
    """The other configuration files are there: it was one of them."""
    path = copy.folder / "config.json"
    if not path.is_file() or not (copy.folder / "generation_config.json").is_file():
        return None  # weights alone are what `ckpt extract` and accelerate write
    path.unlink()
    return names_file(path, warning=True)


@fault("json", HF)
def adapter_config_missing(copy: Copy, rng: Random) -> Expectation | None:
    path = copy.folder / "adapter_config.json"
    if not path.is_file():
        return None
    path.unlink()
    return names_file(path, warning=True)


@fault("json", HF, ZERO)
def trainer_state_of_another_step(copy: Copy, rng: Random) -> Expectation | None:
    """Against the number in checkpoint-N and the optimizer's steps."""
    path = copy.top / "trainer_state.json"
    if not path.is_file():
        return None
    value = json.loads(path.read_text())
    value["global_step"] += 7
    path.write_text(json.dumps(value))
    return names_file(path, warning=True)


# --- safetensors headers ------------------------------------------------------------------------------

Header = dict[str, Any]


def _header(name: str, edit: Callable[[Header, str, Random], object], *, manifest: bool = False) -> None:
    """A header that lies about one tensor; the data stay where they are."""

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = pick(rng, copy.safetensors)
        if path is None:
            return None
        raw = path.read_bytes()
        header = safetensors_header(raw)
        tensor = pick(rng, (n for n, start, end in safetensors_spans(raw) if end > start))
        if tensor is None or edit(header, tensor, rng) is False:
            return None
        write_header(path, raw, json.dumps(header, separators=(",", ":")).encode())
        return only_by_manifest(path) if manifest else names_file(path)

    damage.__name__ = name
    fault("safetensors", HF)(damage)


def write_header(path: Path, raw: bytes, header: bytes) -> None:
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def _set_entry(field: str, value: Callable[[Any, Random], object]) -> Callable[[Header, str, Random], object]:
    def edit(header: Header, tensor: str, rng: Random) -> None:
        header[tensor][field] = value(header[tensor][field], rng)

    return edit


_header("header_offset_shifted", _set_entry("data_offsets", lambda o, rng: [o[0] + 4, o[1] + 4]))
_header("header_offsets_reversed", _set_entry("data_offsets", lambda o, rng: o[::-1]))
_header("header_offset_negative", _set_entry("data_offsets", lambda o, rng: [-o[1], o[0]]))
_header("header_offset_huge", _set_entry("data_offsets", lambda o, rng: [o[0], 2**63 - 1]))
_header("header_offset_no_int", _set_entry("data_offsets", lambda o, rng: [float(o[0]), o[1]]))
_header("header_offsets_missing", lambda h, t, rng: h[t].pop("data_offsets"))
_header("header_offsets_too_many", _set_entry("data_offsets", lambda o, rng: [*o, o[1]]))
_header("header_shape_larger", _set_entry("shape", lambda s, rng: [*s, 2]))
_header("header_shape_overflows", _set_entry("shape", lambda s, rng: [2**33, 2**33]))
_header("header_shape_negative", _set_entry("shape", lambda s, rng: [-1, *s]))
_header("header_shape_of_too_many_dimensions", _set_entry("shape", lambda s, rng: [*s, *[1] * 100]))
_header("header_shape_of_booleans", _set_entry("shape", lambda s, rng: [True, *s]))
_header("header_dtype_unknown", _set_entry("dtype", lambda d, rng: rng.choice(["F31", "f32", "", None])))
_header("header_dtype_of_another_size", _set_entry("dtype", lambda d, rng: "F64" if d != "F64" else "F32"))
_header("header_entry_with_more_fields", lambda h, t, rng: h[t].update(extra=1))
_header("header_entry_no_object", lambda h, t, rng: h.update({t: [1, 2]}))
_header("header_tensor_removed", lambda h, t, rng: h.pop(t))
_header("header_tensor_added", lambda h, t, rng: h.update(stray=dict(h[t])))
_header("header_metadata_no_text", lambda h, t, rng: h.update(__metadata__={"format": 1}))


def _other_dtype(header: Header, tensor: str, rng: Random) -> object:
    same = {"BF16": "F16", "F16": "BF16", "F32": "I32"}
    new = same.get(header[tensor]["dtype"])
    if new is None:
        return False
    header[tensor]["dtype"] = new
    return True


def _transposed(header: Header, tensor: str, rng: Random) -> object:
    shape = header[tensor]["shape"]
    header[tensor]["shape"] = shape[::-1]
    return len(set(shape)) > 1


def _names_swapped(header: Header, tensor: str, rng: Random) -> object:
    same = [
        n
        for n in header
        if n not in (tensor, "__metadata__") and header[n]["shape"] == header[tensor]["shape"]
    ]
    other = pick(rng, same)
    if other is None:
        return False
    header[tensor], header[other] = header[other], header[tensor]
    return True


_header("header_dtype_of_the_same_size", _other_dtype, manifest=True)
_header("header_shape_transposed", _transposed, manifest=True)
_header("header_names_swapped", _names_swapped, manifest=True)


def _raw_header(name: str, edit: Callable[[bytes, Random], bytes]) -> None:
    def damage(copy: Copy, rng: Random) -> Expectation | None:
        path = pick(rng, copy.safetensors)
        if path is None:
            return None
        path.write_bytes(edit(path.read_bytes(), rng))
        return names_file(path)

    damage.__name__ = name
    fault("safetensors", HF)(damage)


def _length(raw: bytes) -> int:
    return int.from_bytes(raw[:8], "little")


_raw_header("header_length_zero", lambda raw, rng: bytes(8) + raw[8:])
_raw_header("header_length_huge", lambda raw, rng: (2**63).to_bytes(8, "little") + raw[8:])
_raw_header("header_length_past_the_end", lambda raw, rng: (len(raw) * 2).to_bytes(8, "little") + raw[8:])
_raw_header(
    "header_length_off",
    lambda raw, rng: (_length(raw) + rng.choice([-8, -1, 1, 8])).to_bytes(8, "little") + raw[8:],
)
_raw_header("header_starts_otherwise", lambda raw, rng: raw[:8] + b" " + raw[9:])
_raw_header("header_not_utf8", lambda raw, rng: raw[:12] + b"\xff" + raw[13:])
_raw_header("header_of_zeros", lambda raw, rng: raw[:8] + bytes(_length(raw)) + raw[8 + _length(raw) :])
_raw_header("header_in_big_endian", lambda raw, rng: raw[:8][::-1] + raw[8:])


@fault("safetensors", HF)
def header_bit_flipped(copy: Copy, rng: Random) -> Expectation | None:
    """A changed letter of a name is a name: what stays JSON and fits the file, only the manifest tells."""
    path = pick(rng, copy.safetensors)
    if path is None:
        return None
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(8 + _length(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return only_by_manifest(path)


@fault("safetensors", HF)
def header_with_a_repeated_tensor(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.safetensors)
    if path is None:
        return None
    raw = path.read_bytes()
    header = json.dumps(safetensors_header(raw))
    name, entry = next((n, e) for n, e in safetensors_header(raw).items() if n != "__metadata__")
    again = f"{{{json.dumps(name)}: {json.dumps(entry)}, {header[1:]}"
    write_header(path, raw, again.encode())
    return names_file(path)


@fault(LEVEL, HF)
def folder_emptied(copy: Copy, rng: Random) -> Expectation | None:
    if not copy.path.is_dir():
        return None
    for path in list(copy.folder.iterdir()):
        path.unlink()
    return names_file(copy.folder)
