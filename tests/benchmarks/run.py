"""Measures `ckpt` against a peer or a floor in the same run, by turns.

    python tests/benchmarks/run.py [NAME ...] [--size 300MB|5GB] [--folder DIR] [--repeat 5]

Each contender runs once per round, in random order; a line shows the median, and the ratio is the median
over the rounds of the quotient to the first contender. Checkpoints are made once and kept in DIR, which also
tells where the outputs go: a folder on disk and one in /dev/shm give different answers. CPU seconds depend
less on what else the machine does than wall time; the load is printed. On a virtual machine whose free memory
lies with the host, the first write to a page is slow and counts as CPU time: with 5GB, writers of equal work
then differ by a factor of two from run to run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed_checkpoint
import scale
import synthetic
from measure import Cost, file_system, measure

HERE = Path(__file__).parent
SIZES = {"300MB": 300e6, "5GB": 4.95e9}
CKPT = (sys.executable, "-m", "ckpttools.cli")
THREADS = min(os.cpu_count() or 1, 8)  # as `ckpt verify` chooses
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # as for a user: modules are not compiled each time
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the inputs and outputs of this run are."""

    folder: Path
    size: str
    repeat: int

    @property
    def checkpoint(self) -> Path:
        """A ZeRO-2 checkpoint of two ranks, saved by DeepSpeed."""
        path = self.folder / f"zero2-{self.size}"
        if not path.exists():
            parameters = int(SIZES[self.size] / deepspeed_checkpoint.BYTES_PER_PARAMETER)
            deepspeed_checkpoint.make(path, parameters)
        return path

    @property
    def tag(self) -> Path:
        return self.checkpoint / (self.checkpoint / "latest").read_text()

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def inputs(self) -> list[str]:
        return sorted(str(path) for path in self.tag.iterdir())


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    command: Sequence[str | Path]


def compare(place: Place, contenders: Sequence[Contender], repeat: int = 0, *, cold: bool = False) -> None:
    """Run the contenders by turns and print a line for each, with ratios to the first one.

    Every run finds the input in the page cache or, if `cold`, none of it.
    """
    measure(["cat", *place.inputs])
    costs: list[list[Cost]] = [[] for _ in contenders]
    for _ in range(repeat or place.repeat):
        for i in random.sample(range(len(contenders)), len(contenders)):
            if cold:
                _forget(place.inputs)
            costs[i].append(measure(contenders[i].command, ENVIRONMENT))
            _remove(place.out)
    first = costs[0]
    print(f"  {'':34} {'wall s':>8} {'cpu s':>8} {'rss MB':>8} {'anon MB':>8}   ratio: wall   cpu   anon")
    for contender, found in zip(contenders, costs, strict=True):
        rss = max(cost.rss for cost in found) / 1e6
        anonymous = max(cost.anonymous for cost in found) / 1e6
        wall = statistics.median(cost.wall for cost in found)
        cpu = statistics.median(cost.cpu for cost in found)
        ratios = ""
        if found is not first:
            by_wall = statistics.median(a.wall / b.wall for a, b in zip(found, first, strict=True))
            by_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(found, first, strict=True))
            by_memory = anonymous * 1e6 / max(cost.anonymous for cost in first) if anonymous else 0
            ratios = f"{by_wall:13.2f} {by_cpu:5.1f} {by_memory:6.1f}"
        print(
            f"  {contender.name:34} {wall:8.2f} {cpu:8.2f} {rss:8.0f} {anonymous:8.0f} {ratios}", flush=True
        )


def _remove(path: Path) -> None:
    """Nothing of one contender's is written to disk during the next one's turn."""
    if path.exists():
        path.unlink() if path.is_file() else shutil.rmtree(path)
        path.with_name(f"{path.name}.ckpt-manifest.json").unlink(missing_ok=True)
        measure(["sync", "-f", path.parent])


def _forget(paths: Sequence[str]) -> None:
    """Drop the files from the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _ckpt(*arguments: str | Path) -> Contender:
    """The command line, named by its words without the paths."""
    return Contender(" ".join(["ckpt", *(a for a in arguments if isinstance(a, str))]), [*CKPT, *arguments])


def reshard(place: Place) -> None:
    """2 ranks to 4, against copying the folder. ckpt flushes to disk, a plain cp does not."""
    flushed = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
    compare(
        place,
        [
            _ckpt("reshard", place.checkpoint, place.out, "--world-size", "4", "-q"),
            Contender("cp -r", ["cp", "-r", place.checkpoint, place.out]),
            Contender("cp -r, then sync each file", ["sh", "-c", flushed, "sh", place.checkpoint, place.out]),
        ],
    )


def universal(place: Place) -> None:
    """2 ranks to 4, against DeepSpeed's own way: ds_to_universal with its default workers."""
    peer = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    peer += ["--input_folder", str(place.tag), "--output_folder", str(place.out)]
    compare(
        place,
        [
            _ckpt("reshard", place.checkpoint, place.out, "--world-size", "4", "-q"),
            Contender("ds_to_universal", peer),
        ],
    )


