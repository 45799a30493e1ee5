"""What the package may import and call, and that no hostile checkpoint makes it do anything else."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ckpttools"
MODULES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The package or module directly below ckpttools."""
    return path.parts[0].removesuffix(".py") if len(path.parts) > 1 else path.stem


READERS = [
    p
    for p in MODULES
    if p.parts[0] in ("stores", "containers", "formats", "frameworks", "tensors")
    or p.stem in ("location", "plan", "errors")
]
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "importlib", "marshal", "subprocess", "ctypes", "shelve",
    "runpy", "code", "codeop", "copyreg", "builtins", "socket", "multiprocessing", "torch", "deepspeed",
    "transformers", "numpy", "ml_dtypes", "safetensors", "zipfile", "tarfile", "tempfile",
    "shutil", "inspect", "types", "pty",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "getattr", "setattr", "delattr", "compile", "globals", "locals", "vars",
    "open", "input", "breakpoint",
}  # fmt: skip
FORBIDDEN_METHODS = {"system", "popen", "spawn", "fork", "startfile", "import_module", "mmap"}
SYSTEM = (Path("stores/disk.py"), Path("stores/direct.py"))


@pytest.mark.parametrize("path", READERS, ids=str)
def test_readers_can_only_read(path: Path) -> None:
    for name in imported(MODULES[path]):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{path} imports {name}"
        if name.split(".")[0] == "os":
            assert path in SYSTEM, f"{path} imports os: only the disk's store opens anything"
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_CALLS, f"{path}:{node.lineno} uses {node.id}"
        if isinstance(node, ast.Attribute):
            aligned = path == SYSTEM[1] and node.attr == "mmap"  # memory of no file
            assert aligned or node.attr not in FORBIDDEN_METHODS, f"{path}:{node.lineno} uses .{node.attr}"
            dunder = node.attr.startswith("__") and node.attr not in ("__init__", "__name__")
            assert not dunder, f"{path}:{node.lineno} uses .{node.attr}"


def test_the_pickle_reader_imports_next_to_nothing() -> None:
    judging = ("arguments", "judge", "known", "names")
    folder = Path("containers/pickles")
    modules = [path for path in MODULES if path.parent == folder and path.stem not in judging]
    assert {folder / "read.py", folder / "machine.py", folder / "opcodes.py"} <= set(modules)
    names = {name for path in modules for name in imported(MODULES[path])}
    allowed = {"__future__", "re", "struct", "collections", "msgspec", "typing", "ckpttools"}
    assert {name.split(".")[0] for name in names} <= allowed
    assert {name for name in names if name.startswith("msgspec")} == {"msgspec.Struct"}  # and no decoder


def test_data_that_is_read_becomes_no_class_by_itself() -> None:
    """msgspec makes values of ours; only the trainer's own configuration is decoded by it."""
    makes = {"Struct", "field", "structs.replace"}
    for path, tree in MODULES.items():
        names = {name.removeprefix("msgspec.") for name in imported(tree) if name.startswith("msgspec")}
        assert names <= makes or part(path) == "trainer", f"{path} imports {names - makes}"


def test_nobody_is_told_to_load_a_pickle() -> None:
    """What is printed is followed: no text of the package loads more than weights."""
    texts = {
        f"{path}:{node.lineno}"
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.search(r"weights_only=($|False|\{)|\bpickle\.loads?\(", node.value)
    }
    assert not texts, texts


def test_heavy_libraries_stay_in_their_place() -> None:
    for path, tree in MODULES.items():
        for name in imported(tree):
            root = name.split(".")[0]
            if root in ("torch", "deepspeed", "transformers", "accelerate"):
                here = part(path) in ("trainer", "integrations") or (root, path) == (
                    "torch",
                    Path("operations/opened.py"),
                )
                assert here, f"{path} imports {name}"
            if root in ("numpy", "ml_dtypes"):
                assert part(path) in ("values", "passes", "trainer"), f"{path} imports {name}"
            if root == "click":
                assert part(path) == "cli" or path == Path("trainer/options.py"), f"{path} imports {name}"
            assert root not in ("pickle", "marshal", "shelve"), f"{path} imports {name}"


# from the bottom up: each part imports only what stands before it; a new part gets its place on purpose
LAYERS = [
    "location",
    "errors",
    "findings",
    "siblings",
    "numbered",
    "suggest",
    "progress",
    "launch",
    "checksums",
    "charts",
    "tensors",
    "tree",
    "plan",
    "schedules",
    "training",
    "checkpoint",
    "values",
    "stores",
    "explain",
    "passes",
    "containers",
    "execute",
    "formats",
    "frameworks",
    "transforms",
    "compare",
    "manifest",
    "checks",
    "runs",
    "pages",
    "resume",
    "operations",
    "trainer",
    "integrations",
    "cli",
]


