"""What training code names, counts and keeps in its own way goes through the formats, or is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

Params = Any
ENGINES = ("zero0", "zero2", "zero3", "universal")


class Counting(torch.optim.Optimizer):
    """Adam as training code writes it: it counts in ints, and computes with them."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                mean = state["exp_avg"] / (1 - one ** state["step"])
                square = state["exp_avg_sq"] / (1 - two ** state["step"])
                p.addcdiv_(mean, square.sqrt() + group["eps"], value=-group["lr"])


def trained(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 3) -> list[float]:
    losses = []
    torch.manual_seed(len(optimizers))
    for _ in range(steps):
        loss = model(torch.randn(4, 3)).pow(2).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def made(make: Callable[[Params], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    return model, make(model.parameters())


def there_and_back(source: Path, to: str, *words: str) -> dict[str, Any]:
    folder, file = source.parent / f"as-{to}", source.parent / f"from-{to}.pt"
    for at, made, form in ((source, folder, to), (folder, file, "pt")):
        ran = run("convert", at, made, "--to", form, *(words if form == to else ()))
        assert ran.code == 0, ran
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("to", ENGINES)
def test_values_under_names_that_deepspeed_has_for_its_own(to: str, tmp_path: Path) -> None:
    """They stood where the engine's own scheduler, optimizer, weights and count should have been."""
    model, optimizer = made(torch.optim.AdamW)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    trained(model, [optimizer])
    schedule.step()
    other = {name: torch.full_like(value, 7) for name, value in model.state_dict().items()}
    own = {"lr_scheduler": "cosine", "optimizer": "adamw", "module": other, "global_steps": 300}
    saved = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "global_step": 3,
    }
    torch.save({**saved, **own, "dp_world_size": 8, "note": "stays"}, tmp_path / "a.pt")
    ran = run("convert", tmp_path / "a.pt", tmp_path / "x", "--to", to, "--dry-run")
    assert all(name in ran.out for name in ("not written: ", *own, "dp_world_size")), ran
    back = there_and_back(tmp_path / "a.pt", to, "--no-digest")
    assert back["global_step"] == 3 and back["note"] == "stays" and not back.keys() & own.keys()
    assert back["scheduler_state_dict"] == schedule.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(back["model_state_dict"][name], value)
    for i, state in optimizer.state_dict()["state"].items():
        assert torch.equal(back["optimizer_state_dict"]["state"][i]["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize("to", ["dcp", *ENGINES])
def test_steps_that_are_ints_stay_ints(to: str, tmp_path: Path) -> None:
    """1 - beta ** step is another number where step is a tensor of 32 bits."""
    model, optimizer = made(Counting)
    trained(model, [optimizer])
    saved = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save({**saved, "global_step": 3}, tmp_path / "a.pt")
    truth = trained(model, [optimizer])
    back = there_and_back(tmp_path / "a.pt", to)
    assert {type(state["step"]) for state in back["optimizer_state_dict"]["state"].values()} == {int}
    model, optimizer = made(Counting)
    model.load_state_dict(back["model_state_dict"])
    optimizer.load_state_dict(back["optimizer_state_dict"])
    assert trained(model, [optimizer]) == truth
    if to == "dcp":
        ran = run("convert", tmp_path / "a.pt", tmp_path / "again", "--to", "dcp")
        (line,) = (line for line in ran.err.splitlines() if "set_state_dict" in line)
        model, optimizer = made(Counting)
        names = {"get_state_dict": get_state_dict, "set_state_dict": set_state_dict, "torch": torch}
        exec(line.removeprefix("next: "), names | {"model": model, "optimizer": optimizer})
        assert trained(model, [optimizer]) == truth


def test_several_optimizers_come_back_from_dcp_with_their_numbers(tmp_path: Path) -> None:
    """Under text torch takes them for nobody's state, and begins anew without a word."""

    def two() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model, _ = made(torch.optim.AdamW)
        of = [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim < 2]
        return model, [torch.optim.Muon(of[0]), torch.optim.AdamW(of[1])]

    model, both = two()
    trained(model, both)
    states = [each.state_dict() for each in both]
    torch.save(
        {"model": model.state_dict(), "muon": states[0], "adamw": states[1], "step": 3}, tmp_path / "a.pt"
    )
    truth = trained(model, both)
    back = there_and_back(tmp_path / "a.pt", "dcp")
    model, both = two()
    model.load_state_dict(back["model_state_dict"])
    for optimizer, key in zip(both, ("muon", "adamw"), strict=True):
        assert all(type(i) is int for i in back[key]["state"])
        optimizer.load_state_dict(back[key])
    assert trained(model, both) == truth


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, 2.0]), {"a": torch.tensor([1.0, 2.0])}, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("to", ["zero2", "zero3"])
def test_a_setting_that_is_no_number_is_the_same_on_all_ranks(value: object, to: str, tmp_path: Path) -> None:
    """The ranks' files were said to hold different optimizer settings."""
    model, optimizer = made(torch.optim.AdamW)
    trained(model, [optimizer])
    optimizer.param_groups[0]["extra"] = value
    saved = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save({**saved, "global_step": 3}, tmp_path / "a.pt")
    ran = run("convert", tmp_path / "a.pt", tmp_path / "z", "--to", to, "--world-size", "2")
    assert ran.code == 0, ran
    assert run("verify", tmp_path / "z").code == 0
    file = next((tmp_path / "z").rglob("*rank_1_*optim_states.pt"))
    rank = torch.load(file, weights_only=False)
    held = rank["optimizer_state_dict"]
    (held.get("base_optimizer_state") or held["optimizer_state_dict"])["param_groups"][0]["extra"] = 1
    torch.save(rank, file)
    assert run("verify", tmp_path / "z").code == 1


def test_a_value_under_the_name_of_the_weights_is_named(tmp_path: Path) -> None:
    model, optimizer = made(torch.optim.AdamW)
    trained(model, [optimizer])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    torch.save({**saved, "model_state_dict": {"x": 1}}, tmp_path / "a.pt")
    assert run("convert", tmp_path / "a.pt", tmp_path / "z", "--to", "zero2").code == 0
    ran = run("convert", tmp_path / "z", tmp_path / "b.pt", "--to", "pt")
    assert ran.code == 0 and "'model_state_dict' among the client's values is not written" in ran.err, ran


@pytest.mark.parametrize("to", [*ENGINES, "dcp"])
def test_a_count_that_no_32_bits_hold_is_not_rounded_in_silence(to: str, tmp_path: Path) -> None:
    model, optimizer = made(torch.optim.AdamW)
    trained(model, [optimizer])
    for count in (2**24, 2**24 + 1, 2.0**24 + 1, 10**40):
        state = optimizer.state_dict()
        for each in state["state"].values():
            each["step"] = count
        file = tmp_path / f"{count}.pt"
        torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": state}, file)
        ran = run("convert", file, tmp_path / f"to{count}", "--to", to)
        if count == 10**40:
            assert ran.code == 1 and "error[nonfinite]: a parameter's step is 1000" in ran.err
        else:
            assert ran.code == 0 and ("steps beyond 2^24 are rounded" in ran.err) == (count > 2**24), ran
        if count > 2**24:
            assert (tmp_path / f"to{count}").exists() == (count < 10**40)
    as_ints = run("convert", file.with_name(f"{2**24 + 1}.pt"), tmp_path / "ints", "--to", "zero2",
                  "--optimizer-class", "FusedAdam")  # fmt: skip
    assert as_ints.code == 0 and "rounded" not in as_ints.err


def test_the_other_of_two_optimizers_is_named(tmp_path: Path) -> None:
    model, optimizer = made(torch.optim.AdamW)
    other = torch.optim.AdamW(model.parameters())
    trained(model, [optimizer])
    trained(model, [other])
    both = {"optimizer_state_dict": optimizer.state_dict(), "optimizer_b": other.state_dict()}
    torch.save({"model_state_dict": model.state_dict(), **both}, tmp_path / "a.pt")
    for to in ENGINES:
        ran = run("convert", tmp_path / "a.pt", tmp_path / to, "--to", to)
        assert ran.code == 0 and "under optimizer_b goes on as a value of training code" in ran.err
        assert there_and_back(tmp_path / "a.pt", to, "--force")["optimizer_b"]["state"].keys() == {0, 1, 2, 3}
