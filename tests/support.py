"""What several tests need: the fixtures, checkpoints compared by content, torch.load's trees compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckpttools import formats
from ckpttools.checkpoint import Checkpoint
from ckpttools.execute import execute
from ckpttools.formats import zero
from ckpttools.frameworks.surroundings import with_surroundings
from ckpttools.passes.read import load
from ckpttools.tensors import TensorRef
from ckpttools.transforms.reshard import reshard

FIXTURES = Path(__file__).parent.parent / "fixtures"
# recognised and refused
REFUSED = dict.fromkeys(
    ("moe", "pp", "autotp1", "autotp3", "autoep2", "autoep3", "folded2"), "layout-unsupported"
)
# whose optimizers keep state of single ranks, which no other number of ranks can be given
RANK_LOCAL = ("z2_ranklocal", "z2_ranknumber", "z2_bnb_adamw8", "z2_bnb_lion8", "z2_muon", "z1_muon_fp32")


def _deepspeed_samples() -> Iterator[Path]:
    for version in sorted(FIXTURES.glob("deepspeed-*")):
        yield from sorted(p for p in version.iterdir() if p.name != "truth")


def variant_of(sample: Path) -> str:
    return sample.name.rpartition("_ws")[0]


REFUSED_SAMPLES = [p for p in _deepspeed_samples() if variant_of(p) in REFUSED]
# every sample of a DeepSpeed version that is ZeRO-1 or ZeRO-2, with the truth about it
SAMPLES = [p for p in _deepspeed_samples() if variant_of(p) not in REFUSED and p.name[:3] in ("z1_", "z2_")]
STAGE0_SAMPLES = [p for p in _deepspeed_samples() if p.name.startswith("z0_")]
ZERO3_SAMPLES = [p for p in _deepspeed_samples() if p.name.startswith("z3_")]
# everything that any framework wrote through DeepSpeed
ZERO_FIXTURES = [
    *SAMPLES,
    *sorted((FIXTURES / "trainer").iterdir()),
    *sorted((FIXTURES / "hf-trainer/deepspeed").iterdir()),
    *sorted((FIXTURES / "hf-trainer/peft").iterdir()),
    *sorted((FIXTURES / "lightning/deepspeed").glob("*.ckpt")),
    FIXTURES / "accelerate/deepspeed",
    FIXTURES / "bundle/checkpoint-200",
    FIXTURES / "mmengine/run/iter_1500.pth",
]


def name_of(path: Path) -> str:
    """A fixture's name in a test's id."""
    return path.relative_to(FIXTURES).as_posix()


def truth_of(sample: Path) -> dict[str, Any]:
    """What the engine of a DeepSpeed sample held when it saved (tests/oracles/deepspeed_samples.py)."""
    truth: dict[str, Any] = torch.load(sample.parent / "truth" / f"{sample.name}.pt", weights_only=False)
    return truth


def resharded(source: Path, ranks: int, destination: Path) -> Path:
    """What `ckpt reshard source destination --world-size ranks` does, without the command line."""
    found = formats.locate(source)
    checkpoint = formats.read(found)
    layout = reshard(checkpoint, ranks)
    plan = zero.plan(checkpoint, layout)
    changed = (checkpoint, layout) if ranks != checkpoint.layout.dp_degree else None
    execute(with_surroundings(found, plan, ranks=changed), destination, source=source)
    return destination


# --- values -------------------------------------------------------------------------------------------


def as_torch(ref: TensorRef) -> torch.Tensor:
    """The value as torch has it."""
    raw = load(ref)
    if not raw.size:
        return torch.empty(ref.shape, dtype=getattr(torch, ref.dtype.name))
    out = torch.from_numpy(raw.reshape(-1).view(np.uint8).copy())
    return out.view(getattr(torch, ref.dtype.name)).reshape(ref.shape)


def bits(tensor: torch.Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same dtype, shape and bits: NaN equals the same NaN, -0 differs from 0."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def tensor_differences(
    ours: Mapping[str, TensorRef], theirs: Mapping[str, torch.Tensor], what: str = "tensor"
) -> list[str]:
    """Where our tensors differ from an oracle's, in names or bits; the order is not looked at."""
    out = [f"{what} {name}: not in the oracle" for name in ours if name not in theirs]
    for name, expected in theirs.items():
        if name not in ours:
            out.append(f"{what} {name}: missing")
        elif not identical(as_torch(ours[name]), expected):
            out.append(f"{what} {name}: differs")
    return out


# --- two checkpoints ----------------------------------------------------------------------------------


