"""Settings that no update can be computed with, and files of different saves, in every container."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools.checks import verify
from ckpttools.findings import ERROR, INFO, WARNING

TRAINER = FIXTURES / "hf-trainer/plain"
# container -> the checkpoint, the file in it, where the optimizer lies there
CONTAINERS: dict[str, tuple[Path, str, tuple[str | int, ...]]] = {
    "plain": (FIXTURES / "monolithic/full/epoch_2_step_40.pt", "", ("optimizer_state_dict",)),
    "Lightning": (FIXTURES / "lightning/file/epoch=0-step=3.ckpt", "", ("optimizer_states", 0)),
    "Trainer": (TRAINER / "checkpoint-4", "optimizer.pt", ()),
    "accelerate": (FIXTURES / "accelerate/plain", "optimizer.bin", ()),
}
SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "lr in words": ({"lr": "0.1"}, ERROR, "lr"),
    "no lr": ({"lr": None}, ERROR, "lr"),
    "lr NaN": ({"lr": math.nan}, WARNING, "lr"),
    "lr below zero": ({"lr": -0.1}, WARNING, "lr"),
    "beta above one": ({"betas": (0.9, 1.5)}, ERROR, "betas[1]"),
    "eps below zero": ({"eps": -1e-8}, WARNING, "eps"),
    "eps beyond all gradients": ({"eps": 1e12}, WARNING, "eps"),
    "decay NaN": ({"weight_decay": math.nan}, WARNING, "weight_decay"),
    "no eps": ({"eps": None}, ERROR, "eps"),
    "a ruinous decay": ({"weight_decay": 1e6}, WARNING, "weight_decay"),
    "a decay that is no float": ({"weight_decay": 10**400}, WARNING, "weight_decay"),
}


def copied(source: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree if source.is_dir() else shutil.copy
    return Path(copy(source, tmp_path / source.name))


def edit(path: Path, change: Callable[[Any], object], at: tuple[str | int, ...] = ()) -> None:
    tree = torch.load(path, weights_only=False)
    value = tree
    for key in at:
        value = value[key]
    change(value)
    torch.save(tree, path)


def said(path: Path) -> list[tuple[str, str, str]]:
    return [(f.severity, f.id, f.where) for f in verify(path).findings if f.severity != INFO]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_setting_that_cannot_be(container: str, tmp_path: Path) -> None:
    source, name, at = CONTAINERS[container]
    for case, (new, severity, where) in SETTINGS.items():
        (tmp_path / case).mkdir()
        path = copied(source, tmp_path / case)
        edit(path / name if name else path, lambda found, new=new: found["param_groups"][0].update(new), at)
        assert said(path) == [(severity, "setting-implausible", f"param_groups[0].{where}")], case
        assert json.loads(run("resume-check", path, "--json").out)["verdict"] != "safe"


def test_a_schedule_that_cannot_be(tmp_path: Path) -> None:
    path = copied(CONTAINERS["plain"][0], tmp_path)
    edit(path, lambda state: state.update(last_epoch="x"), ("scheduler_state_dict",))
    assert said(path) == [(WARNING, "schedule-damaged", "scheduler_state_dict")]


def test_a_schedule_of_another_save(tmp_path: Path) -> None:
    """Of a function that is not saved: what it wrote last tells."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    path = tmp_path / "step_3.pt"
    for _ in range(3):
        optimizer.step()
        schedule.step()
    tree = {"model": {"w": torch.zeros(2)}, "scheduler": schedule.state_dict(), "global_step": 3}
    torch.save({**tree, "optimizer": optimizer.state_dict()}, path)
    assert said(path) == []
    optimizer.step()
    schedule.step()
    torch.save({**tree, "optimizer": optimizer.state_dict()}, path)
    assert said(path) == [(WARNING, "scheduler-mismatch", "scheduler._last_lr")]


