"""The command line as it was promised: each command, its places, its options, its aliases.

An option that is here and not in the program breaks a script; one that is in the program and not here has
been promised to nobody. Both are told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from commands import run
from support import FIXTURES

from ckpttools.cli.app import ALIASES, COMMANDS, app

TELLING = "--json --quiet"
READING = f"{TELLING} --workers --no-progress"
WRITING = f"{READING} --tag --dry-run --force --follow-symlinks"
STORES = "--stats"
MANY = "--spread"
# command -> what it takes by place, and by name: what is common to many, then what is its own
CONTRACT: dict[str, tuple[str, str]] = {
    "inspect": ("SRC", f"{TELLING} {STORES} --tag --key --follow-symlinks --tensors"),
    "verify": (
        "SRC...",
        f"{READING} {STORES} {MANY} --tag --key --follow-symlinks --quick --write-manifest --newest "
        "--require --subset",
    ),
    "explain": ("[ID]", "--json"),
    "extract": (
        "SRC [DST]",
        f"{WRITING} {STORES} {MANY} --key --weights-only --format --dtype --max-shard-size --include "
        "--exclude --source --exclude-frozen-parameters --hf-config --strip-prefix --safe-serialization",
    ),
    "convert": (
        "SRC DST",
        f"{WRITING} {STORES} {MANY} --key --to --world-size --mesh --like --dtype --rename --include "
        "--exclude --reset-optimizer --optimizer-class --dcp-layout --hf-config --digest --no-digest",
    ),
    "reshard": ("SRC [DST]", f"{WRITING} {STORES} {MANY} --world-size --mesh --digest --no-digest"),
    "rebase-schedule": (
        "SRC [DST]",
        f"{WRITING} {STORES} {MANY} --again --old-bs --new-bs --batch-is --old-accum --new-accum --old-gpus "
        "--new-gpus --unit --schedule-unit --dataset-size --steps-per-epoch --epochs --drop-last --warmup "
        "--lr-scaling --counters-only --plot",
    ),
    "ls": ("DIR", f"{READING} {STORES} --follow-symlinks --verify --sort --tree"),
    "latest": ("DIR", f"{READING} {STORES} --follow-symlinks --verified"),
    "prune": (
        "DIR",
        f"{READING} --dry-run --keep-last --per-kind --keep-best --keep-every --keep-within --slim "
        "--verified --yes",
    ),
    "pin": ("PATH", f"{TELLING} -m"),
    "unpin": ("PATH", TELLING),
    "diff": ("A B", f"{READING} {STORES} --tag --key --follow-symlinks --only --top"),
    "report": (
        "RUN|RUNS|A B",
        f"{READING} --force --follow-symlinks --output --keep-last --new-bs --verify",
    ),
    "prove": ("A B", f"{READING} --tag --key --follow-symlinks"),
    "average": ("SRC...", f"{WRITING} {MANY} --output --weights --last --dtype --format --max-shard-size"),
    "copy": ("SRC DST", f"{WRITING} {STORES}"),
    "digest": ("SRC", f"{READING} {STORES} --tag --key --follow-symlinks --compare --kind --tensors"),
    "resume-check": (
        "SRC",
        f"{READING} {STORES} --follow-symlinks --tag --config --world-size --model --groups --freeze "
        "--buffer --scheduler --optimizer --no-strict --full",
    ),
    "batch": (
        "[SRC]",
        "--json --tag --bs --gpus --accum --dataset-size --epochs --drop-last --keep-last --iteration "
        "--new-bs --new-gpus --new-accum",
    ),
    "runs": ("DIR", f"{TELLING} --force --follow-symlinks --run --top --plot --csv --log --parent"),
    "train": (
        "CONFIG",
        f"{TELLING} --nproc --resume --resume-from --reset-optimizer --extra-tag --evaluate --verify-saves "
        "--work-dir --max-steps --set --full-log",
    ),
    "demo": ("[DIR]", f"{TELLING} --keep"),
}
SHORT = {"--tag": "-t", "--quiet": "-q", "--output": "-o", "--yes": "-y"}
ALSO = {
    "info": "inspect",
    "check": "verify",
    "validate": "verify",
    "merge": "extract",
    "consolidate": "extract",
    "compare": "diff",
}


def parts(name: str) -> tuple[str, set[str]]:
    """What a command takes by place, as its usage shows it, and the names of its options."""
    context = click.Context(app)
    command = app.get_command(context, name)
    assert command is not None
    places = " ".join(p.make_metavar(context) for p in command.params if isinstance(p, click.Argument))
    options = [p for p in command.params if isinstance(p, click.Option)]
    return places, {text for option in options for text in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_command_takes_what_was_promised(name: str) -> None:
    places, options = parts(name)
    promised = set(CONTRACT[name][1].split())
    promised |= {SHORT[option] for option in promised if option in SHORT}
    assert places == CONTRACT[name][0]
    assert options == promised


def test_the_commands_and_their_other_names() -> None:
    assert set(COMMANDS) == set(CONTRACT)
    assert ALIASES == ALSO


def test_to_names_every_format() -> None:
    command = app.get_command(click.Context(app), "convert")
    assert command is not None
    (option,) = (p for p in command.params if p.name == "to" or "--to" in p.opts)
    for form in ("pt", "zero1", "zero2", "zero3", "universal", "dcp", "hf"):
        assert form in (option.help or "") + str(getattr(option.type, "choices", "")), option


def test_documents_have_the_promised_keys(tmp_path: Path) -> None:
    run_folder = FIXTURES / "hf-trainer/plain"
    source = run_folder / "checkpoint-4"
    (checked,) = document("verify", source)["checkpoints"]
    assert {"path", "format", "ok", "step", "epoch", "findings"} <= set(checked)
    (bad,) = document("verify", FIXTURES / "monolithic/full", "--require", "val_loss", code=(0, 1))[
        "checkpoints"
    ] or [{}]
    for finding in (*checked["findings"], *bad.get("findings", [])):
        assert set(finding) == {"id", "severity", "file", "where", "message", "hint"}
    (listed,) = document("ls", run_folder)["runs"]
    assert set(listed) == {"path", "checkpoints"}
    assert set(listed["checkpoints"][0]) == {
        "path", "kind", "format", "step", "epoch", "samples", "nbytes", "ranks", "marks", "metrics",
    }  # fmt: skip
    failed = document("verify", tmp_path / "nothing", code=(2,))
    assert failed["ok"] is False and set(failed["error"]) == {"id", "message", "where", "why", "hint"}


def document(*words: object, code: tuple[int, ...] = (0,)) -> Any:
    ran = run(*words, "--json")
    assert ran.code in code, (ran.code, ran.err)
    return json.loads(ran.out)
