"""`ckpt train` interrupted again and again, at random: killed, asked to stop, out of disk.

Between two launches the number of ranks changes by `ckpt reshard`, the batch by `ckpt rebase-schedule`, or
the layout. Each launch goes on by --resume alone, or from what the command wrote; nothing is edited by hand.
The samples of every update that counts are checked against the order that an uninterrupted run has.

    python soak.py FOLDER [INTERRUPTIONS] [SEED]      with ckpttools on PYTHONPATH, and the figures at the end
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ckpttools.trainer import config as settings
from ckpttools.trainer import text
from ckpttools.trainer.order import Order

CKPT = [sys.executable, "-m", "ckpttools.cli"]
# 24 samples are an update of 1, 2, 3 or 4 ranks; 4 updates of warmup
CONFIG = """
experiment: soak
epochs: 3
model: {family: llama, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
data: {max_bytes: 40000, sequence_length: 64, validation_samples: 8}
batch: {global_batch_size: 24}
optimizer: {lr: 1e-2}
schedule: {warmup_steps: 4}
save: {save_steps: 3}
training: {save_total_limit: 3, tensorboard: false}
"""
WARMUP = 96  # samples
BATCHES = (12, 24, 48)
LAYOUTS = ("iter", "bundle")
KINDS = ("SIGKILL", "SIGTERM", "disk full")


@dataclass
class Soak:
    """One run through all its folders. `trail` are the updates that count: (epoch, samples seen, crc)."""

    folder: Path
    seed: int
    changes: bool = True
    ranks: int = 2
    batch: int = 24
    layout: str = "iter"
    number: int = 0
    source: str | None = None
    trail: list[tuple[int, int, int]] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    final: float | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.config = self.folder / "soak.yaml"
        self.config.write_text(CONFIG)

    @property
    def run(self) -> Path:
        return self.folder / f"run{self.number}"

    def command(self) -> list[str]:
        """The next launch."""
        sets = {
            "batch.global_batch_size": self.batch,
            "schedule.warmup_steps": WARMUP // self.batch,
            "save.layout": self.layout,
            "seed": self.seed,
        }
        options = [f"--nproc={self.ranks}", "--resume", f"--work-dir={self.run}"]
        options += [f"--resume-from={self.source}"] if self.source else []
        return [*CKPT, "train", str(self.config), *options, *(f"--set={k}={v}" for k, v in sets.items())]

    def launch(self, kind: str | None) -> bool:
        """One launch, interrupted in this way; True where it came to its end. Raises AssertionError."""
        largest = max((p.stat().st_size for p in self.run.rglob("*states.pt")), default=60_000)
        limit = int(largest * self.random.uniform(0.2, 0.95))

        def full() -> None:
            if kind == "disk full":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        log = self.run / "train_log.jsonl"
        before = log.read_text().splitlines() if log.exists() else []
        steps, wait = self.random.randint(1, 9), self.random.random()
        out: list[str] = []
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self.command(), stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=full
        ) as process:
            assert process.stdout
            for line in process.stdout:
                out.append(line)
                if line.startswith("step ") and kind in ("SIGKILL", "SIGTERM"):
                    steps -= 1
                    if steps == 0:
                        time.sleep(wait * 0.3)  # anywhere in an update or a save
                        _strike(process, kind)
        text = "".join(out)
        self._follow(log, len(before), text)
        if process.returncode == 0:
            return True
        wanted = {"SIGTERM": (128 + signal.SIGTERM,), "SIGKILL": (-signal.SIGKILL,), "disk full": (1, 2)}
        assert kind is not None and process.returncode in wanted[kind], text
        assert "Traceback" not in text, text
        self.done[kind] += 1
        if (self.run / "last_checkpoint").exists():
            self.source = None
        return False

    def _follow(self, log: Path, skip: int, text: str) -> None:
        """Take over the updates of a launch after those that it went on from."""
        lines = log.read_text().splitlines()[skip:] if log.exists() else []
        records: list[dict[str, Any]] = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last one of a killed run
                records.append(json.loads(line))
        self.final = next((r["val_loss"] for r in reversed(records) if "val_loss" in r), self.final)
        updates = [r for r in records if "loss" in r]
        if not updates:
            return
        start = updates[0]["samples_seen"] - self.batch
        kept = [at for at, (_, seen, _) in enumerate(self.trail) if seen <= start]
        self.trail, self.losses = self.trail[: len(kept)], self.losses[: len(kept)]
        reached = self.trail[-1][1] if self.trail else 0
        assert reached == start, f"went on at sample {start}, was at {reached}\n{text}"
        self.trail += [(r["epoch"], r["samples_seen"], r["samples_crc32"]) for r in updates]
        self.losses += [(r["loss"], r["grad_norm"]) for r in updates]

    def change(self) -> None:
        """Another number of ranks, batch or layout, by the commands for it; or nothing."""
        kind = self.random.choice(("none", "ranks", "batch", "layout")) if self.changes else "none"
        newest = subprocess.run(
            [*CKPT, "latest", str(self.run), "--verified"], capture_output=True, text=True
        ).stdout.strip()
        if kind == "none" or not newest:
            return
        target = self.folder / f"to{self.number}"
        if kind == "ranks":
            self.ranks = self.random.choice([n for n in (1, 2, 3, 4) if n != self.ranks])
            self._ckpt("reshard", newest, target, "--world-size", self.ranks)
        elif kind == "batch":
            new = self.random.choice([n for n in BATCHES if n != self.batch])
            self._ckpt("rebase-schedule", newest, target, "--old-bs", self.batch, "--new-bs", new)
            self.batch = new
        else:
            self.layout = next(layout for layout in LAYOUTS if layout != self.layout)
        self.source = str(target) if kind in ("ranks", "batch") else newest
        self.number += 1
        self.done[f"changed {kind}"] += 1

    def _ckpt(self, *arguments: object) -> None:
        done = subprocess.run([*CKPT, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def check(self) -> None:
        """Every update saw exactly the samples that come next in the order. Raises AssertionError."""
        config = settings.load(self.config, [f"seed={self.seed}"])
        samples = text.read(config.data, config.batch.global_batch_size)
        order = Order(dataset_size=len(samples.train), global_batch_size=24, seed=self.seed)
        epoch, inside, before = 1, 0, 0
        for at, seen, crc in self.trail:
            size = seen - before
            if at != epoch:
                assert at == epoch + 1, f"epoch {at} after {epoch}"
                assert len(samples.train) - inside < size, f"{len(samples.train) - inside} samples left out"
                epoch, inside = at, 0
            numbers = [samples.train[i] for i in order.permutation(epoch - 1)[inside : inside + size]]
            assert crc == zlib.crc32(array("q", numbers).tobytes()), f"other samples at {seen}"
            inside, before = inside + size, seen


def _strike(process: subprocess.Popen[str], kind: str) -> None:
    if kind == "SIGTERM":
        process.send_signal(signal.SIGTERM)
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family[:-1])


def story(folder: Path, seed: int, interruptions: int, *, changes: bool, kinds: tuple[str, ...]) -> Soak:
    """One run from its first sample to its last, through so many interruptions at most."""
    folder.mkdir(parents=True)
    soak = Soak(folder=folder, seed=seed, changes=changes)
    for _ in range(interruptions):
        if soak.launch(soak.random.choice(kinds)):
            break
        soak.change()
    else:
        assert soak.launch(None), "the last launch did not come to its end"
    soak.check()
    return soak


def main() -> None:
    folder = Path(sys.argv[1])
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    total: Counter[str] = Counter()
    while sum(total[kind] for kind in KINDS) < wanted:
        changes = bool(seed % 2)
        straight = story(folder / f"whole{seed}", seed, 0, changes=False, kinds=KINDS)
        left = wanted - sum(total[kind] for kind in KINDS)
        soak = story(folder / f"soak{seed}", seed, min(left, 10), changes=changes, kinds=KINDS)
        total += soak.done
        same = soak.losses == straight.losses
        assert changes or same, "interrupted without changes, and not the same to the last bit"
        print(
            f"seed {seed}: {dict(soak.done)}, {len(soak.trail)} updates, final validation loss"
            f" {soak.final:.4f}, never interrupted {straight.final:.4f}; all losses equal to the bit: {same}",
            flush=True,
        )
        seed += 1
    print(f"together: {dict(total)}")


if __name__ == "__main__":
    main()
