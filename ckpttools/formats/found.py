"""Findings of a ZeRO folder's checks."""

from __future__ import annotations

from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.location import Location

ONE_SAVE = "copy all files of the folder again from one save"


def found(
    id: str, file: str | Location, where: str, message: str, *, severity: str = ERROR, hint: str = ONE_SAVE
) -> Finding:
    return Finding(id=id, severity=severity, file=str(file), where=where, message=message, hint=hint)


def contradiction(path: str | Location, field: str, what: str) -> Finding:
    return found("field-contradicts", path, field, what, severity=WARNING)


def missing(file: str | Location, field: str) -> Finding:
    message = "DeepSpeed writes this field, and it is not there"
    return found("field-missing", file, field, message, severity=WARNING, hint="")
