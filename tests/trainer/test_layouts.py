"""The four layouts, in real runs: what lies where, what stays, and that each is resumed from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from trainer.launched import Launch, load, losses, records

import ckpttools
from ckpttools.operations.pin import pin

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launch(config: Path, environment: dict[str, str]) -> Launch:
    return Launch(config, environment)


def sets(**settings: object) -> list[str]:
    return [f"--set={name.replace('__', '.')}={value}" for name, value in settings.items()]


@pytest.mark.heavy
def test_bundles_of_zero3_with_a_limit(launch: Launch, tmp_path: Path) -> None:
    options = sets(zero__stage=3, save__layout="bundle", training__save_total_limit=2)
    options += ["--set=training.best_model_tracking.enabled=true", "--work-dir=run"]
    launch.train(tmp_path, *options, "--max-steps=7")
    run = tmp_path / "run"
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
    pin(run / "checkpoint-6", "kept by hand")
    said = launch.train(tmp_path, *options, "--resume")
    assert "Auto resumed from the latest checkpoint run/checkpoint-7" in said
    assert "removed run/checkpoint-7, older than the last 2 of its kind" in said
    # the last two, and the one that is pinned; the final one is of the last step
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-18", "checkpoint-22"}
    final = run / "checkpoint-22"
    assert {p.name for p in final.iterdir()} == {"deepspeed", "hf_model", "training_info.json"}
    info = json.loads((final / "training_info.json").read_text())
    assert (info["global_step"], info["epoch"], info["world_size"]) == (22, 2, 2)
    assert (info["batch_size"], info["gradient_accumulation_steps"]) == (4, 2)  # derived, and said
    best = load(run / "best_model.pt")
    lowest = min((r["val_loss"], r["step"]) for r in records(run) if "val_loss" in r)
    assert (best["val_loss"], best["global_step"]) == lowest

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(final / "hf_model", dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, best["model_state_dict"][name]), name
    # any saved checkpoint, and all of a run, evaluated on another number of ranks
    table = launch.train(tmp_path, *options, "--evaluate=run", nproc=1)
    row = next(line.split() for line in table.splitlines() if line.startswith("checkpoint-22"))
    assert float(row[3]) == pytest.approx(info["val_loss"], abs=2e-4)  # stage 3 multiplies in another way
    assert len([line for line in table.splitlines() if line.startswith(("checkpoint-", "best_"))]) == 4


R9 = ("epoch", "global_step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict")


@pytest.mark.heavy
def test_one_process_then_ddp_then_zero(launch: Launch, tmp_path: Path) -> None:
    whole = sets(zero__stage=0, save__layout="monolithic", precision="fp32")
    launch.train(tmp_path, *whole, "--work-dir=whole", nproc=1)
    assert {p.name for p in (tmp_path / "whole").glob("*.pt")} == {
        *(f"epoch_{e}_step_{s}.pt" for e, s in ((1, 6), (1, 11), (2, 12), (2, 18), (2, 22)))
    }
    end = load(tmp_path / "whole/epoch_1_step_11.pt")
    assert {*R9, "train_loss", "val_loss"} <= end.keys()
    assert (end["epoch"], end["global_step"]) == (1, 11)
    assert end["val_loss"] == next(r["val_loss"] for r in records(tmp_path / "whole") if "val_loss" in r)
    assert not [name for name in end["model_state_dict"] if name.startswith("module.")]

    (shown,) = ckpttools.experiments(tmp_path / "whole").runs
    assert (shown.framework, shown.batch, shown.step, shown.samples) == ("ckpt train", 16, 22, 352)
    foretold = launch.ckpt(tmp_path, "resume-check", "whole/epoch_2_step_12.pt", "--config=whole/config.yaml")
    assert "10 of 22 are left" in foretold.stdout, foretold.stderr

    launch.train(tmp_path, *whole, "--work-dir=run", "--max-steps=8", nproc=1)
    said = launch.train(tmp_path, *whole, "--work-dir=run", "--resume", "--max-steps=14")
    assert "Auto resumed from the latest checkpoint run/epoch_1_step_8.pt" in said
    assert "careful" not in said
    to_zero = launch.ckpt(
        tmp_path, "convert", "run/epoch_2_step_14.pt", "zero", "--to", "zero2", "--world-size", 2
    )
    assert to_zero.returncode == 0, to_zero.stderr
    zero = [*sets(zero__stage=2, precision="fp32"), "--resume", "--resume-from=zero", "--work-dir=sharded"]
    launch.train(tmp_path, *zero, "--max-steps=18")
    back = launch.ckpt(tmp_path, "convert", "sharded/iter_000018.pth", "back.pt", "--to", "pt")
    assert back.returncode == 0, back.stderr
    launch.train(tmp_path, *whole, "--resume", "--resume-from=back.pt", "--work-dir=back", nproc=1)
    straight = losses(tmp_path / "whole")
    pieces = {**losses(tmp_path / "run"), **losses(tmp_path / "sharded"), **losses(tmp_path / "back")}
    assert pieces.keys() == straight.keys()
    for step, values in straight.items():  # fp32: only the order of summing differs
        assert pieces[step] == pytest.approx(values, rel=2e-4), step


@pytest.mark.heavy
def test_an_experiment_goes_on_under_its_tag(launch: Launch, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kitti"
    folder.mkdir()
    settings = yaml.safe_load(config.read_text()) | {"save": {"layout": "experiment", "save_steps": 0}}
    (folder / "net.yaml").write_text(yaml.safe_dump({**settings, "experiment": ""}))
    own = Launch(folder / "net.yaml", launch.environment)
    once = ["--extra-tag=a", *sets(epochs=1), "--set=training.best_model_tracking.enabled=true"]
    first = own.train(tmp_path, *once)
    run = tmp_path / "output/kitti/net/a"
    assert f"run folder {run.relative_to(tmp_path)}" in first
    assert [p.name for p in (run / "ckpt").glob("*.pth")] == ["checkpoint_epoch_1.pth"]
    assert len(list(run.glob("log_train_*.txt"))) == 1
    for path in (run / "ckpt").glob("best_model.pt*"):  # as where a kill came after the last save
        path.unlink()
    assert "longer" in own.train(tmp_path, *once)  # the same tag: nothing to do
    assert load(run / "ckpt/best_model.pt")["epoch"] == 1
    again = own.train(tmp_path, "--extra-tag=a", "--set=training.save_minutes=1e-6")  # after each update
    assert len(list((run / "ckpt").glob("checkpoint_step_*.pth"))) == 11
    assert "Auto resumed from the latest checkpoint" in again
    assert list(losses(run)) == list(range(1, 23))
    other = own.train(tmp_path, "--extra-tag=b", "--max-steps=1")
    assert "resumed" not in other and "b; nothing to resume from was saved" in other  # no step or epoch
    assert list(losses(run.with_name("b"))) == [1]


def test_digits_are_learned(launch: Launch, tmp_path: Path) -> None:
    options = sets(model__family="vit", data__source="digits", data__validation_samples=179, epochs=3)
    options += sets(training__label_smoothing=0.1, training__log_steps=10, save__save_steps=0)
    options += sets(batch__global_batch_size=32, batch__micro_batch_size=16, optimizer__lr=1e-2)
    options += ["--set=training.best_model_tracking.enabled=true", "--set=save.epochs=false"]
    options += ["--set=training.save_minutes=600"]
    options += ["--set=training.evaluation.eval_best_model_only=true"]
    said = launch.train(tmp_path, *options, "--work-dir=run")
    assert (tmp_path / "run/best_model.pt").exists()
    assert (tmp_path / "run/last_checkpoint").read_text() == "iter_000150.pth"  # at the end, in any case
    *_, epoch, best = records(tmp_path / "run")
    assert best["epoch"] == epoch["epoch"] == 3  # of 3
    assert best["val_loss_best"] == min(r["val_loss"] for r in records(tmp_path / "run") if "val_loss" in r)
    assert "val_loss" in epoch and "val_loss" not in best  # no point of the run's own curve
    accuracy = [r["val_accuracy"] for r in records(tmp_path / "run") if "val_accuracy" in r]
    assert accuracy[-1] > 0.4  # guessing is 0.1
    assert len([line for line in said.splitlines() if line.startswith("step ")]) == 15  # of 150 updates
