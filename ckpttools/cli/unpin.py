"""ckpt unpin: stands beside ckpt pin."""

from __future__ import annotations

from ckpttools.cli.pin import unpin_command as command

__all__ = ["command"]
