"""Every ordered pair of formats: what the target holds is what the source held, and it comes back.

A model of torch is written in each format, and from each of those in each other one. Each result is verified
and compared by digest: weights, master weights, moments, steps, settings and counters.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support import FIXTURES, RANK_LOCAL, REFUSED, as_torch, identical, name_of

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks import verify
from ckpttools.compare.content import progress
from ckpttools.compare.digests import shown
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats import Source, open_checkpoint
from ckpttools.operations import convert as operation
from ckpttools.operations.convert import convert
from ckpttools.operations.digest import Digested, compare, digest
from ckpttools.operations.request import TARGETS

from . import sources

RANKED = [to for to in TARGETS if to not in ("pt", "hf")]
ANY = ("universal", "zero0")  # folders for any number of ranks
DEFAULT = ("all", "bf16", "shapes")  # of the default suite; the others with -m heavy
# the second without the name that universal folders cannot have
PATHOLOGICAL = ("pathological", "shapes")
DTYPES = {"bf16": "bf16", "fp16": "fp16"}  # of the weights of a run without masters


def write(src: Path, folder: Path, to: str, ranks: int = 2, dtype: str | None = None) -> Path:
    """`src` in another format, verified; in a new folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    dst = folder / ("run.pt" if to == "pt" else "run")
    options: dict[str, Any] = {"world_size": ranks} if to in RANKED and to not in ANY else {}
    if to == "hf":
        options["exclude"] = ["complex128"]  # safetensors has no such type, and says so
    made = convert(src, dst, to=to, dtype=dtype, **options).destination  # type: ignore[arg-type]
    errors = [f for f in verify(made).findings if f.severity == "error"]
    assert [f for f in errors if (f.id, f.where) != ("nonfinite", "nan")] == []  # it is in the source
    return made


class Written:
    """One model in each format, each made when it is asked for first."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir()
        self.dtype = DTYPES.get(name)
        self.source = self.folder / "source.pt"
        if name in PATHOLOGICAL:
            sources.pathological(self.source, names=name == "pathological")
        else:
            sources.save(name, self.source)
        # a file of torch does not tell buffers from frozen weights, and ZeRO-3 must know
        stated = {"buffer_names": sorted(open_checkpoint(self.source).buffers)}
        torch.save(torch.load(self.source, weights_only=False) | stated, self.source)
        self._made: dict[str, Path] = {}
        self._digests: dict[Path, Digested] = {}

    def __getitem__(self, to: str) -> Path:
        if to not in self._made:
            self._made[to] = write(self.source, self.folder / to, to, dtype=self.dtype)
        return self._made[to]

    def digest(self, path: Path) -> Digested:
        if path not in self._digests:
            self._digests[path] = digest(path)
        return self._digests[path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("pairs")
    made: dict[str, Written] = {}
    yield lambda name: made.get(name) or made.setdefault(name, Written(folder, name))


def lost(before: Digested, after: Digested) -> list[str]:
    """What the second does not hold as the first did."""
    found = compare(before, after)
    out = [f"{d.kind} {d.name}" for d in found.different]
    # a master that the first has not is its one copy of the weight, exactly
    out += [f"no {kind}" for kind, only_left in found.one_sided.items() if only_left or kind != "master"]
    one, two = before.checkpoint, after.checkpoint
    if dict(one.shared) != dict(two.shared):
        out.append(f"tied: {dict(one.shared)} != {dict(two.shared)}")
    return out


def counters_lost(before: Digested, after: Digested) -> list[str]:
    """Counters, losses and schedule of the first that the second says otherwise; zeros may come."""
    one, two = (progress(each.checkpoint, shown) for each in (before, after))
    parts = ("counters", "losses", "schedule")
    return [key for part in parts for key, value in one[part].items() if two[part].get(key) != value]


def refused(model: Written, a: str | None, b: str) -> str | None:
    """The id with which a pair is refused before anything is written: universal checkpoints have a folder of
    each parameter's name; what has no groups makes no folder of DeepSpeed's. None for `a` is a format that
    holds all of it.
    """
    if a == "hf" and b not in ("hf", "pt", "dcp"):
        return "no-groups"
    if b == "universal" and model.name == "pathological":
        return "name-unsafe"
    return None


def write_or_refuse(src: Path, folder: Path, model: Written, a: str, b: str, ranks: int = 3) -> Path | None:
    """None where the pair is refused, as it must be."""
    expected = refused(model, a, b)
    if expected is None:
        return write(src, folder, b, ranks=ranks, dtype=model.dtype)
    with pytest.raises(CkptError) as caught:
        write(src, folder, b, ranks=ranks, dtype=model.dtype)
    assert caught.value.id == expected
    assert list(folder.iterdir()) == []
    return None


def settings_lost(before: Digested, after: Digested) -> list[str]:
    """Settings of the first that the second has not; a class's defaults may be added."""
    one, two = before.checkpoint.groups, after.checkpoint.groups
    if [list(g.params) for g in one] != [list(g.params) for g in two]:
        return ["the groups"]
    return [
        f"{g}: {key}"
        for g, (a, b) in enumerate(zip(one, two, strict=True))
        for key, value in a.hyper.items()
        if type(b.hyper.get(key)) is not type(value) or b.hyper[key] != value
    ]


KINDS = {"exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq", "momentum_buffer", "sum", "master"}


