"""Which checkpoint an automatic resume takes in a folder, by each framework's own rule.

    DeepSpeed   the tag in `latest`; without that file nothing is loaded, with a warning
    MMEngine    the path in `last_checkpoint`, word for word; nothing is searched, nothing checked
    Trainer     checkpoint-N with the largest N; nobody looks whether it is complete
    OpenPCDet   the newest *.pth by modification time; one that cannot be loaded is silently passed over
    Lightning   ckpt_path="last": last*.ckpt, the newest by modification time
    accelerate  the entry of checkpoints/ with the largest number in its name

Sources: deepspeed/runtime/engine.py, mmengine/runner/checkpoint.py, transformers/trainer_utils.py,
OpenPCDet's tools/train.py, lightning's checkpoint_connector.py, accelerate/accelerator.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import locate, read
from ckpttools.formats.tags import is_tag
from ckpttools.location import Location
from ckpttools.resume.report import AutoResume
from ckpttools.stores.files import entries, exists, is_file, is_folder, small_text, stat

TRAINER = re.compile(r"checkpoint-(\d+)")
PCDET = re.compile(r"checkpoint_epoch_\d+\.pth|latest_model\.pth")
LAST = re.compile(r"last(-(\d+))?.*\.ckpt")
STATE = re.compile(r"checkpoint_(\d+)")
SHOWN = 12


def auto_resume(folder: Location) -> tuple[AutoResume, ...]:
    """What each framework whose checkpoints are here would take. () for a path that is no folder."""
    if not is_folder(folder):
        return ()
    rules = (_deepspeed, _mmengine, _trainer, _openpcdet, _lightning, _accelerate)
    return tuple(found for rule in rules for found in rule(folder))


def _deepspeed(folder: Location) -> Iterator[AutoResume]:
    names = {e.name for e in entries(folder)}
    tags = [e.name for e in entries(folder) if is_folder(e) and is_tag(folder / e.name)]
    if "latest" in names:
        tag = small_text(folder / "latest", 4096).strip()
        path = folder / tag
        problem = "" if is_folder(path) else "it is not there: loading fails"
        yield AutoResume(
            framework="DeepSpeed",
            path=path,
            why=f"latest names {escape(tag)}",
            problem=problem or _damage(path),
            found=_shown(tags),
        )
    elif tags and "last_checkpoint" not in names and not any(TRAINER.fullmatch(n) for n in names):
        yield AutoResume(
            framework="DeepSpeed",
            path=None,
            why="there is no file latest: load_checkpoint without a tag loads nothing, and only warns",
            problem=f"name the tag, or write it into latest: {escape(_by_number(tags)[-1])} is the "
            f"last by number",
            found=_shown(tags),
        )


def _mmengine(folder: Location) -> Iterator[AutoResume]:
    names = [e.name for e in entries(folder)]
    if "last_checkpoint" not in names:
        return
    text = small_text(folder / "last_checkpoint", 4096).strip()
    named = Path(text)
    if not named.is_absolute() and len(named.parts) == 1 and is_folder(folder / named):
        return  # ckpt train's pointer: a name beside it
    problem = ""
    if not exists(named):
        beside = exists(folder / named.name)
        problem = "it is not there: loading fails" + (
            f"; {escape(named.name)} lies beside the pointer, which was written elsewhere" if beside else ""
        )
    elif named.resolve().parent != folder.resolve():
        problem = "it is in another folder: the run was copied or moved, and would go on from the original"
    yield AutoResume(
        framework="MMEngine",
        path=named if exists(named) else None,
        why=f"last_checkpoint names {escape(text)}, which is taken word for word",
        problem=problem or _damage(named),
        found=_shown([n for n in names if n.endswith(".pth")]),
    )


def _trainer(folder: Location) -> Iterator[AutoResume]:
    found = [e.name for e in entries(folder) if is_folder(e) and TRAINER.fullmatch(e.name)]
    if not found:
        return
    last = _by_number(found)[-1]
    inside = {e.name for e in entries(folder / last)}
    problem = ""
    if "checkpoint-is-incomplete.txt" in inside:
        problem = "checkpoint-is-incomplete.txt says that the save was not finished"
    elif "trainer_state.json" not in inside:
        problem = "trainer_state.json, which is written last, is missing: the save was not finished"
    yield AutoResume(
        framework="Hugging Face Trainer",
        path=folder / last,
        why=f"the largest number of {len(found)}",
        problem=problem or _damage(folder / last),
        found=_shown(found),
    )


def _openpcdet(folder: Location) -> Iterator[AutoResume]:
    place = folder / "ckpt" if is_folder(folder / "ckpt") else folder
    files = [e for e in entries(place) if is_file(e) and e.name.endswith(".pth")]
    if not any(PCDET.fullmatch(e.name) for e in files):
        return
    files.sort(key=lambda e: stat(place / e.name).mtime_ns)
    newest = place / files[-1].name
    problem = _damage(newest)
    yield AutoResume(
        framework="OpenPCDet",
        path=newest,
        why=f"the newest of {len(files)} *.pth by modification time, whatever their numbers",
        problem=f"{problem}; it is silently passed over, and an older one is taken" if problem else "",
        found=_shown([e.name for e in files]),
    )


def _lightning(folder: Location) -> Iterator[AutoResume]:
    place = folder / "checkpoints" if is_folder(folder / "checkpoints") else folder
    files = [e for e in entries(place) if e.name.endswith(".ckpt")]
    if not files:
        return
    last = sorted((e for e in files if LAST.fullmatch(e.name)), key=lambda e: stat(place / e.name).mtime_ns)
    if not last:
        yield AutoResume(
            framework="Lightning",
            path=None,
            why='ckpt_path="last" finds no last*.ckpt',
            problem="the run would start anew: name the file itself",
            found=_shown([e.name for e in files]),
        )
        return
    path = place / last[-1].name
    yield AutoResume(
        framework="Lightning",
        path=path,
        why=f"the newest of {len(last)} last*.ckpt by modification time",
        problem=_damage(path),
        found=_shown([e.name for e in files]),
    )


def _accelerate(folder: Location) -> Iterator[AutoResume]:
    place = folder / "checkpoints" if is_folder(folder / "checkpoints") else folder
    found = [e.name for e in entries(place) if is_folder(e) and STATE.fullmatch(e.name)]
    if not found:
        return
    last = _by_number(found)[-1]
    yield AutoResume(
        framework="accelerate",
        path=place / last,
        why=f"the largest number of {len(found)}; it counts saves, not steps",
        problem=_damage(place / last),
        found=_shown(found),
    )


def _by_number(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)[:4]], name))


def _shown(names: list[str]) -> tuple[str, ...]:
    return tuple(_by_number(names)[-SHOWN:])


def _damage(path: Location) -> str:
    """What its headers show to be wrong with it."""
    try:
        read(locate(path))
    except Unsupported:
        return ""  # whole, for all that is known, and read by its framework
    except CkptError as error:
        return f"{error.message} [{error.id}]"
    return ""
