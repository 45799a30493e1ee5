"""The manifest: what a checkpoint's files were when somebody trusted them.

`ckpt-manifest.json` in a checkpoint's folder, or `NAME.ckpt-manifest.json` beside a single file, holds the
size and xxh3_128 of each file, and the xxh3_128 of each tensor in it, so that a change can be named. Files
in folders of the checkpoint's own go by their path below the folder, with `/`. It
covers what formats without checksums cannot: any changed byte, and edits whose checksums were mended. (xxh3
guards against accidents and careless edits, not against somebody who can rewrite the manifest too.)

    {"format": "ckpttools-manifest", "version": 1,
     "files": {name: {"size": bytes, "xxh3_128": hex, "tensors": {path into the file: hex}}}}

With `"output": true` ckpt made the files; without, it found them there. `"digest"`, where it is there, says
what the files hold, in any layout (`compare.digests`), as long as they are the same:

    {"digest": {"state": hex, "apart": [name], "tensors": {kind: {name: hex, or a number as JSON}}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress

from msgspec import Struct, field

from ckpttools.containers import jsons
from ckpttools.errors import CkptError
from ckpttools.location import Location, below
from ckpttools.siblings import MANIFEST, is_ours
from ckpttools.stores.files import entries, is_file, is_folder, size_of
from ckpttools.stores.links import plain_name

FORMAT, VERSION = "ckpttools-manifest", 1
UNUSABLE = "manifest-unusable"  # it says nothing of the files, neither good nor bad


class Entry(Struct, frozen=True, kw_only=True):
    """One file: its size, its digest and those of its tensors."""

    size: int
    digest: str
    tensors: Mapping[str, str] = field(default_factory=dict)


class Difference(Struct, frozen=True, kw_only=True):
    """A file that is not what the manifest says. `tensors` are those that changed, as far as they tell."""

    name: str
    problem: str
    tensors: tuple[str, ...] = ()


Named = Mapping[str, Mapping[str, str]]  # kind -> name -> digest


class Content(Struct, frozen=True, kw_only=True):
    """The digest of what the files hold, and that of each tensor. `apart` as in `compare.digests`."""

    state: str
    apart: tuple[str, ...]
    tensors: Named


def place(target: Location) -> Location:
    """Where the manifest of a checkpoint is written: in its folder, or beside its single file."""
    return target / MANIFEST if is_folder(target) else beside(target)


def beside(file: Location) -> Location:
    """The place of a single file's own manifest."""
    return file.with_name(f"{file.name}.{MANIFEST}")


def places(target: Location) -> list[Location]:
    """Every manifest that may say something about a checkpoint's files: of the folder, of single files."""
    if is_folder(target):
        own = [beside(path) for path in own_files(target)]
        return [path for path in (target / MANIFEST, *own) if is_file(path)]
    return [path for path in (beside(target), target.parent / MANIFEST) if is_file(path)]


def own_files(target: Location, inner: Iterable[Location] = ()) -> dict[Location, str]:
    """The files that a manifest covers, and what it calls them: those directly in the folder and in its
    `inner` ones, or the single file.
    """
    if not is_folder(target):
        return {target: target.name}
    own = (f / e.name for f in (target, *inner) for e in entries(f) if is_file(e) and not is_ours(e.name))
    return {path: below(path, target) for path in own}


def dump(entries: Mapping[str, Entry], *, output: bool = False) -> bytes:
    """The manifest as it is written; `output` says that ckpt made the files themselves."""
    files = {
        name: {"size": entry.size, "xxh3_128": entry.digest, "tensors": dict(entry.tensors)}
        for name, entry in sorted(entries.items())
    }
    made = {"output": True} if output else {}
    return _dumped({"format": FORMAT, "version": VERSION, **made, "files": files})


def with_plan(contents: bytes, digest: str) -> bytes:
    """A manifest that also says which plan the files are the result of."""
    return _dumped({**json.loads(contents), "plan": digest})


def with_content(contents: bytes, state: str, apart: Iterable[str], tensors: Named) -> bytes:
    """A manifest that also says what the files hold: the digest of all, and of each tensor."""
    held = {"state": state, "apart": list(apart), "tensors": {k: dict(named) for k, named in tensors.items()}}
    return _dumped({**json.loads(contents), "digest": held})


def _dumped(value: object) -> bytes:
    return _indented(value, 1).encode() + b"\n"


