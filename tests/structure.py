"""The shape of the package, from its code: who imports whom, who names a format, who opens files.

python tests/structure.py           the touch lists and the lines
python tests/structure.py --svg     the drawing of the imports
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ckpttools"
FORMATS = tuple(sorted(p.name for p in (PACKAGE / "formats").iterdir() if (p / "__init__.py").is_file()))
# the places that may open files: where bytes lie, where they are written, and the trainer
OPENERS = ("stores", "execute", "trainer")
OPENING = {
    "open",
    "read_text",
    "read_bytes",
    "stat",
    "lstat",
    "exists",
    "is_file",
    "is_dir",
    "iterdir",
    "glob",
    "rglob",
}
OPENING |= {"is_symlink", "samefile", "readlink", "resolve", "cwd", "home", "expanduser"}
OPENING |= {"absolute", "memmap"}
# the places that may change the file system; the demo has a folder of its own
WRITERS = ("execute", "trainer")
DEMO = Path("cli/demo.py")
CHANGING = {"unlink", "rmdir", "rename", "mkdir", "touch", "chmod", "write_text", "write_bytes", "utime"}
CHANGING_OS = {"replace", "remove", "makedirs", "link", "symlink"}
CHANGING |= {"symlink_to", "hardlink_to", "rmtree", "move", "remove_dir", "truncate"}
# of os
SYSTEM = {"open", "stat", "lstat", "listdir", "scandir", "walk", "access", "readlink", "getcwd", "statvfs"}


@cache
def modules() -> dict[Path, ast.Module]:
    return {p.relative_to(PACKAGE): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


def part(path: Path) -> str:
    """The package or module directly below ckpttools; "" is ckpttools itself."""
    return path.parts[0] if len(path.parts) > 1 else "" if path.stem == "__init__" else path.stem


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names within ckpttools, function-level imports included, those for types left out."""
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("ckpttools.") for name in names if name.startswith("ckpttools."))


def graph() -> dict[str, set[str]]:
    """Part -> the parts that it imports."""
    found = modules()
    parts = {part(path) for path in found} - {""}
    out: dict[str, set[str]] = {name: set() for name in sorted(parts)}
    for path, tree in found.items():
        if own := part(path):
            out[own] |= {name.split(".")[0] for name in imported(tree)} & parts - {own}
    return out


def layers(edges: dict[str, set[str]]) -> list[list[str]]:
    """Bottom up: each part imports only parts of layers before its own. Raises ValueError in a circle."""
    out: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(edges):
        layer = sorted(name for name in edges if name not in done and edges[name] <= done)
        if not layer:
            raise ValueError(f"a circle among {sorted(set(edges) - done)}")
        out.append(layer)
        done |= set(layer)
    return out


