"""The batch out of all evidence: who decides, what contradicts, and what stays unknown."""

from __future__ import annotations

import pytest

from ckpttools.schedules.evidence import (
    Fact,
    Known,
    kept,
    known,
    of_counters,
    of_deepspeed,
    of_samples,
    stated,
)
from ckpttools.schedules.lengths import Unit


def numbers(batch: Known) -> tuple[int | None, ...]:
    return batch.total, batch.micro, batch.ranks, batch.accumulation


# a ds_config's settings on two ranks, and the batch that DeepSpeed makes of them
DEEPSPEED: dict[str, tuple[dict[str, int], tuple[int | None, ...]]] = {
    "micro and accumulation": ({"micro": 2, "accumulation": 2}, (8, 2, 2, 2)),
    "all": ({"global": 8, "micro": 2, "accumulation": 2}, (8, 2, 2, 2)),
    "total and micro": ({"global": 8, "micro": 2}, (8, 2, 2, 2)),
    "total and accumulation": ({"global": 8, "accumulation": 2}, (8, 2, 2, 2)),
    "micro": ({"micro": 2}, (4, 2, 2, 1)),
    "total": ({"global": 8}, (8, 4, 2, 1)),
    "nothing": ({}, (None, None, 2, None)),
    "only accumulation": ({"accumulation": 2}, (None, None, 2, 2)),
}


@pytest.mark.parametrize(("settings", "made"), DEEPSPEED.values(), ids=DEEPSPEED)
def test_ds_config_is_completed_as_deepspeed_does(
    settings: dict[str, int], made: tuple[int | None, ...]
) -> None:
    assert numbers(known(of_deepspeed(settings, 2))) == made


@pytest.mark.parametrize("settings", [s for s, _ in DEEPSPEED.values() if "micro" in s or "global" in s])
def test_deepspeed_itself_completes_it_so(settings: dict[str, int]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    names = {"global": "train_batch_size", "micro": "train_micro_batch_size_per_gpu"}
    names["accumulation"] = "gradient_accumulation_steps"
    config = DeepSpeedConfig.__new__(DeepSpeedConfig)
    config.world_size = 2
    config.train_batch_size = settings.get("global")
    config.train_micro_batch_size_per_gpu = settings.get("micro")
    config.gradient_accumulation_steps = settings.get("accumulation")
    config._set_batch_related_parameters()
    ours = known(of_deepspeed(settings, 2))
    theirs = (config.train_batch_size, config.train_micro_batch_size_per_gpu, 2)
    assert numbers(ours) == (*theirs, config.gradient_accumulation_steps)


@pytest.mark.parametrize(
    ("iterations", "updates", "between"), [(50, 25, (2, 2)), (51, 25, (2, 2)), (3, 1, (2, 3)), (1, 1, (1, 1))]
)
def test_counters_prove_the_accumulation(iterations: int, updates: int, between: tuple[int, int]) -> None:
    (fact,) = of_counters(iterations, updates)
    assert (fact.least, fact.most) == between
    for steps in range(1, 60):
        assert (iterations // steps == updates) == (fact.least <= steps <= fact.most)


def test_counters_decide_where_no_setting_does() -> None:
    facts = [Fact("ranks", 2, 2, "files"), *stated("micro", 2, "loader"), *of_counters(50, 25)]
    batch = known(facts)
    assert numbers(batch) == (8, 2, 2, 2) and "50 micro-batches" in batch.by["accumulation"]
    proven = known([Fact("ranks", 2, 2, "files"), *stated("micro", 2, "loader"), *of_samples(200, 25)])
    assert numbers(proven) == (8, 2, 2, 2) and proven.by["accumulation"] == "the other three"


def test_a_setting_that_counters_contradict_is_said() -> None:
    facts = [*stated("accumulation", 1, "optim_wrapper"), *of_counters(50, 25)]
    batch = known(facts)
    assert batch.accumulation == 1
    assert any("50 micro-batches and 25 updates says 2" in note for note in batch.notes)


def test_settings_that_do_not_multiply_leave_the_total_unknown() -> None:
    batch = known(of_deepspeed({"global": 8, "micro": 2, "accumulation": 2}, 3))
    assert batch.total is None and "make 12, not 8" in batch.notes[0]


def test_what_nothing_says_is_not_one() -> None:
    assert numbers(known([Fact("ranks", 2, 2, "files")])) == (None, None, 2, None)
    assert str(known([])) == "? = ? x ? ranks x ? accumulated"


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize("unit", ["micro", "update"])
@pytest.mark.parametrize("batch", [(2, 2, 2), (4, 1, 3), (3, 4, 4)])
def test_a_batch_is_kept_or_its_change_is_said(batch: tuple[int, ...], unit: Unit, ranks: int) -> None:
    micro, steps, old = batch
    total = micro * steps * old
    found = kept(known(of_deepspeed({"micro": micro, "accumulation": steps}, old)), ranks, unit, 50)
    if ranks == old:
        assert found.micro is None and not found.notes
    elif total % ranks:
        assert found.micro is None and "rebase-schedule" in found.notes[0]
    else:
        assert found.micro is not None and found.accumulation is not None
        assert found.micro * ranks * found.accumulation == total
        moved = unit == "micro" and found.micro * ranks != micro * old
        assert any("rebase-schedule" in note for note in found.notes) == moved


def test_an_unknown_batch_is_said_on_other_ranks() -> None:
    (note,) = kept(known(of_deepspeed({}, 2)), 4).notes
    assert "not known" in note and "on 4 instead of 2 ranks" in note and "rebase-schedule" in note
