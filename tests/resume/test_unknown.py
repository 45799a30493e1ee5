"""What is not known is `?`, and what a checkpoint lacks or contradicts is said: never safe in silence."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checks.test_contradictions import CASES
from commands import run
from safetensors.torch import save_file
from support import FIXTURES, decayed

from ckpttools.resume import Target, foretell
from ckpttools.resume.config_files import read_config

MMENGINE = FIXTURES / "mmengine/run/iter_1500.pth"
FULL = FIXTURES / "monolithic/full/epoch_2_step_40.pt"
DECAY = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"


def said(*words: object) -> tuple[int, dict[str, Any]]:
    ran = run("resume-check", *words, "--json")
    assert ran.out, ran.err
    return ran.code, json.loads(ran.out)


def line(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in found["checks"] if c["name"] == name)  # type: ignore[no-any-return]


def edited(source: Path, path: Path, change: Any) -> Path:
    """A torch file with something changed."""
    value = torch.load(source, weights_only=False)
    change(value)
    torch.save(value, path)
    return path


def mmengine(folder: Path, change: Any) -> Path:
    """MMEngine's DeepSpeed folder with something changed in the model file."""
    shutil.copytree(MMENGINE, folder / "iter_1500.pth")
    model = folder / "iter_1500.pth/mp_rank_00_model_states.pt"
    edited(model, model, change)
    return folder / "iter_1500.pth"


class ConfigDict(dict):  # type: ignore[type-arg]
    """Pickled as MMEngine's is: a class around one dict."""

    def __reduce_ex__(self, protocol: object) -> Any:
        return (ConfigDict, (dict(self),), None, None, None)


STAGE = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def test_a_batch_that_only_counters_tell_is_held_against_the_new_one(tmp_path: Path) -> None:
    def without(model: dict[str, Any]) -> None:
        for key in BATCH_KEYS:
            model["ds_config"].pop(key, None)

    path = mmengine(tmp_path, without)
    config = tmp_path / "new.json"
    config.write_text(json.dumps({"train_batch_size": 256, **STAGE}))
    _, found = said(path, "--config", config)
    assert found["verdict"] == "careful"
    batch = next(d for d in found["differences"] if "batch" in d["setting"])
    assert batch["class"] == "careful" and "256" in str(batch["new"])
    assert "still 256" not in batch["why"]
    assert line(found, "effective batch")["ok"] is False


def test_a_batch_that_nothing_tells_is_unknown(tmp_path: Path) -> None:
    def without(model: dict[str, Any]) -> None:
        for key in BATCH_KEYS:
            model["ds_config"].pop(key, None)
        model["global_samples"] = 0

    path = mmengine(tmp_path, without)
    assert line(said(path)[1], "effective batch")["ok"] is None
    config = tmp_path / "new.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 64, **STAGE}))
    _, found = said(path, "--config", config)
    assert found["verdict"] == "careful"
    assert line(found, "effective batch")["ok"] is not True


def test_a_class_around_settings_is_no_setting(tmp_path: Path) -> None:
    def wrapped(model: dict[str, Any]) -> None:
        for key in ("bf16", "zero_optimization"):
            model["ds_config"][key] = ConfigDict(model["ds_config"][key])

    path = mmengine(tmp_path, wrapped)
    config = tmp_path / "new.json"
    model = torch.load(MMENGINE / "mp_rank_00_model_states.pt", weights_only=False)
    config.write_text(json.dumps(model["ds_config"]))
    assert said(path, "--config", config)[1]["differences"] == []


