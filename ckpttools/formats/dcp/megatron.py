"""What Megatron-Core keeps beside a distributed checkpoint (its `torch_dist` folders).

    <folder>/common.pt      what all ranks have alike: arguments, iteration, schedule, optimizer settings
    <folder>/metadata.json  {"sharded_backend": "torch_dist", ...}, written last: Megatron reads none without

Which parameter is in which of the optimizer's groups is in no file. Source: megatron-core 0.16.1,
dist_checkpointing/serialization.py and strategies/common.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, FileRole
from ckpttools.containers import fields, jsons
from ckpttools.containers.nodes import decode
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError
from ckpttools.findings import Finding, of_error
from ckpttools.formats.counters import COMMON, training
from ckpttools.formats.files import check_files
from ckpttools.formats.found import found
from ckpttools.location import Location
from ckpttools.stores.files import exists, size_of

FILE, CONFIG = "common.pt", "metadata.json"
MEGATRON = "megatron"


def with_common(checkpoint: Checkpoint) -> Checkpoint:
    """With what common.pt says, where there is one. Raises CkptError where it is damaged."""
    path = checkpoint.path / FILE
    if not exists(path):
        return checkpoint
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    counted = replace(training(None, root), keys={})
    roles = [FileRole(path=path, nbytes=file.size, role="what all ranks have alike", dangers=file.dangers)]
    if exists(config := checkpoint.path / CONFIG):
        roles.append(FileRole(path=config, nbytes=size_of(config), role="says that the save was finished"))
    return replace(
        checkpoint,
        layout=replace(checkpoint.layout, variant=MEGATRON),
        training=counted if checkpoint.training.step is None else checkpoint.training,
        client={**checkpoint.client, COMMON: decode(file, file.value)},
        files=(*checkpoint.files, *roles),
        checks=(*checkpoint.checks, *file.checks()),
    )


def check(folder: Location) -> Iterator[Finding]:
    """Both files are there or none, and common.pt is whole."""
    path, config = folder / FILE, folder / CONFIG
    if exists(path):
        try:
            yield from check_files([read_torch_file(path)])
        except CkptError as error:
            yield of_error(error)
        if not exists(config):
            message = f"no {CONFIG}, which is written last: Megatron takes the folder for no checkpoint"
            yield found("metadata-missing", config, "", message)
    elif _is_config(config):
        message = f"no {FILE}: arguments, iteration, schedule and the optimizer's settings are in no file"
        yield found("shard-missing", path, "", message)


def _is_config(path: Location) -> bool:
    try:
        return exists(path) and jsons.read(path).get("sharded_backend") == "torch_dist"
    except CkptError:  # a file of somebody else
        return False