def _indented(value: object, depth: int) -> str:
    """As `json.dumps(value, indent=1)` writes it; what holds no dicts or lists itself, such as the digests of
    a hundred thousand tensors, is written at once, several times as fast.
    """
    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    inside, after = "\n" + depth * " ", "\n" + (depth - 1) * " "
    if isinstance(value, dict) and any(isinstance(inner, (dict, list)) for inner in value.values()):
        pairs = (f"{json.dumps(key)}: {_indented(inner, depth + 1)}" for key, inner in value.items())
        return f"{{{inside}{f',{inside}'.join(pairs)}{after}}}"
    flat = json.dumps(value, separators=(f",{inside}", ": "))
    return flat[0] + inside + flat[1:-1] + after + flat[-1]


def content_in(path: Location) -> Content | None:
    """What a manifest says that the files hold; None where it does not. Raises CkptError as `load` does."""
    match jsons.read(path).get("digest"):
        case None:
            return None
        case {"state": str(state), "apart": list(apart), "tensors": dict(tensors)} if all(
            isinstance(named, dict) and all(isinstance(each, str) for each in named.values())
            for named in tensors.values()
        ) and all(isinstance(name, str) for name in apart):
            return Content(state=state, apart=tuple(apart), tensors=tensors)
    raise jsons.damaged(path, "the manifest describes the contents in another way than it must")


def is_result(target: Location, digest: str) -> bool:
    """Whether a manifest says that these files are the result of this plan."""
    with suppress(CkptError):
        tags = [target / e.name for e in entries(target) if is_folder(e)] if is_folder(target) else []
        found = [path for folder in (target, *tags) for path in places(folder)]
        return any(jsons.read(path).get("plan") == digest for path in found)
    return False


def outputs(path: Location) -> set[str]:
    """The files that a manifest describes as made by ckpt. Raises CkptError as `load` does."""
    return set(load(path)) if jsons.read(path).get("output") is True else set()


def load(path: Location) -> dict[str, Entry]:
    """Read a manifest. Raises CkptError where it is damaged, UNUSABLE where it is empty or too new."""
    if size_of(path) == 0:
        raise _unusable(path, "it is empty")
    value = jsons.read(path)
    files, version = value.get("files"), value.get("version")
    if value.get("format") == FORMAT and type(version) is int and version > VERSION:
        raise _unusable(path, f"a later ckpttools wrote it (version {version}; this one reads {VERSION})")
    if value.get("format") != FORMAT or value.get("version") != VERSION or not isinstance(files, dict):
        raise CkptError(
            "manifest-damaged",
            "not a manifest of this version of ckpttools",
            where=path,
            why="what it says about the files cannot be used",
            hint="write it anew with ckpt verify --write-manifest, once the checkpoint is known to be good",
        )
    return {_inner_name(name, path): _entry(path, entry) for name, entry in files.items()}


def _unusable(path: Location, why: str) -> CkptError:
    return CkptError(
        UNUSABLE,
        f"the manifest cannot be used, because {why}",
        where=path,
        why="the files are judged by themselves: what only a manifest shows is not seen",
        hint="write it anew with ckpt verify --write-manifest, once the checkpoint is known to be good",
    )


def _inner_name(name: str, path: Location) -> str:
    """A path below the manifest's folder: no part leads out, whatever characters it is of."""
    return "/".join(part if part.strip(".") else plain_name(part, path) for part in name.split("/"))


def _entry(path: Location, entry: object) -> Entry:
    match entry:
        case {"size": int(size), "xxh3_128": str(digest), "tensors": dict(tensors)} if all(
            isinstance(part, str) for part in tensors.values()
        ):
            return Entry(size=size, digest=digest, tensors=tensors)
    raise jsons.damaged(path, "the manifest describes a file in another way than it must")


def differences(stated: Mapping[str, Entry], found: Mapping[str, Entry]) -> list[Difference]:
    """What changed since the manifest was written, for the files that both know or that are gone."""
    out: list[Difference] = []
    for name, entry in stated.items():
        now = found.get(name)
        if now is None:
            out.append(Difference(name=name, problem="is gone"))
        elif now.size != entry.size:
            out.append(Difference(name=name, problem=f"has {now.size} bytes instead of {entry.size}"))
        elif now.digest and now.digest != entry.digest:
            changed = tuple(t for t, part in entry.tensors.items() if now.tensors.get(t, part) != part)
            out.append(Difference(name=name, problem="has other contents", tensors=changed))
    return out
