"""Which files make up a universal checkpoint, by name."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import tags
from ckpttools.formats.format import Folder, Found, Inner
from ckpttools.formats.rank_files import FLAT, MODEL, MODEL_NAME, STAGE3_MODEL
from ckpttools.location import Location
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import Entered, entries, is_file, is_folder, small_text
from ckpttools.stores.links import plain_name

LATEST = "latest_universal"
ZERO = "zero"
SETTINGS = "optimizer_state.pt"
SUFFIX = ".pt"
KINDS = {"fp32", "step", *FLAT}
UNFINISHED = "tmp"  # of ds_to_universal, while it runs
STAGE3_NAME = "zero_pp_rank_0_mp_rank_00_model_states.pt"
MAX_DEPTH = 64  # of folders below zero/: a parameter's name may hold slashes


class UniversalFiles(Struct, frozen=True, kw_only=True):
    """The files of one tag folder. `params` has, by parameter and kind, what lies below zero/; `stage3` the
    model files of ZeRO-3 by rank.
    """

    folder: Location
    model: Location | None
    stage3: Mapping[int, Location]
    settings: Location | None
    params: Mapping[str, Mapping[str, Location]]
    unfinished: bool
    others: tuple[Location, ...]

    def place(self, name: str, kind: str) -> Location:
        """Where the state of a parameter belongs."""
        return self.folder / ZERO / name / f"{kind}{SUFFIX}"


def holds(folder: Folder) -> bool:
    """Whether the folder is a tag folder of this format."""
    return ZERO in folder.folders and any(
        MODEL.fullmatch(n) or STAGE3_MODEL.fullmatch(n) for n in folder.names
    )


def recognise(folder: Folder) -> Found | Inner | None:
    """A tag folder, or the one that `latest` or, where there is none, `latest_universal` names.

    Raises CkptError for a pointer that leads nowhere.
    """
    if holds(folder) or _is_zero(folder):
        return Found(folder.path, "a DeepSpeed universal checkpoint")
    if tags.LATEST in folder.names or LATEST not in folder.names:
        return tags.recognise(folder, holds)
    name = plain_name(small_text(folder.path / LATEST, 256).strip(), folder.path / LATEST)
    tag = folder.inside(name) if name in folder.folders else None
    if tag is None or not (holds(tag) or _is_zero(tag)):
        raise CkptError(
            "latest-dangling",
            f"{LATEST} names {escape(name)}, which is not there or is no universal checkpoint",
            where=folder.path / LATEST,
            why="DeepSpeed would fail to resume from this folder",
            hint=f"copy {escape(name)} again from where it was made",
        )
    return Found(tag.path, f"{LATEST} names {escape(name)}")


def _is_zero(folder: Folder) -> bool:
    """Whether zero/ is what this format has there, and no folder of somebody's that is called so."""
    if ZERO not in folder.folders:
        return False
    zero = folder.inside(ZERO)
    return SETTINGS in zero.files or any(f"fp32{SUFFIX}" in zero.inside(name).files for name in zero.folders)


def names_it(path: Location) -> bool:
    """Whether it is a model file, or in the zero/ beside one, of a kind of state that optimizers are known to
    have or that another parameter has as well."""
    if tags.names_it(path):
        return True
    zeros = (folder for folder in path.parents if folder.name == ZERO)
    if not path.name.endswith(SUFFIX) or not any(holds(Folder.of(zero.parent)) for zero in zeros):
        return False
    if (path.parent.name, path.name) == (ZERO, SETTINGS):
        return True
    if path.name.removesuffix(SUFFIX) in KINDS:
        return is_file(path.with_name(f"fp32{SUFFIX}"))
    others = (entry.name for entry in entries(path.parent.parent) if entry.name != path.parent.name)
    return any(is_file(path.parent.parent / name / path.name) for name in others)


def find(folder: Location) -> UniversalFiles:
    """Sort a tag folder's files. Raises Unsupported for layouts of tensor parallelism and experts."""
    model: Location | None = None
    stage3: dict[int, Location] = {}
    others: list[Location] = []
    unfinished = False
    for entry in entries(folder):
        path = folder / entry.name
        if match := MODEL.fullmatch(entry.name):
            _plain(folder, match[1])
            model = path
        elif match := STAGE3_MODEL.fullmatch(entry.name):
            _plain(folder, match["mp"])
            stage3[int(match["dp"])] = path
        elif is_folder(entry):
            unfinished |= entry.name == UNFINISHED
        elif is_file(entry) and entry.name != MANIFEST:
            others.append(path)
    if model is None and not stage3:
        raise CkptError(
            "model-missing",
            f"there is no {MODEL_NAME}",
            where=folder,
            why="the counters, the schedule and the shapes of all parameters are in that file",
            hint=f"copy it from where the folder was made ({STAGE3_NAME} where that was ZeRO-3)",
        )
    params: dict[str, dict[str, Location]] = {}
    settings = None
    for name, path in _below(folder / ZERO):
        if not name and path.name == SETTINGS:
            settings = path
        elif name and path.name.endswith(SUFFIX):
            params.setdefault(name, {})[path.name.removesuffix(SUFFIX)] = path
        else:
            others.append(path)
    return UniversalFiles(
        folder=folder,
        model=model,
        stage3=dict(sorted(stage3.items())),
        settings=settings,
        params={name: dict(sorted(kinds.items())) for name, kinds in sorted(params.items())},
        unfinished=unfinished,
        others=tuple(others),
    )


def inner(target: Location) -> list[Location]:
    """zero/ and the folders in it that hold files."""
    if not is_folder(target / ZERO):
        return []
    return list(dict.fromkeys(path.parent for _, path in _below(target / ZERO)))


def _below(zero: Location) -> list[tuple[str, Location]]:
    """Every file below zero/ with the name of the parameter, which is the path of its folder."""
    found: list[tuple[str, Location]] = []
    todo, entered = [("", 0)], Entered()
    while todo:
        name, depth = todo.pop()
        entered.enter(zero / name)
        for entry in entries(zero / name):
            inner = f"{name}/{entry.name}" if name else entry.name
            if is_folder(entry):
                if depth == MAX_DEPTH:
                    raise CkptError(
                        "name-unsafe",
                        "folders lie too deep",
                        where=zero / inner,
                        why="ds_to_universal makes a folder for each parameter, and none below them",
                    )
                todo.append((inner, depth + 1))
            elif is_file(entry):
                found.append((name, zero / inner))
    return found


def _plain(folder: Location, mp: str) -> None:
    if mp != "00":
        raise Unsupported(
            "layout-unsupported",
            "a universal checkpoint of a tensor-parallel run, which is recognised but not read yet",
            where=folder,
            why="its model files hold slices of every weight, and shapes of slices",
            hint="load it in DeepSpeed with the same tensor parallelism",
            layout="tensor-parallel",
        )


def folder_of(name: str, where: Location) -> str:
    """The path below zero/ of a parameter's files. Raises Unsupported for a name that cannot be one."""
    parts = name.split("/")
    bad = (
        name == SETTINGS
        or "\0" in name
        or any(part in ("", ".", "..") for part in parts)
        or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
    )
    if bad:
        raise Unsupported(
            "name-unsafe",
            f"'{escape(name, 100)}' cannot be the name of a folder",
            where=where,
            why="a universal checkpoint keeps each parameter in a folder of its name (of 255 bytes at most)",
            hint="rename it with --rename, or convert to another format",
        )
    return name
