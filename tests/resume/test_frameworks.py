"""The forecast for transformers' Trainer and for Lightning, against the real ones resuming."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckpttools.resume import Forecast, NewRun, Target, foretell
from ckpttools.resume.config_files import of_arguments, read_config
from ckpttools.resume.model import Model, Tensor

STEPS, SAVED, BATCH = 8, 4, 2


def foretold(path: Path, run: NewRun | None = None) -> Forecast:
    return foretell(Target.find(path), run or NewRun())


def shapes(module: nn.Module) -> Model:
    return Model(
        tensors={n: Tensor(shape=tuple(t.shape), dtype="fp32") for n, t in module.state_dict().items()}
    )


# --- transformers -------------------------------------------------------------------------------------


def train(folder: Path, hidden: int = 8, resume: Path | None = None, **arguments: Any) -> list[float]:
    """Train a tiny Llama, or go on from a checkpoint; the learning rate of each update, as it is used."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rates: list[float] = []

    class Rates(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    settings = transformers.LlamaConfig(
        vocab_size=16, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings)
    data = [
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}
        for _ in range(STEPS * BATCH)
    ]
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "save_steps": SAVED,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**options), train_dataset=data, callbacks=[Rates()]
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    return rates


def test_the_trainer_goes_on_as_foretold(tmp_path: Path) -> None:
    whole = train(tmp_path / "run")
    saved = tmp_path / f"run/checkpoint-{SAVED}"
    forecast = foretold(saved)
    assert (forecast.verdict, forecast.step, forecast.epoch) == ("safe", SAVED, 0.5)
    assert forecast.rates.next is not None
    rates = train(tmp_path / "again", resume=saved)
    assert rates == whole[SAVED:]
    assert rates[0] == pytest.approx(forecast.rates.first[0], rel=1e-12)
    assert rates[1] == pytest.approx(forecast.rates.next[0], rel=1e-12)


def test_the_trainers_new_learning_rate_has_no_effect(tmp_path: Path) -> None:
    whole = train(tmp_path / "run")
    saved = tmp_path / f"run/checkpoint-{SAVED}"
    forecast = foretold(saved, of_arguments({"learning_rate": 0.5}))
    assert [(o.setting, o.configured, o.used) for o in forecast.overridden] == [("learning_rate", 0.5, 0.01)]
    assert train(tmp_path / "again", resume=saved, learning_rate=0.5) == whole[SAVED:]


def test_the_trainer_computes_another_curve_for_another_batch(tmp_path: Path) -> None:
    whole = train(tmp_path / "run")
    saved = tmp_path / f"run/checkpoint-{SAVED}"
    forecast = foretold(saved, of_arguments({"per_device_train_batch_size": 1}))
    assert (forecast.verdict, forecast.rates.next) == ("careful", None)
    rates = train(tmp_path / "again", resume=saved, per_device_train_batch_size=1)
    assert rates[0] == pytest.approx(forecast.rates.first[0], rel=1e-12)
    assert rates[1] != pytest.approx(whole[SAVED + 1], rel=0.01)  # it jumps, as was said


def test_a_larger_batch_may_leave_nothing_of_the_run(tmp_path: Path) -> None:
    """The Trainer finds its epoch by the new number of updates: 12 are 3 epochs of 4, and 2 are asked for."""
    train(tmp_path / "run", num_train_epochs=2, save_steps=12)
    saved = tmp_path / "run/checkpoint-12"
    forecast = foretold(saved, of_arguments({"per_device_train_batch_size": 2 * BATCH}))
    (left,) = (d for d in forecast.differences if d.setting == "what is left")
    assert left.cls == "careful" and "12 of 8" in left.why
    assert (
        train(
            tmp_path / "again", resume=saved, num_train_epochs=2, per_device_train_batch_size=4, save_steps=12
        )
        == []
    )


@pytest.mark.parametrize(("steps", "after"), [(6, 1), (8, 0)])
def test_a_finished_run_of_the_trainer(tmp_path: Path, steps: int, after: int) -> None:
    """It looks only after an update whether all are made: within an epoch a resume makes one more."""
    train(tmp_path / "run", max_steps=steps, save_steps=steps)
    saved = tmp_path / f"run/checkpoint-{steps}"
    (left,) = (d for d in foretold(saved).differences if d.setting == "what is left")
    assert ("another update" in left.why, "ends at once" in left.why) == (bool(after), not after)
    assert len(train(tmp_path / "again", resume=saved, max_steps=steps, save_steps=steps)) == after


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"lr_scheduler_type": "linear"}, "careful"),
        ({"warmup_steps": 4}, "careful"),
        ({"lr_scheduler_kwargs": {"num_cycles": 1.5}}, "careful"),
        ({"weight_decay": 0.1, "adam_beta2": 0.9, "logging_steps": 3}, "safe"),
        ({"optim": "sgd"}, "impossible"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else None,
)
def test_the_trainers_other_arguments(tmp_path: Path, changed: dict[str, Any], verdict: str) -> None:
    train(tmp_path / "run", save_steps=SAVED)
    saved = tmp_path / f"run/checkpoint-{SAVED}"
    forecast = foretold(saved, of_arguments({"output_dir": "x", **changed}))
    assert forecast.verdict == verdict
    logged = {"logging_steps"}  # no part of what is saved
    assert {d.setting.partition(".")[0] for d in forecast.differences} == changed.keys() - logged
    if verdict == "impossible":
        with pytest.raises(KeyError):
            train(tmp_path / "again", resume=saved, **changed)
        return
    rates = train(tmp_path / "again", resume=saved, **changed)
    assert rates[0] == pytest.approx(forecast.rates.first[0], rel=1e-12)
    if verdict == "safe":
        assert forecast.rates.next is not None
        assert rates[1] == pytest.approx(forecast.rates.next[0], rel=1e-12)
    else:
        assert forecast.rates.next is None and "new settings" in forecast.rates.note


