"""The options of one launch, as an argument list and back: the launcher writes it, each rank reads it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

Verify = Literal["quick", "full", "off"]


class Options(Struct, frozen=True, kw_only=True):
    """What one launch does with a config; none of it changes the result of an update."""

    config: Path
    resume: bool = False
    resume_from: Path | None = None
    reset_optimizer: bool = False
    evaluate: Path | None = None
    extra_tag: str | None = None
    verify_saves: Verify = "quick"
    work_dir: Path | None = None
    max_steps: int | None = None
    overrides: tuple[str, ...] = ()
    full_log: bool = False

    def arguments(self) -> list[str]:
        """The command line that `parse` reads back."""
        flags = ["--resume"] * self.resume + ["--full-log"] * self.full_log
        flags += ["--reset-optimizer"] * self.reset_optimizer
        valued = {
            "--resume-from": self.resume_from,
            "--evaluate": self.evaluate,
            "--extra-tag": self.extra_tag,
            "--verify-saves": self.verify_saves,
            "--work-dir": self.work_dir,
            "--max-steps": self.max_steps,
        }
        pairs = [f"{name}={value}" for name, value in valued.items() if value is not None]
        return [*flags, *pairs, *(f"--set={text}" for text in self.overrides), "--", str(self.config)]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read a command line; exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="python -m ckpttools.trainer", allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-from", type=Path)
    parser.add_argument("--reset-optimizer", action="store_true")
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--extra-tag")
    parser.add_argument("--verify-saves", choices=get_args(Verify), default="quick")
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--full-log", action="store_true")
    given = vars(parser.parse_args(arguments))
    return Options(**{**given, "overrides": tuple(given["overrides"])})
