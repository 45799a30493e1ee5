"""`ckpt batch`: the numbers of the guides, the checkpoint's own, and what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Ckpt
from support import FIXTURES

R21 = ("--bs", 64, "--gpus", 2, "--accum", 2, "--dataset-size", 100_000, "--epochs", 8)
R22 = (
    "--bs",
    128,
    "--gpus",
    2,
    "--dataset-size",
    100_000,
    "--epochs",
    8,
    "--iteration",
    1500,
    "--new-bs",
    64,
)


def rows(out: str) -> dict[str, list[str]]:
    """A table's lines: the first column by name, the others as they are printed."""
    cells = (line.split("  ") for line in out.splitlines())
    return {first.strip(): [cell.strip() for cell in rest if cell.strip()] for first, *rest in cells}


def test_the_worked_numbers(ckpt: Ckpt) -> None:
    shown = rows(ckpt("batch", *R21).out)
    assert shown["effective batch"] == ["256"]
    assert shown["iterations per epoch"] == ["781"]
    assert shown["iterations in 8 epochs"] == ["6248"]
    assert shown["optimizer updates"] == ["3124"]


def test_what_an_iteration_means(ckpt: Ckpt) -> None:
    shown = rows(ckpt("batch", *R22).out)
    assert shown["iteration 1500 is epoch"] == ["3.85", "1.92"]
    assert shown["of the run"] == ["48.08 %", "24.01 %"]
    assert shown["samples seen"] == ["384000", "192000"]


def test_the_same_as_one_document(ckpt: Ckpt) -> None:
    document = json.loads(ckpt("batch", *R22, "--json").out)
    assert document["now"]["effective_batch"] == 256 and document["new"]["effective_batch"] == 128
    assert document["now"]["iteration"]["samples"] == 384_000
    assert [(w["gpus"], w["accumulation"]) for w in document["ways"]] == [(2, 2), (1, 4), (4, 1)]
    assert all(w["off"] == 0 for w in document["ways"])


def test_without_an_exact_way_the_nearest_are_shown(ckpt: Ckpt) -> None:
    ways = json.loads(ckpt("batch", "--bs", 128, "--gpus", 2, "--new-bs", 48, "--json").out)["ways"]
    assert ways and all(w["off"] != 0 for w in ways)
    assert [abs(w["off"]) for w in ways] == sorted(abs(w["off"]) for w in ways)


def test_the_partial_batch_is_kept_on_demand(ckpt: Ckpt) -> None:
    assert rows(ckpt("batch", *R21, "--keep-last").out)["iterations per epoch"] == ["782"]


def test_a_checkpoint_supplies_what_it_knows(ckpt: Ckpt) -> None:
    """8 = 2 x 2 ranks x 2, 185 samples, 1 epoch, at update 3."""
    document = json.loads(ckpt("batch", FIXTURES / "trainer/z2_bf16_2", "--json").out)
    now = document["now"]
    assert (now["effective_batch"], now["gpus"], now["accumulation"]) == (8, 2, 2)
    assert (document["dataset_size"], document["epochs"], now["iteration"]["number"]) == (185, 1, 6)
    assert now["updates"] == 23


@pytest.mark.parametrize(
    ("options", "id"),
    [
        (("--bs", 0), "bad-usage"),
        (("--bs", 4, "--gpus", -1), "bad-usage"),
        (("--bs", 4, "--iteration", -1), "bad-usage"),
        ((), "batch-unknown"),
        (("--bs", 64, "--dataset-size", 10), "epoch-empty"),
        ((FIXTURES / "monolithic/pcdet",), "batch-unknown"),
        ((FIXTURES / "hf/single", "--bs", 4), "weights-only"),
    ],
    ids=str,
)
def test_bad_input(options: tuple[object, ...], id: str, ckpt: Ckpt) -> None:
    ran = ckpt("batch", *options)
    assert ran.code == 2 and f"[{id}]" in ran.err and "hint:" in ran.err


def test_where_am_i_under_the_new_batch(ckpt: Ckpt) -> None:
    assert rows(ckpt("batch", *R22).out)["the same place: iteration"] == ["1500", "3003"]
    document = json.loads(ckpt("batch", *R22, "--json").out)
    assert document["new"]["same_place"] == {"unit": "iteration", "count": 3003}


# checkpoints that know their batch, and what they need to be told to be rebased
KNOWING = {
    "mmengine-deepspeed/iter_50.pth": (),
    "trainer/z2_bf16_2": (),
    "trainer/z2_bf16_4": (),
    "hf-trainer/plain/checkpoint-2": (),
    "deepspeed-0.19.8/z2_clientsched_ws2": ("--dataset-size", 350),
}


@pytest.mark.parametrize(("name", "options"), KNOWING.items(), ids=KNOWING)
def test_batch_and_rebase_agree(name: str, options: tuple[object, ...], ckpt: Ckpt) -> None:
    """Also at the end of an epoch whose last batch is not whole: 350 samples are 3 updates of 120."""
    src = FIXTURES / name
    for new in (1, 4, 30):
        asked = ("--new-bs", new, *options, "--json")
        moved = ckpt("rebase-schedule", src, "x", *asked, "--batch-is", "per-gpu", "--dry-run")
        shown = json.loads(ckpt("batch", src, *asked).out)
        if moved.code:
            assert "same_place" not in shown["new"], moved.err
            continue
        position = json.loads(moved.out)["position"]
        assert shown["now"]["same_place"]["count"] == position["old"]
        assert shown["new"]["same_place"]["count"] == position["new"]


def test_what_a_checkpoint_does_not_say_is_a_question_mark(ckpt: Ckpt) -> None:
    src = FIXTURES / "monolithic/full/epoch_2_step_40.pt"
    shown = rows(ckpt("batch", src, "--bs", 4, "--new-bs", 2).out)
    assert shown["GPUs"] == shown["accumulation"] == shown["effective batch"] == ["?", "?"]
    assert shown["the same place: update"] == ["40", "80"]
    document = json.loads(ckpt("batch", src, "--bs", 4, "--json").out)
    assert document["now"]["gpus"] is None and document["now"]["effective_batch"] is None


def test_a_checkpoint_fills_in_what_it_knows(ckpt: Ckpt) -> None:
    shown = rows(ckpt("batch", FIXTURES / "mmengine-deepspeed/iter_50.pth").out)
    assert shown["effective batch"] == ["8"] and shown["accumulation"] == ["2"]


def test_what_decided_is_said_and_a_contradiction_is_no_number(ckpt: Ckpt, tmp_path: Path) -> None:
    """MMEngine's own configuration still says 2 per GPU after a reshard of the 8 samples to one rank."""
    src = FIXTURES / "mmengine-deepspeed/iter_50.pth"
    assert "accumulation by strategy.gradient_accumulation_steps" in ckpt("batch", src).out
    assert ckpt("reshard", src, tmp_path / "iter_50.pth", "--world-size", 1).code == 0
    ran = ckpt("batch", tmp_path / "iter_50.pth")
    assert rows(ran.out)["effective batch"] == ["?"] and "which of them holds is not known" in ran.out
    document = json.loads(ckpt("batch", tmp_path / "iter_50.pth", "--json").out)
    assert document["now"]["effective_batch"] is None and document["from"]["micro"]
    assert rows(ckpt("batch", tmp_path / "iter_50.pth", "--bs", 4).out)["effective batch"] == ["8"]
