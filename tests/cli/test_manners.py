"""How errors look in every command: four parts, one JSON document, the exit code, and what was meant."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Ran, ckpt_process, run
from support import FIXTURES

GOOD = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
# every command that takes a checkpoint or a folder of them, and what else it needs
READERS: dict[str, list[object]] = {
    "inspect": [],
    "verify": [],
    "latest": [],
    "resume-check": [],
    "batch": ["--bs", "2"],
    "extract": [],
    "reshard": ["--world-size", "3"],
    "rebase-schedule": ["--new-bs", "1"],
    "digest": [],
    "diff": [GOOD],
    "prove": [GOOD],
    "convert": ["out", "--to", "pt"],
    "average": [GOOD, "-o", "out"],
    "pin": [],
    "unpin": [],
    "ls": [],
    "runs": [],
    "report": ["-o", "out.html"],
    "prune": ["--keep-last", "1", "-y"],
    "copy": ["out"],
}
FOLDERS = ("latest", "ls", "runs", "report", "prune", "unpin")  # what takes no single file
WRONG: dict[str, list[object]] = {
    "no such command": ["frobnicate"],
    "no such option": ["reshard", GOOD, "--world-sise", "3"],
    "an argument is missing": ["inspect"],
    "an option is missing": ["reshard", GOOD],
    "no number": ["reshard", GOOD, "--world-size", "many"],
    "too large a number": ["reshard", GOOD, "--world-size", "99999999"],
    "no such choice": ["extract", GOOD, "--format", "gguf"],
    "too many threads": ["reshard", GOOD, "--world-size", "3", "--workers", "3000"],
    "one argument too many": ["explain", "a", "b"],
    "no such file": ["extract", GOOD, "--hf-config", "/does/not/exist"],
    "no such tag": ["inspect", GOOD, "--tag", "global_step33"],
    "an unset variable": ["verify", ""],
    "an unset variable, to remove": ["prune", "", "--keep-last", "1", "-y"],
    "an unset variable, to list": ["ls", ""],
    "a name too long": ["ls", "x" * 5000],
    "convert to nothing": ["convert", GOOD, "out", "--to", "gguf"],
    "convert for no ranks": ["convert", GOOD, "out", "--to", "zero2", "--world-size", "0"],
    "one side of a diff": ["diff", GOOD],
    "proof of nothing": ["prove", GOOD, "/does/not/exist"],
    "a digest of nothing": ["digest", "/does/not/exist"],
    "a rule of nothing": ["prune", GOOD, "--keep-last", "many"],
    "a pin of nothing": ["pin", "/does/not/exist"],
    "no pin": ["unpin", "/does/not/exist"],
    "not pinned": ["unpin", GOOD],
    "a part of nothing": ["verify", GOOD, "--subset", "9/7"],
    "a part of no bytes": ["verify", GOOD, "--subset", "5%", "--quick"],
    "required, and no key": ["verify", GOOD, "--require", "schedular"],
    "a mean of nothing": ["average", "/does/not/exist", "-o", "out"],
    "a mean of one": ["average", GOOD, "-o", "out"],
    "a mean of one twice": ["average", GOOD, GOOD, "-o", "out"],
    "weights of others": ["average", GOOD, GOOD.parent / "z2_bf16_4", "-o", "out", "--weights", "1,2,3"],
    "no batch size": ["batch"],
    "an iteration below none": ["batch", "--bs", "8", "--iteration", "-1"],
    "a batch of none": ["batch", "--bs", "8", "--new-bs", "0"],
    "a mesh where there is none": ["convert", GOOD, "out", "--to", "zero2", "--mesh", "2x2"],
    "no mesh": ["convert", GOOD, "out", "--to", "dcp", "--mesh", "2y2"],
    "another mesh than ranks": ["convert", GOOD, "out", "--to", "dcp", "--mesh", "2x2", "--world-size", "3"],
    "ranks of a single file": ["convert", GOOD, "out.pt", "--to", "pt", "--world-size", "2"],
    "a layout of another format": ["convert", GOOD, "out.pt", "--to", "pt", "--dcp-layout", "flat"],
    "a configuration of no model": ["convert", GOOD, "out.pt", "--to", "pt", "--hf-config", GOOD],
    "another run for weights": ["convert", GOOD, "out", "--to", "hf", "--like", GOOD],
    "two say the class": [
        "convert",
        GOOD,
        "out",
        "--to",
        "zero2",
        "--like",
        GOOD,
        "--optimizer-class",
        "Lion",
    ],
    "no class": ["convert", GOOD, "out", "--to", "zero2", "--optimizer-class", "AdamX"],
    "no dtype": ["convert", GOOD, "out", "--to", "pt", "--dtype", "bf17"],
    "no renaming": ["convert", GOOD, "out", "--to", "pt", "--rename", "model"],
    "a renaming that is none": ["convert", GOOD, "out", "--to", "pt", "--rename", "(=x"],
    "a renaming of nothing": ["convert", GOOD, "out", "--to", "pt", "--rename", "nothing=x"],
    "a size of none": ["extract", GOOD, "out", "--max-shard-size", "large"],
    "another suffix": ["extract", GOOD, "out.safetensors", "--format", "pt"],
    "two formats": ["extract", GOOD, "out.pt", "--format", "pt", "--safe-serialization"],
    "only what is not there": ["diff", GOOD, GOOD, "--only", "nothing"],
    "a kind of none": ["digest", GOOD, "--compare", GOOD, "--kind", "third_moment"],
    "tags of others": ["diff", GOOD, GOOD, "--tag", "a", "--tag", "b", "--tag", "c"],
    "a tag of a file": ["inspect", GOOD / "latest", "--tag", "a"],
    "no rule": ["prune", GOOD.parent, "-y"],
    "a rule of none": ["prune", GOOD.parent, "--keep-last", "0", "-y"],
    "a metric of which nothing is known": ["prune", GOOD.parent, "--keep-best", "beauty", "-y"],
    "a report of three": ["report", GOOD, GOOD, GOOD, "-o", "out"],
    "no picture": ["runs", GOOD.parent, "--plot", "out.doc"],
    "no log": ["runs", GOOD.parent, "--log", "out.doc"],
}


def four_parts(ran: Ran) -> None:
    lines = ran.err.splitlines()
    assert re.match(r"error\[[a-z-]+\]: \S", lines[0]), ran.err
    assert lines[-1].startswith("hint: "), ran.err
    assert "Traceback" not in ran.err and ran.out == ""


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_errors_of_four_parts(name: str, tmp_path: Path) -> None:
    ran = run(*WRONG[name])
    assert ran.code == 2
    four_parts(ran)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "no such command"])
def test_json_errors_are_one_document(name: str) -> None:
    ran = run(*WRONG[name], "--json")
    document = json.loads(ran.out)
    assert ran.code == 2 and ran.err == ""
    assert document.keys() == {"ok", "error"} and document["ok"] is False
    assert document["error"].keys() == {"id", "message", "where", "why", "hint"}
    assert all(document["error"].values())


def test_a_damaged_checkpoint_is_one_document_with_code_1(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(GOOD, folder)
    next(folder.glob("*/*rank_1*optim*")).unlink()
    ran = run("reshard", folder, "--world-size", "3", "--json")
    error = json.loads(ran.out)["error"]
    assert ran.code == 1 and error["id"] == "shard-missing" and error["where"] and error["hint"]
    assert run("inspect", tmp_path / "gone", "--json").code == 2


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["verfy", GOOD], "verify"),
        (["rebase", GOOD], "rebase-schedule"),
        (["consolidat", GOOD], "consolidate"),
        (["reshard", GOOD, "--world-sise", "3"], "--world-size"),
        (["extract", GOOD, "--hf_confg", "x"], "--hf-config"),
        (["inspect", GOOD, "--tag", "global_step33"], "global_step3"),
        (["explain", "shard-mising"], "shard-missing"),
    ],
)
def test_did_you_mean(args: list[object], meant: str) -> None:
    ran = run(*args)
    hint = ran.err.splitlines()[-1]
    assert ran.code == 2 and hint.startswith("hint: did you mean ") and meant in hint, ran.err


def test_ranges_name_both_ends() -> None:
    assert "1 to 65,536" in run("reshard", GOOD, "--world-size", "99999999").err
    assert "0 to 256" in run("reshard", GOOD, "--world-size", "2", "--workers", "3000").err
    assert "1 to 1,000,000" in run("batch", "--bs", "0").err


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback_and_keeps_the_code(before: bool, tmp_path: Path) -> None:
    args: list[object] = ["inspect", tmp_path / "gone"]
    ran = run(*(["--debug", *args] if before else [*args, "--debug"]))
    assert ran.code == 2 and "Traceback" in ran.err and "error[not-found]" in ran.err
    folder = tmp_path / "run"
    shutil.copytree(GOOD, folder)
    next(folder.glob("*/*rank_1*optim*")).unlink()
    assert run("extract", folder, "--debug").code == 1
    assert run("reshard", GOOD, "--debug").code == 2


def test_suffixes_that_extract_cannot_write_are_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.GGUF", "a.onnx", "a.h5"):
        ran = run("extract", GOOD, tmp_path / name)
        assert ran.code == 2 and ".safetensors" in ran.err, ran.err
        four_parts(ran)
    assert not list(tmp_path.iterdir())
    assert run("extract", GOOD, tmp_path / "model.v2").code == 0  # a folder


def test_writing_commands_end_with_the_next_step(tmp_path: Path) -> None:
    source = FIXTURES / "hf-trainer" / "deepspeed" / "checkpoint-2"
    calls = {
        "reshard": ["--world-size", "4"],
        "rebase-schedule": ["--new-bs", "1"],
        "extract": [],
    }
    for command, options in calls.items():
        dst = tmp_path / command
        ran = run(command, source, dst, *options)
        steps = [line for line in ran.err.splitlines() if line.startswith("next: ")]
        assert steps[0] == f"next: ckpt verify {dst}", ran.err
        assert ran.err.splitlines()[-1] == steps[-1] and str(dst) in steps[-1]
        assert run("verify", dst).code == 0
        shown = json.loads(run(command, source, tmp_path / "again", *options, "--json", "--dry-run").out)
        assert len(shown["next"]) == len(steps)
        assert run(command, source, tmp_path / f"{command}-q", *options, "-q").err == ""
    trainer = json.loads(run("reshard", source, tmp_path / "n", "--world-size", "4", "--json").out)
    assert "--nproc-per-node 4" in trainer["next"][-1] and "resume_from_checkpoint" in trainer["next"][-1]


# --- no permission ------------------------------------------------------------------------------------

NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]


@pytest.fixture
def as_nobody(tmp_path: Path) -> list[str]:
    """What makes a command run as somebody who may not read everything."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root, and no setpriv to become another user")
    for parent in [tmp_path, *tmp_path.parents]:
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)
    probe = subprocess.run([*NOBODY, sys.executable, "-c", "import ckpttools.cli"], check=False)
    if probe.returncode != 0:
        pytest.skip("another user cannot run this installation")
    return NOBODY


