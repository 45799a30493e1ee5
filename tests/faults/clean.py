"""Good checkpoints: every fixture, and what other tools, other settings and ourselves make of them."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from msgspec.structs import replace
from support import RANK_LOCAL, resharded, variant_of
from torch.serialization import skip_data
from torch.utils.serialization import config as torch_config

from ckpttools import formats
from ckpttools.checkpoint import Layout
from ckpttools.execute import execute
from ckpttools.formats import hf
from ckpttools.formats.configs import config_files
from ckpttools.transforms.select import weights_only

from .core import DCP, HF, PT, UNIVERSAL, ZERO, ZERO3, Base, bases, load
from .layout import contents, regions

Make = Callable[[Base, Path], Path | None]
VARIATIONS: dict[str, tuple[frozenset[str], Make]] = {}


def variation(*kinds: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        VARIATIONS[make.__name__] = (frozenset(kinds), make)
        return make

    return register


def clean() -> Iterator[tuple[str, Base]]:
    """Every variation with every base that it may apply to."""
    for name, (kinds, _) in VARIATIONS.items():
        for base in bases():
            if base.kind in kinds:
                yield name, base


def made(name: str, base: Base, folder: Path) -> Path | None:
    """One clean checkpoint, made within `folder`; None where the variation does not apply."""
    folder.mkdir(parents=True)
    return VARIATIONS[name][1](base, folder)


def _copy(base: Base, folder: Path) -> Path:
    to = folder / base.path.name
    if base.path.is_dir():
        shutil.copytree(base.path, to)
    else:
        shutil.copyfile(base.path, to)
    return to


@variation(ZERO, PT, HF, ZERO3, DCP, UNIVERSAL)
def as_it_is(base: Base, folder: Path) -> Path:
    return base.path


def _resharded_to(ranks: int) -> None:
    def make(base: Base, folder: Path) -> Path | None:
        if variant_of(base.path) in RANK_LOCAL:
            return None  # nothing can cut their state
        if "elastic" in base.path.name:
            return None  # they lack what a reshard needs
        return resharded(base.path, ranks, folder / "out")

    make.__name__ = f"resharded_to_{ranks}"
    variation(ZERO)(make)


for _ranks in range(1, 9):
    _resharded_to(_ranks)


def _written(base: Base, folder: Path, variant: str | None = None, **options: int) -> Path:
    """What `ckpt extract` makes of it, with the configuration of a model folder."""
    checkpoint = weights_only(formats.open_checkpoint(base.path))
    plan = hf.plan(checkpoint, Layout(format="hf", variant=variant, **options))
    if base.kind == HF and base.path.is_dir():
        plan = replace(plan, files=(*plan.files, *config_files(base.path)))
    execute(plan, folder / "out", source=base.path)
    return folder / "out"


@variation(ZERO, PT, HF)
def extracted(base: Base, folder: Path) -> Path:
    return _written(base, folder)


@variation(ZERO, PT, HF)
def extracted_in_shards(base: Base, folder: Path) -> Path:
    return _written(base, folder, max_shard_size=1024)


@variation(ZERO, PT, HF)
def extracted_as_bin(base: Base, folder: Path) -> Path:
    return _written(base, folder, hf.BIN, max_shard_size=1500)


def _saved_again(base: Base, folder: Path, save: Callable[[object, Path], object]) -> Path | None:
    path = _copy(base, folder)
    files = [p for p in ([path] if path.is_file() else sorted(path.rglob("*"))) if _is_torch(p)]
    for file in files:
        save(load(file), file)
    return path if files else None


def _is_torch(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:2] in (b"PK", b"\x80\x02") and path.suffix != ".safetensors"


@variation(ZERO, PT)
def saved_again_by_torch(base: Base, folder: Path) -> Path | None:
    return _saved_again(base, folder, lambda value, file: torch.save(value, file))


@variation(ZERO, PT)
def saved_again_in_the_older_serialization(base: Base, folder: Path) -> Path | None:
    return _saved_again(
        base, folder, lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False)
    )


@variation(ZERO, PT)
def saved_without_checksums(base: Base, folder: Path) -> Path | None:
    torch_config.save.compute_crc32 = False
    try:
        return _saved_again(base, folder, lambda value, file: torch.save(value, file))
    finally:
        torch_config.save.compute_crc32 = True


@variation(PT)
def saved_with_another_alignment(base: Base, folder: Path) -> Path | None:
    torch_config.save.storage_alignment = 4096
    try:
        return _saved_again(base, folder, lambda value, file: torch.save(value, file))
    finally:
        torch_config.save.storage_alignment = 64


@variation(PT)
def saved_through_a_buffer(base: Base, folder: Path) -> Path | None:
    """torch.save to an open file calls the archive's root "archive"."""

    def save(value: object, file: Path) -> None:
        with file.open("wb") as stream:
            torch.save(value, stream)

    return _saved_again(base, folder, save)


