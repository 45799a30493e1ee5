"""`python -m ckpttools.cli` is `ckpt`."""

from ckpttools.cli import main

main()
