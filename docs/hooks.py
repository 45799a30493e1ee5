"""Pages that are made from the code when the site is built: commands, problems, limits, imports."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import click
import structure
from mkdocs.structure.files import File, Files

from ckpttools.cli.app import ALIASES, COMMANDS, app
from ckpttools.explain import EXPLANATIONS


def on_files(files: Files, config: Any) -> Files:
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    readme = (ROOT / "README.md").read_text()
    return {
        "commands.md": commands(),
        "problems.md": problems(),
        "limits.md": section(readme, "Limits"),
        "imports.svg": structure.svg(),
    }


def section(readme: str, title: str) -> str:
    """One `##` section of the README as a page."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    return f"# {title}\n{text}"


def commands() -> str:
    """Every command's --help as it is printed."""
    out = ["# Commands", ""]
    out += [
        "Exit codes: 0 done or clean, 1 a problem of the checkpoint, 2 could not run. `-` and `_` are alike."
    ]
    context = click.Context(app, info_name="ckpt")
    for name in COMMANDS:
        command = app.get_command(context, name)
        assert command is not None
        text = command.get_help(click.Context(command, info_name=name, parent=context, terminal_width=100))
        also = [f"`{alias}`" for alias, meant in ALIASES.items() if meant == name]
        out += [
            "",
            f"## {name}",
            "",
            *([f"Also {', '.join(also)}.", ""] if also else []),
            "```text",
            text,
            "```",
        ]
    return "\n".join(out) + "\n"


def problems() -> str:
    """What `ckpt explain` says of every id."""
    out = ["# Problems", "", "Every error and finding, as `ckpt explain ID` tells it."]
    for name, found in sorted(EXPLANATIONS.items()):
        out += ["", f"## {name}", "", f"*{found.kind}*", "", found.meaning, ""]
        out += [f"**To mend it:** {found.mend}"]
    return "\n".join(out) + "\n"
