"""Faults of whole files: what disks, networks, killed jobs and people do to them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import torch

from .core import (
    HF,
    PT,
    ZERO,
    ZERO3,
    Base,
    Copy,
    Expectation,
    bases,
    fault,
    load,
    names_file,
    only_by_manifest,
    pick,
)
from .layout import regions, safetensors_spans

LEVEL = "file"
SECTOR = 512


def rank_of(path: Path) -> str:
    return f"dp rank {path.name.partition('pp_rank_')[2].partition('_')[0]}"


def some_file(copy: Copy, rng: Random) -> Path:
    return rng.choice(copy.files)


@fault(LEVEL)
def file_missing(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.unlink()
    if (path in copy.ranks and len(copy.ranks) > 1) or (copy.kind == ZERO3 and "pp_rank" in path.name):
        return Expectation(parts=(rank_of(path), path.name))
    if path in copy.ranks:
        return Expectation(parts=("optim_states",))
    # a folder without its only weights may be anything: then the folder is named
    return names_file(path, *([copy.folder] if len(copy.files) == 1 else []))


@fault(LEVEL)
def file_empty(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.write_bytes(b"")
    return names_file(path)


@fault(LEVEL)
def file_truncated_anywhere(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    os.truncate(path, rng.randrange(1, path.stat().st_size))
    return names_file(path)


@fault(LEVEL)
def file_truncated_at_a_boundary(copy: Copy, rng: Random) -> Expectation | None:
    """Where a record, a tensor, a sector or the directory begins: what interrupted writers leave."""
    path = some_file(copy, rng)
    raw = path.read_bytes()
    cuts = set(range(SECTOR, len(raw), SECTOR))
    if path in copy.zips:
        cuts |= {r.start for r in regions(raw)}
    elif path in copy.safetensors:
        cuts |= {8} | {start for _, start, _ in safetensors_spans(raw)}
    os.truncate(path, rng.choice(sorted(cuts - {0})))
    return names_file(path)


@fault(LEVEL)
def file_truncated_and_filled_with_zeros(copy: Copy, rng: Random) -> Expectation | None:
    """Full length, but the tail was never written: a power cut after the size was set."""
    path = some_file(copy, rng)
    raw = path.read_bytes()
    keep = rng.randrange(0, len(raw) // SECTOR) * SECTOR
    new = raw[:keep] + bytes(len(raw) - keep)
    if new == raw:
        return None
    is_zip = path in copy.zips
    path.write_bytes(new)
    if is_zip or keep == 0:
        return names_file(path)
    return _unless_header(copy, path, keep)


def _unless_header(copy: Copy, path: Path, at: int) -> Expectation:
    """Damage from byte `at` on in a file without checksums: only its header can tell."""
    if path in copy.safetensors and at < 8 + int.from_bytes(path.read_bytes()[:8], "little"):
        return names_file(path)
    return only_by_manifest(path)


@fault(LEVEL)
def file_appended(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    tail = rng.choice([b"\0" * rng.randrange(1, 5000), b"\n", b"tail", path.read_bytes()])
    with path.open("ab") as file:
        file.write(tail)
    return names_file(path)


@fault(LEVEL)
def file_prepended(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.write_bytes(
        rng.choice([b"\0", b"\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\xef\xbb\xbf"]) + path.read_bytes()
    )
    return names_file(path)


@fault(LEVEL)
def file_git_lfs_pointer(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    oid = f"{rng.getrandbits(256):064x}"
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {path.stat().st_size}\n"
    )
    return names_file(path)


@fault(LEVEL)
def file_html_error_page(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    status = rng.choice(["401 Unauthorized", "403 Forbidden", "404 Not Found", "503 Service Unavailable"])
    path.write_text(
        f"<!DOCTYPE html>\n<html><head><title>{status}</title></head><body>{status}</body></html>\n"
    )
    return names_file(path)


@fault(LEVEL)
def file_of_zeros(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.write_bytes(bytes(path.stat().st_size))
    return names_file(path)


@fault(LEVEL)
def file_of_random_bytes(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.write_bytes(rng.randbytes(path.stat().st_size))
    return names_file(path)


@fault(LEVEL)
def file_is_a_folder(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.unlink()
    path.mkdir()
    return names_file(path)


@fault(LEVEL)
def file_is_a_pipe(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.unlink()
    os.mkfifo(path)
    return names_file(path)


@fault(LEVEL)
def file_is_a_device(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null"]))
    return names_file(path)


@fault(LEVEL)
def file_is_a_loop_of_links(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    other = path.with_name("loop")
    path.unlink()
    path.symlink_to(other.name)
    other.symlink_to(path.name)
    return names_file(path)


@fault(LEVEL)
def file_is_a_dangling_link(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    path.unlink()
    path.symlink_to("blobs/0123456789abcdef")
    return names_file(path)


@fault(LEVEL, ZERO, HF)
def file_is_a_link_out_of_the_checkpoint(copy: Copy, rng: Random) -> Expectation | None:
    """The very same bytes, in a place that the checkpoint's author chose."""
    if copy.path.is_file():
        return None  # the path that a user names may be a link
    path = some_file(copy, rng)
    outside = copy.top.parent / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)
    return names_file(path)


