"""How far training is, as each framework's own files say it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FIXTURES, SAMPLES, name_of
from transformers import get_scheduler

from ckpttools import formats
from ckpttools import frameworks as training
from ckpttools.checks.rates import check_rates
from ckpttools.errors import CkptError, Unsupported, UsageError
from ckpttools.frameworks.progress import progress
from ckpttools.resume.rates import rates
from ckpttools.schedules.mmengine.config import settings
from ckpttools.training import Training
from ckpttools.transforms.rebase import Request, rebase

# framework, unit, count, batch per GPU, accumulation, ranks, schedules' families of frameworks
KNOWN: dict[str, tuple[object, ...]] = {
    "trainer/z2_bf16_2": ("ckpt train", "update", 3, 2, 2, 2, ["deepspeed"]),
    "trainer/z2_bf16_4": ("ckpt train", "update", 3, 2, 1, 4, ["deepspeed"]),
    "hf-trainer/plain/checkpoint-2": ("hf-trainer", "update", 2, 2, 1, 1, ["transformers"]),
    "hf-trainer/deepspeed/checkpoint-2": ("hf-trainer", "update", 2, 2, 1, 2, ["transformers"]),
    "lightning/file/epoch=0-step=3.ckpt": ("lightning", "update", 3, None, 1, None, ["torch"]),
    "lightning/deepspeed/epoch=0-step=3.ckpt": ("lightning", "update", 3, 2, 1, 2, ["torch"]),
    "accelerate/plain": ("accelerate", "update", 8, None, None, 1, ["torch"]),
    "accelerate/deepspeed": ("accelerate", "update", 8, 2, 1, 2, ["torch"]),
    "mmengine/run/iter_1500.pth": ("mmengine", "micro", 1500, 2, 2, 2, ["mmengine"]),
    "bundle/checkpoint-200": ("deepspeed", "update", 3, 2, 2, 2, []),
    "monolithic/full/epoch_2_step_40.pt": ("plain", "update", 40, None, None, None, ["torch"]),
    "monolithic/pcdet/checkpoint_epoch_4.pth": ("openpcdet", "micro", 80, None, 1, None, []),
    "monolithic/mmengine/epoch_4.pth": ("mmengine", "micro", 80, None, None, None, ["mmengine"]),
    "deepspeed-0.19.8/z2_clientsched_ws2": ("deepspeed", "update", 3, 60, 1, 2, ["torch"]),
}


def read(path: Path) -> Training:
    source = formats.locate(path)
    return training.read(source, formats.read(source))


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_framework_wrote_is_understood(name: str) -> None:
    found = read(FIXTURES / name)
    batch = found.batch
    shown = (found.framework, found.unit, found.count, batch.micro, batch.accumulation, batch.ranks)
    assert (*shown, [s.framework for s in found.schedules]) == KNOWN[name]
    # every place holds what it is said to hold
    for counter in found.counters:
        for place in counter.places:
            assert at(place.file, place.at) == counter.value
    for optimizer in found.optimizers:
        assert all(
            [g["lr"] for g in at(place.file, place.at)] == [g["lr"] for g in optimizer.groups]
            for place in optimizer.places
        )
    for schedule in found.schedules:
        for place, state in zip(schedule.places, schedule.states, strict=True):
            assert list(at(place.file, place.at)) == list(state)


def at(file: Path, keys: tuple[str | int, ...]) -> Any:
    import json

    node: Any = (
        json.loads(file.read_text()) if file.suffix == ".json" else torch.load(file, weights_only=False)
    )
    for key in keys:
        node = node[key]
    return node


@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_every_shard_of_every_sample_is_a_place(sample: Path) -> None:
    found = read(sample)
    ranks = len(list(sample.rglob("*optim_states.pt")))
    assert found.batch.ranks == ranks and found.framework == "deepspeed"
    if "elastic" not in sample.name:
        (optimizer,) = found.optimizers
        assert len(optimizer.places) == ranks


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    """Each rank would resume with its own learning rate."""
    folder = tmp_path / "run"
    shutil.copytree(FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2", folder)
    shard = next(folder.rglob("*rank_1_*optim_states.pt"))
    tree = torch.load(shard, weights_only=False)
    tree["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = 0.5
    torch.save(tree, shard)
    with pytest.raises(CkptError, match="different optimizer settings"):
        read(folder)


def test_a_counter_that_cannot_be_is_refused(tmp_path: Path) -> None:
    tree = torch.load(FIXTURES / "monolithic/full/epoch_2_step_40.pt", weights_only=False)
    tree["global_step"] = -7
    torch.save(tree, tmp_path / "a.pt")
    with pytest.raises(CkptError, match="global_step is -7"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["hf/single", "hf/sharded", "hf/peft"])
def test_weights_are_no_training_state(name: str) -> None:
    with pytest.raises(Unsupported, match="no training state"):
        read(FIXTURES / name)


# --- MMEngine's config --------------------------------------------------------------------------------

CONFIG = """
train_dataloader = dict(batch_size=4, num_workers=2, sampler=dict(shuffle=True, type='DefaultSampler'))
optim_wrapper = dict(type='OptimWrapper', accumulative_counts=2, optimizer=dict(lr=0.01, type='SGD'))
train_cfg = dict(by_epoch=True, max_epochs=6)
milestones = [8, 11]
secret = open('/etc/passwd').read()
"""


def test_a_config_is_read_and_never_run() -> None:
    found = settings(CONFIG)
    assert found["train_cfg"] == {"by_epoch": True, "max_epochs": 6}
    assert found["train_dataloader"] == {
        "batch_size": 4,
        "num_workers": 2,
        "sampler": {"shuffle": True, "type": "DefaultSampler"},
    }
    assert found["milestones"] == [8, 11]
    assert found["secret"] is None


@pytest.mark.parametrize(
    "text", ["x = (", "\0", "x = " + "(" * 10_000, 7, None, "import os\nos.system('true')"]
)
def test_no_text_harms(text: object) -> None:
    assert settings(text) == {}


def test_lengths_come_from_where_mmengine_keeps_them(tmp_path: Path) -> None:
    tree = {
        "meta": {"epoch": 3, "iter": 39, "cfg": CONFIG},
        "message_hub": {"runtime_info": {"iter": 38, "epoch": 2, "max_epochs": 6, "max_iters": 78}},
        "state_dict": {"w": torch.zeros(2)},
        "optimizer": torch.optim.SGD([torch.zeros(2)], lr=0.01).state_dict(),
        "param_schedulers": [{"last_step": 39, "_global_step": 40, "begin": 0, "end": 78}],
    }
    torch.save(tree, tmp_path / "epoch_3.pth")
    found = read(tmp_path / "epoch_3.pth")
    assert (found.batches, found.epochs, found.total_count, found.batch.micro, found.batch.accumulation) == (
        13,
        6,
        78,
        4,
        2,
    )
    assert [(c.name.rpartition(".")[2], c.value, c.offset) for c in found.counters] == [
        ("iter", 39, 0),
        ("iter", 38, 1),
        ("max_iters", 78, 0),
    ]


def schedule(gamma: float) -> dict[str, object]:
    """As ExponentialLR of mmengine 0.10.7 saves itself after 12 iterations."""
    return {
        "param_name": "lr", "begin": 0, "end": 10**9, "by_epoch": False, "base_values": [0.1],
        "last_step": 12, "_global_step": 12, "_last_value": [0.1 * gamma**12], "verbose": False,
        "gamma": gamma,
    }  # fmt: skip


def test_an_iteration_based_run_with_an_optimizer_by_name(tmp_path: Path) -> None:
    """Of an OptimWrapperDict, whose schedulers are saved by the same names; the epoch stays 0 to the end."""
    weight = torch.zeros(2)
    optimizers = {name: torch.optim.SGD([weight], lr=0.1) for name in ("generator", "critic")}
    tree = {
        "meta": {"epoch": 0, "iter": 12, "cfg": "train_cfg = dict(by_epoch=False, max_iters=40)\n"},
        "message_hub": {"runtime_info": {"iter": 11, "epoch": 0, "max_epochs": 1, "max_iters": 40}},
        "state_dict": {"w.weight": weight},
        "optimizer": {name: each.state_dict() for name, each in optimizers.items()},
        "param_schedulers": {"generator": [schedule(0.5)], "critic": [schedule(0.9)]},
    }
    torch.save(tree, tmp_path / "iter_12.pth")
    source = formats.locate(tmp_path / "iter_12.pth")
    found = progress(source, formats.read(source))
    assert [s.optimizer for s in found.state.schedules] == [0, 1]
    assert found.schedules == ("ExponentialLR 0-, at 12",) * 2
    assert found.state.epoch is None and found.state.iteration == 12
    tree["param_schedulers"] = dict(reversed(tree["param_schedulers"].items()))  # type: ignore[attr-defined]
    torch.save(tree, tmp_path / "iter_12.pth")
    assert [(s.name, s.optimizer) for s in read(tmp_path / "iter_12.pth").schedules] == [
        ("param_schedulers.critic", 1),
        ("param_schedulers.generator", 0),
    ]
    del tree["meta"]["cfg"]  # type: ignore[attr-defined]
    torch.save(tree, tmp_path / "iter_12.pth")
    assert read(tmp_path / "iter_12.pth").epoch is None
    tree["meta"]["cfg"] = "train_cfg = dict(by_epoch=True, max_epochs=2)\n"  # type: ignore[index]
    torch.save(tree, tmp_path / "iter_12.pth")
    assert read(tmp_path / "iter_12.pth").epoch == 0  # the first one is running


@pytest.mark.parametrize(
    ("asked", "updates", "known"),
    [(1.5, 4, 4), (2.0, 4, 4), (2.5, 5, 5), (0.7, 40, 40), (0.01, 40, 40), (1e-310, 40, None)],
)
def test_the_trainers_part_of_an_epoch_is_no_whole_one(
    asked: float, updates: int, known: int | None, tmp_path: Path
) -> None:
    """transformers rounds `num_train_epochs` up in its state, and not in what it counts by."""
    shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2/trainer_state.json"
    state = json.loads(path.read_text())
    state |= {"max_steps": math.ceil(asked * updates), "num_train_epochs": math.ceil(asked)}
    state["log_history"] = [
        {"step": s, "epoch": (s - 1) // updates + ((s - 1) % updates + 1) / updates} for s in (1, 2)
    ]
    path.write_text(json.dumps(state))
    torch.save(
        {"num_train_epochs": asked, "max_steps": -1, "gradient_accumulation_steps": 1},
        tmp_path / "checkpoint-2/training_args.bin",
    )
    found = read(tmp_path / "checkpoint-2")
    assert (found.epochs, found.updates) == (asked, known)


def test_the_trainers_groups_of_their_own_rates(tmp_path: Path) -> None:
    """lr_end is a part of the optimizer's default rate, which the arguments have, not of a group's."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", folder)
    saved = torch.load(folder / "optimizer.pt", weights_only=False)
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in saved["param_groups"]]
    groups = [{"params": [w], "lr": 1e-3 * 10**i} for i, w in enumerate(weights)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    arguments = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3}, "max_steps": -1}
    made = get_scheduler("polynomial", optimizer, 0, 6, {"lr_end": 1e-3})
    for _ in range(2):
        optimizer.step()
        made.step()
    for group, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group |= {"lr": new["lr"], "initial_lr": new["initial_lr"]}
    torch.save(saved, folder / "optimizer.pt")
    torch.save(made.state_dict(), folder / "scheduler.pt")
    torch.save({**arguments, "learning_rate": 1e-2, "num_train_epochs": 3.0}, folder / "training_args.bin")
    state = json.loads((folder / "trainer_state.json").read_text()) | {"max_steps": 6}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert not list(check_rates(read(folder)))
    optimizer.step()
    made.step()
    assert rates(read(folder)).next == tuple(group["lr"] for group in optimizer.param_groups)


