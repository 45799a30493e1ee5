"""Repositories of the Hugging Face hub, `hf://ORG/NAME[@REVISION]/PATH`, by huggingface_hub's file system.

Answers what `remote` asks of obstore: one object, a range of it, a listing. The revision is looked up once,
and each request is for its commit, so nothing changes while it is read. Tokens are huggingface_hub's matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import ENOENT, EOPNOTSUPP
from typing import Any, NamedTuple

from ckpttools.errors import UsageError

SCHEME = "hf"
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


def split(address: str) -> tuple[str, str]:
    """The repository and the key in it: of `org/name@main/a/b` they are `org/name@main` and `a/b`. The only
    revisions with slashes are the hub's own: refs/pr/1, refs/convert/parquet.
    """
    parts = address.split("/")
    depth = 3 if parts[0] in _KINDS else 2
    if parts[depth - 1 : depth] and parts[depth - 1].endswith("@refs"):
        depth += 2
    if len(parts) < depth or not all(parts[:depth]) or parts[0] == "buckets":
        raise UsageError(
            "store-unknown",
            "the address names no repository of the hub",
            where=f"{SCHEME}://",
            why="which part is the repository, and which the path in it, is told by their order",
            hint="write it as hf://ORG/NAME/PATH, hf://ORG/NAME@REVISION/PATH or hf://datasets/ORG/NAME/PATH",
        )
    return "/".join(parts[:depth]), "/".join(parts[depth:])


class NotSupportedError(OSError):
    """As obstore's: a range was asked for, and something else came."""


class Got(NamedTuple):
    """The bytes of a range, which range it is, and of what."""

    data: bytes
    range: tuple[int, int]
    meta: dict[str, Any]

    def bytes(self) -> bytes:
        return self.data


class Repository:
    """One revision of a repository. Raises UsageError where huggingface_hub is not installed."""

    def __init__(self, url: str) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise UsageError(
                "store-extra",
                "the hub needs huggingface_hub, which is not installed",
                where=url,
                hint="pip install huggingface_hub",
            ) from None
        self._api: Any = huggingface_hub.HfApi()
        self._files: Any = huggingface_hub.HfFileSystem()
        self._errors: Any = huggingface_hub.errors
        name, _, self._revision = url.partition("://")[2].partition("@")
        *kind, org, name = name.split("/")
        self._kind, self._id = kind[0] if kind else "models", f"{org}/{name}"
        self._root = ""
        self._lock = threading.Lock()

    def head(self, key: str) -> dict[str, Any]:
        with self._missing(key):
            found = self._files.info(self._path(key))
        if found["type"] != "file":
            raise FileNotFoundError(ENOENT, "a folder", key)
        return self._meta(found)

    def get(self, key: str, start: int, end: int) -> Got:
        meta = self.head(key)
        end = min(end, meta["size"])
        with self._missing(key), self._files.open(self._path(key), "rb", cache_type="none") as file:
            file.seek(start)
            data = bytes(file.read(end - start))
        if len(data) != end - start:
            raise NotSupportedError(EOPNOTSUPP, "the hub sent another range than was asked for", key)
        return Got(data, (start, end), meta)

    def list(self, key: str) -> dict[str, Any]:
        with self._missing(key):
            found = self._files.ls(self._path(key), detail=True)
        return {
            "common_prefixes": [each["name"] for each in found if each["type"] != "file"],
            "objects": [self._meta(each) for each in found if each["type"] == "file"],
        }

    def _path(self, key: str) -> str:
        with self._lock:
            if not self._root:
                kind, revision = _KINDS[self._kind], self._revision or None
                info = self._api.repo_info(self._id, repo_type=kind, revision=revision)
                self._root = f"{self._kind}/{self._id}@{info.sha}"
                self._written = info.last_modified
        return f"{self._root}/{key}".rstrip("/")

    def _meta(self, found: Mapping[str, Any]) -> dict[str, Any]:
        # the kind of a path that huggingface_hub returns is left out where it is "models"
        key = found["name"].partition("@")[2].partition("/")[2]
        tag = found.get("blob_id") or found.get("xet_hash")
        return {"path": key, "size": found["size"], "e_tag": tag, "last_modified": self._written}

    @contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        """What is not there, in the hub's words, as the system says it."""
        try:
            yield
        except self._errors.GatedRepoError:
            raise
        except (
            self._errors.RepositoryNotFoundError,
            self._errors.RevisionNotFoundError,
            self._errors.EntryNotFoundError,
        ):
            raise FileNotFoundError(ENOENT, "there is no such key", key) from None


def head(store: Repository, key: str) -> dict[str, Any]:
    return store.head(key)


def get(store: Repository, key: str, *, options: Mapping[str, Any]) -> Got:
    return store.get(key, *options["range"])


def list_with_delimiter(store: Repository, key: str) -> dict[str, Any]:
    return store.list(key)
