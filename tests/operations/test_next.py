"""The next steps that every writing command ends with: carried out as they stand."""

from __future__ import annotations

import argparse
import collections
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dcp_job
import pytest
import torch
from commands import run
from support import FIXTURES, identical
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.optim import lr_scheduler

from ckpttools.operations.convert import convert

ZERO = FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2"
TRAINER = FIXTURES / "hf-trainer" / "deepspeed" / "checkpoint-2"
FILE = FIXTURES / "monolithic" / "full" / "epoch_2_step_40.pt"
CALLS: dict[str, tuple[str, list[object], str, list[object]]] = {
    "reshard": ("reshard", [ZERO], "out", ["--world-size", 3]),
    "reshard of the Trainer's": ("reshard", [TRAINER], "out", ["--world-size", 3]),
    "rebase": ("rebase-schedule", [TRAINER], "out", ["--new-bs", 1]),
    "extract": ("extract", [ZERO], "out", []),
    "extract with a configuration": ("extract", [TRAINER], "out", []),
    "extract to one file": ("extract", [ZERO], "out.safetensors", []),
    "extract to pt": ("extract", [ZERO], "out.pt", []),
    "copy": ("copy", [FILE], "out.pt", []),
    "average": ("average", [ZERO, FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws4", "-o"], "out", []),
    "weights": ("convert", [ZERO], "out", ["--to", "hf"]),
    "weights with a configuration": ("convert", [TRAINER], "out", ["--to", "hf"]),
}
LAUNCHED = ("deepspeed --num_gpus", "torchrun --nproc-per-node")


@pytest.mark.parametrize("name", CALLS)
def test_each_can_be_carried_out(name: str, tmp_path: Path) -> None:
    command, sources, target, options = CALLS[name]
    ran = run(command, *sources, tmp_path / target, *options, "--json")
    assert ran.code == 0, ran.out + ran.err
    steps = json.loads(ran.out)["next"]
    assert steps[0] == f"ckpt verify {tmp_path / target}"
    import safetensors.torch
    import torch
    import transformers

    known = {"safetensors": safetensors, "torch": torch, "transformers": transformers}
    for step in steps:
        if step.startswith("ckpt "):
            done = run(*shlex.split(step)[1:])
            assert done.code == 0, (step, done.out, done.err)
        elif not step.startswith(LAUNCHED):
            exec(step, dict(known))
        assert str(tmp_path / target) in step


def test_weights_of_32_bits_stay_so_where_the_configuration_says_bf16(tmp_path: Path) -> None:
    """transformers casts to the dtype of the configuration; an adapter's does not lie beside a model."""
    import transformers

    folder = tmp_path / "run"
    folder.mkdir()
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=16)
    config.dtype = "bfloat16"
    model = transformers.GPT2LMHeadModel(config).float()
    config.save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save(model.state_dict(), folder / "model.pt")
    ran = run("convert", folder / "model.pt", tmp_path / "out", "--to", "hf", "--hf-config", folder, "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert any("not copied: adapter_config.json" in note for note in said["notes"])
    (line,) = (step for step in said["next"] if "transformers" in step)
    after: dict[str, Any] = {"transformers": transformers, "torch": torch}
    exec(f"loaded = {line}", after)
    assert identical(after["loaded"].wte.weight.detach(), model.transformer.wte.weight.detach())


# --- the lines of Python with which torch goes on ------------------------------------------------------


def carried_out(lines: Iterable[str], **names: Any) -> dict[str, Any]:
    """The lines as they stand, where `names` are what training code has; what they leave behind."""
    after = {**vars(state_dict), "torch": torch, "collections": collections, **names}
    for line in lines:
        exec(line, after)
    return after


def shell(weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model with these parameters, all 0."""
    model = nn.Module()
    for name, weight in weights.items():
        *above, last = name.split(".")
        inner = model
        for each in above:
            if not hasattr(inner, each):
                inner.add_module(each, nn.Module())
            inner = inner.get_submodule(each)
        inner.register_parameter(last, nn.Parameter(torch.zeros_like(weight)))
    return model


class Net(nn.Module):
    """Two parameters that never get a gradient, and two matrices of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.unused = nn.Linear(3, 2)
        self.last = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x))
        return out


def trained(model: nn.Module, optimizer: Any, steps: int, schedulers: Iterable[Any] = ()) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.arange(6.0).reshape(2, 3) / (step + 1)).square().sum()
        loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        losses.append(loss.item())
    return losses


