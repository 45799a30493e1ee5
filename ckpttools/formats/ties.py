"""Tied weights: names that are the very same bytes."""

from __future__ import annotations

from collections.abc import Mapping

from ckpttools.tensors import TensorRef


def tied(tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    """Alias -> owner for names that are the very same bytes in the same shape; the first one is owner."""
    owners: dict[object, str] = {}
    out: dict[str, str] = {}
    for name, ref in tensors.items():
        if ref.numel:
            owner = owners.setdefault((ref.chunks, ref.shape, ref.dtype.name), name)
            if owner != name:
                out[name] = owner
    return out
