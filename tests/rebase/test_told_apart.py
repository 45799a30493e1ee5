"""Small real runs of which one number must not be taken for another: a scheduler per epoch for one per
update, micro-batches for updates, a function of one's own for the Trainer's, old arguments for new ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiplicativeLR, StepLR


def test_accelerate_with_sgd_does_not_say_what_its_scheduler_follows(tmp_path: Path) -> None:
    """Three epochs of ten updates, stepped once per epoch: SGD counts nothing, and 3 counts no updates."""
    from accelerate import Accelerator

    def prepared(batch: int) -> tuple[Any, Any, Any, Any]:
        data = torch.utils.data.TensorDataset(torch.ones(40, 2))
        model = torch.nn.Linear(2, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        made = Accelerator(cpu=True)
        loader = torch.utils.data.DataLoader(data, batch_size=batch)
        return made, *made.prepare(model, sgd, StepLR(sgd, 2, 0.5), loader)[1:]

    def epochs(parts: tuple[Any, Any, Any, Any], count: int) -> list[float]:
        _, sgd, schedule, loader = parts
        rates = []
        for _ in range(count):
            rates.append(sgd.param_groups[0]["lr"])
            for _ in loader:
                sgd.step()
            schedule.step()
        return rates

    parts = prepared(4)
    epochs(parts, 3)
    parts[0].save_state(str(tmp_path / "old"))
    batch = ("--old-bs", 4, "--new-bs", 2, "--dataset-size", 40, "--old-accum", 1)
    asked = run("rebase-schedule", tmp_path / "old", tmp_path / "new", *batch)
    assert asked.code == 2 and "error[schedule-unit]" in asked.err and not (tmp_path / "new").exists()
    assert "step 3" not in run("inspect", tmp_path / "old").out
    assert (
        run("rebase-schedule", tmp_path / "old", tmp_path / "new", *batch, "--schedule-unit", "epoch").code
        == 0
    )
    parts = prepared(2)
    parts[0].load_state(str(tmp_path / "new"))
    assert epochs(parts, 6) == epochs(prepared(2), 9)[3:]


@pytest.mark.parametrize("unit", ["update", "epoch"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_rebase_of_accelerate_is_known_for_what_it_is(tmp_path: Path, name: str, unit: str) -> None:
    """Twice is refused; the unit that was said once holds for another on top, and where training went on."""
    from accelerate import Accelerator

    def train(into: str, epochs: int, batch: int, begin: Path | None = None) -> list[float]:
        model = torch.nn.Linear(2, 1)
        settings = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **settings)
        schedule = StepLR(optimizer, 2 if unit == "epoch" else 80 // batch, 0.5)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(40, 2)), batch)
        made = Accelerator(cpu=True)
        model, optimizer, schedule, loader = made.prepare(model, optimizer, schedule, data)
        if begin is not None:
            made.load_state(str(begin))
        rates = []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            for (inputs,) in loader:
                made.backward(model(inputs).sum())
                optimizer.step()
                if unit == "update":
                    schedule.step()
            if unit == "epoch":
                schedule.step()
        made.save_state(str(tmp_path / into))
        return rates

    whole = train("whole", 9, 4)
    assert train("old", 3, 4) == whole[:3]
    size = ("--dataset-size", 40, "--old-accum", 1)
    said = ("--schedule-unit", unit, "--lr-scaling", "linear")
    rebase = "rebase-schedule"
    assert (
        run(rebase, tmp_path / "old", tmp_path / "new", "--old-bs", 4, "--new-bs", 2, *size, *said).code == 0
    )
    again = run(rebase, tmp_path / "new", tmp_path / "x", "--old-bs", 2, "--new-bs", 4, *size, *said)
    assert (
        again.code == 2 and "error[rebased-already]" in again.err and "from a batch of 4 = 4 x" in again.err
    )
    assert train("on", 6, 2, tmp_path / "new") == [rate / 2 for rate in whole[3:]]
    for source, epochs in (("new", 3), ("on", 9)):
        more = said if source == "on" else ("--again", *said[2:])
        back = (rebase, tmp_path / source, tmp_path / f"{source}-4", "--old-bs", 2, "--new-bs", 4)
        assert run(*back, *size, *more).code == 0
        assert train("last", 9 - epochs, 4, tmp_path / f"{source}-4") == whole[epochs:]
    third = run(rebase, tmp_path / "new-4", tmp_path / "y", "--old-bs", 4, "--new-bs", 2, *size)
    assert third.code == 2 and "error[rebased-already]" in third.err
    note = tmp_path / "new" / "ckpt-rebase.json"
    for count, counted in ((10**400, 1), (-5, 30), (1, 10**11), (60, True), (True, 30), ("60", 30)):
        note.write_text(json.dumps({**json.loads(note.read_text()), "count": count, "counted": counted}))
        said = json.loads(run("inspect", tmp_path / "new", "--json").out)
        assert said["step"] is None and run("resume-check", tmp_path / "new").code in (0, 1)


def test_batch_takes_a_counter_for_what_a_rebase_takes_it(tmp_path: Path) -> None:
    """28 micro-batches: Adam made 7 updates of 4."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    adam = torch.optim.AdamW([weight], lr=0.1)
    schedule = CosineAnnealingLR(adam, 20)
    for _ in range(7):
        weight.grad = torch.ones(2, 2)
        adam.step()
        schedule.step()
    said = {"global_step": 28, "gradient_accumulation_steps": 4, "batch_size_per_gpu": 8, "world_size": 1}
    state = {"optimizer": adam.state_dict(), "scheduler": schedule.state_dict()}
    torch.save({"model": {"a.weight": weight.data}, **state, **said}, tmp_path / "q.pt")
    told = run("batch", tmp_path / "q.pt", "--new-bs", 4, "--dataset-size", 320, "--epochs", 3).out
    rows = {" ".join(line.split()) for line in told.splitlines()}
    assert {"samples seen 224 112", "iteration 28 is epoch 0.70 0.35"} <= rows
    assert "the same place: iteration 28 56" in rows
    rebased = run("rebase-schedule", tmp_path / "q.pt", "--new-bs", 4, "--dataset-size", 320, "--dry-run")
    assert "micro-batch 28  ->  56, after 224 samples" in rebased.out + rebased.err