def test_all_arguments_of_the_same_run_differ_in_nothing(tmp_path: Path) -> None:
    """As TrainingArguments.to_json_string writes them."""
    transformers = pytest.importorskip("transformers")
    train(tmp_path / "run")
    saved = tmp_path / f"run/checkpoint-{SAVED}"
    own = torch.load(saved / "training_args.bin", weights_only=False)
    assert isinstance(own, transformers.TrainingArguments)
    forecast = foretold(saved, of_arguments(json.loads(own.to_json_string())))
    assert (forecast.verdict, forecast.differences) == ("safe", ())


def test_a_configuration_of_another_framework_is_no_error_of_ours(tmp_path: Path) -> None:
    train(tmp_path / "run")
    config = tmp_path / "config.py"
    config.write_text(
        "train_dataloader = dict(batch_size=2)\ntrain_cfg = dict(by_epoch=True, max_epochs=1)\n"
    )
    forecast = foretold(tmp_path / f"run/checkpoint-{SAVED}", read_config(config))
    assert [(d.setting, d.cls) for d in forecast.differences] == [("--config", "careful")]


def test_the_trainer_refuses_another_width(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train(tmp_path / "run")
    saved = tmp_path / f"run/checkpoint-{SAVED}"
    settings = transformers.LlamaConfig(
        vocab_size=16, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    forecast = foretold(saved, NewRun(model=shapes(transformers.LlamaForCausalLM(settings))))
    assert forecast.refusal is not None and not forecast.resumes
    with pytest.raises(Exception) as caught:  # the class is what is compared
        train(tmp_path / "again", hidden=12, resume=saved)
    assert type(caught.value).__name__ == forecast.refusal.error
    assert "size mismatch" in str(caught.value) and "size mismatch" in forecast.refusal.text


# --- Lightning ----------------------------------------------------------------------------------------


def fit(
    folder: Path, width: int = 3, resume: Path | None = None, *, weights_only: bool = False
) -> list[float]:
    """Train a tiny model in Lightning, or go on; the learning rate of each update, as it is used."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rates: list[float] = []

    class Tiny(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).pow(2).mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    torch.manual_seed(0)
    saving = ModelCheckpoint(
        dirpath=folder, every_n_train_steps=SAVED, save_top_k=-1, save_weights_only=weights_only
    )
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[saving], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.ones(STEPS * BATCH, 4), batch_size=BATCH)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Tiny(), data, ckpt_path=str(resume) if resume is not None else None)
    return rates


def saved_by_lightning(folder: Path, **options: Any) -> tuple[Path, list[float]]:
    rates = fit(folder, **options)
    return folder / f"epoch=0-step={SAVED}.ckpt", rates


def test_lightning_goes_on_as_foretold(tmp_path: Path) -> None:
    saved, whole = saved_by_lightning(tmp_path / "run")
    forecast = foretold(saved)
    assert (forecast.verdict, forecast.step, forecast.epoch) == ("safe", SAVED, 0)
    assert forecast.rates.next is not None
    rates = fit(tmp_path / "again", resume=saved)
    assert rates == whole[SAVED:]
    assert (rates[0], rates[1]) == (forecast.rates.first[0], forecast.rates.next[0])


def test_lightning_refuses_weights_alone_and_another_width(tmp_path: Path) -> None:
    saved, _ = saved_by_lightning(tmp_path / "light", weights_only=True)
    forecast = foretold(saved)
    assert forecast.refusal is not None and not forecast.resumes
    with pytest.raises(KeyError) as caught:
        fit(tmp_path / "again", resume=saved)
    assert forecast.refusal.error == "KeyError" and forecast.refusal.text in str(caught.value)

    saved, _ = saved_by_lightning(tmp_path / "whole")
    wider = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))})
    forecast = foretold(saved, NewRun(model=shapes(wider)))
    assert forecast.refusal is not None and forecast.refusal.error == "RuntimeError"
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(tmp_path / "other", width=5, resume=saved)
