"""ZeRO folders: what is written reads as it was, and what was changed reads as changed; with and without what
the source's own files add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from changes import CHANGES, Change, content_differences, reordered
from msgspec.structs import replace
from support import FIXTURES, RANK_LOCAL, ZERO_FIXTURES, name_of, variant_of

from ckpttools.checkpoint import Checkpoint
from ckpttools.execute import execute
from ckpttools.formats import open_checkpoint, zero
from ckpttools.formats.zero.read import read

NEWEST = FIXTURES / "deepspeed-0.19.8"
SOURCES = [p for p in ZERO_FIXTURES if variant_of(p) not in ("z2_elastic", "z2_elastic_sgd", *RANK_LOCAL)]
VARIED = [
    NEWEST / name
    for name in ("z2_groups_ws2", "z2_tied_ws2", "z2_frozen_ws2", "z1_bf16opt_groups_ws2", "z2_buffers_ws2",
                 "z2_clientsched_ws2", "z2_align_rr_groups_ws2", "z2_fp32_ws2", "z2_nostep_ws2")
]  # fmt: skip


def there_and_back(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    execute(zero.plan(checkpoint, checkpoint.layout), folder / "tag")
    return read(folder / "tag")


def stripped(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, template=None)


def cases(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", [p for p in paths if p.exists()], ids=name_of)


@cases(SOURCES)
@pytest.mark.parametrize("template", ["kept", "stripped"])
def test_what_is_written_reads_as_it_was(path: Path, template: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(path)
    written = checkpoint if template == "kept" else stripped(checkpoint)
    assert list(content_differences(there_and_back(written, tmp_path), checkpoint)) == []


@cases(VARIED)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("template", ["kept", "stripped"])
def test_what_is_changed_reads_as_changed(path: Path, change: Change, template: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(path)
    if change is reordered and len(checkpoint.groups) == 1:
        pytest.skip("one group has no other order")
    changed = change(checkpoint)
    assert list(content_differences(changed, checkpoint)), "the change changes nothing"
    written = changed if template == "kept" else stripped(changed)
    assert list(content_differences(there_and_back(written, tmp_path), changed)) == []


def test_lists_and_tuples_of_nested_state_stay_what_they_are(tmp_path: Path) -> None:
    checkpoint = stripped(open_checkpoint(NEWEST / "z2_nested_ws2"))
    execute(zero.plan(checkpoint, checkpoint.layout), tmp_path / "tag")
    for source in (NEWEST / "z2_nested_ws2/global_step3", tmp_path / "tag"):
        (shard,) = source.glob("*_rank_1_*optim_states.pt")
        state = torch.load(shard, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"]
        assert type(state[0]["history"]) is list and type(state[0]["pair"]) is tuple