# every call in one process, each by its exit code and what it printed
SCRIPT = """
import contextlib, io, json, sys
from ckpttools.cli import main
done = []
for call in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(call)
        except SystemExit as stop:
            done.append([call, stop.code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@pytest.mark.parametrize("closed", ["the folder", "a folder in it", "the files", "a file", "its parent"])
def test_no_permission_is_exit_code_2(closed: str, as_nobody: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "above" / "run"
    file = tmp_path / "above" / "epoch_2_step_40.pt"
    shutil.copytree(GOOD, folder)
    shutil.copy(FIXTURES / "monolithic" / "full" / file.name, file)
    assert run("pin", folder).code == 0
    shut = {
        "the folder": [folder],
        "a folder in it": [path for path in folder.iterdir() if path.is_dir()],
        "the files": [path for path in folder.rglob("*") if path.is_file()],
        "a file": [file],
        "its parent": [folder.parent],
    }[closed]
    source = file if closed == "a file" else folder
    commands = [name for name in READERS if name not in FOLDERS or closed != "a file"]
    calls = [[name, str(source), *map(str, READERS[name])] for name in commands]
    calls += [[*call, "--json"] for call in calls]
    folder.parent.chmod(0o555)  # whoever runs this owns it, and could unpin a closed folder from beside it
    for path in shut:
        path.chmod(0)
    try:
        ran = subprocess.run(
            [*as_nobody, sys.executable, "-c", SCRIPT, json.dumps(calls)],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for path in [folder.parent, *shut]:
            path.chmod(0o755)
    wrong = []
    for call, code, out, err in json.loads(ran.stdout):
        good = code == 2 and "no-permission" in out + err and "Traceback" not in err
        if call[-1] == "--json":
            good = good and err == "" and json.loads(out)["ok"] is False
        if not good:
            wrong.append((call[0], code, out, err))
    assert not wrong, wrong


def test_a_closed_file_beside_the_weights_is_no_damage(as_nobody: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "above" / "checkpoint-4"
    shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-4", folder)
    (folder / "optimizer.pt").chmod(0)
    calls = [[name, str(folder)] for name in ("verify", "resume-check")]
    command = [*as_nobody, sys.executable, "-c", SCRIPT, json.dumps(calls)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    for _, code, out, err in json.loads(ran.stdout):
        assert code == 2 and "no-permission" in out + err


def test_a_folder_that_may_not_be_written_is_exit_code_2(as_nobody: list[str], tmp_path: Path) -> None:
    shutil.copytree(GOOD, tmp_path / "run")
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut").chmod(0o555)
    ran = subprocess.run(
        [*as_nobody, sys.executable, "-m", "ckpttools.cli", "reshard", str(tmp_path / "run"),
         str(tmp_path / "shut" / "out"), "--world-size", "3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2 and ran.stderr.startswith("error["), ran.stderr


def test_help_and_version_are_no_errors() -> None:
    for args in (["--help"], ["--version"], ["verify", "-h"]):
        assert ckpt_process(*args).returncode == 0
    ran = ckpt_process()
    assert ran.returncode == 2 and "Usage: ckpt" in ran.stderr + ran.stdout


def test_a_reader_that_leaves_does_not_change_the_answer(tmp_path: Path) -> None:
    """`ckpt verify RUN | head` under pipefail: damage is exit code 1, whoever still listens."""
    shutil.copytree(GOOD, tmp_path / "run")
    shard = next((tmp_path / "run").rglob("*rank_1*"))
    shard.write_bytes(shard.read_bytes()[:-500])
    damaged = str(tmp_path / "run")
    for words, code in (["verify", damaged], 1), (["verify", "--json", damaged], 1), (["ls", str(GOOD)], 0):
        ckpt = shlex.join([sys.executable, "-m", "ckpttools.cli", *words])
        script = f"({ckpt}; echo $? > {shlex.quote(str(tmp_path / 'code'))}) | true"
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert (int((tmp_path / "code").read_text()), ran.stderr) == (code, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_that_cannot_be_written_is_an_error(unbuffered: str) -> None:
    for words in (["verify", GOOD], ["verify", GOOD, "--json"]):
        with Path("/dev/full").open("w") as full:
            ran = subprocess.run(
                [sys.executable, "-m", "ckpttools.cli", *map(str, words)],
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert ran.returncode == 2 and ran.stderr.startswith("error[system]: No space left"), ran.stderr
    closed = shlex.join([sys.executable, "-m", "ckpttools.cli", "verify", str(GOOD)]) + " >&-"
    ran = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize(("source", "code"), [("z2_bf16_ws2", 0), ("nowhere", 2)])
def test_messages_that_nobody_can_get_do_not_change_the_code(source: str, code: int, json: bool) -> None:
    """A full disk under stderr, under both, or neither there: 1 would say that the checkpoint is damaged."""
    command = [sys.executable, "-m", "ckpttools.cli", "verify", str(FIXTURES / "deepspeed-0.19.8" / source)]
    command += ["--json"] * json
    for end in ("2>/dev/full", "2>&-", *((">/dev/full 2>&1", ">/dev/full") if code else ())):
        ran = subprocess.run(f"{shlex.join(command)} {end}", shell=True, capture_output=True, check=False)
        assert ran.returncode == code and b"Traceback" not in ran.stderr, (end, ran)


def test_one_folder_that_may_not_be_listed_does_not_hide_the_others(
    as_nobody: list[str], tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / "hf-trainer/plain", tmp_path / "tree/run")
    shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / "tree/shut")
    (tmp_path / "tree/shut").chmod(0)
    code = {"verify": 2, "ls": 0, "latest": 0, "runs": 0, "prune": 1}
    try:
        for command, expected in code.items():
            words = [
                command,
                str(tmp_path / "tree"),
                *(["--keep-last", "1", "--dry-run"] * (command == "prune")),
            ]
            ran = subprocess.run(
                [*as_nobody, sys.executable, "-m", "ckpttools.cli", *words],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert ran.returncode == expected and "tree/run" in ran.stdout + "tree/run" * (
                command == "runs"
            ), ran
            if command != "latest":
                assert "shut" in ran.stdout + ran.stderr, (command, ran)
    finally:
        (tmp_path / "tree/shut").chmod(0o755)


def test_a_script_opens_the_path_that_latest_prints(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 and control characters as they are, but for a terminal."""
    run = os.fsencode(tmp_path) + b"/caf\xe9 \x1b[31m"
    shutil.copytree(os.fsencode(FIXTURES / "hf-trainer/plain"), run)
    command = [sys.executable, "-m", "ckpttools.cli", "latest", os.fsdecode(run)]
    ran = subprocess.run(command, capture_output=True, check=True)
    assert Path(os.fsdecode(ran.stdout.removesuffix(b"\n"))).is_dir()
    master, end = os.openpty()
    subprocess.run(command, stdout=end, stderr=subprocess.DEVNULL, check=True)
    os.close(end)
    seen = os.read(master, 10_000)
    os.close(master)
    assert b"checkpoint-" in seen and b"\x1b" not in seen


