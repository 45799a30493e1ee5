"""The configuration and tokenizer files that transformers needs beside the weights."""

from __future__ import annotations

from ckpttools.formats.hf.names import CONFIG_FILES
from ckpttools.location import Location
from ckpttools.plan import OutputFile, copy_file
from ckpttools.stores.files import entries, is_file, size_of
from ckpttools.stores.links import within


def config_files(folder: Location) -> list[OutputFile]:
    """Copies of the configuration and tokenizer files of a folder."""
    with within(folder):
        return [
            copy_file(folder / entry.name, entry.name, size_of(folder / entry.name))
            for entry in entries(folder)
            if is_file(entry) and CONFIG_FILES.fullmatch(entry.name)
        ]
