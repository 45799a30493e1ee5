"""A folder of several models that are used together: a pipeline of diffusers.

model_index.json            {"_class_name": ..., NAME: [library, class], NAME: [null, null]}
NAME/config.json            of a model, with its weights beside it; others have files of other names
"""

from __future__ import annotations

from ckpttools.containers import jsons
from ckpttools.errors import CkptError, escape
from ckpttools.formats.format import Folder
from ckpttools.location import Location
from ckpttools.stores.links import plain_name

INDEX = "model_index.json"
WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Processor", "Extractor", "Scheduler")


def components(folder: Folder) -> list[str]:
    """The folders of a pipeline's parts, as its index lists them; [] of another folder. Raises CkptError."""
    if INDEX not in folder.files:
        return []
    listed = jsons.read(folder.path / INDEX)
    return [plain_name(name, folder.path / INDEX) for name, value in listed.items() if _is_part(name, value)]


def _is_part(name: str, value: object) -> bool:
    """Whether it is a model. `[null, null]` is a part that was left out on purpose; tokenizers and schedulers
    have no weights, and may lie in the pipeline's own folder.
    """
    if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
        return False
    _, kind = value
    return all(isinstance(each, str) for each in value) and not kind.endswith(WITHOUT_WEIGHTS)


def missing(place: Location, what: str) -> CkptError:
    return CkptError(
        "component-missing",
        f"the part {escape(place.name)} of the pipeline {what}",
        where=place,
        why=f"{INDEX} lists it: the pipeline cannot be loaded without it",
        hint="copy the part's folder again from where the pipeline was saved",
    )