def test_a_file_where_a_folder_is_needed_is_called_one() -> None:
    file = FIXTURES / "monolithic/full/epoch_2_step_40.pt"
    for command in ("latest", "ls", "runs", "prune"):
        ran = run(command, file, *READERS[command])
        assert ran.code == 2 and "it is a file" in ran.err and "hint: name the folder" in ran.err, ran.err


def test_a_pattern_that_matches_nothing_is_said(tmp_path: Path) -> None:
    options = ("--weights-only", "--exclude", "nothing*", "--dry-run")
    ran = run("extract", GOOD, tmp_path / "out.safetensors", *options)
    assert ran.code == 0 and "nothing* matches no tensor" in ran.out + ran.err


def test_names_that_leave_no_room_for_a_longer_one_beside_them(tmp_path: Path) -> None:
    source = tmp_path / ("x" * 247 + ".pt")
    shutil.copy(FIXTURES / "torch-writers/2.8.0/weights.pt", source)
    assert run("verify", source).code == 0
    for words in (["extract", source, tmp_path / ("y" * 300)], ["extract", source]):
        ran = run(*words)
        assert ran.code == 2 and "the name is too long" in ran.err, ran.err
        assert "hint: name a DST" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("address", ["hf://", "hf://one", "s3://", "s3://a:b@c/d"])
def test_an_address_that_is_none_is_refused_in_four_parts(address: str) -> None:
    lines = run("inspect", address).err.splitlines()
    assert lines[0].startswith("error[store-unknown]") and lines[1].startswith("  in ")
    assert lines[2].startswith("  ") and lines[-1].startswith("hint: ") and len(lines) == 4, lines


@pytest.mark.parametrize(
    "words",
    [
        ["verfy", "x"],
        ["verify", "--quik", "x"],
        ["explain", "shard-misssing"],
        ["inspect", FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2", "-t", "global_step33"],
        ["reshard", FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2", "--world-size", "70000"],
    ],
    ids=lambda words: " ".join(str(word) for word in words[:2])[:12],
)
def test_a_slip_of_the_pen_has_all_four_parts(words: list[object]) -> None:
    ran = run(*words)
    lines = ran.err.splitlines()
    assert ran.code == 2 and lines[0].startswith("error[") and lines[1].startswith("  in "), lines
    assert lines[2].startswith("  ") and lines[-1].startswith("hint: "), lines
