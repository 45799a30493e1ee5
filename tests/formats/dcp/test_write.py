"""What we write: read back as it was, and loaded by real torch, which trains on as if nothing happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from msgspec.structs import replace
from support import FIXTURES, as_torch, differences, identical, name_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckpttools.checkpoint import Checkpoint, Layout, ParamGroup
from ckpttools.checks import verify
from ckpttools.compare import facts
from ckpttools.errors import UsageError
from ckpttools.execute import execute
from ckpttools.findings import INFO
from ckpttools.formats import dcp as ours
from ckpttools.formats import open_checkpoint
from ckpttools.operations.convert import convert
from ckpttools.tensors import BFLOAT16, FLOAT32, TensorRef, Zeros
from ckpttools.training import Training
from ckpttools.tree import same

from .compare import unlike

SAMPLES = sorted(p for p in (FIXTURES / "dcp").iterdir() if p.name != "truth")
JOB = Path(__file__).parents[2] / "oracles/dcp_job.py"
STYLES = ("nested", "flat", "titan", "accelerate")


def written(checkpoint: Checkpoint, out: Path, **layout: object) -> Path:
    plan = ours.plan(checkpoint, replace(checkpoint.layout, **layout))  # type: ignore[arg-type]
    execute(plan, out)
    return out


def truth_of(path: Path) -> dict[str, object]:
    truth: dict[str, object] = torch.load(path.parent / "truth" / f"{path.name}.pt", weights_only=True)
    return truth


# --- read(write(c)) == c ------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["template", "bare"])
@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_read_again_it_is_what_it_was(path: Path, kept: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(path)
    source = checkpoint if kept else replace(checkpoint, template=None)
    again = open_checkpoint(written(source, tmp_path / "out"))
    assert differences(checkpoint, again, but=("ranks",)) == []  # a copy on every rank is written once
    for one, two in zip(checkpoint.groups, again.groups, strict=True):
        assert {k: list(v) for k, v in one.scalars.items()} == {k: list(v) for k, v in two.scalars.items()}
    assert list(again.client) == list(checkpoint.client)
    assert unlike(again, truth_of(path), groups=again.layout.variant not in ("flat", "titan")) == []
    assert [f for f in verify(tmp_path / "out", workers=1).findings if f.severity != INFO] == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_every_layout_holds_the_same(style: str, ranks: int, tmp_path: Path) -> None:
    path = FIXTURES / "dcp/fsdp2_ws2"
    checkpoint = open_checkpoint(path)
    again = open_checkpoint(written(checkpoint, tmp_path / "out", variant=style, dp_degree=ranks))
    assert again.layout.variant == style
    assert unlike(again, truth_of(path), groups=style in ("nested", "accelerate")) == []
    if style != "accelerate":
        assert again.training == checkpoint.training
    assert verify(tmp_path / "out", workers=1).ok


def changed(change: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
    return change(open_checkpoint(FIXTURES / "dcp/plain-sgd_ws1"))


def rename(c: Checkpoint) -> Checkpoint:
    new = {name: f"net.{name}" for name in c.tensors}
    groups = tuple(
        replace(
            g,
            params={new[n]: s for n, s in g.params.items()},
            state={k: {new[n]: r for n, r in v.items()} for k, v in g.state.items()},
        )
        for g in c.groups
    )
    tensors = {new[name]: ref for name, ref in c.tensors.items()}
    return replace(
        c,
        tensors=tensors,
        groups=groups,
        shared={new[a]: new[o] for a, o in c.shared.items()},
        frozen=frozenset(new[n] for n in c.frozen),
        buffers=frozenset(new[n] for n in c.buffers),
    )


def cast(c: Checkpoint) -> Checkpoint:
    tensors = {n: ref.cast(BFLOAT16) if ref.dtype is FLOAT32 else ref for n, ref in c.tensors.items()}
    return replace(c, tensors=tensors, layout=replace(c.layout, dtype="bf16"))


def step(c: Checkpoint) -> Checkpoint:
    return replace(c, training=replace(c.training, step=999, epoch=2.5, val_loss=0.5, samples=12))


def rate(c: Checkpoint) -> Checkpoint:
    groups = tuple(replace(g, hyper={**g.hyper, "lr": 123.0}) for g in c.groups)
    return replace(c, groups=groups)


def tied(c: Checkpoint) -> Checkpoint:
    return replace(c, shared={"head.weight": "emb.weight"})


def reordered(c: Checkpoint) -> Checkpoint:
    return replace(c, groups=c.groups[::-1])


def client(c: Checkpoint) -> Checkpoint:
    more = {"note": "é", "table": {"a": [1, {"b": (None, 2.0)}]}, "sizes": ((1, 2), [3])}
    return replace(c, client={**c.client, **more}, loss_scaler={"scale": 1024.0, "growth": 3})


def no_optimizer(c: Checkpoint) -> Checkpoint:
    return replace(c, groups=(), buffers=frozenset(), frozen=frozenset())


def extra(c: Checkpoint) -> Checkpoint:
    return replace(c, extra_state={"up._extra_state": b"amax", "down._extra_state": None})


CHANGES = (rename, cast, step, rate, tied, reordered, client, no_optimizer, extra)


@pytest.mark.parametrize("kept", [True, False], ids=["template", "bare"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_change_is_in_what_is_written(
    change: Callable[[Checkpoint], Checkpoint], kept: bool, tmp_path: Path
) -> None:
    checkpoint = changed(change)
    if not kept:
        checkpoint = replace(checkpoint, template=None)
    again = open_checkpoint(written(checkpoint, tmp_path / "out"))
    assert differences(checkpoint, again) == []
    assert same(dict(again.loss_scaler), dict(checkpoint.loss_scaler))
    assert list(again.extra_state) == list(checkpoint.extra_state)
    assert {k for k, v in checkpoint.client.items() if k not in again.client} == set()
    for key in ("note", "table", "sizes"):
        assert same(again.client.get(key), checkpoint.client.get(key))


class Scaled(torch.nn.Linear):
    """With extra state as quantising modules keep it."""

    extra: object = None

    def get_extra_state(self) -> object:
        return {"amax": torch.arange(3.0), "calls": 3, "table": {"a": [1, torch.ones(2)]}}

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize("style", ["nested", "titan"])
def test_extra_state_is_one_value_whatever_is_in_it(style: str, tmp_path: Path) -> None:
    """Its tensors are no weights, and a model loads it from a file that is made of the folder."""
    model = torch.nn.Sequential(Scaled(2, 3), Scaled(3, 2))
    state = model.state_dict()
    dcp.save(state if style == "titan" else {"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = open_checkpoint(tmp_path / "dcp")
    assert sorted(found.tensors) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    convert(tmp_path / "dcp", tmp_path / "a.pt", to="pt")
    new = torch.nn.Sequential(Scaled(2, 3), Scaled(3, 2))
    new.load_state_dict(torch.load(tmp_path / "a.pt")["model_state_dict"])
    convert(tmp_path / "a.pt", tmp_path / "b", to="dcp", dcp_layout=style)
    other = torch.nn.Sequential(Scaled(2, 3), Scaled(3, 2))
    into = other.state_dict()
    dcp.load(into if style == "titan" else {"model": into}, checkpoint_id=tmp_path / "b", no_dist=True)
    other.load_state_dict(into)
    for made in (*new, *other):
        assert repr(made.extra) == repr(made.get_extra_state())


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    once = ours.plan(changed(tied))
    owner = changed(tied).tensors["emb.weight"]
    apart = {"head.weight": replace(owner)}  # equal, and another object
    twice = changed(lambda c: replace(c, shared={}, tensors={**c.tensors, **apart}))
    assert once.nbytes < ours.plan(twice).nbytes
    out = written(changed(tied), tmp_path / "out")
    assert open_checkpoint(out).shared == {"head.weight": "emb.weight"}
    assert verify(out, workers=1).ok
    made = {"model": {"head.weight": torch.zeros(7, 8), "emb.weight": torch.zeros(7, 8)}}
    dcp.load(made, checkpoint_id=out, no_dist=True)
    assert identical(made["model"]["head.weight"], made["model"]["emb.weight"])
    assert made["model"]["head.weight"].abs().sum() > 0


def test_masters_are_written_instead_of_16_bit_weights(tmp_path: Path) -> None:
    checkpoint = changed(lambda c: c)
    master = {name: checkpoint.tensors[name] for group in checkpoint.groups for name in group.params}
    groups = tuple(
        replace(g, state={**g.state, "fp32": {n: master[n] for n in g.params}}) for g in checkpoint.groups
    )
    low = replace(cast(checkpoint), groups=groups, template=None)
    plan = ours.plan(low)
    assert any("fp32 masters" in note for note in plan.notes)
    execute(plan, tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert again.master == {}
    assert all(identical(as_torch(again.tensors[n]), as_torch(ref)) for n, ref in master.items())


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(open_checkpoint(FIXTURES / "dcp/fsdp2_ws2"), tmp_path / name, dp_degree=3)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and set(one) == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
    assert str(tmp_path).encode() not in b"".join(one.values())
    assert ours.plan(open_checkpoint(FIXTURES / "dcp/fsdp2_ws2")).files[-1].path == ".metadata"


def test_what_the_format_cannot_hold_is_said() -> None:
    checkpoint = changed(
        lambda c: replace(
            c,
            optimizer="SGD",
            frozen=frozenset({"frozen"}),
            roles_guessed=False,
            client={**c.client, "model": 3, "nothing": {}},
            training=replace(c.training, saved_batch={"global": 8}),
        )
    )
    notes = "\n".join(ours.plan(checkpoint).notes)
    for what in ("SGD", "'model'", "'nothing'", "batch"):
        assert what in notes
    accelerates = ours.plan(checkpoint, replace(checkpoint.layout, variant="accelerate"))
    assert "which 1 weights are frozen has no place in the format" in accelerates.notes
    flat = ours.plan(checkpoint, replace(checkpoint.layout, variant="flat"))
    assert any("which parameters make a group is not kept" in note for note in flat.notes)


ZERO = ("z2_groups_ws2", "z2_tied_ws2", "z2_frozen_ws2", "z2_clientstate_ws2")


@pytest.mark.parametrize("name", ZERO)
def test_from_a_zero_folder(name: str, tmp_path: Path) -> None:
    """Weights are the fp32 masters, moments and groups what they were, tied names still one."""
    source = open_checkpoint(FIXTURES / "deepspeed-0.19.8" / name)
    execute(ours.plan(source), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    best = {n: source.master.get(source.shared.get(n, n), ref) for n, ref in source.tensors.items()}
    assert [n for n in best if not identical(as_torch(again.tensors[n]), as_torch(best[n]))] == []
    assert [list(g.params) for g in again.groups] == [list(g.params) for g in source.groups]
    for one, two in zip(source.groups, again.groups, strict=True):
        assert set(two.state) == set(one.state) - {"fp32"}
        for kind, refs in two.state.items():
            assert [n for n in refs if not identical(as_torch(refs[n]), as_torch(one.state[kind][n]))] == []
        assert two.hyper.get("lr") == one.hyper.get("lr")
    assert again.shared == source.shared and again.training.step == source.training.step
    assert verify(tmp_path / "out", workers=1).ok


def test_a_count_of_the_training_code_stays_beside_the_engines(tmp_path: Path) -> None:
    """The counters and the schedule lie among the client's values then: no difference."""
    source = open_checkpoint(FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2")
    source = replace(source, client={**source.client, "step": 99})
    execute(ours.plan(source), tmp_path / "out", source=source.path)
    again = open_checkpoint(tmp_path / "out")
    assert again.training.step == source.training.step == 3
    assert again.client["step"] == 99
    assert [fact.name for fact in facts.differences(source, again) if fact.part == facts.CLIENT] == []


def test_keys_that_would_be_the_same_are_refused() -> None:
    ref = TensorRef(FLOAT32, (1,), (Zeros(4),))
    group = ParamGroup(
        params={"a": (1,), "a.b": (1,)}, state={"b.c": {"a": ref}, "c": {"a.b": ref}}, hyper={}
    )
    checkpoint = Checkpoint(
        path=Path("x"),
        layout=Layout(format="pt"),
        tensors={"a": ref, "a.b": ref},
        groups=(group,),
        training=Training(),
    )
    with pytest.raises(UsageError) as caught:
        ours.plan(checkpoint)
    assert caught.value.id == "names-collide"


def test_many_small_tensors_are_planned_in_little(tmp_path: Path) -> None:
    """What all items share is kept once: a plan of many small tensors must not hold their headers."""
    ref = TensorRef(FLOAT32, (4, 3), (Zeros(48),))
    tensors = {f"layer.{i}.weight": replace(ref) for i in range(10_000)}
    plan = ours.plan(Checkpoint(path=tmp_path, layout=Layout(format="pt"), tensors=tensors))
    literals = {id(s.data): len(s.data) for f in plan.files[:-1] for s in f.segments if hasattr(s, "data")}
    assert sum(literals.values()) < 10_000
    assert plan.files[-1].nbytes < 2_000_000


# --- torch takes it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["nested", "flat", "titan"])
def test_torch_reads_it(style: str, tmp_path: Path) -> None:
    path = FIXTURES / "dcp/tp_ws4"  # columns and rows
    truth = truth_of(path)
    out = written(open_checkpoint(path), tmp_path / "out", variant=style, dp_degree=3)
    dcp_to_torch_save(out, tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=True)
    model = (
        {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if style == "titan"
        else state["model"]
    )
    weights = truth["model"]
    assert isinstance(weights, dict)
    assert [name for name in weights if not identical(model[name], weights[name])] == []
    assert list(model) == list(weights)


def launched(ranks: int, *arguments: str, job: Path = JOB) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks else []), str(job), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def resumed(ranks: int, kind: str, folder: Path) -> list[float]:
    losses = folder.parent / f"{folder.name}-{ranks}.json"
    launched(ranks, "resume", kind, str(folder), "--losses", str(losses))
    made: list[float] = json.loads(losses.read_text())
    return made


def uninterrupted(tmp_path: Path, kind: str) -> list[float]:
    """The losses of steps 3 to 5 of a run that was never saved."""
    launched(0, "save", kind, str(tmp_path / "never"), "--steps", "6", "--truth", str(tmp_path / "never.pt"))
    losses: list[float] = torch.load(tmp_path / "never.pt", weights_only=True)["losses"]
    return losses[3:]


TORCHRUN = pytest.mark.distributed
HEAVY = [pytest.mark.distributed, pytest.mark.heavy]
CASES = [  # source, the style that is written, what loads it, ranks
    pytest.param("fsdp2_ws2", "nested", "fsdp2-nested", 2, marks=TORCHRUN),
    pytest.param("fsdp2_ws2", "flat", "fsdp2-flat", 4, marks=HEAVY),
    pytest.param("fsdp2_ws2", "titan", "fsdp2-titan", 2, marks=HEAVY),
    pytest.param("app_ws2", "nested", "fsdp2-app", 1, marks=HEAVY),
    pytest.param("accelerate_ws2", "accelerate", "fsdp2-accelerate", 2, marks=HEAVY),
    pytest.param("fsdp2_ws2", "nested", "fsdp2-nested", 1, marks=HEAVY),
    pytest.param("fsdp2_ws2", "nested", "fsdp2-nested", 4, marks=HEAVY),
    pytest.param("fsdp2_ws2", "nested", "hsdp-nested", 4, marks=HEAVY),
    pytest.param("tp_ws4", "nested", "tp-bare-sgd-nested", 4, marks=HEAVY),
    pytest.param("tp_ws4", "nested", "fsdp2-bare-sgd-nested", 2, marks=HEAVY),
    pytest.param("plain-sgd_ws1", "nested", "plain-sgd-nested", 0),
]


@pytest.mark.parametrize(("source", "style", "kind", "ranks"), CASES)
def test_torch_trains_on_from_it(source: str, style: str, kind: str, ranks: int, tmp_path: Path) -> None:
    """With the losses of the run that was never interrupted; in three rows of parts, which no job has."""
    checkpoint = open_checkpoint(FIXTURES / "dcp" / source)
    out = written(checkpoint, tmp_path / "out", variant=style, dp_degree=3)
    plain = "-".join(part for part in kind.split("-") if part in ("sgd", "bare"))
    expected = uninterrupted(tmp_path, f"plain-{plain}-nested")
    assert resumed(ranks, kind, out) == pytest.approx(expected, rel=2e-6)
    assert len(set(expected)) == 3


@pytest.mark.distributed
@pytest.mark.heavy
def test_accelerate_trains_on_from_it(tmp_path: Path) -> None:
    job = JOB.with_name("dcp_accelerate.py")
    launched(2, "save", str(tmp_path / "saved"), str(tmp_path / "one.json"), job=job)
    checkpoint = replace(open_checkpoint(tmp_path / "saved"), template=None)
    out = written(checkpoint, tmp_path / "out", variant="accelerate", dp_degree=3)
    launched(2, "load", str(out), str(tmp_path / "two.json"), job=job)
    one, two = ((tmp_path / name).read_text() for name in ("one.json", "two.json"))
    assert one == two
