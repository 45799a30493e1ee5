"""Killed at any moment or refused by the system at any call, a writing command leaves nothing half-made."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from crash.core import COMMANDS, TALLIES, Server, Stage, Tally

SOME = (
    "reshard",
    "reshard --force",
    "rebase-schedule",
    "extract folder",
    "extract file --force",
    "write manifest",
)
CODES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def stage(name: str, server: Server, tmp_path: Path) -> tuple[Stage, Tally]:
    return Stage(COMMANDS[name], server, tmp_path / "stage"), TALLIES.setdefault(name, Tally())


@pytest.mark.parametrize("name", SOME)
def test_killed_at_some_moments(name: str, server: Server, tmp_path: Path) -> None:
    trials, tally = stage(name, server, tmp_path)
    trials.kill_at_random(tally, 7, Random(name))
    calls = trials.calls(every=40)
    trials.kill_at_calls(tally, [*calls[:-4:10], *calls[-4:]])
    assert tally.states["whole"] and not tally.states["PARTIAL"]


@pytest.mark.parametrize("name", SOME[2:])
def test_a_call_fails(name: str, server: Server, tmp_path: Path) -> None:
    trials, _ = stage(name, server, tmp_path)
    found = trials.fail_calls(errno.ENOSPC, trials.calls(every=40))
    assert {outcome: n for outcome, n in found.items() if outcome[1]} == {}
    assert {"open", "close", "fallocate", "pwrite", "fsync", "renameat2"} <= {call for call, _ in found}


@pytest.mark.heavy
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_moment(name: str, server: Server, tmp_path: Path) -> None:
    """More than 1,000 kills over all commands: random moments, and before every call."""
    trials, tally = stage(name, server, tmp_path)
    trials.kill_at_random(tally, 90, Random())
    trials.kill_at_calls(tally, trials.calls(every=1))
    assert not tally.states["PARTIAL"]


@pytest.mark.heavy
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_fails(name: str, code: str, server: Server, tmp_path: Path) -> None:
    trials, _ = stage(name, server, tmp_path)
    found = trials.fail_calls(CODES[code], trials.calls(every=1))
    assert {outcome: n for outcome, n in found.items() if outcome[1]} == {}