def test_imports_point_one_way() -> None:
    for path, tree in MODULES.items():
        own = part(path)
        if path == Path("__init__.py"):
            continue
        assert own in LAYERS, f"{path}: give {own} its place in LAYERS"
        below = LAYERS[: LAYERS.index(own)]
        for name in imported(tree):
            pieces = name.split(".")
            if pieces[0] == "ckpttools" and len(pieces) > 1 and pieces[1] != "__version__":
                assert pieces[1] == own or pieces[1] in below, f"{path} imports {name}"


def test_importing_is_light() -> None:
    code = "import sys, ckpttools.formats; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = ["torch", "numpy", "deepspeed", "pickle", "click", "subprocess", "ctypes"]
    out = subprocess.run(
        [sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


# --- hostile samples ----------------------------------------------------------------------------------

LIMIT = 40_000_000  # lines of Python for one file: some seconds
AUDITED = """
LIMIT = %(limit)d
import importlib, json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, %(tests)r)
import hostile
from work import TooMuch, at_most
from ckpttools.errors import CkptError
from ckpttools.formats import FORMATS, open_checkpoint
from ckpttools.containers.torch_file import read_torch_file, labelled
from ckpttools.containers.pickles.judge import judge

folder = Path(%(folder)r)
watching = False
events = []
# what reading may do besides opening the files of the checkpoint
FREE = {"os.listdir", "os.scandir", "object.__getattr__", "sys._getframe", "builtins.id"}

def audit(event, args):
    if not watching or event in FREE:
        return
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        inside = isinstance(path, (str, Path)) and os.path.realpath(path).startswith(str(folder))
        if inside and not writes:
            return
    events.append([event, repr(args)[:200]])

for format in FORMATS:  # each is imported when the first of its checkpoints is read
    importlib.import_module("ckpttools.formats." + {"pt": "torch"}.get(format.name, format.name) + ".read")
"\\x1b".encode("unicode_escape"), b"a".decode("raw-unicode-escape")  # Python imports its codecs at first use
sys.addaudithook(audit)
def peak_mib():
    # not ru_maxrss, which begins with what the parent process had
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

names = list(hostile.samples(folder))
report = {}
for name in names:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = hostile.samples(folder)[name]()
    before = set(sys.modules)
    events = []
    error = shown = None
    lines = at_most(LIMIT)
    counted = lines.__enter__()  # before the watch: setting a trace function is an audited event
    watching = True
    try:
        checkpoint = open_checkpoint(path)
        outcome = "read"
    except CkptError as caught:
        outcome, shown = caught.id, str(caught)
    except BaseException as caught:
        outcome = "crash " + repr(caught)[:300]
    if path.is_file() and path.suffix == ".pt":
        try:
            file = read_torch_file(path)
            judge(file.pickle)
            list(labelled(file))
        except CkptError:
            pass
        except BaseException as caught:
            outcome = "crash " + repr(caught)[:300]
    watching = False
    lines.__exit__(None, None, None)
    report[name] = {
        "outcome": outcome,
        "lines": counted.count,
        "events": events,
        "modules": sorted(set(sys.modules) - before),
        "marker": (folder / hostile.MARKER).exists(),
        "mib": peak_mib(),
        "printable": shown is None or all(c.isprintable() for c in shown.replace(str(folder), "")),
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """All samples opened in one process that is watched."""
    folder = tmp_path_factory.mktemp("hostile") / "x"
    code = AUDITED % {"tests": str(Path(__file__).parent), "folder": str(folder), "limit": LIMIT}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    assert len(found) > 150
    return found


def test_only_our_errors(report: dict[str, dict[str, object]]) -> None:
    assert {n: r["outcome"] for n, r in report.items() if str(r["outcome"]).startswith("crash")} == {}


def test_nothing_is_run_imported_or_opened(report: dict[str, dict[str, object]]) -> None:
    assert {n: r["events"] for n, r in report.items() if r["events"]} == {}
    assert {n: r["modules"] for n, r in report.items() if r["modules"]} == {}
    assert [n for n, r in report.items() if r["marker"]] == []


def test_work_and_memory_are_bounded(report: dict[str, dict[str, object]]) -> None:
    assert {n: r["lines"] for n, r in report.items() if int(str(r["lines"])) >= LIMIT} == {}
    assert max(int(str(r["mib"])) for r in report.values()) < 512


def test_messages_are_safe_to_print(report: dict[str, dict[str, object]]) -> None:
    assert [n for n, r in report.items() if not r["printable"]] == []


def test_what_lies_is_refused(report: dict[str, dict[str, object]]) -> None:
    lies = [name for name in report if name.startswith(("safetensors:", "folder:", "archive:"))]
    assert [name for name in lies if report[name]["outcome"] == "read"] == []
