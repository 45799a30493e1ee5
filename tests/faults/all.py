"""Every fault, registered by importing the modules that define them."""

from __future__ import annotations

from . import dcp, fields, files, folders, keys, sharded, universal, values, zero3, zips
from .core import FAULTS

MODULES = (files, zips, fields, values, folders, keys, sharded, zero3, dcp, universal)
__all__ = ["FAULTS", "MODULES"]