def test_names_with_ddps_prefix_do_not_fit_a_model_without(tmp_path: Path) -> None:
    """torch itself loads the same two files."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapped = {f"module.{name}": value for name, value in net.state_dict().items()}
    path, model = tmp_path / "ddp.pt", tmp_path / "model.pt"
    torch.save(
        {"model_state_dict": wrapped, "optimizer_state_dict": optimizer.state_dict(), "epoch": 1}, path
    )
    torch.save(net.state_dict(), model)
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(torch.load(path)["model_state_dict"])
    code, found = said(path, "--model", model)
    assert (code, found["verdict"], found["error"]["class"]) == (1, "impossible", "RuntimeError")
    assert found["error"]["text"][:70] in " ".join(str(caught.value).replace(" for Sequential", "").split())
    assert line(found, "model")["ok"] is False
    torch.save(wrapped, model)
    assert said(path, "--model", model)[1]["tensors"] == []


def test_a_finished_run_has_nothing_left(tmp_path: Path) -> None:
    cfg = "train_cfg = dict(type='IterBasedTrainLoop', max_iters={})\ntrain_dataloader = dict(batch_size=2)\n"
    for most, verdict in ((1500, "careful"), (2000, "safe")):
        (tmp_path / str(most)).mkdir()

        def change(model: dict[str, Any], most: int = most) -> None:
            model["meta"]["cfg"] = cfg.format(most)
            model["message_hub"]["runtime_info"]["max_iters"] = most

        found = said(mmengine(tmp_path / str(most), change))[1]
        assert found["verdict"] == verdict, found["differences"]
        left = line(found, "length")
        assert left["ok"] is (most == 2000) and f"of {most}" in left["text"]
    assert line(said(FULL)[1], "length")["ok"] is None


def test_a_schedule_that_was_at_work_and_is_not_saved_is_said(tmp_path: Path) -> None:
    path = edited(FULL, tmp_path / "epoch_2_step_40.pt", lambda saved: saved.pop("scheduler_state_dict"))
    _, found = said(path)
    assert found["verdict"] == "careful"
    assert line(found, "schedule")["ok"] is False and "initial_lr" in line(found, "schedule")["text"]


def test_a_newest_by_time_that_is_not_the_furthest_is_said(tmp_path: Path) -> None:
    for epoch, age in ((3, 0), (12, 100)):
        path = tmp_path / f"checkpoint_epoch_{epoch}.pth"
        edited(
            FIXTURES / "monolithic/pcdet/checkpoint_epoch_4.pth",
            path,
            lambda saved, epoch=epoch: saved.update(epoch=epoch, it=20 * epoch),
        )
        os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    _, found = said(tmp_path)
    assert found["verdict"] == "careful" and found["path"].endswith("checkpoint_epoch_3.pth")
    newest = next(d for d in found["differences"] if d["setting"] == "newest")
    assert "epoch_3" in newest["old"] and "epoch_12" in newest["new"]
    os.utime(tmp_path / "checkpoint_epoch_12.pth")
    assert not [d for d in said(tmp_path)[1]["differences"] if d["setting"] == "newest"]


def test_a_stale_latest_is_said(tmp_path: Path) -> None:
    shutil.copytree(DECAY, tmp_path / "run")
    tag = (tmp_path / "run/latest").read_text().strip()
    later = tmp_path / "run/global_step9"
    shutil.copytree(tmp_path / "run" / tag, later)
    model = later / "mp_rank_00_model_states.pt"
    edited(model, model, lambda saved: saved.update(global_steps=9))
    _, found = said(tmp_path / "run")
    assert found["step"] == 3 and found["verdict"] == "careful"
    newest = next(d for d in found["differences"] if d["setting"] == "newest")
    assert "global_step9" in newest["new"]


# --- what teams name with --config --------------------------------------------------------------------

BASE = """
_base_ = []
batch_size = 4
train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(type='A'))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=5))
"""
CHILD = """
_base_ = ['./_base_/run.py', '../outside.py']
__import__('os').system('touch MARK')
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=0.5), accumulative_counts=3)
train_cfg = dict(by_epoch=False, max_iters=99)
"""


def test_mmengines_configuration_is_read_as_data_with_its_bases(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    (folder / "_base_").mkdir(parents=True)
    (folder / "_base_/run.py").write_text(BASE)
    (tmp_path / "outside.py").write_text("train_dataloader = dict(batch_size=77, extra=1)")
    (folder / "run.py").write_text(CHILD.replace("MARK", str(tmp_path / "executed")))
    stated = read_config(folder / "run.py").stated
    assert (stated.micro, stated.accumulation, stated.lr, stated.steps) == (8, 3, 0.5, 99)
    assert stated.values["optim_wrapper"]["optimizer"] == {"type": "AdamW", "lr": 0.5}  # type: ignore[index]
    assert stated.values["train_dataloader"]["num_workers"] == 2  # type: ignore[index]
    assert "extra" not in stated.values["train_dataloader"]  # type: ignore[operator]
    assert stated.unread == ("../outside.py",)
    assert not (tmp_path / "executed").exists()


def test_an_mmengine_run_against_its_new_configuration(tmp_path: Path) -> None:
    old = tmp_path / "old.py"
    old.write_text(
        BASE.replace("lr=0.01))", "lr=0.01), accumulative_counts=2)")
        + "train_cfg = dict(by_epoch=False, max_iters=2000)\n"
    )
    path = mmengine(tmp_path, lambda model: model["meta"].update(cfg=old.read_text()))
    _, found = said(path, "--config", old)
    assert found["differences"] == []
    new = tmp_path / "new.py"
    text = old.read_text().replace("interval=5", "interval=9").replace("batch_size=2", "batch_size=4")
    new.write_text(text.replace("num_workers=2", "num_workers=8").replace("'SGD'", "'Adam'"))
    code, found = said(path, "--config", new)
    classes = {d["setting"]: d["class"] for d in found["differences"]}
    assert code == 1
    assert classes["default_hooks.checkpoint.interval"] == "safe"
    assert classes["train_dataloader.num_workers"] == "safe"
    assert classes["optim_wrapper.optimizer.type"] == "impossible"
    assert classes["effective batch"] == "careful"
    code, found = said(MMENGINE, "--config", new)  # it does not hold the configuration it was started with
    assert code == 0 and "impossible" not in {d["class"] for d in found["differences"]}


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("OPTIMIZATION:\n  BATCH_SIZE_PER_GPU: 4\n  NUM_EPOCHS: 80\n  LR: 1e-3\n", (4, None, 1e-3, 80)),
        ("train:\n  batch_size: 16\n  lr: 0.1\nmax_epochs: 5\naccumulate_grad_batches: 2", (16, 2, 0.1, 5)),
        ("train:\n  batch_size: 16\nval:\n  batch_size: 8\nlr: 0.1\n", (None, None, 0.1, None)),
    ],
)
def test_yaml_says_batch_rate_and_length(text: str, stated: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    found = read_config(tmp_path / "run.yaml").stated
    assert (found.micro, found.accumulation, found.lr, found.epochs) == stated


def test_openpcdets_configuration_against_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pointpillar.yaml").write_text("OPTIMIZATION:\n  BATCH_SIZE_PER_GPU: 4\n  NUM_EPOCHS: 4\n")
    source = FIXTURES / "monolithic/pcdet/checkpoint_epoch_4.pth"
    code, found = said(source, "--config", tmp_path / "pointpillar.yaml")
    assert (code, found["verdict"]) == (0, "careful")
    assert "finished" in line(found, "length")["text"]
    assert line(found, "effective batch")["ok"] is not True


@pytest.mark.parametrize(
    "text", ["", "x = 1\n", "def f(:\n", "\x00", "train_dataloader = " + "[" * 300 + "]" * 300]
)
def test_a_python_file_without_settings_is_explained(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(text)
    ran = run("resume-check", MMENGINE, "--config", tmp_path / "run.py")
    assert (ran.code, ran.out) == (2, "") and "error[run-config]" in ran.err


def test_bases_that_name_each_other_end(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("_base_ = 'b.py'\ntrain_dataloader = dict(batch_size=3)\n")
    (tmp_path / "b.py").write_text("_base_ = 'a.py'\n")
    found = foretell(Target.find(MMENGINE), read_config(tmp_path / "a.py"))
    assert found.step == 3


# --- what the checkpoint says against itself: verify's findings are resume-check's classes --------------


@pytest.mark.parametrize("name", CASES)
def test_a_contradiction_is_never_safe(name: str, tmp_path: Path) -> None:
    """An error is what DeepSpeed fails on or loses state by: impossible. A warning is careful."""
    change, severity, _, _, _ = CASES[name]
    shutil.copytree(DECAY, tmp_path / "copy")
    change(tmp_path / "copy/global_step3")
    code, found = said(tmp_path / "copy", "--full")
    assert found["verdict"] == ("impossible" if severity == "error" else "careful"), found["checks"]
    assert code == (1 if severity == "error" else 0)
    assert any(check["ok"] is False for check in found["checks"])


def test_no_step_anywhere_is_not_safe() -> None:
    """Neither a step nor an epoch: what the run goes on with is up to its code."""
    code, found = said(FIXTURES / "dcp/app_ws2")
    assert (code, found["verdict"], found["step"]) == (0, "careful", None)
    assert line(found, "length")["ok"] is False and line(found, "effective batch")["ok"] is None


def by_hand(folder: Path, name: str, factor: float) -> Path:
    """A DeepSpeed folder whose learning rate is not the one that its schedule gives."""
    shutil.copytree(FIXTURES / "deepspeed-0.19.8" / name, folder)

    def change(value: Any) -> None:
        for group in value["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["lr"] *= factor

    for path in folder.glob("*/*optim_states.pt"):
        edited(path, path, change)
    return folder


def test_a_schedule_that_does_not_give_the_saved_rate_foretells_no_next_one(tmp_path: Path) -> None:
    for path, families in (
        (decayed(tmp_path / "a.pt"), "PolynomialLR"),
        (by_hand(tmp_path / "own", "z2_bf16_ws2", 1.5), "WarmupDecayLR"),
    ):
        rates = said(path)[1]["lr"]
        assert rates["first"] is not None and rates["next"] is None, (path, rates)
        assert families in rates["note"] and "does not give the saved learning rate" in rates["note"]
        shown = run("resume-check", path).out
        assert "for the first update; then ? (not forecast" in shown, shown


def test_the_next_rate_of_an_engine_that_has_made_no_step() -> None:
    """Older DeepSpeed has the optimizer's own rate for the first update, newer the schedule's."""
    for version, first in (("0.14.5", 0.02), ("0.19.8", 0.002)):
        rates = said(FIXTURES / f"deepspeed-{version}/z2_nostep_ws2")[1]["lr"]
        assert (rates["first"], rates["next"]) == (first, 0.002)


def test_a_run_that_ends_with_its_first_update_has_no_next_rate() -> None:
    shown = run("resume-check", FIXTURES / "mmengine-deepspeed/iter_50.pth").out
    assert "for the first update; then none: the run ends with that update" in shown


def test_what_becomes_of_a_rate_that_was_set_by_hand_is_computed(tmp_path: Path) -> None:
    """A formula writes over it; a product goes on from it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    for name, schedule, words in (
        ("formula", torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)), None),
        ("product", torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "goes on from it"),
    ):
        optimizer.step()
        schedule.step()
        optimizer.param_groups[0]["lr"] = 0.3
        tree = {"global_step": 1, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
        torch.save(tree | {"model": {"w": torch.zeros(2)}}, tmp_path / f"{name}.pt")
        found = json.loads(run("verify", tmp_path / f"{name}.pt", "--json").out)["checkpoints"][0]["findings"]
        hints = [f["hint"] for f in found if f["id"] == "rate-unexpected"]
        assert hints == [] if words is None else words in hints[0] and "0.15" in hints[0]
    folder = by_hand(tmp_path / "own", "z2_bf16_ws2", 1.5)
    found = json.loads(run("verify", folder, "--json").out)["checkpoints"][0]["findings"]
    (hint,) = {f["hint"] for f in found if f["id"] == "rate-unexpected"}
    assert "lasts until the schedule's next step" in hint


def loop(path: Path, make: Any, *, steps: int, **counters: int) -> tuple[Path, list[float]]:
    """A plain loop's file after so many steps of a schedule, and the rates of the next ones."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = make(optimizer)

    def step() -> float:
        optimizer.step()
        schedule.step()
        return float(optimizer.param_groups[0]["lr"])

    for _ in range(steps):
        step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**tree, "scheduler": schedule.state_dict(), **counters}, path)
    return path, [step() for _ in range(2)]


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)


def test_a_schedule_of_epochs_says_nothing_of_the_next_update(tmp_path: Path) -> None:
    """Its next step comes with the end of the epoch, not with the update."""
    path, rates = loop(tmp_path / "epochs.pt", halving, steps=4, epoch=4, global_step=200)
    found = said(path)[1]["lr"]
    assert found["first"] == 0.1 and found["next"] is None
    assert "once per epoch" in found["note"] and f"{rates[0]:g}" in found["note"]
    path, rates = loop(tmp_path / "updates.pt", halving, steps=4, epoch=1, global_step=4)
    assert said(path)[1]["lr"]["next"] == rates[0] == 0.05
    path, rates = loop(tmp_path / "unsaid.pt", halving, steps=4)
    found = said(path)[1]["lr"]
    assert found["next"] is None and "update, batch or epoch is not saved" in found["note"]


# as timm 1.0.31's CosineLRScheduler(optimizer, t_initial=100, warmup_t=10, warmup_lr_init=0.01) saves itself
TIMM = {
    "param_group_field": "lr", "_initial_param_group_field": "initial_lr", "base_values": [0.1],
    "metric": None,
    "t_in_epochs": False, "noise_range_t": None, "noise_pct": 0.67, "noise_type": "normal", "noise_std": 1.0,
    "noise_seed": 42, "t_initial": 100, "lr_min": 0.0, "cycle_mul": 1.0, "cycle_decay": 1.0, "cycle_limit": 1,
    "warmup_t": 10, "warmup_lr_init": 0.01, "warmup_prefix": False, "k_decay": 1.0, "warmup_steps": [0.009],
}  # fmt: skip


def of_timm(path: Path, count: int, **state: Any) -> Path:
    """A file as Swin's main.py saves it: timm's scheduler is beside the optimizer, its count is not."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(40):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    optimizer.param_groups[0]["initial_lr"] = 0.1
    optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * count / 100))
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save({**tree, "lr_scheduler": {**TIMM, **state}}, path)
    return path


