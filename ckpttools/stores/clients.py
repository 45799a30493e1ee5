"""Who asks a store: obstore (the `remote` extra), or `hub`; and what went wrong, as the system says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from errno import EEXIST, EIO, EOPNOTSUPP, ERANGE, ESTALE
from typing import Any

from ckpttools.errors import UsageError
from ckpttools.stores import hub

_HTTP = re.compile(r"\b(4\d\d|5\d\d) [A-Z][A-Za-z ]+")


def client(url: str, retries: Mapping[str, Any]) -> tuple[Any, Any]:
    """The functions that ask a store, and what they take for it. Raises UsageError."""
    if url.startswith(f"{hub.SCHEME}:"):
        return hub, hub.Repository(url)
    try:
        import obstore  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UsageError(
            "store-extra",
            "object stores need obstore, which is not installed",
            where=url,
            why="what only reads and writes disks does without",
            hint="pip install 'ckpttools[remote]'",
        ) from None
    from_url: Any = obstore.store.from_url
    options: Any = {"client_options": {"allow_http": True}} if url.startswith("http:") else {}
    try:
        return obstore, from_url(url, retry_config=retries, **options)
    except Exception as error:  # of many classes; their text may quote the configuration
        raise UsageError(
            "store-unknown",
            f"the store cannot be used ({type(error).__name__})",
            where=url,
            why="its client refuses the address or its settings",
            hint="check the address and the store's settings in the environment (AWS_ENDPOINT_URL, "
            "AZURE_STORAGE_ACCOUNT_NAME, GOOGLE_SERVICE_ACCOUNT ...)",
        ) from None


def failed(error: Exception, where: str) -> OSError:
    """What a client raised, without a word of what the store said."""
    match type(error).__name__:
        case "PreconditionError":
            return OSError(ESTALE, "the object changed while it was read or written", where)
        case "AlreadyExistsError":
            return FileExistsError(EEXIST, "the object exists already", where)
        case "PermissionDeniedError" | "UnauthenticatedError" | "GatedRepoError":
            return OSError(EIO, "the store denies access: check its credentials in the environment", where)
        case "NotSupportedError" | "NotImplementedError":
            return OSError(EOPNOTSUPP, "the server does not answer such requests (for a range)", where)
        case "OfflineModeIsEnabled":
            return OSError(EIO, "HF_HUB_OFFLINE is set, so the hub is not asked", where)
    status = _HTTP.search(str(error))
    if status is not None and status[1] == "416":
        return OSError(ERANGE, "the object has no such bytes", where)
    if status is not None and status[1] in ("401", "403"):  # of a listing
        return OSError(EIO, "the store denies access: check its credentials in the environment", where)
    said = f" ({status[0].strip()})" if status else ""
    if where.startswith("http") and not said:
        return OSError(
            EIO, "the server cannot be reached, or there is no single file: folders have no listing", where
        )
    return OSError(EIO, f"the store cannot be reached, or failed{said}", where)