def lightning(path: Path, step: int, batches: int, *, last: bool, stepped: int) -> Any:
    """The fixture's tree after so many updates and micro-batches of a first epoch."""
    tree = torch.load(FIXTURES / "lightning/file/epoch=0-step=3.ckpt", weights_only=False)
    loop = tree["loops"]["fit_loop"]
    for span in ("total", "current"):
        loop["epoch_loop.batch_progress"][span] = dict.fromkeys(
            ("ready", "started", "processed", "completed"), batches
        )
        loop["epoch_loop.scheduler_progress"][span] = {"ready": stepped, "completed": stepped}
    loop["epoch_loop.batch_progress"]["is_last_batch"] = last
    tree["global_step"] = step
    tree["lr_schedulers"][0]["last_epoch"] = stepped
    torch.save(tree, path)
    return tree


def test_lightnings_last_update_of_an_epoch_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    """13 of them, 4 for an update: the epoch is over after 4 updates, not after 3.25."""
    path = tmp_path / "epoch=0-step=4.ckpt"
    lightning(path, 4, 13, last=True, stepped=4)
    source = formats.locate(path)
    assert progress(source, formats.read(source)).epoch == 1


def test_a_schedule_of_every_fifth_update_is_not_one_of_updates(tmp_path: Path) -> None:
    """Lightning's `frequency`, which is not saved; scheduler_progress counts what the scheduler does."""
    path = tmp_path / "epoch=0-step=10.ckpt"
    lightning(path, 10, 10, last=False, stepped=2)
    found = read(path)
    assert not [c.name for c in found.counters if "scheduler_progress" in c.name]
    assert rates(found).next is None
    lightning(path, 10, 10, last=False, stepped=10)
    assert [c.name for c in read(path).counters if "scheduler_progress" in c.name]


