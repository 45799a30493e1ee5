"""One table of frameworks: each reads what it wrote, and no two of them claim the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import FIXTURES, ZERO_FIXTURES, name_of

from ckpttools import formats
from ckpttools.frameworks import FRAMEWORKS, _saved, read
from ckpttools.stores.links import within

# the last resorts: whatever lies in a ZeRO folder or in a file
ANY = ("deepspeed", "plain")
WRITTEN = {
    "ckpt train": ["trainer/z2_bf16_2", "trainer/z2_fp32_1"],
    "lightning": ["lightning/file/epoch=0-step=3.ckpt", "lightning/deepspeed/epoch=0-step=3.ckpt"],
    "mmengine": [
        "mmengine/run/iter_1500.pth",
        "mmengine-deepspeed/iter_50.pth",
        "monolithic/mmengine/epoch_4.pth",
    ],
    "hf-trainer": ["hf-trainer/plain/checkpoint-2", "hf-trainer/deepspeed/checkpoint-2"],
    "accelerate": ["accelerate/plain", "accelerate/deepspeed"],
    "deepspeed": ["bundle/checkpoint-200", "deepspeed-0.19.8/z2_bf16_ws2"],
    "openpcdet": ["monolithic/pcdet/checkpoint_epoch_4.pth"],
    "timm": ["monolithic/timm/checkpoint-5.pth.tar"],
    "distributed": ["dcp/fsdp2_ws2", "dcp/step-3"],
    "plain": ["monolithic/full/epoch_2_step_40.pt", "monolithic/bare/model.pth"],
}
CASES = [(framework, name) for framework, names in WRITTEN.items() for name in names]


def claimed(path: Path) -> list[str]:
    source = formats.locate(path)
    with within(source.root):
        checkpoint = formats.read(source)
        saved = _saved(source, checkpoint, source.format.torch_files(checkpoint))
        return [each.name for each in FRAMEWORKS if each.recognise(saved)]


def test_the_table_is_tried_in_full() -> None:
    assert sorted(WRITTEN) == sorted(each.name for each in FRAMEWORKS)


@pytest.mark.parametrize(("framework", "name"), CASES)
def test_each_reads_what_it_wrote(framework: str, name: str) -> None:
    path = FIXTURES / name
    assert framework in claimed(path)
    source = formats.locate(path)
    assert read(source, formats.read(source)).framework == framework


@pytest.mark.parametrize("path", ZERO_FIXTURES + [FIXTURES / name for _, name in CASES], ids=name_of)
def test_no_two_claim_the_same(path: Path) -> None:
    assert len([each for each in claimed(path) if each not in ANY]) <= 1
