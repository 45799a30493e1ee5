"""ckpttools: trust, understand, move and change training checkpoints."""

__version__ = "0.1.0"
