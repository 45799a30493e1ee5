"""What a run evaluates, saves and keeps: the section `training` with its overrides carried out.

`skip_evaluation` has the highest priority, then `save_all_checkpoints`; without a best model none is
evaluated at the end, but the last one where that is asked for. Each setting that is overruled is named, so
that a log says why the run did something else than its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from ckpttools.trainer.config import Config

PART = 8  # a partial evaluation takes every eighth of the held-out samples


class Policy(Struct, frozen=True, kw_only=True):
    """`limit` is the number of checkpoints of each kind that stay. `notes` are the overrides."""

    evaluates: bool  # at the end of each epoch
    partial: bool
    at_end: bool
    best_at_end: bool
    best: bool
    only_best: bool
    limit: int | None
    notes: tuple[str, ...]


def policy(config: Config) -> Policy:
    """The decisions for a run.

    >>> from ckpttools.trainer.config import BestModel, Training
    >>> asked = Training(skip_evaluation=True, best_model_tracking=BestModel(enabled=True))
    >>> made = policy(Config(training=asked))
    >>> made.best, made.evaluates
    (False, False)
    >>> made.notes[1]
    'skip_evaluation: training.best_model_tracking.enabled true -> false'
    """
    asked = config.training
    best, evaluation = asked.best_model_tracking, asked.evaluation
    wanted = {
        "save_all_checkpoints": asked.save_all_checkpoints,
        "best_model_tracking.enabled": best.enabled,
        "best_model_tracking.save_best_only": best.save_best_only,
        "evaluation.partial_eval_during_training": evaluation.partial_eval_during_training,
        "evaluation.full_eval_at_end": evaluation.full_eval_at_end,
        "evaluation.eval_best_model_only": evaluation.eval_best_model_only,
    }
    notes: list[str] = []
    if asked.skip_evaluation:
        forced = {name: name == "save_all_checkpoints" for name in wanted}
        notes += _overrides("skip_evaluation", wanted, forced)
        wanted = forced
    if wanted["save_all_checkpoints"]:
        forced = {**wanted, "best_model_tracking.save_best_only": False}
        notes += _overrides("save_all_checkpoints", wanted, forced)
        wanted = forced
        if asked.save_total_limit is not None:
            notes.append(
                f"save_all_checkpoints: training.save_total_limit goes on to remove all but the last"
                f" {asked.save_total_limit} of each kind"
            )
    best_at_end = "evaluation.eval_best_model_only"
    if wanted[best_at_end] and not wanted["best_model_tracking.enabled"]:
        forced = {**wanted, best_at_end: False}
        notes += _overrides("best_model_tracking.enabled false", wanted, forced)
        wanted = forced
    evaluates = bool(config.data.validation_samples) and not asked.skip_evaluation
    return Policy(
        evaluates=evaluates,
        partial=evaluates and wanted["evaluation.partial_eval_during_training"],
        at_end=evaluates and wanted["evaluation.full_eval_at_end"],
        best_at_end=evaluates and wanted[best_at_end],
        best=wanted["best_model_tracking.enabled"],
        only_best=wanted["best_model_tracking.enabled"] and wanted["best_model_tracking.save_best_only"],
        limit=asked.save_total_limit,
        notes=tuple(notes),
    )


def _overrides(by: str, wanted: dict[str, bool], forced: dict[str, bool]) -> Iterator[str]:
    for name, value in forced.items():
        if value != wanted[name]:
            yield f"{by}: training.{name} {str(wanted[name]).lower()} -> {str(value).lower()}"
