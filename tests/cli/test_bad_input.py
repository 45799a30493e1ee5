"""Bad input gets a clear four-part error and exit code 1 or 2; nothing is left behind, nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Ckpt, Ran, ckpt_process
from damage import EDITS, VALUES
from support import FIXTURES

GOOD = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    shutil.copytree(GOOD, path)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def digest(path: Path) -> dict[str, str]:
    """Every regular file below a path, by content."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def is_four_part_error(ran: Ran, id: str) -> None:
    first = ran.err.splitlines()[0]
    assert first.startswith(f"error[{id}]: "), ran.err
    assert "Traceback" not in ran.err
    assert re.search(r"^  in ", ran.err, re.MULTILINE), ran.err
    assert "hint: " in ran.err or id in ("name-unsafe", "not-a-file", "bare-pickle"), ran.err


@pytest.mark.parametrize("name", EDITS)
def test_verify_finds_it(name: str, folder: Path, ckpt: Ckpt) -> None:
    id, code, edit = EDITS[name]
    edit(folder)
    ran = ckpt("verify", folder)
    assert ran.code == code, ran
    assert f"ERROR[{id}]" in ran.out, ran.out
    assert not Path("executed").exists()
    quiet = ckpt("verify", folder, "--json")
    document = json.loads(quiet.out)
    assert quiet.code == 1 and document["ok"] is False
    findings = document["checkpoints"][0]["findings"]
    assert id in {finding["id"] for finding in findings if finding["severity"] == "error"}
    assert all(set(f) == {"id", "severity", "file", "where", "message", "hint"} for f in findings)


@pytest.mark.parametrize("name", VALUES)
def test_only_a_full_verify_finds_it(name: str, folder: Path, ckpt: Ckpt) -> None:
    id, edit = VALUES[name]
    edit(folder)
    ran = ckpt("verify", folder)
    assert ran.code == 1 and f"ERROR[{id}]" in ran.out, ran
    assert ckpt("verify", folder, "--quick").code == 0


@pytest.mark.parametrize("command", ["reshard", "extract"])
@pytest.mark.parametrize("name", EDITS)
def test_writers_refuse_it(name: str, command: str, folder: Path, ckpt: Ckpt) -> None:
    id, code, edit = EDITS[name]
    edit(folder)
    before = names(folder.parent)
    options = ["--world-size", "3"] if command == "reshard" else ["--weights-only"]
    ran = ckpt(command, folder, *options)
    assert ran.code == code, ran
    # what loading it would run is said before what it is not
    is_four_part_error(ran, "pickle-dangerous" if id == "bare-pickle" else id)
    assert names(folder.parent) == before
    assert not Path("executed").exists()


@pytest.mark.parametrize("command", ["inspect", "verify", "reshard", "extract"])
@pytest.mark.parametrize(
    ("content", "id"), [(b"hello\n" * 50, "not-a-checkpoint"), (b"", "file-empty"), (None, "not-found")]
)
def test_what_is_no_checkpoint(
    content: bytes | None, id: str, command: str, tmp_path: Path, ckpt: Ckpt
) -> None:
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    ran = ckpt(command, path, *(["--world-size", "2"] if command == "reshard" else []))
    if id == "file-empty" and command == "verify":
        assert ran.code == 1 and "ERROR[file-empty]" in ran.out
        return
    assert ran.code == (1 if id == "file-empty" else 2)
    is_four_part_error(ran, id)