def test_the_trainers_optimizer_of_another_save(tmp_path: Path) -> None:
    """Also where the learning rate is the same: Adam has counted."""
    path = copied(TRAINER / "checkpoint-4", tmp_path)
    rates = [group["lr"] for group in torch.load(path / "optimizer.pt")["param_groups"]]
    shutil.copy(TRAINER / "checkpoint-2/optimizer.pt", path)

    def same_rates(found: Any) -> None:
        for group, lr in zip(found["param_groups"], rates, strict=True):
            group["lr"] = lr

    edit(path / "optimizer.pt", same_rates)
    assert said(path) == [(WARNING, "counter-mismatch", "state[].step")]
    assert json.loads(run("resume-check", path, "--json").out)["verdict"] == "careful"


@pytest.mark.parametrize("container", ["Trainer", "accelerate"])
def test_moments_that_are_no_numbers(container: str, tmp_path: Path) -> None:
    """In the optimizer's own file, whose tensors no weights lead to."""
    source, name, _ = CONTAINERS[container]
    path = copied(source, tmp_path)

    def broken(found: Any) -> None:
        first = next(iter(found["state"].values()))
        first["exp_avg"].view(-1)[0] = math.nan
        first["exp_avg_sq"].view(-1)[0] = -1.0

    edit(path / name, broken)
    assert said(path) == [
        (ERROR, "negative-square", "state[0].exp_avg_sq"),
        (ERROR, "nonfinite", "state[0].exp_avg"),
    ]


def test_two_counts_of_iterations(tmp_path: Path) -> None:
    path = copied(FIXTURES / "monolithic/mmengine/epoch_4.pth", tmp_path)
    assert said(path) == []
    edit(path, lambda meta: meta.update(iter=40), ("meta",))
    assert said(path) == [(WARNING, "counter-mismatch", "message_hub.runtime_info.iter")]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_count_of_updates_that_cannot_be(container: str, tmp_path: Path) -> None:
    """torch fails with a count below zero, makes NaN of the weights with one that is none, and gets no
    farther than fp32 does.
    """
    source, name, at = CONTAINERS[container]
    for step, severity in ((-5.0, ERROR), (math.nan, ERROR), (math.inf, WARNING), (1e9, WARNING)):
        (tmp_path / f"{step}").mkdir()
        path = copied(source, tmp_path / f"{step}")

        def counted(found: Any, step: float = step) -> None:
            next(iter(found["state"].values()))["step"] = torch.tensor(step)

        edit(path / name if name else path, counted, at)
        found = [each for each in said(path) if each[1] == "setting-implausible"]
        assert found == [(severity, "setting-implausible", "state[].step")], step
        assert run("inspect", path).code == 0


def test_parts_of_a_model_that_not_every_batch_goes_through(tmp_path: Path) -> None:
    """Those count less, and may come first: the optimizer made as many updates as the trainer counts."""
    path = copied(TRAINER / "checkpoint-4", tmp_path)

    def seldom(found: Any) -> None:
        states = list(found["state"].values())
        assert len(states) > 9
        for state in states[:-1]:
            state["step"] = torch.tensor(2.0)

    edit(path / "optimizer.pt", seldom)
    assert said(path) == []


def test_rates_that_the_optimizer_finds_itself(tmp_path: Path) -> None:
    """transformers' Adafactor beside a schedule that only shows them."""
    path = copied(TRAINER / "checkpoint-4", tmp_path)
    edit(path / "scheduler.pt", lambda state: state.update(base_lrs=[0.0, 0.0], _last_lr=[4e-7, 4e-7]))

    def own(found: Any) -> None:
        for group in found["param_groups"]:
            group.update(lr=4e-7, initial_lr=0.0, relative_step=True)

    edit(path / "optimizer.pt", own)
    assert said(path) == []


class Two(lightning.LightningModule):
    """`configure`: its optimizers and schedulers."""

    def __init__(self, configure: Callable[[Any], Any]) -> None:
        super().__init__()
        self.one, self.other, self.configure = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), configure
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return self.configure(self)

    def training_step(self, batch: list[torch.Tensor]) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.other(self.one(batch[0])).square().mean())
            optimizer.step()
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()