def quick(name: str, *formats: str) -> bool:
    """Whether it is of the default suite: stage 0, the simplest to read and write, with one model."""
    return name in DEFAULT if "zero0" not in formats else name == "all"


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.heavy, id="-".join(case))
        for case in product((*sources.MODELS, *PATHOLOGICAL), TARGETS, TARGETS)
    ],
)
def test_a_pair(name: str, a: str, b: str, written: Any, tmp_path: Path) -> None:
    model: Written = written(name)
    if refused(model, None, a):
        return
    source = model[a]
    made = write_or_refuse(source, tmp_path / "out", model, a, b)
    if made is None:
        return
    before, after = model.digest(source), digest(made)
    gone = lost(before, after)
    if model.dtype and gone == ["no master"]:  # they were made from the weights, which are all there is
        gone = []
    if b == "hf":
        assert {each for each in gone if each.removeprefix("no ") not in KINDS} <= {"weight complex128"}
        return
    assert gone == []
    assert after.checkpoint.training.step == before.checkpoint.training.step
    assert settings_lost(before, after) == []
    if model.dtype is None:
        assert after.digests.state == before.digests.state
    assert counters_lost(before, after) == []


@pytest.mark.parametrize("to", RANKED)
def test_more_ranks_than_rows(to: str, written: Any, tmp_path: Path) -> None:
    """Most of 16 ranks hold nothing of a tensor of one element or of none."""
    model: Written = written("shapes")
    source = model["zero2"]
    made = write(source, tmp_path / "out", to, ranks=16)
    back = write(made, tmp_path / "back", "zero2", ranks=2)
    for each in (made, back):
        assert lost(model.digest(source), digest(each)) == []
    if to == "dcp":
        mesh = convert(source, tmp_path / "mesh", to="dcp", mesh="8x3").destination
        assert lost(model.digest(source), digest(mesh)) == []


def test_what_safetensors_cannot_hold_is_refused_by_name(written: Any, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        convert(written("pathological")["pt"], tmp_path / "out", to="hf")
    assert caught.value.id == "dtype-unsupported" and "complex128" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [True, False], ids=["template", "bare"])
@pytest.mark.parametrize(
    ("name", "through"),
    [
        pytest.param(
            *case,
            # in 16 bits each step of the way is a pair of its own above
            marks=() if quick(*case) and case[0] != "bf16" else pytest.mark.heavy,
            id="-".join(case),
        )
        for case in product((*sources.MODELS, *PATHOLOGICAL), TARGETS)
        if case[1] != "hf"
    ],
)
def test_there_and_back(
    name: str, through: str, kept: bool, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, through another format for three ranks, and back: every bit, setting and counter."""
    model: Written = written(name)
    if not kept:
        read = operation.check_before_use

        def bare(source: Source, **how: bool) -> Checkpoint:
            return replace(read(source, **how), template=None)

        monkeypatch.setattr(operation, "check_before_use", bare)
    for start in ("pt", "zero2", "dcp"):
        first = model[start]
        there = write_or_refuse(first, tmp_path / start / "there", model, start, through)
        if there is None:
            continue
        back = write(there, tmp_path / start / "back", start, dtype=model.dtype)
        one, two = model.digest(first), digest(back)
        assert lost(one, two) == []
        assert two.digests.state == one.digests.state
        assert counters_lost(one, two) == []
        assert settings_lost(one, two) == []
        names = [(c.checkpoint.frozen, c.checkpoint.buffers - c.checkpoint.shared.keys()) for c in (one, two)]
        assert names[0] == names[1]


# --- what frameworks wrote ----------------------------------------------------------------------------

THEIRS = [
    "deepspeed-0.19.8/z2_groups_ws2",
    "deepspeed-0.19.8/z2_fp16_ws2",
    "deepspeed-0.19.8/z3_bf16_ws2",
    "dcp/fsdp2_ws2",
]
OTHERS = [
    *(p for v in ("0.19.8", "0.16.9", "0.10.3") for p in sorted((FIXTURES / f"deepspeed-{v}").iterdir())),
    *sorted((FIXTURES / "dcp").iterdir()),
    *sorted((FIXTURES / "trainer").iterdir()),
]
CASES = [
    *(pytest.param(FIXTURES / name, id=name) for name in THEIRS),
    *(
        pytest.param(path, id=name_of(path), marks=pytest.mark.heavy)
        for path in OTHERS
        if path.name != "truth" and name_of(path) not in THEIRS
    ),
]
NOT_CUT = (
    "elastic", "no-groups", "state-incomplete", "state-not-flat", "rank-local-state", "tensor-unknown",
)  # fmt: skip


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("path", CASES)
def test_what_frameworks_saved(path: Path, to: str, tmp_path: Path) -> None:
    """Whole in the other format, or refused by name before anything is written."""
    try:
        made = write(path, tmp_path / "out", to, ranks=3)
    except Unsupported as error:
        variant = path.name.rpartition("_ws")[0]
        assert error.id in NOT_CUT or variant in REFUSED or variant in RANK_LOCAL, error
        assert list((tmp_path / "out").iterdir()) == []
        return
    before, after = digest(path), digest(made)
    gone = lost(before, after)
    if to == "hf":  # which keeps nothing beside the weights
        gone = [each for each in gone if not each.startswith(("no ", "client state "))]
    # frozen weights are in hf as the masters are; masters that a run keeps in 16 bits are fp32 elsewhere
    free = ("weight ", "master ") if to == "hf" else ("master ",)
    gone = [each for each in gone if not (each.startswith(free) and widened(before, after, each))]
    assert gone == []
    if to != "hf":
        assert settings_lost(before, after) == []


def widened(before: Digested, after: Digested, what: str) -> bool:
    """Whether a 16-bit weight or master is the same number in a wider type."""
    kind, _, name = what.partition(" ")
    held = [
        each.checkpoint.master if kind == "master" else each.checkpoint.tensors for each in (before, after)
    ]
    one, two = (tensors.get(name) for tensors in held)
    if one is None or two is None or one.dtype.itemsize >= two.dtype.itemsize:
        return False
    return identical(as_torch(one).float(), as_torch(two))