@fault(LEVEL)
def bytes_inserted(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    raw, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:])
    return names_file(path)


@fault(LEVEL)
def bytes_lost(copy: Copy, rng: Random) -> Expectation:
    path = some_file(copy, rng)
    raw, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(raw[:at] + raw[at + rng.randrange(1, 9) :])
    return names_file(path)


@fault(LEVEL)
def newlines_converted(copy: Copy, rng: Random) -> Expectation | None:
    """A transfer in text mode: each \\n became \\r\\n."""
    path = some_file(copy, rng)
    raw = path.read_bytes()
    if b"\n" not in raw:
        return None
    path.write_bytes(raw.replace(b"\n", b"\r\n"))
    return names_file(path)


@fault(LEVEL)
def sector_zeroed(copy: Copy, rng: Random) -> Expectation | None:
    path = some_file(copy, rng)
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw) // SECTOR) * SECTOR
    if not any(raw[at : at + SECTOR]):
        return None
    raw[at : at + SECTOR] = bytes(SECTOR)
    checked = path in copy.checked
    path.write_bytes(raw)
    return names_file(path) if checked or at == 0 else only_by_manifest(path)


@fault(LEVEL)
def sector_overwritten_by_another(copy: Copy, rng: Random) -> Expectation | None:
    path = some_file(copy, rng)
    raw = bytearray(path.read_bytes())
    to, there = rng.randrange(len(raw) // SECTOR) * SECTOR, rng.randrange(len(raw) // SECTOR) * SECTOR
    if raw[to : to + SECTOR] == raw[there : there + SECTOR]:
        return None
    raw[to : to + SECTOR] = raw[there : there + SECTOR]
    checked = path in copy.checked
    path.write_bytes(raw)
    return names_file(path) if checked or to == 0 else only_by_manifest(path)


@fault(LEVEL)
def sectors_swapped(copy: Copy, rng: Random) -> Expectation | None:
    path = some_file(copy, rng)
    raw = bytearray(path.read_bytes())
    a, b = sorted(rng.sample(range(len(raw) // SECTOR), 2)) if len(raw) >= 2 * SECTOR else (0, 0)
    a, b = a * SECTOR, b * SECTOR
    if raw[a : a + SECTOR] == raw[b : b + SECTOR]:
        return None
    raw[a : a + SECTOR], raw[b : b + SECTOR] = raw[b : b + SECTOR], raw[a : a + SECTOR]
    checked = path in copy.checked
    path.write_bytes(raw)
    return names_file(path) if checked or a == 0 else only_by_manifest(path)


# --- the right file in the wrong place ----------------------------------------------------------------


@fault(LEVEL, ZERO)
def ranks_swapped(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2:
        return None
    a, b = rng.sample(copy.ranks, 2)
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)
    return names_file(a, b)


@fault(LEVEL, ZERO)
def ranks_swapped_and_saved_again(copy: Copy, rng: Random) -> Expectation | None:
    """Without the old names in the archives: only the contents can tell."""
    if len(copy.ranks) < 2:
        return None
    a, b = rng.sample(copy.ranks, 2)
    one, two = load(a), load(b)
    if not _differ(one, two, copy):
        return None
    torch.save(one, b)
    torch.save(two, a)
    return names_file(a, b)


@fault(LEVEL, ZERO)
def rank_copied_over_another(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2:
        return None
    a, b = rng.sample(copy.ranks, 2)
    shutil.copyfile(a, b)
    return names_file(b)


@fault(LEVEL, ZERO)
def extra_rank(copy: Copy, rng: Random) -> Expectation:
    """A rank file left over from a save with more ranks."""
    n = len(copy.ranks)
    stale = copy.ranks[0].name.replace("pp_rank_0_", f"pp_rank_{n + rng.randrange(3)}_")
    shutil.copyfile(copy.ranks[-1], copy.folder / stale)
    number = stale.partition("pp_rank_")[2].partition("_")[0]
    return Expectation(parts=(stale, f"dp ranks {number}", f"dp rank {number}", f"ranks {number}"))


@fault(LEVEL, ZERO)
def last_rank_missing(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2:
        return None
    copy.ranks[-1].unlink()
    return Expectation(parts=(copy.ranks[-1].name, rank_of(copy.ranks[-1])))


@fault(LEVEL, ZERO)
def rank_renumbered(copy: Copy, rng: Random) -> Expectation | None:
    if len(copy.ranks) < 2:
        return None
    path = rng.choice(copy.ranks)
    number = path.name.partition("pp_rank_")[2].partition("_")[0]
    new = path.with_name(path.name.replace(f"pp_rank_{number}_", f"pp_rank_{len(copy.ranks) + 1}_"))
    path.rename(new)
    return Expectation(parts=(path.name, rank_of(path), new.name))


@fault(LEVEL, ZERO)
def rank_in_another_style(copy: Copy, rng: Random) -> Expectation | None:
    """The same rank of an fp32 or a bf16 save beside this one's."""
    path = rng.choice(copy.ranks)
    name = path.name[5:] if path.name.startswith("bf16_") else f"bf16_{path.name}"
    shutil.copyfile(path, path.with_name(name))
    return Expectation(parts=(path.name, name, rank_of(path)))


@fault(LEVEL, ZERO)
def rank_in_place_of_the_model(copy: Copy, rng: Random) -> Expectation:
    shutil.copyfile(rng.choice(copy.ranks), copy.model)
    return names_file(copy.model)


@fault(LEVEL, ZERO)
def model_in_place_of_a_rank(copy: Copy, rng: Random) -> Expectation:
    path = rng.choice(copy.ranks)
    shutil.copyfile(copy.model, path)
    return names_file(path)


def others(copy: Copy, rng: Random, name: str) -> Path | None:
    """A file of the same name from another checkpoint, another run or another step."""
    found = [
        path
        for base in bases()
        if base.kind == copy.kind and base != copy.base and base.path.is_dir()
        for path in base.path.rglob(name)
    ]
    return pick(rng, found)


def _differ(mine: object, theirs: object, copy: Copy) -> bool:
    """Whether two rank or model files hold different weights, as far as the model's dtype can show."""
    dtype = _model_dtype(copy)
    a, b = _weights(mine, dtype), _weights(theirs, dtype)
    return a.keys() != b.keys() or any(
        x.shape != b[k].shape or x.dtype != b[k].dtype or not torch.equal(x, b[k]) for k, x in a.items()
    )


def _model_dtype(copy: Copy) -> torch.dtype:
    root = load(copy.model)
    names = [name for group in root["param_shapes"] for name in group if name in root["module"]]
    dtype: torch.dtype = root["module"][names[0]].dtype if names else torch.float32
    return dtype


def _weights(value: object, dtype: torch.dtype) -> dict[object, torch.Tensor]:
    assert isinstance(value, dict)
    if "module" in value:
        trainable = {name for group in value["param_shapes"] for name in group}
        return {name: t for name, t in value["module"].items() if name in trainable}
    groups = value["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    return {g: t.detach().to(dtype) for g, t in enumerate(groups)}


@fault(LEVEL, ZERO)
def file_of_another_checkpoint(copy: Copy, rng: Random) -> Expectation | None:
    """The same name, from another run, step or version: as loaded, other weights."""
    path = some_file(copy, rng)
    other = others(copy, rng, path.name)
    if other is None or not _differ(load(path), load(other), copy):
        return None
    shutil.copyfile(other, path)
    return names_file(*copy.files, copy.folder)


@fault(LEVEL, ZERO)
def all_ranks_of_another_checkpoint(copy: Copy, rng: Random) -> Expectation | None:
    """The model file stays: optimizer and weights are of two saves."""
    found = [b for b in bases() if b.kind == ZERO and b != copy.base and b.version == copy.base.version]
    other = pick(rng, found)
    if other is None:
        return None
    theirs = [next(other.path.rglob(path.name), None) for path in copy.ranks]
    known = [path for path in theirs if path is not None]
    if len(known) < len(copy.ranks) or not any(
        _differ(load(a), load(b), copy) for a, b in zip(copy.ranks, known, strict=True)
    ):
        return None
    for mine, theirs_ in zip(copy.ranks, known, strict=True):
        shutil.copyfile(theirs_, mine)
    return names_file(*copy.files, copy.folder)


STEPS = {"checkpoint-2": "checkpoint-4", "checkpoint-4": "checkpoint-2"}


def other_step(base: Base) -> Path | None:
    """The same run, two steps later or earlier."""
    other = STEPS.get(base.path.name)
    return base.path.with_name(other) if other else None


@fault(LEVEL, ZERO)
def model_of_another_step(copy: Copy, rng: Random) -> Expectation | None:
    other = other_step(copy.base)
    if other is None:
        return None
    shutil.copyfile(next(other.rglob(copy.model.name)), copy.model)
    return names_file(*copy.files)


@fault(LEVEL, ZERO)
def rank_of_another_step(copy: Copy, rng: Random) -> Expectation | None:
    other = other_step(copy.base)
    if other is None:
        return None
    path = rng.choice(copy.ranks)
    shutil.copyfile(next(other.rglob(path.name)), path)
    return names_file(path)


@fault(LEVEL, ZERO)
def all_ranks_of_another_step(copy: Copy, rng: Random) -> Expectation | None:
    other = other_step(copy.base)
    if other is None:
        return None
    for path in copy.ranks:
        shutil.copyfile(next(other.rglob(path.name)), path)
    return names_file(*copy.files)


@fault(LEVEL, PT, HF)
def file_of_another_run(copy: Copy, rng: Random) -> Expectation | None:
    """A good file of the same name and shapes, other values: nothing in it can tell."""
    path = some_file(copy, rng)
    if path in copy.safetensors:
        raw = bytearray(path.read_bytes())
        spans = [(start, end) for name, start, end in safetensors_spans(bytes(raw)) if end - start >= 8]
        for start, end in spans:
            raw[start:end] = raw[start + 4 : end] + raw[start : start + 4]
        path.write_bytes(raw)
    else:
        value = load(path)
        changed = False
        for tensor in _tensors(value):
            if tensor.is_floating_point() and tensor.numel() > 1:
                tensor.copy_(tensor.flatten().roll(1).reshape(tensor.shape))
                changed = True
        if not changed:
            return None
        legacy = path in copy.legacy
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return only_by_manifest(path)


def _tensors(value: object) -> list[torch.Tensor]:
    match value:
        case torch.Tensor():
            return [value.detach()]
        case dict():
            return [t for v in value.values() for t in _tensors(v)]
        case list() | tuple():
            return [t for v in value for t in _tensors(v)]
    return []


# --- files beside the checkpoint ----------------------------------------------------------------------

SIDE = (".pt", ".pth", ".bin", ".pkl", ".safetensors")


def side_files(copy: Copy) -> list[Path]:
    """Torch and safetensors files that belong to the checkpoint without holding its weights."""
    found = sorted(path for path in copy.top.rglob("*") if path.is_file() and path.suffix in SIDE)
    return [path for path in found if path not in copy.files and _beside(copy, path)]


def _beside(copy: Copy, path: Path) -> bool:
    return path.parent in (copy.top, copy.folder, copy.folder.parent) or path.parent.name == "hf_model"


@fault("side file", ZERO, HF)
def side_file_truncated(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, side_files(copy))
    if path is None:
        return None
    os.truncate(path, rng.randrange(path.stat().st_size))
    return names_file(path)


@fault("side file", ZERO, HF)
def side_file_bit_flipped(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, (p for p in side_files(copy) if p.suffix != ".safetensors"))
    if path is None:
        return None
    raw = bytearray(path.read_bytes())
    data = [r for r in regions(bytes(raw)) if r.what == "data" and r.end > r.start]
    region = rng.choice(data)
    raw[rng.randrange(region.start, region.end)] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return names_file(path)