def test_timms_schedule_is_where_its_saved_rate_says(tmp_path: Path) -> None:
    """By the updates that Adam counted: the script's step comes before the save, or after it."""
    for count in (39, 40):
        path = of_timm(tmp_path / f"{count}.pth", count)
        assert f"schedule timm CosineLRScheduler 0-100, at {count}\n" in run("inspect", path).out
        after = 0.05 * (1 + math.cos(math.pi * (count + 1) / 100))
        assert said(path)[1]["lr"]["next"] == pytest.approx(after, rel=1e-12)
        options = ("--old-bs", 4, "--new-bs", 2, "--old-accum", 1, "--dry-run", "--json")
        moved = json.loads(run("rebase-schedule", path, *options).out)
        assert moved["next_lr"]["new"] == pytest.approx(moved["next_lr"]["old"], rel=1e-12)
    by_epoch = of_timm(tmp_path / "epochs.pth", 4, t_in_epochs=True, warmup_t=0)
    assert "CosineLRScheduler 0-100, at 4\n" in run("inspect", by_epoch).out


def test_timms_schedule_that_no_counter_explains_is_unknown(tmp_path: Path) -> None:
    path = of_timm(tmp_path / "elsewhere.pth", 70)
    assert "schedule timm CosineLRScheduler 0-100, at ?\n" in run("inspect", path).out
    assert said(path)[1]["lr"]["next"] is None
    refused = run("rebase-schedule", path, "--old-bs", 4, "--new-bs", 2, "--schedule-unit", "update")
    assert refused.code == 2 and "error[schedule-unknown]" in refused.err