def extract(place: Place) -> None:
    """fp32 weights as safetensors, against DeepSpeed's zero_to_fp32."""
    peer = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", place.checkpoint, place.out]
    compare(
        place,
        [
            _ckpt("extract", place.checkpoint, place.out, "-q"),
            Contender("zero_to_fp32 --safe_serialization", [*peer, "--safe_serialization"]),
        ],
    )


TORCH_TO_DCP = """
import sys
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
torch_save_to_dcp(sys.argv[1], sys.argv[2])
"""
DCP_TO_TORCH = """
import sys
from pathlib import Path
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
Path(sys.argv[2]).mkdir()
dcp_to_torch_save(sys.argv[1], sys.argv[2] + "/run.pt")
"""
MERGE = """
import sys
from accelerate.utils import merge_fsdp_weights
merge_fsdp_weights(sys.argv[1] + "/pytorch_model_fsdp_0", sys.argv[2])
"""


# the formats of `convert --to`, and how the source of that format is made
TARGETS = {
    "pt": (),
    "zero1": ("--world-size", "2"),
    "zero2": (),
    "zero3": ("--world-size", "2"),
    "universal": (),
    "dcp": ("--world-size", "2", "--dcp-layout", "accelerate"),
    "hf": (),
}


def _made(place: Place, to: str) -> Path:
    """The checkpoint in another format, made when it is asked for first."""
    if to == "zero2":
        return place.checkpoint
    path = place.folder / f"{to}-{place.size}{'.pt' if to == 'pt' else ''}"
    if not path.exists():
        command = [*CKPT, "convert", place.checkpoint, path, "--to", to, *TARGETS[to], "-q", "--no-digest"]
        measure(command, ENVIRONMENT)
    return path


def _peer(source: str, to: str, path: Path, out: Path) -> Contender | None:
    """A library's own converter for the pair."""
    python = (sys.executable, "-c")
    universal = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    match source, to:
        case (("zero2" | "zero3"), "hf"):
            weights = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", path, out]
            return Contender("zero_to_fp32", weights)
        case (("zero2" | "zero3"), "universal"):
            folder = path / (path / "latest").read_text()
            command = [*universal, "--input_folder", folder, "--output_folder", out]
            return Contender("ds_to_universal", command)
        case "pt", "dcp":
            return Contender("torch_save_to_dcp", [*python, TORCH_TO_DCP, path, out])
        case "dcp", "pt":
            command = [*python, DCP_TO_TORCH, path / "optimizer_0", out]
            return Contender("dcp_to_torch_save (optimizer)", command)
        case "dcp", "hf":
            return Contender("accelerate merge-weights", [*python, MERGE, path, out])
    return None


def convert(place: Place) -> None:
    """Every format into every other, each pair by itself; where a library has a converter, against it."""
    for source in TARGETS:
        for to in TARGETS:
            if source == "hf" and to in ("zero1", "zero2", "zero3", "universal"):
                continue  # weights alone make no folder of DeepSpeed's
            path = _made(place, source)
            ours = _ckpt("convert", path, place.out, "--to", to, "-q")
            peer = _peer(source, to, path, place.out)
            print(f"  {source} to {to}")
            compare(place, [ours, *([peer] if peer else [])], repeat=place.repeat if peer else 1)


def peers(place: Place) -> None:
    """The pairs for which a library has a converter, against it; each source is removed after its turn."""
    for source in ("zero2", "zero3", "dcp", "pt"):
        path = _made(place, source)
        for to in TARGETS:
            if (peer := _peer(source, to, path, place.out)) is not None:
                print(f"  {source} to {to}, load {os.getloadavg()[0]:.1f}")
                compare(place, [_ckpt("convert", path, place.out, "--to", to, "-q"), peer])
        if source != "zero2":
            _remove(path)