def differences(a: Checkpoint, b: Checkpoint, *, but: tuple[str, ...] = ()) -> list[str]:
    """Where two checkpoints differ in content; `but` names fields of Layout that may."""
    left = {name: getattr(a.layout, name) for name in a.layout.__struct_fields__}
    right = {name: getattr(b.layout, name) for name in b.layout.__struct_fields__}
    out = [f"layout.{k}: {left[k]} != {right[k]}" for k in left if k not in but and left[k] != right[k]]
    for field in ("training", "shared", "frozen", "buffers"):
        x, y = getattr(a, field), getattr(b, field)
        if x != y and repr(x) != repr(y):
            out.append(f"{field}: {x} != {y}")
    out += _refs("tensors", a.tensors, b.tensors)
    if len(a.groups) != len(b.groups):
        return [*out, f"{len(a.groups)} groups != {len(b.groups)}"]
    for g, (one, two) in enumerate(zip(a.groups, b.groups, strict=True)):
        if list(one.params.items()) != list(two.params.items()):
            out.append(f"groups[{g}].params: {one.params} != {two.params}")
        if one.hyper != two.hyper or list(one.hyper) != list(two.hyper):
            out.append(f"groups[{g}].hyper: {one.hyper} != {two.hyper}")
        if list(one.state) != list(two.state):
            out.append(f"groups[{g}].state: {list(one.state)} != {list(two.state)}")
        for kind in set(one.state) & set(two.state):
            out += _refs(f"groups[{g}].{kind}", one.state[kind], two.state[kind])
    return out


def _refs(what: str, a: Mapping[str, TensorRef], b: Mapping[str, TensorRef]) -> Iterator[str]:
    if list(a) != list(b):
        yield f"{what}: names {sorted(set(a) ^ set(b)) or 'in another order'}"
    for name in a:
        if name in b:
            if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
                yield f"{what}.{name}: {a[name].dtype}{a[name].shape} != {b[name].dtype}{b[name].shape}"
            elif load(a[name]).tobytes() != load(b[name]).tobytes():
                yield f"{what}.{name}: values"


# --- two trees of torch.load --------------------------------------------------------------------------


def tree_differences(
    a: object, b: object, at: str = "", *, values: bool = True, storages: bool = False
) -> Iterator[str]:
    """Where two values of torch.load differ: types, keys and their order, tensors bit by bit.

    Without `values`, floats and tensors are compared by type, shape and dtype only. With `storages`, views
    must also lie in storages of the same size.
    """
    again = functools.partial(tree_differences, values=values, storages=storages)
    if type(a) is not type(b):
        yield f"{at}: {type(a).__name__} != {type(b).__name__}"
        return
    match a, b:
        case torch.Tensor(), torch.Tensor():
            if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
                yield f"{at}: {a.dtype}{tuple(a.shape)} != {b.dtype}{tuple(b.shape)}"
            elif values and bits(a) != bits(b):
                yield f"{at}: values"
            if storages and a.untyped_storage().nbytes() != b.untyped_storage().nbytes():
                yield f"{at}: storage of {a.untyped_storage().nbytes()} != {b.untyped_storage().nbytes()}"
        case np.ndarray(), np.ndarray():
            if a.dtype != b.dtype or a.shape != b.shape or (values and a.tobytes() != b.tobytes()):
                yield f"{at}: array"
        case dict(), dict():
            if list(a) != list(b):
                yield f"{at}: keys {list(a)} != {list(b)}"
            for key in a:
                if key in b:
                    yield from again(a[key], b[key], f"{at}.{key}")
        case (list() | tuple(), list() | tuple()):
            if len(a) != len(b):
                yield f"{at}: {len(a)} items != {len(b)}"
            for i, (x, y) in enumerate(zip(a, b, strict=False)):
                yield from again(x, y, f"{at}[{i}]")
        case _:
            plain = not hasattr(a, "__dict__") or isinstance(a, type) or hasattr(a, "_value_")
            if not plain:
                yield from again(vars(a), vars(b), at)
            elif not (isinstance(a, float) and not values) and a != b and repr(a) != repr(b):
                yield f"{at}: {a!r} != {b!r}"


def torch_folder(folder: Path) -> dict[str, Any]:
    """Every torch file of a folder by name, loaded by torch."""
    return {p.name: torch.load(p, weights_only=False) for p in sorted(folder.iterdir()) if p.suffix == ".pt"}


def decayed(path: Path) -> Path:
    """A plain loop's file with a class of its own that has PolynomialLR's fields."""

    class Decay(torch.optim.lr_scheduler.PolynomialLR):
        def get_lr(self) -> list[float]:  # type: ignore[override]
            return [base / (1 + self.last_epoch) for base in self.base_lrs]

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = Decay(optimizer, total_iters=100)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    tree = {"global_step": 7, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    torch.save(tree | {"model": {"w": torch.zeros(2)}}, path)
    return path
