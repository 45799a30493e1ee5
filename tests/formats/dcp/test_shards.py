"""The safetensors shards of torch's HuggingFaceStorageWriter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import as_torch, identical

from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.formats import open_checkpoint

ROWS, COLUMNS = torch.arange(28.0).reshape(7, 4), torch.randn(7, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As two ranks of torch 2.13 write them: rows, columns, and a tensor that only one rank writes."""
    parts = [
        {"rows": ([0, 0], ROWS[:4]), "columns": ([0, 0], COLUMNS[:, :2])},
        {"rows": ([4, 0], ROWS[4:]), "columns": ([0, 2], COLUMNS[:, 2:]), "whole": ([0], torch.ones(3))},
    ]
    for rank, held in enumerate(parts, 1):
        places = {name: {"saved_offsets": at} for name, (at, _) in held.items()}
        save_file(
            {name: tensor.contiguous() for name, (_, tensor) in held.items()},
            tmp_path / f"shard-{rank:05d}-model-00001-of-00001.safetensors",
            {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)},
        )
    return tmp_path


def test_they_are_put_together(folder: Path) -> None:
    found = open_checkpoint(folder)
    assert (found.layout.format, found.layout.variant, found.layout.dp_degree) == ("dcp", "safetensors", 2)
    for name, tensor in (("rows", ROWS), ("columns", COLUMNS), ("whole", torch.ones(3))):
        assert identical(as_torch(found.tensors[name]), tensor)
    assert verify(folder, workers=1).ok


def test_a_missing_shard(folder: Path) -> None:
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CkptError) as caught:
        open_checkpoint(folder)
    assert caught.value.id == "shard-missing"
    assert not verify(folder, workers=1).ok


@pytest.mark.parametrize(
    ("places", "id"),
    [
        ({"rows": {"saved_offsets": [5, 0]}}, "chunk-missing"),
        ({"rows": {"saved_offsets": [3, 0]}}, "chunks-overlap"),
        ({"rows": {"saved_offsets": [4]}}, "safetensors-header"),
        ({"rows": {"saved_offsets": [-4, 0]}}, "safetensors-header"),
        ({"rows": 3}, "safetensors-header"),
        (None, "safetensors-header"),
    ],
)
def test_places_that_make_no_sense(places: object, id: str, folder: Path) -> None:
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    metadata = {} if places is None else {"DCP_SHARDING_INFO": json.dumps(places)}
    save_file({"rows": ROWS[4:].contiguous()}, path, metadata)
    with pytest.raises(CkptError) as caught:
        open_checkpoint(folder)
    assert caught.value.id == id and caught.value.where.startswith(str(folder))
    assert not verify(folder, workers=1).ok


def test_parts_of_the_same_place_are_one_only_if_they_are_equal(tmp_path: Path) -> None:
    """Two ranks keep a tensor: equal copies are one, others are not passed over, nor one without a place."""
    at = {"w": {"saved_offsets": [0, 0]}}
    for name, places, differ, good in (
        ("equal", at, 0.0, True),
        ("other", at, 1.0, False),
        ("nowhere", {}, 0.0, False),
    ):
        (tmp_path / name).mkdir()
        for rank in (1, 2):
            save_file(
                {"w": torch.full((2, 3), rank * differ)},
                tmp_path / name / f"shard-{rank:05d}-model-00001-of-00001.safetensors",
                {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)},
            )
        if good:
            assert identical(as_torch(open_checkpoint(tmp_path / name).tensors["w"]), torch.zeros(2, 3))
        else:
            with pytest.raises(CkptError) as caught:
                open_checkpoint(tmp_path / name)
            assert caught.value.id == "safetensors-header"
