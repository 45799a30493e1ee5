"""Every fault, registered by importing the modules that define them."""

from __future__ import annotations

from . import fields, files, folders, keys, values, zips
from .core import FAULTS

MODULES = (files, zips, fields, values, folders, keys)
__all__ = ["FAULTS", "MODULES"]
