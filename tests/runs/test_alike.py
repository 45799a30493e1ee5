"""A listing that reads a save by another one says what reading it whole says, whatever is in it."""

from __future__ import annotations

import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FIXTURES

from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError
from ckpttools.runs.alike import MANY, Kinds
from ckpttools.runs.find import Entry, _entry

ZERO = FIXTURES / "deepspeed-0.19.8"
SAMPLES = [
    FIXTURES / "trainer" / "z2_bf16_2" / "iter_000003.pth",
    *sorted(
        p for name in ("z2_bf16_ws2", "z2_groups_ws2", "z1_bf16opt_ws2") for p in (ZERO / name).glob("*/")
    ),
    *sorted(p for suffix in ("pt", "pth", "ckpt") for p in FIXTURES.glob(f"*/**/*.{suffix}"))[:400:20],
]


def said(entry: Entry) -> dict[str, object]:
    """Everything but where it lies: copies of one save follow each other."""
    values = {
        name: getattr(entry, name) for name in ("format", "state", "resumes", "ranks", "metrics", "best")
    }
    return {**values, "model": entry.model, "problem": str(entry.problem), "nbytes": entry.nbytes}


def copied(source: Path, to: Path) -> Path:
    (shutil.copytree if source.is_dir() else shutil.copy)(source, to)
    return to


def both(path: Path, kinds: Kinds) -> tuple[bool, Entry, Entry]:
    """Whether it is read by another one, what that gives, and what reading it whole does."""
    try:
        used = kinds.other((path, path.parent)) is not None
    except CkptError:  # which the listing tells
        used = False
    return used, _entry(path, path.parent, kinds), _entry(path, path.parent, Kinds(()))


def learnt(path: Path) -> Kinds:
    kinds = Kinds([(path, path.parent)] * MANY)
    _entry(path, path.parent, kinds)
    return kinds


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: str(path.relative_to(FIXTURES)))
def test_a_copy_says_the_same(sample: Path, tmp_path: Path) -> None:
    kinds = learnt(copied(sample, tmp_path / f"save_1{sample.suffix}"))
    used, fast, whole = both(copied(sample, tmp_path / f"save_2{sample.suffix}"), kinds)
    assert said(fast) == said(whole)
    if sample in SAMPLES[1:4]:
        assert used


