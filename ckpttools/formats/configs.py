"""The configuration and tokenizer files that transformers needs beside the weights."""

from __future__ import annotations

import re

from ckpttools.location import Location
from ckpttools.plan import OutputFile, copy_file
from ckpttools.stores.files import entries, is_file, size_of
from ckpttools.stores.links import within

# what transformers needs beside the weights to load a model and its tokenizer
CONFIG_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"preprocessor_config|processor_config|adapter_config)\.json|merges\.txt|vocab\.txt|.*\.model|"
    r"chat_template\.(jinja|json)"
)
# a folder with one of them has a configuration
CONFIG, ADAPTER_CONFIG = HEADS = ("config.json", "adapter_config.json")
ADAPTER = "adapter_model"  # how the weights of an adapter are called
DIFFUSERS = "diffusion_pytorch_model"  # how weights are called that diffusers loads, and not transformers


def config_files(folder: Location) -> list[OutputFile]:
    """Copies of the configuration and tokenizer files of a folder."""
    with within(folder):
        return [
            copy_file(folder / entry.name, entry.name, size_of(folder / entry.name))
            for entry in entries(folder)
            if is_file(entry) and CONFIG_FILES.fullmatch(entry.name)
        ]
