"""What is fuzzed: a target takes a fixture, mutates one file of it, and lets every reader have it.

A case is a target's name and a number; the same two give the same bytes on every machine. `run_case` returns
what is wrong with it, if anything: an exception that is no CkptError, a warning of numpy, more than 5 s, or a
result that was written and does not verify.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from work import TooMuch, at_most

from ckpttools.checkpoint import Layout
from ckpttools.checks import check_before_use, verify
from ckpttools.cli.app import app
from ckpttools.containers.pickles import dumps, loads, plain, walk
from ckpttools.containers.pickles.judge import judge
from ckpttools.containers.torch_file import labelled, read_torch_file
from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.formats import dcp, hf, locate, zero
from ckpttools.transforms.reshard import reshard
from ckpttools.transforms.select import weights_only

from . import mutations

FIXTURES = Path(__file__).parents[2] / "fixtures"
LIMIT_SECONDS = 5.0  # of the processor; what takes longer is counted
LIMIT_LINES = 40_000_000
ZERO = (
    "deepspeed-0.19.8/z2_groups_ws2", "deepspeed-0.19.8/z2_bf16_ws1", "deepspeed-0.19.8/z2_lora_ws2",
    "deepspeed-0.19.8/z2_round_robin_ws2", "deepspeed-0.19.8/z1_bf16opt_ws2", "deepspeed-0.19.8/z2_tied_ws2",
    "deepspeed-0.19.8/z2_fp16_ws2", "deepspeed-0.19.8/z2_elastic_ws2", "deepspeed-0.19.8/z2_frozen_ws2",
    "deepspeed-0.19.8/z2_legacy_ws2", "deepspeed-0.19.8/z2_clientstate_ws2", "deepspeed-0.10.3/z2_groups_ws2",
    "deepspeed-0.19.8/z2_sgd_ws2", "deepspeed-0.19.8/z2_zerosize_ws2", "deepspeed-0.19.8/z2_nostep_ws2",
)  # fmt: skip
DCP = ("dcp/fsdp2_ws2", "dcp/tp_ws4", "dcp/flat_ws2", "dcp/step-3", "dcp/accelerate_ws2", "dcp/plain-sgd_ws1")
ZERO3 = tuple(
    f"deepspeed-0.19.8/z3_{n}_ws2" for n in ("groups", "tiny_groups", "lora", "sgd", "fp16", "fp32")
)
UNIVERSAL = ("universal/z2_groups", "universal/z2_frozen", "universal/z3_groups")
HF = ("hf/sharded", "hf/single", "hf/gpt2_tied", "hf/peft", "hf/bin_sharded", "hf/bin")


@dataclass(frozen=True)
class Wrong:
    """A case that went wrong, and the bytes of the mutated file."""

    target: str
    number: int
    file: str
    problem: str
    trace: str
    data: bytes


@dataclass
class Case:
    """One mutated file: `name` for people, `data`, and how the readers get it."""

    name: str
    data: bytes
    read: Callable[[], None]


# --- what the readers do with it ----------------------------------------------------------------------


def read_pickle(data: bytes) -> None:
    read = loads(data)
    plain(read.value)
    for _ in walk(read.value):
        pass
    judge(read)
    again = loads(dumps(read.value)).value
    assert dumps(again) == dumps(read.value), "writing what was read changes it"


def read_file(path: Path) -> None:
    with contextlib.suppress(CkptError):
        file = read_torch_file(path)
        judge(file.pickle)
        list(labelled(file))
    read_checkpoint(path)


def read_checkpoint(path: Path, out: Path | None = None) -> None:
    """verify, inspect and, where it is still good enough, the plans of reshard and extract."""
    for args in (["verify", "--workers", "1", "--no-progress", "--json"], ["inspect"], ["inspect", "--json"]):
        with contextlib.suppress(CkptError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
            app.main([*args, str(path)], prog_name="ckpt", standalone_mode=False)
    try:
        checkpoint = check_before_use(locate(path))
    except CkptError:
        return
    plans = (
        lambda: hf.plan(weights_only(checkpoint)),
        lambda: hf.plan(weights_only(checkpoint), Layout(format="hf", variant=hf.BIN, single=True)),
        lambda: zero.plan(checkpoint, reshard(checkpoint, 3)),
        lambda: dcp.plan(checkpoint),
    )
    for make in plans:
        with contextlib.suppress(CkptError):
            plan = make()
            if out is not None and not plan.is_single_file:
                execute(plan, out, workers=1, force=True)
                bad = [f for f in verify(out, quick=True).findings if f.severity == "error"]
                assert not bad, f"what was written does not verify: {bad[0].id}: {bad[0].message}"


# --- where the cases come from ------------------------------------------------------------------------


@cache
def corpus(suffixes: tuple[str, ...], under: str = "") -> tuple[Path, ...]:
    """Small files of the fixtures, in a fixed order."""
    files = (p for p in sorted((FIXTURES / under).rglob("*")) if p.name.endswith(suffixes) and p.is_file())
    return tuple(p for p in files if 0 < p.stat().st_size < 60_000 and "truth" not in p.parts)


@cache
def contents(path: Path) -> bytes:
    return path.read_bytes()


@cache
def torch_zips() -> tuple[bytes, ...]:
    picked = Random(1).sample(corpus((".pt", ".pth", ".bin")), 80)
    return tuple(data for p in picked if (data := contents(p))[:4] == b"PK\x03\x04")


@cache
def legacy_files() -> tuple[bytes, ...]:
    picked = corpus((".pth",), "monolithic/legacy") + corpus((".pt",), "deepspeed-0.19.8/z2_legacy_ws2")
    return tuple(data for p in picked if (data := contents(p))[:2] == b"\x80\x02")


@cache
def pickles() -> tuple[bytes, ...]:
    """Pickles of real torch files, and of Python values in every protocol."""
    value = {
        "a": [1, 2.5, None, True, "é", b"x"],
        "b": {"c": (1, (2,), {3, 4}), "d": frozenset("a")},
        "e": 2**90,
    }
    plain_ones = [pickle.dumps(value, protocol) for protocol in range(6)]
    return (*(mutations.record(data, "data.pkl") for data in torch_zips()), *plain_ones)


class Workplace:
    """A folder for the cases of one process. Copies of the fixtures are made once and mended after use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def copy(self, name: str, *, manifest: bool = False) -> Path:
        place = self.folder / (name.replace("/", "-") + "-m" * manifest)
        if not place.exists():
            shutil.copytree(FIXTURES / name, place)
            if manifest:
                described = verify(place, quick=True, describe=True, workers=1).manifest
                assert described is not None
                described[0].write_bytes(described[1])
        return place

    @contextlib.contextmanager
    def replaced(self, path: Path, data: bytes) -> Iterator[None]:
        was = path.read_bytes()
        try:
            path.write_bytes(data)
            yield
        finally:
            path.write_bytes(was)


