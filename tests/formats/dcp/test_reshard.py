"""A distributed checkpoint for other ranks: the same content, in the rows that torch would give them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import run
from support import FIXTURES, name_of

from ckpttools.checks import verify
from ckpttools.errors import UsageError
from ckpttools.formats import open_checkpoint
from ckpttools.formats.dcp.metadata import read_metadata
from ckpttools.formats.dcp.pieces import rows
from ckpttools.operations.convert import convert
from ckpttools.operations.digest import digest
from ckpttools.operations.reshard import reshard
from ckpttools.tensors import FLOAT32, TensorRef, Zeros
from ckpttools.transforms.reshard import ranks_of

SAMPLES = sorted(p for p in (FIXTURES / "dcp").iterdir() if p.name != "truth")
HEAVY = pytest.mark.heavy
RANKS = [
    (3, None),
    (None, "2x4"),
    *(pytest.param(*each, marks=HEAVY) for each in [(1, None), (16, None), (None, "2x2"), (None, "3x2")]),
]


@pytest.mark.parametrize(("world", "mesh"), RANKS, ids=str)
@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_the_content_is_the_same(path: Path, world: int | None, mesh: str | None, tmp_path: Path) -> None:
    made = reshard(path, tmp_path / path.name, world_size=world, mesh=mesh)
    assert [f.id for f in verify(made.destination).findings if f.severity in ("error", "warning")] == []
    before, after = digest(path), digest(made.destination)
    assert after.digests.state == before.digests.state
    assert (after.digests.settings, after.digests.counters) == (
        before.digests.settings,
        before.digests.counters,
    )
    old, new = open_checkpoint(path).layout, open_checkpoint(made.destination).layout
    assert new.variant == old.variant


def test_rows_are_where_torch_puts_them_on_two_dimensions(tmp_path: Path) -> None:
    """What tensor parallelism cuts by rows and FSDP2 cuts again is at the same place, on the same rank."""
    torchs = FIXTURES / "dcp/tp_ws4"  # 2 data-parallel times 2 tensor-parallel ranks, saved by torch
    at = reshard(torchs, tmp_path / "out", mesh="2x2").destination
    theirs, ours = read_metadata(torchs).tensors, read_metadata(at).tensors

    def places(tensor: object) -> set[tuple[object, ...]]:
        return {
            (p.offsets, p.shape, p.item.file.split("_")[2])
            for p in tensor.pieces  # type: ignore[attr-defined]
            if p.numel
        }

    key = "model.up.weight"  # ColwiseParallel: by rows
    assert len(places(theirs[key])) == 4
    assert places(ours[key]) == places(theirs[key])


def test_uneven_rows() -> None:
    ref = TensorRef(FLOAT32, (7, 2), (Zeros(56),))
    assert [(rank, first, part.shape[0]) for rank, first, part in rows(ref, (4,))] == [
        (0, 0, 2),
        (1, 2, 2),
        (2, 4, 2),
        (3, 6, 1),
    ]
    # 4 and 3 rows by tensor parallelism; each of them over 2 data-parallel ranks
    assert [(rank, first, part.shape[0]) for rank, first, part in rows(ref, (2, 2))] == [
        (0, 0, 2),
        (2, 2, 2),
        (1, 4, 2),
        (3, 6, 1),
    ]
    assert [rank for rank, _, _ in rows(TensorRef(FLOAT32, (), (Zeros(4),)), (2, 2))] == [0]
    assert [part.shape for _, _, part in rows(TensorRef(FLOAT32, (0, 3), ()), (2,))] == [(0, 3)]


def test_what_lies_beside_an_fsdp_folder_comes_along(tmp_path: Path) -> None:
    """The Trainer's and accelerate's small files; random states of single ranks do not."""
    source = shutil.copytree(FIXTURES / "dcp/accelerate_ws2", tmp_path / "checkpoint-3")
    (source / "trainer_state.json").write_text(json.dumps({"global_step": 3, "epoch": 1.0}))
    (source / "scheduler.pt").write_bytes(
        (FIXTURES / "hf-trainer/plain/checkpoint-4/scheduler.pt").read_bytes()
    )
    (source / "rng_state_0.pth").write_bytes(b"x")
    (source / "rng_state_1.pth").write_bytes(b"x")
    done = run("reshard", source, tmp_path / "new", "--world-size", 4)
    assert done.code == 0, done
    names = {p.name for p in (tmp_path / "new").iterdir()}
    assert {"trainer_state.json", "scheduler.pt", "pytorch_model_fsdp_0", "optimizer_0"} <= names
    assert not any(name.startswith("rng_state") for name in names)
    assert "rng_state_0.pth, rng_state_1.pth" in done.err


def test_positions_of_single_ranks_are_left_out_and_named(tmp_path: Path) -> None:
    source = FIXTURES / "dcp/step-3"
    assert "dataloader" in open_checkpoint(source).client
    same = reshard(source, tmp_path / "same", world_size=2)
    assert "dataloader" in open_checkpoint(same.destination).client
    for made in (
        reshard(source, tmp_path / "four", world_size=4),
        convert(source, tmp_path / "mesh", to="dcp", mesh="4x2"),
    ):
        assert "dataloader" not in open_checkpoint(made.destination).client
        assert any("'dataloader' is not carried" in note for note in made.notes)
    other = convert(source, tmp_path / "tp", to="dcp", mesh="2x2")  # as many data-parallel ranks as before
    assert "dataloader" in open_checkpoint(other.destination).client


@pytest.mark.parametrize(
    ("words", "id"),
    [
        (("reshard", "dcp/fsdp2_ws2"), "bad-usage"),
        (("reshard", "dcp/fsdp2_ws2", "--mesh", "2x0"), "bad-usage"),
        (("reshard", "dcp/fsdp2_ws2", "--mesh", "2x2x2"), "bad-usage"),
        (("reshard", "dcp/fsdp2_ws2", "--mesh", "2x2", "--world-size", "3"), "bad-usage"),
        (("reshard", "dcp/fsdp2_ws2", "--mesh", "999x999"), "bad-usage"),
        (("reshard", "deepspeed-0.19.8/z2_groups_ws2", "--mesh", "2x2"), "mesh-unsupported"),
        (("convert", "dcp/fsdp2_ws2", "--mesh", "2x2", "--to", "pt"), "bad-usage"),
        (("convert", "dcp/fsdp2_ws2", "--mesh", "two", "--to", "dcp"), "bad-usage"),
    ],
)
def test_refused(words: tuple[str, ...], id: str, tmp_path: Path) -> None:
    command, source, *options = words
    done = run(command, FIXTURES / source, tmp_path / "out", *options)
    assert done.code == 2 and f"[{id}]" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_is_spelled_in_one_way_or_another() -> None:
    assert ranks_of(8, "2x4") == ranks_of(None, "2x4") == (8, (2, 4))
    assert ranks_of(3, None) == (3, ())
    with pytest.raises(UsageError):
        ranks_of(None, "-1x2")


def test_shards_of_the_model_alone_need_no_ranks(tmp_path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    folder = tmp_path / "shards"
    dcp.save(
        {"a.weight": torch.arange(6.0).reshape(2, 3)},
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        no_dist=True,
    )
    done = run("reshard", folder, tmp_path / "out", "--world-size", 2)
    assert done.code == 2 and "[not-zero]" in done.err
