"""The guides' own keys, and which setting overrules which."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from ckpttools.trainer import config as settings
from ckpttools.trainer.config import Config
from ckpttools.trainer.policy import policy
from ckpttools.trainer.state import Progress

GUIDE = """
training:
  save_steps: 50
  max_keep_ckpts: 3
  weight_decay: 0.05
  label_smoothing: 0.1
  save_minutes: 30
  skip_evaluation: false
  save_all_checkpoints: false
  best_model_tracking: {enabled: true, save_best_only: true}
  evaluation: {partial_eval_during_training: true, full_eval_at_end: true, eval_best_model_only: true}
save: {layout: iter}
"""


def load(tmp_path: Path, *overrides: str, text: str = GUIDE) -> Config:
    path = tmp_path / "guide.yaml"
    path.write_text(text)
    return settings.load(path, overrides)


def test_the_keys_of_the_guides_are_read_as_they_stand(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.save.save_steps, config.optimizer.weight_decay) == (50, 0.05)
    training = config.training
    assert (training.save_total_limit, training.label_smoothing, training.save_minutes) == (3, 0.1, 30.0)
    made = policy(config)
    assert (made.evaluates, made.partial, made.at_end, made.best_at_end) == (True,) * 4
    assert (made.best, made.only_best, made.limit, made.notes) == (True, True, 3, ())


def test_the_resolved_settings_are_read_again(tmp_path: Path) -> None:
    import yaml

    config = load(tmp_path)
    again = tmp_path / "config.yaml"
    again.write_text(yaml.safe_dump(config.plain()))
    assert settings.load(again) == config


def test_an_override_of_a_setting_by_its_other_name(tmp_path: Path) -> None:
    assert load(tmp_path, "training.save_steps=7").save.save_steps == 7
    assert load(tmp_path, "training.save_total_limit=3").training.save_total_limit == 3


KEEPS_ON = "training.save_total_limit goes on to remove all but the last 3 of each kind"
NAMES = (
    "save_all_checkpoints",
    "best_model_tracking.enabled",
    "best_model_tracking.save_best_only",
    "evaluation.partial_eval_during_training",
    "evaluation.full_eval_at_end",
    "evaluation.eval_best_model_only",
)


@pytest.mark.parametrize("asked", list(product((False, True), repeat=6)))
def test_skip_evaluation_has_the_highest_priority(tmp_path: Path, asked: tuple[bool, ...]) -> None:
    given = dict(zip(NAMES, asked, strict=True))
    overrides = [f"training.{name}={str(value).lower()}" for name, value in given.items()]
    made = policy(load(tmp_path, "training.skip_evaluation=true", *overrides))
    assert not (made.evaluates or made.partial or made.at_end or made.best_at_end)
    assert not (made.best or made.only_best)
    forced = {name: name == "save_all_checkpoints" for name in NAMES}
    assert made.notes[-1] == "save_all_checkpoints: " + KEEPS_ON
    assert made.notes[:-1] == tuple(
        f"skip_evaluation: training.{name} {str(given[name]).lower()} -> {str(value).lower()}"
        for name, value in forced.items()
        if given[name] != value
    )


def test_save_all_checkpoints_with_evaluation_left_on(tmp_path: Path) -> None:
    made = policy(load(tmp_path, "training.save_all_checkpoints=true"))
    assert (made.evaluates, made.best, made.only_best) == (True, True, False)
    note = "save_all_checkpoints: training.best_model_tracking.save_best_only true -> false"
    assert made.notes == (note, "save_all_checkpoints: " + KEEPS_ON)


def test_without_a_best_model_the_last_is_evaluated_at_the_end(tmp_path: Path) -> None:
    asked = [
        "training.best_model_tracking.enabled=false",
        "training.best_model_tracking.save_best_only=false",
    ]
    made = policy(load(tmp_path, *asked))
    assert (made.at_end, made.best_at_end, made.limit) == (True, False, 3)
    assert made.notes == (
        "best_model_tracking.enabled false: training.evaluation.eval_best_model_only true -> false",
    )


def test_nothing_held_out_is_nothing_to_evaluate(tmp_path: Path) -> None:
    made = policy(load(tmp_path, "data.validation_samples=0", text="{}"))
    assert not (made.evaluates or made.partial or made.at_end)


@pytest.mark.parametrize(
    ("best", "loss", "improves"),
    [
        (None, float("nan"), False),  # a first loss that is none must not end the tracking
        (float("nan"), 0.9, True),  # as older checkpoints say it
        (float("nan"), float("nan"), False),
        (None, 0.9, True),
        (0.9, 0.5, True),
        (0.9, 0.9, False),
        (0.9, float("nan"), False),
    ],
)
def test_nan_is_never_the_best(best: float | None, loss: float, improves: bool) -> None:
    assert Progress(best_val_loss=best).improves(loss) is improves