def test_accelerate_steps_a_schedule_once_per_process(tmp_path: Path) -> None:
    """Twice for each update of two, and as often as there are processes in the new run."""

    def saved(folder: Path, updates: int, steps: int) -> tuple[Path, Any]:
        folder.mkdir()
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=100)
        for _ in range(updates):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
        for _ in range(steps):
            schedule.step()
        torch.save(optimizer.state_dict(), folder / "optimizer.bin")
        torch.save(schedule.state_dict(), folder / "scheduler.bin")
        save_file(model.state_dict(), folder / "model.safetensors")
        for rank in range(2):
            torch.save({"step": 0}, folder / f"random_states_{rank}.pkl")
        return folder, schedule

    path, schedule = saved(tmp_path / "checkpoint_0", 5, 10)
    after = []
    for _ in range(4):
        schedule.step()
        after.append(schedule.get_last_lr()[0])
    assert said(path)[1]["lr"]["next"] == pytest.approx(after[1], rel=1e-12)
    assert said(path, "--world-size", 4)[1]["lr"]["next"] == pytest.approx(after[3], rel=1e-12)
    # stepped at the end of each epoch, which nothing here counts
    path, _ = saved(tmp_path / "checkpoint_1", 5, 2)
    found = said(path)[1]
    assert found["step"] == 5 and found["lr"]["next"] is None and "not saved" in found["lr"]["note"]