def saved(path: Path, model: nn.Module, optimizer: Any, **more: Any) -> Path:
    parts = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save({**parts, "global_step": 3, **more}, path)
    return path


def test_a_list_of_one_optimizer_is_loaded(tmp_path: Path) -> None:
    """Lightning's, whose file keeps its places."""
    (source,) = (FIXTURES / "lightning/file").glob("*.ckpt")
    made = convert(source, tmp_path / "out.pt", to="pt")
    theirs = torch.load(source, weights_only=False)
    model = shell(theirs["state_dict"])
    optimizer = torch.optim.AdamW(model.parameters())
    schedulers = [lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    carried_out(made.next[1:], model=model, optimizer=optimizer, schedulers=schedulers)
    state = theirs["optimizer_states"][0]["state"]
    assert len(state) == len(optimizer.state_dict()["state"])
    for i, each in optimizer.state_dict()["state"].items():
        assert identical(each["exp_avg"], state[i]["exp_avg"]), i


def test_an_optimizer_without_names_is_loaded_by_its_place(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.AdamW([{"params": model.last.weight}, {"params": model.first.weight}])
    trained(model, optimizer, 3)
    made = convert(saved(tmp_path / "run.pt", model, optimizer), tmp_path / "out.pt", to="pt")
    assert any("whose parameters have no names" in note for note in made.notes)
    again = Net()
    fresh = torch.optim.AdamW([{"params": again.last.weight}, {"params": again.first.weight}])
    carried_out(made.next[1:], model=again, optimizer=fresh)
    assert trained(again, fresh, 2) == trained(model, optimizer, 2)


@pytest.mark.parametrize("kept", ["keys", "list", "dict"])
def test_several_optimizers_are_loaded_by_their_places(kept: str, tmp_path: Path) -> None:
    model = Net()
    optimizers = [torch.optim.AdamW([each.weight]) for each in (model.last, model.first)]
    for optimizer in optimizers:
        trained(model, optimizer, 2)
    last, first = (optimizer.state_dict() for optimizer in optimizers)
    states = {
        "keys": {"optimizer_b": last, "optimizer_a": first},
        "list": {"optimizer_states": [last, first]},
        "dict": {"optimizers": {"b": last, "a": first}},
    }
    torch.save({"model_state_dict": model.state_dict(), **states[kept]}, tmp_path / "run.pt")
    made = convert(tmp_path / "run.pt", tmp_path / "out.pt", to="pt")
    again = Net()
    fresh = [torch.optim.AdamW([each.weight]) for each in (again.last, again.first)]
    carried_out(made.next[1:], model=again, optimizers=fresh)
    assert [trained(again, each, 2) for each in fresh] == [trained(model, each, 2) for each in optimizers]


def test_a_distributed_checkpoint_is_asked_for_by_its_own_keys(tmp_path: Path) -> None:
    made = convert(FIXTURES / "dcp/app_ws2", tmp_path / "out", to="dcp")
    net, optimizer = dcp_job.build(["plain"])
    expected = dcp_job.train(net, optimizer, 0, 5)[3:]
    net, optimizer = dcp_job.build(["plain"])
    carried_out(made.next[1:], model=net, optimizer=optimizer)
    assert dcp_job.train(net, optimizer, 3, 5) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("layout", [None, "flat"])
def test_parameters_without_a_gradient_do_not_stop_torch(layout: Any, tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    trained(model, optimizer, 3)
    source = saved(tmp_path / "run.pt", model, optimizer)
    made = convert(source, tmp_path / "out", to="dcp", dcp_layout=layout)
    (note,) = (note for note in made.notes if "without a gradient" in note)
    assert "unused.weight, unused.bias" in note and "a step of 1" in note
    again = Net()
    fresh = torch.optim.AdamW(again.named_parameters())
    carried_out(made.next[1:], model=again, optimizer=fresh)
    assert fresh.state[again.unused.bias]["step"] == 1 and not fresh.state[again.unused.bias]["exp_avg"].any()
    assert trained(again, fresh, 2) == trained(model, optimizer, 2)


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_no_line_loads_state_that_no_optimizer_goes_on_from(to: Any, tmp_path: Path) -> None:
    """Megatron's, whose settings and step lie elsewhere."""
    made = convert(FIXTURES / "megatron/iter_0000003", tmp_path / "out", to=to)
    lacking = "state without settings (lr, betas ...) and a count of steps"
    assert any(lacking in note for note in made.notes), made.notes
    assert not any("optimizer.load" in line or "optim_state" in line for line in made.next)
    if to == "dcp":
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs = torch.load(made.destination, weights_only=True)
        model = shell(theirs["model_state_dict"])
        carried_out(made.next[1:], model=model)
    for name, weight in model.state_dict().items():
        assert identical(weight, theirs["model_state_dict"][name]), name
    groups = [{"params": [model.get_parameter(n) for n in group["param_names"]]}
              for group in theirs["optimizer_state_dict"]["param_groups"]]  # fmt: skip
    with pytest.raises(KeyError, match="step"):
        torch.optim.AdamW(groups).load_state_dict(theirs["optimizer_state_dict"])


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_a_schedule_of_deepspeeds_is_not_given_to_torchs(to: Any, tmp_path: Path) -> None:
    from deepspeed.runtime.lr_schedules import WarmupLR

    made = convert(ZERO, tmp_path / "out", to=to)
    (line,) = (line for line in made.next if "scheduler" in line)
    assert line.startswith("#") and "deepspeed.runtime.lr_schedules" in line
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    ours, torchs = WarmupLR(optimizer), lr_scheduler.StepLR(optimizer, 1)
    (code,) = (part for part in line.split("DeepSpeed's class, ")[1:])
    load = code.removesuffix("; set one of torch's by hand")
    before = [f"saved = torch.load({str(made.destination)!r})"] if to == "pt" else []
    carried_out([*before, load], scheduler=ours)
    assert ours.last_batch_iteration == 2
    if to == "pt":
        carried_out([*before, load], scheduler=torchs)
        assert torchs.last_epoch == 0  # as the line says


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: [lr_scheduler.StepLR(o, 2)],
    "MultiStepLR": lambda o: [lr_scheduler.MultiStepLR(o, [2, 4])],
    "OneCycleLR": lambda o: [lr_scheduler.OneCycleLR(o, 0.1, total_steps=9)],
    "LambdaLR": lambda o: [lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1))],
    "SequentialLR": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 1)], [2])
    ],
    "SequentialLR of MultiStepLR": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [2, 2])], [2])
    ],
    "two": lambda o: [lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)],
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("layout", [None, "flat"])
def test_a_schedule_in_a_distributed_checkpoint_is_loaded(name: str, layout: Any, tmp_path: Path) -> None:
    model = Net()
    del model.unused
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedulers = SCHEDULERS[name](optimizer)
    trained(model, optimizer, 3, schedulers)
    states = [each.state_dict() for each in schedulers]
    held = states if len(states) > 1 else states[0]
    source = saved(tmp_path / "run.pt", model, optimizer, lr_scheduler=held)
    made = convert(source, tmp_path / "out", to="dcp", dcp_layout=layout)
    again = Net()
    del again.unused
    fresh = torch.optim.AdamW(again.parameters(), lr=0.01)
    made_anew = SCHEDULERS[name](fresh)
    carried_out(made.next[1:], model=again, optimizer=fresh, schedulers=made_anew, scheduler=made_anew[0])
    assert [each.state_dict() for each in made_anew] == states
    assert trained(again, fresh, 3, made_anew) == trained(model, optimizer, 3, schedulers)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