def state(n: int) -> dict[str, Any]:
    """As torch saves AdamW and a scheduler, without their imports."""
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "1.running_mean": (6,), "2.weight": (2, 6), "2.bias": (2,)}
    weights = {name: torch.full(shape, 0.5 / n) for name, shape in shapes.items()}
    trained = [weight for name, weight in weights.items() if "running" not in name]
    moments = {
        i: {"step": torch.tensor(float(n)), "exp_avg": weight.clone(), "exp_avg_sq": weight * weight}
        for i, weight in enumerate(trained)
    }
    group = {"lr": 1e-3 / n, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    return {
        "epoch": n // 10,
        "global_step": n,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": moments, "param_groups": [{**group, "params": [0, 1, 2, 3]}]},
        "scheduler_state_dict": {"T_max": 100, "last_epoch": n, "_step_count": n + 1, "_last_lr": [1e-3 / n]},
        "train_loss": 1.0 / n,
        "val_loss": 1.5 / n,
    }


def test_saves_of_one_run(tmp_path: Path) -> None:
    """Counters, losses, rates and data differ: nearly all are read by the first, and each says its own."""
    numbers = [*range(1, 20), *range(254, 259), 65535, 65536, 70000]
    for n in numbers:
        torch.save(state(n), tmp_path / f"iter_{n:06d}.pth")
    places = [(path, tmp_path) for path in sorted(tmp_path.iterdir())]
    kinds, used = Kinds(places), 0
    for (path, _), n in zip(places, numbers, strict=True):
        fast, entry, whole = both(path, kinds)
        used += fast
        assert said(entry) == said(whole) and entry.state.step == n, path
        assert entry.metrics == {"train_loss": 1.0 / n, "val_loss": 1.5 / n}
    assert used >= len(numbers) - 6


@pytest.mark.parametrize(
    "other",
    [
        lambda saved: saved["model_state_dict"].popitem(),
        lambda saved: saved["model_state_dict"].update({"0.weight": torch.zeros(4, 6)}),
        lambda saved: saved.pop("optimizer_state_dict"),
        lambda saved: saved.update(epoch="many"),
        lambda saved: saved.update(epoch=torch.tensor(77)),
        lambda saved: saved.update(val_loss=None),
        lambda saved: saved.update(train_loss=float("nan")),
        lambda saved: saved.update(global_step=-3),
        lambda saved: saved.update(global_step=10**16),
        lambda saved: saved["optimizer_state_dict"]["param_groups"][0].update(lr=torch.tensor(0.5)),
        lambda saved: saved["optimizer_state_dict"]["param_groups"][0].update(params=[0, 1, 2, 3, 4]),
    ],
)
def test_what_differs_otherwise_is_read_whole(tmp_path: Path, other: Callable[[Any], object]) -> None:
    first, second = tmp_path / "iter_000012.pth", tmp_path / "iter_000013.pth"
    torch.save(state(12), first)
    kinds = learnt(first)
    saved = state(13)
    other(saved)
    torch.save(saved, second)
    _, fast, whole = both(second, kinds)
    same = [(name, str(value)) for name, value in said(fast).items()]  # nan is not itself
    assert same == [(name, str(value)) for name, value in said(whole).items()]


def test_a_counter_that_is_a_tensor_is_read_from_its_own_file(tmp_path: Path) -> None:
    for n in (1, 2):
        torch.save({**state(12), "epoch": torch.tensor(n)}, tmp_path / f"iter_{n}.pth")
    used, fast, whole = both(tmp_path / "iter_2.pth", learnt(tmp_path / "iter_1.pth"))
    assert used and said(fast) == said(whole)


def test_numbers_in_what_lies_in_several_places(tmp_path: Path) -> None:
    """One dict under two keys: the pickle holds it once, and who asks under the second key gets its own."""
    for n in (12, 13):
        progress = {"iter": n, "epoch": n // 2, "loss": 1.0 / n}
        saved = {"model_state_dict": {"w.weight": torch.ones(2, 2)}, "resume": progress, "meta": progress}
        torch.save({**saved, "deep": [[progress]], "val_loss": 2.0 / n}, tmp_path / f"iter_{n}.pth")
    kinds = learnt(tmp_path / "iter_12.pth")
    _, fast, whole = both(tmp_path / "iter_13.pth", kinds)
    assert said(fast) == said(whole) and fast.state.iteration == 13


def with_crc(data: bytearray, record: tuple[int, int, int], at: int, value: int) -> bytes:
    """The file with another byte in its pickle, and every checksum as if it had been saved so."""
    start, nbytes, crc = record
    old = struct.pack("<I", crc)
    data[start + at] = value
    new = struct.pack("<I", zlib.crc32(data[start : start + nbytes]))
    tail = data[start + nbytes :]
    return bytes(data[: start + nbytes] + tail.replace(old, new))


def mutations(path: Path, count: int, seed: int) -> Iterator[bytes]:
    """Bytes changed anywhere in what a listing reads, half of them in the pickle under a right checksum."""
    chance = random.Random(seed)
    archive = read_torch_file(path).archive
    assert archive is not None
    pickle = archive.records["data.pkl"]
    data = path.read_bytes()
    directory = max(record.end for record in archive.records.values())
    floats = [
        at + chance.randrange(1, 9) for at in range(pickle.nbytes - 9) if data[pickle.start + at] == 0x47
    ]
    for i in range(count):
        if i % 2:
            at = chance.choice(floats) if i % 4 == 1 else chance.randrange(pickle.nbytes)
            value = chance.choice((data[pickle.start + at] ^ 1, chance.randrange(256)))
            yield with_crc(bytearray(data), (pickle.start, pickle.nbytes, pickle.crc32), at, value)
        elif i % 8 == 0:
            yield data[: chance.randrange(len(data))]
        else:
            out = bytearray(data)
            held = [*range(pickle.header, pickle.end + 200), *range(directory - 100, len(data))]
            out[chance.choice(held)] ^= 1 << chance.randrange(8)
            yield bytes(out)


def check_mutations(tmp_path: Path, count: int, seed: int) -> int:
    first, second = tmp_path / "iter_000012.pth", tmp_path / "iter_000013.pth"
    torch.save(state(12), first)
    kinds = learnt(first)
    used = 0
    for data in mutations(first, count, seed):
        second.write_bytes(data)
        fast, entry, whole = both(second, kinds)
        used += fast
        assert str(said(entry)) == str(said(whole)), data
    return used


def test_bytes_changed_at_random(tmp_path: Path) -> None:
    assert check_mutations(tmp_path, 96, 1)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_bytes_changed_at_random(tmp_path: Path, seed: int) -> None:
    check_mutations(tmp_path, 1000, seed)


def test_other_counters_in_a_deepspeed_folder(tmp_path: Path) -> None:
    (tag,) = (path for path in (ZERO / "z2_bf16_ws2").iterdir() if path.is_dir())
    kinds = learnt(copied(tag, tmp_path / "global_step1"))
    for n in range(2, 6):
        path = copied(tag, tmp_path / f"global_step{n}")
        model = path / "mp_rank_00_model_states.pt"
        data = bytearray(model.read_bytes())
        archive = read_torch_file(model).archive
        assert archive is not None
        pickle = archive.records["data.pkl"]
        key = data.index(b"global_steps", pickle.start) - pickle.start + len(b"global_steps")
        at = data.index(b"K", pickle.start + key) - pickle.start + 1  # BININT1
        model.write_bytes(with_crc(data, (pickle.start, pickle.nbytes, pickle.crc32), at, 40 + n))
        used, fast, whole = both(path, kinds)
        assert used and said(fast) == said(whole) and fast.state.step == 40 + n