def test_a_folder_without_permission(folder: Path) -> None:
    if os.geteuid() == 0:  # root may read everything: become somebody else
        prefix = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to become another user")
        for parent in [folder, *folder.parents]:
            if parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o711)
        probe = subprocess.run([*prefix, sys.executable, "-c", "import ckpttools.cli"], check=False)
        if probe.returncode != 0:
            pytest.skip("another user cannot run this installation")
    else:
        prefix = []
    folder.chmod(0)
    try:
        ran = subprocess.run(
            [*prefix, sys.executable, "-m", "ckpttools.cli", "verify", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        folder.chmod(0o755)
    assert ran.returncode == 2
    assert "error[no-permission]" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["reshard", GOOD],
        ["reshard", GOOD, "--world-size", "0"],
        ["reshard", GOOD, "--world-size", "-3"],
        ["reshard", GOOD, "--world-size", "many"],
        ["reshard", GOOD, "--world-size", "99999999"],
        ["extract", GOOD, "--dtype", "fp12"],
        ["extract", GOOD, "--max-shard-size", "huge"],
        ["extract", GOOD, "--max-shard-size", "0"],
        ["extract", GOOD, "out.pt", "--format", "safetensors"],
        ["extract", GOOD, "out.safetensors", "--format", "pt"],
        ["extract", GOOD, "--include", "nothing.*"],
        ["extract", GOOD, "--hf-config", "/does/not/exist"],
        ["extract", GOOD, "--tag", "global_step9"],
        ["inspect", GOOD, "--tag", "../x"],
        ["verify"],
        ["frobnicate"],
        ["explain", "no-such-id"],
    ],
)
def test_wrong_arguments(args: list[object], ckpt: Ckpt, tmp_path: Path) -> None:
    ran = ckpt(*args)
    assert ran.code in (1, 2) and ran.err and not ran.out, ran
    assert "Traceback" not in ran.err
    assert not list(Path.cwd().iterdir())


def test_an_existing_destination_is_kept_without_force(folder: Path, ckpt: Ckpt) -> None:
    destination = folder.with_name("out")
    destination.mkdir()
    (destination / "precious").write_text("mine")
    ran = ckpt("reshard", folder, destination, "--world-size", "3")
    assert ran.code == 2
    is_four_part_error(ran, "destination-exists")
    assert digest(destination).keys() == {"precious"}
    is_four_part_error(ckpt("reshard", folder, destination, "--world-size", "3", "--force"), "not-replaced")
    assert digest(destination).keys() == {"precious"}
    (destination / "precious").unlink()
    assert ckpt("reshard", folder, destination, "--world-size", "3", "--force").code == 0
    assert ckpt("verify", destination).code == 0


def test_a_destination_inside_the_source_is_refused(folder: Path, ckpt: Ckpt) -> None:
    before = digest(folder)
    for destination in (folder, folder / "out", tag_folder(folder) / "out"):
        ran = ckpt("reshard", folder, destination, "--world-size", "3", "--force")
        assert ran.code == 2, ran
        is_four_part_error(ran, "destination-in-source")
    assert digest(folder) == before


def tag_folder(folder: Path) -> Path:
    return folder / (folder / "latest").read_text()


def test_a_full_disk_leaves_nothing(folder: Path) -> None:
    """RLIMIT_FSIZE makes the system refuse to grow a file: the nearest to a full disk without one."""
    before = digest(folder)

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    ran = subprocess.run(
        [sys.executable, "-m", "ckpttools.cli", "reshard", str(folder), "--world-size", "3"],
        capture_output=True,
        text=True,
        preexec_fn=small,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("error[") and "Traceback" not in ran.stderr
    assert names(folder.parent) == {folder.name}
    assert digest(folder) == before


# shells without a terminal start jobs with SIGINT ignored; before "up" Python itself would be interrupted
CKPT_UP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
print("up", flush=True)
from ckpttools.cli import main
main(sys.argv[1:])
"""


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    """Interrupted at many moments: the destination is absent or whole, no staging folder stays."""
    before, destination = digest(folder), folder.with_name("out")
    for delay in (0, 0.05, 0.1, 0.15, 0.2, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", CKPT_UP, "reshard", folder, destination, "--world-size", "4", "--force"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        # -SIGINT: before `main` was there to meet it
        assert process.returncode in (0, 130, -signal.SIGINT), err
        left = names(folder.parent) - {folder.name}
        assert left <= {"out"}, left
        if left:
            assert ckpt_process("verify", destination).returncode == 0
    assert digest(folder) == before


def test_ctrl_c_while_the_program_loads(tmp_path: Path) -> None:
    """The first library that the command line imports is met by it."""
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n", "utf-8")
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{CKPT_UP}"
    ran = subprocess.run([sys.executable, "-c", start, "--help"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "up\n", "interrupted: nothing was begun\n")