# --- transformers' Trainer ----------------------------------------------------------------------------


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([i / 40, 1.0]), "labels": torch.tensor([1.0])}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.l(x) - labels) ** 2).mean()}


def trained(
    folder: Path,
    size: int,
    *,
    stop: int | None = None,
    resume: Path | None = None,
    own: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    **arguments: Any,
) -> tuple[dict[int, float], int]:
    """The learning rate of each update, and how many there would be."""
    transformers = pytest.importorskip("transformers")
    rates: dict[int, float] = {}

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            rates[state.global_step] = more["optimizer"].param_groups[0]["lr"]

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if stop is not None and state.global_step >= stop:
                control.should_training_stop = control.should_save = True

    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_steps": 1000}
    args = transformers.TrainingArguments(
        output_dir=str(folder), learning_rate=0.05, num_train_epochs=4, **quiet, **arguments
    )
    torch.manual_seed(0)
    model, ours = Model(), {}
    if own is not None:
        adam = torch.optim.AdamW(model.parameters(), lr=0.05)
        ours = {"optimizers": (adam, own(adam))}
    trainer = transformers.Trainer(model, args, train_dataset=Data(size), callbacks=[Watch()], **ours)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return rates, trainer.state.max_steps


@pytest.mark.parametrize(("size", "accumulation"), [(37, 3), (40, 3), (37, 2)])
def test_batch_counts_the_short_updates_at_the_ends_of_epochs(
    tmp_path: Path, size: int, accumulation: int
) -> None:
    more = {"gradient_accumulation_steps": accumulation}
    _, now = trained(tmp_path / "a", size, stop=6, per_device_train_batch_size=4, **more)
    _, then = trained(tmp_path / "b", size, stop=1, per_device_train_batch_size=2, **more)
    told = run("batch", tmp_path / "a/checkpoint-6", "--dataset-size", size, "--new-bs", 2, "--json")
    found = json.loads(told.out)
    assert [found[each]["updates"] for each in ("now", "new")] == [now, then]


@pytest.mark.parametrize(
    "own",
    [
        lambda adam: LambdaLR(adam, lambda t: 1 / (1 + t)),
        lambda adam: MultiplicativeLR(adam, lambda t: 0.95),
    ],
)
def test_a_function_of_ones_own_is_not_taken_for_the_trainers(
    tmp_path: Path, own: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    """training_args.bin says linear, for nobody told it otherwise; the scheduler left another rate."""
    rates, _ = trained(tmp_path / "a", 40, stop=13, own=own, per_device_train_batch_size=4)
    ran = run(
        *("rebase-schedule", tmp_path / "a/checkpoint-13", tmp_path / "new"),
        *("--old-bs", 4, "--new-bs", 2, "--dataset-size", 40),
    )
    assert ran.code == 2 and "error[schedule-contradicts]" in ran.err and len(rates) == 13


def test_a_rebased_trainers_checkpoint_is_judged_by_its_new_arguments(tmp_path: Path) -> None:
    """warmup_steps lies in training_args.bin, which stays as the old run saved it."""
    base = {"lr_scheduler_type": "linear"}
    trained(tmp_path / "a", 40, stop=13, per_device_train_batch_size=4, warmup_steps=5, **base)
    new = tmp_path / "b/checkpoint-26"
    new.parent.mkdir()
    batch = ("--old-bs", 4, "--new-bs", 2, "--dataset-size", 40)
    assert run("rebase-schedule", tmp_path / "a/checkpoint-13", new, *batch, "-q").code == 0
    more = {**base, "per_device_train_batch_size": 2, "warmup_steps": 10}
    went, _ = trained(tmp_path / "b", 40, resume=new, **more)
    anew, _ = trained(tmp_path / "c", 40, **more)
    assert went == {step: rate for step, rate in anew.items() if step >= 26}
    assert "rate-unexpected" not in run("verify", new, "--json").out
    told = run("resume-check", new).out
    found = re.search(r"learning rate (\S+) for the first update, (\S+) for the next", told)
    assert found and [float(each) for each in found.groups()] == pytest.approx([anew[26], anew[27]], rel=1e-5)
    assert "yes  consistent" in told
    again = run("rebase-schedule", new, tmp_path / "d", "--new-bs", 1, "--dataset-size", 40, "--again")
    assert again.code == 0 and "warmup_steps = 20 (was 10)" in again.err