def verify(place: Place) -> None:
    """Every byte read and checked, against reading every byte once."""
    floor = [sys.executable, HERE / "floor.py", str(THREADS), *place.inputs]
    contenders = [
        _ckpt("verify", place.checkpoint, "-q"),
        _ckpt("verify", place.checkpoint, "-q", "--workers", "1"),
        Contender("cat > /dev/null", ["cat", *place.inputs]),
        Contender(f"preadv, {THREADS} threads", floor),
    ]
    print("  from the page cache")
    compare(place, contenders)
    print("  from disk")
    compare(place, contenders, cold=True)


INSPECTED = """
import sys
from ckpttools.cli import main
try:
    main(["inspect", sys.argv[1]])
finally:
    heavy = {"torch", "numpy"} & set(sys.modules)
    assert not heavy, heavy
"""


def inspect(place: Place) -> None:
    """100 GB in 64 shards (sparse), against an interpreter that does nothing; without torch and numpy."""
    sparse = place.folder / "sparse-100GB"
    if not sparse.exists():
        synthetic.write_sparse(sparse, int(100e9 / deepspeed_checkpoint.BYTES_PER_PARAMETER), ranks=64)
    measure([sys.executable, "-c", INSPECTED, sparse], ENVIRONMENT)
    compare(
        place,
        [
            Contender("ckpt inspect (100 GB)", [*CKPT, "inspect", sparse]),
            Contender(f"ckpt inspect ({place.size})", [*CKPT, "inspect", place.checkpoint]),
            Contender("python -c pass", [sys.executable, "-c", "pass"]),
        ],
        repeat=max(place.repeat, 11),
    )


def memory(place: Place) -> None:
    """Peak memory by the size of the input; the bytes mapped by libraries count in rss."""
    for size in SIZES if place.size == "5GB" else [place.size]:
        where = Place(place.folder, size, place.repeat)
        print(f"  {size}")
        compare(
            where,
            [
                _ckpt("extract", where.checkpoint, where.out, "-q"),
                _ckpt("reshard", where.checkpoint, where.out, "--world-size", "4", "-q"),
                _ckpt("verify", where.checkpoint, "-q"),
                _ckpt("inspect", where.checkpoint),
            ],
            repeat=1,
        )


def direct(place: Place) -> None:
    """What goes past the page cache: reshard against a flushed cp, verify against dd and cat."""
    flushed = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
    dd = 'for file; do dd if="$file" of=/dev/null bs=4M iflag=direct status=none; done'
    read = [
        _ckpt("verify", place.checkpoint, "-q"),
        Contender("dd iflag=direct bs=4M", ["sh", "-c", dd, "sh", *place.inputs]),
        Contender("cat > /dev/null", ["cat", *place.inputs]),
    ]
    print("  verify, from the page cache")
    compare(place, read)
    print("  verify, from disk")
    compare(place, read, cold=True)
    print("  reshard, to disk, flushed")
    cp = Contender("cp -r, then sync each file", ["sh", "-c", flushed, "sh", place.checkpoint, place.out])
    compare(place, [_ckpt("reshard", place.checkpoint, place.out, "--world-size", "4", "-q"), cp])


def growth(place: Place) -> None:
    """0.3 to 20 GB (with --size 5GB; else 0.3 GB alone): time is linear, memory flat."""
    scale.grow(place.folder, CKPT, ENVIRONMENT, 20e9 if place.size == "5GB" else SIZES[place.size])


def remote(place: Place) -> None:
    """Requests, bytes and seconds of each command where every request takes 30 ms more."""
    scale.far(place.folder, CKPT, ENVIRONMENT)


def spread(place: Place) -> None:
    """One reshard shared by 1, 2 and 4 processes of this machine."""
    words = ["reshard", place.checkpoint, place.out, "--world-size", "4", "-q"]
    contenders = [_ckpt(*words)]
    for world in (1, 2, 4):
        contenders.append(Contender(f"--spread, {world} workers", scale.among(world, words, CKPT)))
    compare(place, contenders)


ALL: dict[str, Callable[[Place], None]] = {
    f.__name__: f
    for f in (
        *(reshard, universal, extract, convert, peers, verify, inspect, memory),
        *(direct, growth, remote, spread),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; default all")
    parser.add_argument("--size", choices=SIZES, default="300MB")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckpt-benchmarks"))
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    place = Place(options.folder.resolve(), options.size, options.repeat)
    for name in options.names or ALL:
        print(f"{name}: {ALL[name].__doc__}")
        where = f"{options.size} in {options.folder} ({file_system(place.folder)})"
        print(f"  {where}, load {os.getloadavg()[0]:.1f}", flush=True)
        ALL[name](place)
        print(f"  load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