def test_optimizers_of_which_one_steps_less_often(tmp_path: Path) -> None:
    """global_step adds them up: 3 updates of the first and 2 of the second are no 2 of each."""
    path = tmp_path / "epoch=0-step=5.ckpt"
    tree = lightning(path, 5, 3, last=False, stepped=3)
    tree["optimizer_states"] *= 2
    torch.save(tree, path)
    assert read(path).count == 3


def stepped(optimizer: torch.optim.Optimizer, scheduler: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    return optimizer.state_dict(), scheduler.state_dict()


def pair(step_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], lr=step_size * 1e-2)
    return stepped(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size))


@pytest.mark.parametrize("under", ["list", "dict", "names"])
def test_several_optimizers_with_a_schedule_each(tmp_path: Path, under: str) -> None:
    """As teams save a GAN: whatever the names, what is an optimizer's or a scheduler's state is told by what
    it holds.
    """
    (one, first), (two, second) = pair(2), pair(5)
    saved: dict[str, Any] = {
        "list": {"optimizers": [one, two], "schedulers": [first, second]},
        "dict": {"optimizer": {"g": one, "d": two}, "scheduler": {"g": first, "d": second}},
        "names": {"optim_g": one, "optim_d": two, "sched_g": first, "sched_d": second},
    }[under]
    path = tmp_path / "gan.pt"
    torch.save({"model": {"w": torch.ones(2)}, "step": 3, **saved}, path)
    found = read(path)
    assert [o.groups[0]["lr"] for o in found.optimizers] == [2e-3, 5e-2]
    assert [(s.optimizer, s.states[0]["step_size"]) for s in found.schedules] == [(0, 2), (1, 5)]
    assert rates(found).next == (2e-4,)  # the fourth step of the first one is a fall


def test_two_schedules_of_one_optimizer_are_not_guessed_at(tmp_path: Path) -> None:
    """A warmup beside the main one: in which order the code steps them, no file says."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10)
    main = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    path = tmp_path / "two.pt"
    saved = {"optimizer": optimizer.state_dict(), "step": 0, "model": {"w": torch.ones(2)}}
    torch.save({**saved, "warmup_scheduler": warmup.state_dict(), "main_scheduler": main.state_dict()}, path)
    found = read(path)
    assert len(found.schedules) == 2
    assert rates(found).next is None
    assert "2 schedules" in rates(found).note
    with pytest.raises(UsageError, match="2 schedules"):
        rebase(found, Request(old_bs=2, new_bs=4, old_accum=1, old_gpus=1))
