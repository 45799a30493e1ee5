"""Crash trials: a writing command is killed or meets a failing system; then everything is looked at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import xxhash

FIXTURES = Path(__file__).parents[2] / "fixtures"
SOURCE = FIXTURES / "deepspeed-0.19.8/z2_groups_ws2"
MANIFEST = "ckpt-manifest.json"
# Path.mkdir finds the folder there, which is all that it is for; a folder keeps its times where that can be
HARMLESS = ("mkdir", "utime")

Bytes = dict[str, bytes]


@dataclass(frozen=True)
class Ran:
    code: int
    seconds: float
    fired: str
    log: str


class Server:
    """The process that forks the commands (server.py)."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip()

    def run(self, argv: list[str], **how: Any) -> Ran:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": argv, "log": str(self._log), **how}) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._read())
        return Ran(said["code"], said["seconds"], said["fired"], self._log.read_text(errors="replace"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def contents(path: Path) -> Bytes | None:
    """Every file of what lies at `path`; None where nothing does."""
    if not os.path.lexists(path):
        return None
    if path.is_file():
        return {"": path.read_bytes()}
    found = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*"))}
    return {name: b"(folder)" if p.is_dir() else p.read_bytes() for name, p in found.items()}


def put(path: Path, what: Bytes | None) -> None:
    """Make `path` what `contents` said."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    for name, data in (what or {}).items():
        place = path / name if name else path
        if data == b"(folder)":
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)


@dataclass(frozen=True)
class Command:
    """A writing command; `old` makes what is at the destination before."""

    name: str
    argv: Callable[[Path, Path], list[str]]
    dst: str
    old: Callable[[Path], None] | None = None
    in_source: bool = False  # it writes beside the files of its source
    source: Path = SOURCE


def _extract(*more: str) -> Callable[[Path, Path], list[str]]:
    return lambda src, dst: ["extract", str(src), str(dst), "--workers", "1", *more]


def _reshard(*more: str) -> Callable[[Path, Path], list[str]]:
    return lambda src, dst: ["reshard", str(src), str(dst), "--world-size", "3", "--workers", "1", *more]


def _rebase(*more: str) -> Callable[[Path, Path], list[str]]:
    sizes = ["--old-bs", "120", "--new-bs", "60", "--counters-only", "--workers", "1"]
    return lambda src, dst: ["rebase-schedule", str(src), str(dst), *sizes, *more]


def _convert(to: str, *more: str) -> Callable[[Path, Path], list[str]]:
    return lambda src, dst: ["convert", str(src), str(dst), "--to", to, "--workers", "1", *more]


def _manifest(src: Path, _: Path) -> list[str]:
    return ["verify", str(src), "--write-manifest", "--workers", "1"]


def _old_folder(dst: Path) -> None:
    shutil.copytree(FIXTURES / "hf/single", dst)


def _old_file(dst: Path) -> None:
    shutil.copyfile(FIXTURES / "hf/single/model.safetensors", dst)


def _manifest_of(path: Path) -> bytes:
    """The manifest of a single file that holds no tensors."""
    entry = {
        "size": path.stat().st_size,
        "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
        "tensors": {},
    }
    return json.dumps({"format": "ckpttools-manifest", "version": 1, "files": {path.name: entry}}).encode()


def _old_manifest(dst: Path) -> None:
    """As good as the new one, but written in another way."""
    dst.write_text(json.dumps({"format": "ckpttools-manifest", "version": 1, "files": {}}))


COMMANDS = {
    command.name: command
    for command in (
        Command("reshard", _reshard(), "out"),
        Command("reshard --force", _reshard("--force"), "out", _old_folder),
        Command("rebase-schedule", _rebase(), "out"),
        Command("rebase-schedule --force", _rebase("--force"), "out", _old_folder),
        Command("extract folder", _extract("--hf-config", str(FIXTURES / "hf/single")), "weights"),
        Command("extract folder --force", _extract("--force"), "weights", _old_folder),
        Command("extract file", _extract(), "w.safetensors"),
        Command("extract file --force", _extract("--force"), "w.safetensors", _old_file),
        Command("extract .pt", _extract(), "w.pt"),
        Command("to pt", _convert("pt"), "w.pt"),
        Command("to zero0", _convert("zero0"), "out"),
        Command("to zero3", _convert("zero3", "--world-size", "3"), "out"),
        Command("to universal --force", _convert("universal", "--force"), "out", _old_folder),
        Command("to dcp", _convert("dcp", "--mesh", "2x2"), "out"),
        Command("to dcp --force", _convert("dcp", "--force"), "out", _old_folder),
        Command("reshard zero3", _reshard(), "out", source=FIXTURES / "deepspeed-0.19.8/z3_groups_ws2"),
        Command("rebase zero3", _rebase(), "out", source=FIXTURES / "deepspeed-0.19.8/z3_bf16_ws2"),
        Command("rebase zero0", _rebase(), "out", source=FIXTURES / "deepspeed-0.19.8/z0_bf16_ws2"),
        Command("reshard dcp", _reshard(), "out", source=FIXTURES / "dcp/fsdp2_ws2"),
        Command("universal to zero2", _convert("zero2"), "out", source=FIXTURES / "universal/z2_groups"),
        Command("write manifest", _manifest, f"src/global_step3/{MANIFEST}", in_source=True),
        Command(
            "write manifest anew", _manifest, f"src/global_step3/{MANIFEST}", _old_manifest, in_source=True
        ),
    )
}


@dataclass
class Tally:
    """What the trials of one command came to."""

    kills: int = 0
    states: Counter[str] = field(default_factory=Counter)
    stale: int = 0


class Stage:
    """A folder with a source and a destination, put back before every trial."""

    def __init__(self, command: Command, server: Server, folder: Path) -> None:
        self.command, self.server, self.folder = command, server, folder
        folder.mkdir()
        self.src, self.dst = folder / "src", folder / command.dst
        shutil.copytree(command.source, self.src)
        self.argv = command.argv(self.src, self.dst)
        self.source = self._source()
        if command.old is not None:
            command.old(self.dst)
        self.old = contents(self.dst)
        self.old_manifest = None
        if self.old is not None and self.dst.is_file() and not command.in_source:
            self.old_manifest = {"": _manifest_of(self.dst)}
            self._put_back()
        first = server.run(self.argv)
        assert first.code == 0, first.log
        new = contents(self.dst)
        assert new is not None and new != self.old
        self.new = new
        if not command.in_source:
            checked = server.run(["verify", str(self.dst), "--workers", "1"])
            assert checked.code == 0, checked.log
        self.reset()
        self.seconds = max(self._timed() for _ in range(3))

    def _timed(self) -> float:
        seconds = self.server.run(self.argv).seconds
        assert contents(self.dst) == self.new, "the command writes other bytes each time"
        self.reset()
        return seconds

    def _source(self) -> tuple[Bytes, dict[str, int]]:
        """Bytes and times of the source, without what the command writes there."""
        found = {n: d for n, d in (contents(self.src) or {}).items() if MANIFEST not in n}
        return found, {n: (self.src / n).stat().st_mtime_ns for n, d in found.items() if d != b"(folder)"}

    def reset(self) -> None:
        self._put_back()
        assert not self.staging()

    def _put_back(self) -> None:
        put(self.dst, self.old)
        put(self.dst.with_name(f"{self.dst.name}.{MANIFEST}"), self.old_manifest)

    def staging(self) -> list[Path]:
        """What killed runs left, anywhere."""
        return [
            path for path in self.folder.rglob("*") if ".ckpt-tmp-" in path.name or ".ckpt-old-" in path.name
        ]

    def manifest(self) -> str:
        """Of a destination that is a single file: "none", "true" or "FALSE"."""
        place = self.dst.with_name(f"{self.dst.name}.{MANIFEST}")
        if not place.exists():
            return "none"
        stated = json.loads(place.read_bytes())["files"][self.dst.name]
        raw = self.dst.read_bytes() if self.dst.exists() else b""
        fits = stated["size"] == len(raw) and stated["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw)
        return "true" if fits else "FALSE"

    def state(self) -> str:
        """ "absent", "old", "whole" or "PARTIAL"."""
        found = contents(self.dst)
        if found == self.new:
            return "whole"
        if found == self.old:
            return "old" if found is not None else "absent"
        return "PARTIAL"

    def trial(self, tally: Tally, **how: Any) -> Ran:
        """One run that is killed, and one more."""
        ran = self.server.run(self.argv, **how)
        tally.kills += ran.code == -9
        assert ran.code in (-9, 0), ran.log
        state = self.state()
        if ran.code == -9:
            tally.states[state] += 1
            tally.stale += bool(self.staging())
        where = f"{self.command.name}, {how}, killed at {ran.fired or 'some time'}"
        assert state == "whole" if ran.code == 0 else state != "PARTIAL", where
        assert self.manifest() != "FALSE", where
        assert len(self.staging()) <= 1, where
        assert self._source() == self.source, where
        again = self.server.run(self.argv)
        refused = state == "whole" and again.code == 2 and "destination-exists" in again.log
        assert again.code == 0 or refused, (where, again.log)
        assert self.state() == "whole" and not self.staging(), (where, again.log)
        assert self.manifest() != "FALSE", where
        assert self._source() == self.source, where
        self.reset()
        return ran

    def kill_at_random(self, tally: Tally, kills: int, rng: Random) -> None:
        """Kills spread evenly over the run time; runs that ended before do not count."""
        until = tally.kills + kills
        while tally.kills < until:
            self.trial(tally, kill_after=rng.random() * self.seconds * 1.05)

    def calls(self, every: int) -> list[int]:
        """The calls that change the file system, by number; of those in a row of one kind, every n-th."""
        names = self.server.run(self.argv, nth=0, action=0).fired.split("\n")[:-1]
        self.reset()
        seen: Counter[str] = Counter()
        chosen = []
        for nth, name in enumerate(names, 1):
            seen[name] += 1
            if name != "pwrite" or seen[name] % every == 1 % every or nth == len(names):
                chosen.append(nth)
        return chosen

    def kill_at_calls(self, tally: Tally, calls: list[int]) -> None:
        """SIGKILL right before a call."""
        for nth in calls:
            assert self.trial(tally, nth=nth, action="kill").fired

    def fail_calls(self, code: int, calls: list[int]) -> Counter[tuple[str, str]]:
        """Each of the calls fails; (call, what is wrong with the outcome) -> how often."""
        found: Counter[tuple[str, str]] = Counter()
        for nth in calls:
            ran = self.server.run(self.argv, nth=nth, action=code)
            assert ran.fired, nth
            found[ran.fired, self._failed(ran)] += 1
            self._put_back()
            for path in self.staging():
                put(path, None)
        return found

    def _failed(self, ran: Ran) -> str:
        """ "" where the failure was handled as it must be, else what is wrong."""
        state = self.state()
        problems = []
        if state == "PARTIAL":
            problems.append("a partial destination")
        if self.staging():
            problems.append("a staging is left")
        if self._source() != self.source:
            problems.append("the source changed")
        if self.manifest() == "FALSE":
            problems.append("a false manifest")
        without = "manifest could not be written" in ran.log and self.manifest() == "none"
        if ran.code == 0 and state == "whole" and without:
            return ", ".join(problems)
        if ran.code == 0 and ran.fired in HARMLESS and state == "whole":
            pass
        elif ran.code == 0:
            problems.append("no error" if state == "whole" else "no error and no result")
        else:
            if ran.code != 2:
                problems.append(f"exit code {ran.code}")
            if state == "whole":
                problems.append("an error, though the result is there")
            lines = ran.log.strip().splitlines()
            start = next((i for i, line in enumerate(lines) if line.startswith("error[")), None)
            if start is None:
                problems.append("no error message")
            else:
                parts = lines[start + 1 :]
                if not any(line.startswith("  in ") for line in parts):
                    problems.append("the message names no place")
                if not any(line.startswith("hint: ") for line in parts):
                    problems.append("the message has no hint")
        return ", ".join(problems)


TALLIES: dict[str, Tally] = {}  # of this process, for the table after the tests


def table(tallies: Mapping[str, Tally]) -> str:
    head = f"{'command':24} {'kills':>6} {'absent':>7} {'old':>6} {'whole':>6} {'partial':>8} {'stale':>6}"
    rows = [head]
    total = Tally()
    for name, tally in [*tallies.items(), ("all", total)]:
        if tally is not total:
            total.kills += tally.kills
            total.states += tally.states
            total.stale += tally.stale
        s = tally.states
        rows.append(
            f"{name:24} {tally.kills:6} {s['absent']:7} {s['old']:6} {s['whole']:6} {s['PARTIAL']:8}"
            f" {tally.stale:6}"
        )
    return "\n".join(rows)
