"""The folders around DeepSpeed's tag folders, the same for every stage and layout.

<save folder>/latest, global_step500/ ...       `latest` holds the name of one of the tags
<bundle>/deepspeed/, hf_model/, training_info.json
<checkpoint-N>/latest, global_stepN/, trainer_state.json, model.safetensors       the HF Trainer's
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ckpttools.errors import CkptError, escape
from ckpttools.formats.format import Folder, Found, Inner
from ckpttools.formats.rank_files import EXPERT, LAYER, MODEL, OPTIM, PART, STAGE3_MODEL
from ckpttools.location import Location, below
from ckpttools.numbered import by_number
from ckpttools.stores.files import small_text
from ckpttools.stores.links import plain_name

LATEST = "latest"
BUNDLE, BUNDLED = "deepspeed", ("hf_model", "training_info.json")
TRAINER_STATE = "trainer_state.json"
STEP_TAG = re.compile(r"global_step\d+")
ANY = re.compile(r".*_(model|optim)_states\.pt(-\d+\.\d+)?|.*[0-9]optim_states\.pt")


def is_states(name: str) -> bool:
    """Whether a file is one of DeepSpeed's, of whatever stage."""
    return ANY.fullmatch(name) is not None


def names_it(path: Location) -> bool:
    """Whether DeepSpeed itself gives a file that name."""
    return any(name.fullmatch(path.name) for name in (OPTIM, MODEL, STAGE3_MODEL, EXPERT, LAYER, PART))


def holds_states(folder: Folder) -> bool:
    """Whether the folder directly holds DeepSpeed's model or optimizer files, of whatever stage."""
    return any(map(is_states, folder.names))


def is_tag(path: Location) -> bool:
    """`holds_states` of the folder at a path. Raises CkptError where it cannot be listed."""
    return holds_states(Folder.of(path))


def recognise(folder: Folder, holds: Callable[[Folder], bool]) -> Found | Inner | None:
    """The tag folder that a folder is, or that its `latest` names, where that `holds` the format's files.

    Raises CkptError for a `latest` that leads nowhere.
    """
    if holds_states(folder):
        return Found(folder.path, "a DeepSpeed tag folder") if holds(folder) else None
    if LATEST not in folder.names:
        return None
    tag = _tag(folder)
    return Found(tag.path, f"latest names {escape(below(tag.path, folder.path))}") if holds(tag) else None


def last_word(folder: Folder) -> Inner | None:
    """What a folder means that no stage has recognised: a bundle, or a save that lacks something."""
    if LATEST in folder.names:
        tag = _tag(folder)
        raise CkptError(
            "latest-dangling",
            f"latest names {escape(tag.path.name)}, which holds no DeepSpeed files",
            where=tag.path,
            why="the save did not finish, or its files were moved",
            hint=named_tags(folder, but=tag.path.name),
        )
    if is_bundle(folder):
        return Inner(BUNDLE, f"{BUNDLE}/ of this bundle")
    tags = [name for name in folder.names if STEP_TAG.fullmatch(name) and name in folder.folders]
    if tags and TRAINER_STATE in folder.names:
        raise CkptError(
            "latest-missing",
            f"{tags[-1]}/ is here, but no `latest` that names it",
            where=folder.path,
            why="the Trainer would not find its DeepSpeed state and could not resume",
            hint=f"if the save was finished, write {tags[-1]} into the file latest, or use --tag {tags[-1]}",
        )
    return None


def is_bundle(folder: Folder) -> bool:
    """Whether `deepspeed/` is a part of it. It may also be a run: of experiments with DeepSpeed, say, or one
    of several that lie beside each other.
    """
    if BUNDLE not in folder.folders:
        return False
    if any(name in folder.names for name in BUNDLED):
        return True
    if len(folder.folders) > 1:
        return False
    inner = folder.inside(BUNDLE)
    return LATEST in inner.names or holds_states(inner)


def is_rest(folder: Folder) -> bool:
    """Whether it is a bundle whose `deepspeed/` is gone."""
    return BUNDLE not in folder.folders and all(name in folder.names for name in BUNDLED)


def _tag(folder: Folder) -> Folder:
    """The tag folder that `latest` names: with folders in its name where training code gave it such a tag."""
    pointer = folder.path / LATEST
    name, tag = small_text(pointer, 256).strip(), folder
    for part in name.split("/"):
        if plain_name(part, pointer) not in tag.folders:
            raise CkptError(
                "latest-dangling",
                f"latest names {escape(name)}, which is not there",
                where=pointer,
                why="DeepSpeed would fail to resume from this folder",
                hint=named_tags(folder),
            )
        tag = tag.inside(part)
    return tag


def tags(folder: Folder) -> list[str]:
    """The tag folders of a save folder, in the order of their names."""
    return [name for name in sorted(folder.folders) if holds_states(Folder.of(folder.path / name))]


def named_tags(folder: Folder, but: str = "") -> str:
    """A hint that names the newest tags there are."""
    found = [name for name in tags(folder) if name != but]
    if not found:
        return "no other checkpoint is in this folder: copy it again from where it was saved"
    shown = ", ".join(map(escape, sorted(found, key=by_number)[-8:]))
    return f"the folder holds {shown}: name one with --tag"