def test_optimizer_state_of_ranks_that_is_not_joined() -> None:
    """verl resumes from it, on as many ranks: what it goes on with is not known here, which is no no."""
    folder = FIXTURES / "verl/actor_ws2"
    code, found = said(folder)
    assert (code, found["verdict"]) == (0, "careful") and "optimizer" in found["unknown"]
    code, found = said(folder, "--world-size", "4")
    assert (code, found["verdict"]) == (1, "impossible")


def test_without_the_extra_of_the_trainer() -> None:
    """Whose rule of resuming is asked for in every folder."""
    words = ["resume-check", str(FIXTURES / "hf-trainer/plain/checkpoint-4"), "--json"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys(('deepspeed', 'torch', 'yaml')); sys.argv[1:] = {words}; "
    )
    code += "from ckpttools.cli.app import main; sys.exit(main())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and json.loads(ran.stdout)["resumes"], ran.stdout + ran.stderr


def test_of_several_optimizers_it_is_said_whose_rates_are_told(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    made = {
        f"optimizer_{name}": torch.optim.SGD(model.parameters(), lr).state_dict()
        for name, lr in (("g", 1.0), ("d", 2.0))
    }
    torch.save({"model_state_dict": model.state_dict(), "global_step": 3, **made}, tmp_path / "a.pt")
    whose = "of optimizer_g, the first of 2 optimizers"
    assert whose in run("resume-check", tmp_path / "a.pt").out
    assert whose in run("inspect", tmp_path / "a.pt").out
    ran = run("convert", tmp_path / "a.pt", tmp_path / "z", "--to", "zero2")
    assert ran.code == 2 and "optimizer_g, optimizer_d" in ran.err, ran
    assert "--reset-optimizer --like CHECKPOINT" in ran.err, "--like alone is refused as well"