def circle() -> list[str]:
    """Modules that import each other in a circle, [] where none do; imports within functions count."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in modules()}
    edges: dict[str, set[str]] = {}
    for own, path in names.items():
        parts = [name.split(".") for name in imported(modules()[path])]
        ends = [[".".join(each[:n]) for n in range(len(each), 0, -1)] for each in parts]
        edges[own] = {found for each in ends if (found := next(filter(names.get, each), own)) != own}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def svg() -> str:
    """The parts in layers, the lowest at the bottom; every line leads down."""
    edges = graph()
    rows = layers(edges)
    width, step = 1000, 84
    height = step * len(rows)
    at: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        for i, name in enumerate(row):
            at[name] = (width * (i + 0.5) / len(row), height - step * (level + 0.5))
    box = f'viewBox="0 0 {width} {height}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif">']
    for name, below in edges.items():
        x, y = at[name]
        for other in sorted(below):
            u, v = at[other]
            out.append(
                f'<path d="M{x:.0f} {y + 14:.0f} C{x:.0f} {(y + v) / 2:.0f} {u:.0f} {(y + v) / 2:.0f} '
                f'{u:.0f} {v - 14:.0f}" fill="none" stroke="#3b6ea5" stroke-opacity="0.35"/>'
            )
    for name, (x, y) in at.items():
        half = 5 + 4.2 * len(name)
        out.append(
            f'<rect x="{x - half:.0f}" y="{y - 14:.0f}" width="{2 * half:.0f}" height="28" rx="5" '
            f'fill="#fff" stroke="#3b6ea5"/><text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" '
            f'font-size="14">{name}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def naming_formats() -> dict[str, list[str]]:
    """Modules outside formats/ that import one format by name."""
    out: dict[str, list[str]] = {name: [] for name in FORMATS}
    for path, tree in modules().items():
        if part(path) == "formats":
            continue
        named = {n.split(".")[1] for n in imported(tree) if n.startswith("formats.")}
        for name in named & set(FORMATS):
            out[name].append(path.as_posix())
    return out


def opening() -> list[str]:
    """Calls outside the places for it that open, list or look up a path by themselves: `module:line call`."""
    out = []
    for path, tree in modules().items():
        if part(path) in OPENERS or path == DEMO:
            continue
        own = {name.rpartition(".")[2] for name in imported(tree)}
        own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) in own:
                continue
            if ast.unparse(node.func) == "np.memmap" and ast.unparse(node.args[0]) == "file":
                continue  # that a store has opened
            if opens(ast.unparse(node.func)) and "os.devnull" not in map(ast.unparse, node.args):
                out.append(f"{path.as_posix()}:{node.lineno} {ast.unparse(node.func)}")
    return out


def opens(called: str) -> bool:
    """`open` itself, os.stat ..., path.is_file ..."""
    before, _, name = called.rpartition(".")
    if before in ("", "os", "os.path"):
        return called == "open" or before == "os.path" or (before == "os" and name in SYSTEM)
    return name in OPENING and before.rpartition(".")[2] != "store"


def changing() -> list[str]:
    """Calls outside the places for it that make, replace or remove something: `module:line call`."""
    out = []
    for path, tree in modules().items():
        if part(path) in WRITERS or path == DEMO:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                before, name = ast.unparse(node.func.value), node.func.attr
                if before != "self" and (name in CHANGING or (before == "os" and name in CHANGING_OS)):
                    out.append(f"{path.as_posix()}:{node.lineno} {before}.{name}")
    return out


def lengths() -> dict[str, int]:
    """Lines of each module."""
    return {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}


def frameworks() -> dict[str, list[str]]:
    """Modules outside frameworks/ that import one framework by name."""
    names = {p.stem for p in (PACKAGE / "frameworks").glob("*.py") if " = Framework(" in p.read_text()}
    out: dict[str, list[str]] = {}
    for path, tree in modules().items():
        if part(path) != "frameworks":
            named = {n.split(".")[1] for n in imported(tree) if n.startswith("frameworks.")}
            for name in sorted(named & names):
                out.setdefault(name, []).append(path.as_posix())
    return out


# what only a framework's own file may spell: its name, its files, its pointers, its keys
MARKS = {
    "huggingface": r"hf-trainer|trainer_state\.json|training_args|checkpoint-is-incomplete|rng_state|"
    r"num_train_epochs|best_model_checkpoint",
    "accelerate": r"random_states",
    "lightning": r"lightning|loops",
    "mmengine": r"mmengine|message_hub|param_scheduler\b|last_checkpoint|optim_wrapper",
    "openpcdet": r"openpcdet|pcdet|latest_model",
    "plain": r"\btimm\b",
    "client": r"training_info",
}


# what a format says of its files, a library's mathematics, its classes, help texts, the trainer, and the
# configurations that a new run is started with
SPELLERS = ("formats", "schedules", "containers", "cli", "trainer", "integrations")
CONFIGURATIONS = "resume/config_files.py"
LOGS = "runs/logs/"  # files of several loggers, a format each


def spelling_frameworks() -> dict[str, list[str]]:
    """The places of each framework: modules whose strings (docstrings left out) spell a mark of it."""
    out: dict[str, list[str]] = {name: [] for name in MARKS}
    for path, tree in modules().items():
        if part(path) in SPELLERS or path.as_posix().startswith((CONFIGURATIONS, LOGS)):
            continue
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ]
        for name, pattern in MARKS.items():
            if any(re.search(pattern, text, re.IGNORECASE) for text in texts):
                out[name].append(path.as_posix())
    return out


def main() -> None:
    if "--svg" in sys.argv:
        print(svg(), end="")
        return
    for title, lists in (("name the format", naming_formats()), ("name the framework", frameworks())):
        for name, where in lists.items():
            print(f"{len(where):3} modules outside {title} {name}: {', '.join(where) or '-'}")
    for name, where in spelling_frameworks().items():
        print(f"{len(where):3} places of the framework {name}: {', '.join(where)}")
    found = opening()
    print(f"{len(found):3} calls open, list or look up a path by themselves: {', '.join(found) or '-'}")
    changed = changing()
    print(f"{len(changed):3} calls write or remove by themselves: {', '.join(changed) or '-'}")
    counts = lengths()
    longest = max(counts, key=lambda path: counts[path])
    print(f"{sum(counts.values())} lines in {len(counts)} modules; the longest, {longest}: {counts[longest]}")
    print("layers, lowest first:", " | ".join(" ".join(row) for row in layers(graph())))


if __name__ == "__main__":
    main()