def _second_only(model: Any) -> Any:
    one, other = (
        torch.optim.SGD(part.parameters(), lr) for part, lr in ((model.one, 0.1), (model.other, 0.01))
    )
    return [one, other], [torch.optim.lr_scheduler.ExponentialLR(other, 0.9)]


def _other_order(model: Any) -> Any:
    (one, other), (schedule,) = _second_only(model)
    return [one, other], [schedule, torch.optim.lr_scheduler.StepLR(one, 1)]


@pytest.mark.parametrize("configure", [_second_only, _other_order])
def test_schedulers_of_other_optimizers(configure: Callable[[Any], Any], tmp_path: Path) -> None:
    """No file says of which optimizer a scheduler is; the rates do."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 2)), batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Two(configure), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert said(tmp_path / "last.ckpt") == []


def test_groups_that_were_added_since_the_last_step(tmp_path: Path) -> None:
    """As Lightning's BaseFinetuning adds what it unfreezes; torch's schedulers go on with them."""
    path = copied(CONTAINERS["Lightning"][0], tmp_path)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    optimizer.add_param_group({"params": [model.bias], "lr": 0.05})
    found = torch.load(path, weights_only=False)
    found.update(optimizer_states=[optimizer.state_dict()], lr_schedulers=[schedule.state_dict()])
    found["state_dict"] = model.state_dict()
    torch.save(found, path)
    assert said(path) == []


@pytest.mark.parametrize("container", ["Trainer", "accelerate"])
def test_no_state_in_the_optimizers_own_file(container: str, tmp_path: Path) -> None:
    source, name, _ = CONTAINERS[container]
    path = copied(source, tmp_path)
    edit(path / name, lambda found: found["state"].clear())
    assert (WARNING, "optimizer-empty", "state") in said(path)


def changed(container: str, tmp_path: Path, change: Callable[[Any], object]) -> Path:
    source, name, at = CONTAINERS[container]
    path = copied(source, tmp_path)
    edit(path / name if name else path, change, at)
    return path


def forecast(path: Path) -> dict[str, Any]:
    return dict(json.loads(run("resume-check", path, "--json").out))


@pytest.mark.parametrize("container", CONTAINERS)
def test_state_of_a_parameter_that_no_group_lists(container: str, tmp_path: Path) -> None:
    def other(found: Any) -> None:
        found["param_groups"][-1]["params"][-1] = 999

    path = changed(container, tmp_path, other)
    assert [(level, id) for level, id, _ in said(path)] == [(WARNING, "state-unlisted")]
    assert forecast(path)["verdict"] == "careful"


def test_groups_that_are_gone(tmp_path: Path) -> None:
    path = changed("plain", tmp_path, lambda found: found["param_groups"].clear())
    assert (WARNING, "state-unlisted", "optimizer_state_dict.state") in said(path)
    assert forecast(path)["verdict"] == "careful"


def test_no_state_after_iterations(tmp_path: Path) -> None:
    """Of a run that counts no updates."""
    path = copied(FIXTURES / "monolithic/mmengine/epoch_4.pth", tmp_path)
    group = {"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}
    edit(path, lambda found: found.update(optimizer={"state": {}, "param_groups": [group]}))
    assert (WARNING, "optimizer-empty", "optimizer.state") in said(path)


def test_a_schedule_at_another_place_of_its_span(tmp_path: Path) -> None:
    path = copied(FIXTURES / "monolithic/mmengine/epoch_4.pth", tmp_path)
    group = {"lr": 0.1, "momentum": 0, "params": [0]}
    rising = {
        "start_factor": 0.1, "end_factor": 1.0, "total_iters": 5, "param_name": "lr", "begin": 0, "end": 6,
        "by_epoch": False, "base_values": [0.1], "last_step": 5, "_global_step": 12, "_last_value": [0.1],
        "verbose": False,
    }  # fmt: skip

    def schedule(found: Any) -> None:
        found["optimizer"] = {"state": {}, "param_groups": [group]}
        found["param_schedulers"] = [rising]

    edit(path, schedule)
    assert said(path) == []
    rising["last_step"] = 3
    edit(path, schedule)
    assert said(path) == [(WARNING, "scheduler-mismatch", "param_schedulers[0].last_step")]


def test_numbers_that_no_float_can_be(tmp_path: Path) -> None:
    for i, new in enumerate((10**400, -(10**400))):
        (tmp_path / str(i)).mkdir()

        def huge(found: Any, new: int = new) -> None:
            found["param_groups"][0]["lr"] = new
            for state in found["state"].values():
                state["step"] = new

        path = changed("plain", tmp_path / str(i), huge)
        assert {each[1] for each in said(path)} >= {"setting-implausible"}
        for command in ("inspect", "resume-check", "batch"):
            assert "internal" not in run(command, path).err
        ran = run(
            "rebase-schedule",
            path,
            tmp_path / "out",
            "--old-bs",
            "8",
            "--new-bs",
            "16",
            "--lr-scaling",
            "linear",
        )
        assert "internal" not in ran.err


def test_a_rate_that_no_schedule_explains(tmp_path: Path) -> None:
    path = copied(FIXTURES / "monolithic/pcdet/checkpoint_epoch_4.pth", tmp_path)
    edit(path, lambda found: found["param_groups"][0].update(lr=1e6), ("optimizer_state",))
    assert said(path) == [(WARNING, "setting-implausible", "param_groups[0].lr")]


@pytest.mark.parametrize("container", CONTAINERS)
def test_half_of_the_state(container: str, tmp_path: Path) -> None:
    """Partly frozen models look so, too: it is told, and not taken for safe."""

    def half(found: Any) -> None:
        for number in list(found["state"])[::2]:
            del found["state"][number]

    path = changed(container, tmp_path, half)
    assert said(path) == []
    (note,) = [f for f in verify(path).findings if f.id == "state-partial"]
    assert "have no state" in note.message
    told = forecast(path)
    assert ("optimizer" in told["unknown"], told["verdict"]) == (True, "careful")
    (row,) = [each for each in told["differences"] if each["setting"] == "optimizer state"]
    assert " have no state: " in row["why"]
    told = forecast(CONTAINERS[container][0])
    assert "optimizer" not in told["unknown"]
    assert not [each for each in told["differences"] if each["setting"] == "optimizer state"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_moments_of_zero(container: str, tmp_path: Path) -> None:
    def zero(found: Any) -> None:
        for state in found["state"].values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    path = changed(container, tmp_path, zero)
    assert {(level, id) for level, id, _ in said(path)} == {(WARNING, "moments-zero")}
    assert forecast(path)["verdict"] == "careful"


@pytest.mark.parametrize("container", ["Trainer", "accelerate"])
def test_moments_that_are_not_alike(container: str, tmp_path: Path) -> None:
    """Their parameter has no name there, and both are of its shape."""

    def shorter(found: Any) -> None:
        found["state"][0]["exp_avg"] = torch.ones(3, 5)

    path = changed(container, tmp_path, shorter)
    assert said(path) == [(ERROR, "moment-size", "state[0].exp_avg")]


def test_the_trainers_schedule_at_another_update(tmp_path: Path) -> None:
    """Also where the learning rate is the same."""
    path = copied(TRAINER / "checkpoint-4", tmp_path)
    edit(path / "scheduler.pt", lambda state: state.update(last_epoch=11))
    assert (WARNING, "counter-mismatch", "last_epoch") in said(path)
    assert forecast(path)["verdict"] == "careful"


def test_moments_of_another_shape_than_their_parameter(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    torch.save(tree, path)
    assert said(path) == []
    tree["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 5)
    torch.save(tree, path)
    assert said(path) == [(ERROR, "moment-size", "0.weight (exp_avg)")]
    optimizer.load_state_dict(tree["optimizer"])
    with pytest.raises(RuntimeError):
        optimizer.step()