def _pickle(rng: Random, place: Workplace) -> Case:
    data = mutations.of_pickle(rng.choice(pickles()), rng, pickles())
    return Case("pickle", data, lambda: read_pickle(data))


def _zip(rng: Random, place: Workplace) -> Case:
    data = mutations.of_zip(rng.choice(torch_zips()), rng, torch_zips())
    return Case("a.pt", data, lambda: read_file(place.put("a.pt", data)))


def _legacy(rng: Random, place: Workplace) -> Case:
    data = mutations.of_legacy(rng.choice(legacy_files()), rng, pickles())
    return Case("legacy.pt", data, lambda: read_file(place.put("legacy.pt", data)))


def _safetensors(rng: Random, place: Workplace) -> Case:
    data = mutations.of_safetensors(contents(rng.choice(corpus((".safetensors",)))), rng)
    return Case("a.safetensors", data, lambda: read_checkpoint(place.put("a.safetensors", data)))


def _in_folder(place: Workplace, folder: Path, path: Path, data: bytes, out: Path | None = None) -> Case:
    def read() -> None:
        with place.replaced(path, data):
            read_checkpoint(folder, out)

    return Case(f"{folder.name}/{path.relative_to(folder)}", data, read)


def _json(rng: Random, place: Workplace) -> Case:
    folder = place.copy(rng.choice(HF))
    path = rng.choice(sorted(folder.rglob("*.json")))
    return _in_folder(place, folder, path, mutations.of_json(path.read_bytes(), rng))