@variation(PT)
def renamed(base: Base, folder: Path) -> Path:
    path = _copy(base, folder)
    return path.rename(path.with_name(f"best{path.suffix}"))


@variation(PT)
def zipped_again_by_python(base: Base, folder: Path) -> Path | None:
    """Stored, by zipfile: no padding, no descriptors, other flags; torch loads it."""
    path = _copy(base, folder)
    if path.read_bytes()[:2] != b"PK":
        return None
    found = contents(path.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in found:
            archive.writestr(name, data)
    return path


@variation(PT)
def filled_in_later(base: Base, folder: Path) -> Path | None:
    """Saved under skip_data; then the bytes were written where torch had left room for them."""
    path = _copy(base, folder)
    if path.read_bytes()[:2] != b"PK":
        return None
    value = load(path)
    torch.save(value, path)
    whole = path.read_bytes()
    with skip_data():
        torch.save(value, path)
    raw = bytearray(path.read_bytes())
    for region in regions(whole):
        if region.what == "data" and region.record.startswith("data/"):
            raw[region.start : region.end] = whole[region.start : region.end]
    path.write_bytes(raw)
    return path


@variation(PT)
def zipped_again_with_a_small_pickle(base: Base, folder: Path) -> Path | None:
    """As `zip` does: records that shrink are compressed; tensors are stored."""
    path = _copy(base, folder)
    if path.read_bytes()[:2] != b"PK":
        return None
    found = contents(path.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in found:
            stored = name.partition("/")[2].startswith("data/")
            archive.writestr(name, data, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)
    return path


@variation(ZERO, PT, HF)
def through_links(base: Base, folder: Path) -> Path:
    """Every file a symbolic link into the blobs of Hugging Face's cache."""
    cache = folder / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    path = _copy(base, cache / "snapshots")
    (cache / "blobs").mkdir()
    for i, file in enumerate([path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())):
        file.rename(cache / "blobs" / str(i))
        file.symlink_to(os.path.relpath(cache / "blobs" / str(i), file.parent))
    return path


@variation(ZERO, HF)
def through_links_within(base: Base, folder: Path) -> Path | None:
    """Every file a symbolic link to a folder of the checkpoint's own."""
    if not base.path.is_dir() or (formats.locate(base.path).target == base.path and base.kind == ZERO):
        return None
    path = _copy(base, folder)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    (path / "store").mkdir()
    for i, file in enumerate(files):
        file.rename(path / "store" / str(i))
        file.symlink_to(os.path.relpath(path / "store" / str(i), file.parent))
    return path


@variation(ZERO, HF)
def through_a_linked_folder(base: Base, folder: Path) -> Path | None:
    if not base.path.is_dir():
        return None
    link = folder / "link"
    link.symlink_to(base.path, target_is_directory=True)
    return link


@variation(ZERO, HF)
def with_odd_company(base: Base, folder: Path) -> Path | None:
    """Files that people and systems leave beside checkpoints."""
    if not base.path.is_dir():
        return None
    path = _copy(base, folder)
    for name in (".DS_Store", "README.md", "notes.txt", ".gitattributes", "run.log", "Thumbs.db"):
        (path / name).write_bytes(b"\0\1 something\n")
    return path


@variation(ZERO)
def latest_with_a_line_end(base: Base, folder: Path) -> Path | None:
    path = _copy(base, folder)
    latest = next(iter(path.rglob("latest")), None)
    if latest is None:
        return None
    latest.write_text(latest.read_text().strip() + "\n")
    return path


@variation(ZERO)
def tag_folder_by_itself(base: Base, folder: Path) -> Path:
    path = _copy(base, folder)
    return formats.locate(path).target


@variation(HF)
def saved_again_by_safetensors(base: Base, folder: Path) -> Path | None:
    path = _copy(base, folder)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return path if any(file.suffix == ".safetensors" for file in files) else None


@variation(HF)
def json_written_otherwise(base: Base, folder: Path) -> Path | None:
    """One line, a byte order and key order of its own: still JSON."""
    if not base.path.is_dir():
        return None
    path = _copy(base, folder)
    for file in path.glob("*.json"):
        value = json.loads(file.read_text())
        file.write_text(json.dumps(dict(reversed(value.items()))))
    return path
