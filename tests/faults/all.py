"""Every fault, registered by importing the modules that define them."""

from __future__ import annotations

from . import fields, files, folders, values, zips
from .core import FAULTS

MODULES = (files, zips, fields, values, folders)
__all__ = ["FAULTS", "MODULES"]