def _latest(rng: Random, place: Workplace) -> Case:
    folder = place.copy(rng.choice(ZERO))
    path = folder / "latest"
    return _in_folder(place, folder, path, mutations.of_latest(path.read_bytes(), rng))


def _manifest(rng: Random, place: Workplace) -> Case:
    folder = place.copy(rng.choice((*HF, *ZERO[:3])), manifest=True)
    path = rng.choice(sorted(folder.rglob("ckpt-manifest.json")))
    return _in_folder(place, folder, path, mutations.of_json(path.read_bytes(), rng))


def _torch_files(rng: Random, place: Workplace, samples: tuple[str, ...]) -> Case:
    folder = place.copy(rng.choice(samples))
    path = rng.choice(sorted(folder.rglob("*.pt")))
    old = path.read_bytes()
    if old[:2] == b"PK":
        data = mutations.of_zip(old, rng, torch_zips())
    else:
        data = mutations.of_legacy(old, rng, pickles())
    return _in_folder(place, folder, path, data, place.out if rng.random() < 0.2 else None)


def _dcp(rng: Random, place: Workplace) -> Case:
    folder = place.copy(rng.choice(DCP))
    name = "*.distcp" if rng.random() < 0.3 else ".metadata"
    path = rng.choice(sorted(folder.rglob(name)))
    old = path.read_bytes()
    data = mutations.of_bytes(old, rng) if name == "*.distcp" else mutations.of_pickle(old, rng, pickles())
    return _in_folder(place, folder, path, data, place.out if rng.random() < 0.2 else None)


TARGETS: dict[str, Callable[[Random, Workplace], Case]] = {
    "pickle": _pickle,
    "zip": _zip,
    "legacy": _legacy,
    "safetensors": _safetensors,
    "json": _json,
    "latest": _latest,
    "manifest": _manifest,
    "zero": lambda rng, place: _torch_files(rng, place, ZERO),
    "zero3": lambda rng, place: _torch_files(rng, place, ZERO3),
    "universal": lambda rng, place: _torch_files(rng, place, UNIVERSAL),
    "dcp": _dcp,
}


def make(target: str, number: int, place: Workplace) -> Case:
    return TARGETS[target](Random(f"{target} {number}"), place)


def is_too_much(case: Case) -> bool:
    """Whether a case that took long runs many lines of Python: a busy machine is slow without them."""
    try:
        with warnings.catch_warnings(), contextlib.suppress(CkptError), at_most(LIMIT_LINES):
            warnings.simplefilter("ignore")
            case.read()
    except TooMuch:
        return True
    return False


def run_case(target: str, number: int, place: Workplace) -> tuple[float, Wrong | None]:
    """The seconds that the readers took, and what went wrong."""
    case = make(target, number, place)
    problem = trace = ""
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.read()
    except CkptError:
        pass
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem, trace = repr(error)[:500], traceback.format_exc()
    seconds = time.process_time() - started
    if not problem and seconds > LIMIT_SECONDS and is_too_much(case):
        problem = f"{seconds:.1f} s, and more than {LIMIT_LINES:,} lines"
    return seconds, Wrong(target, number, case.name, problem, trace, case.data) if problem else None
