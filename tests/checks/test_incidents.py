"""What went wrong in other people's runs: each rule finds it, and no good checkpoint is suspected."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from support import FIXTURES, name_of

from ckpttools.checks import verify
from ckpttools.errors import CkptError, Unsupported
from ckpttools.operations.convert import convert
from ckpttools.runs.find import paths

RULES = {
    "experts-missing",
    "weights-empty",
    "lora-empty",
    "buffer-repeated",
    "optimizer-empty",
    "rank-files-stale",
    "constant-weight",
    "denormal-flood",
    "moments-zero",
}
PT = FIXTURES / "monolithic/full/epoch_2_step_40.pt"


def found(path: Path) -> dict[str, str]:
    """The rules that fired, and where."""
    return {f.id: f.where for f in verify(path).findings if f.id in RULES}


def saved(path: Path, change: Callable[[Any], None]) -> Path:
    """A training checkpoint of torch with something done to it, `.pt` and as others would write it."""
    tree = torch.load(PT, weights_only=True)
    change(tree)
    torch.save(tree, path)
    return path


def everywhere(path: Path) -> list[Path]:
    """The same as a `.pt`, in DeepSpeed's folders, and as a distributed checkpoint."""
    made = [path]
    for to, ranks in (("dcp", 3), ("zero2", 2), ("zero0", None), ("zero3", 2), ("universal", None)):
        out = path.with_name(f"{path.stem}-{to}")
        made.append(convert(path, out, to=to, world_size=ranks, digest=False).destination)
    return made


def test_a_weight_that_was_overwritten_with_one_value(tmp_path: Path) -> None:
    def fill(tree: Any) -> None:
        tree["model_state_dict"]["emb.weight"].fill_(0.25)

    paths = everywhere(saved(tmp_path / "a.pt", fill))
    (two,) = (path for path in paths if path.name.endswith("zero3"))
    for ranks in (3, 16):  # whose parts are shorter than a run of equal values that means something
        paths.append(convert(two, tmp_path / f"of{ranks}", to="zero3", world_size=ranks).destination)
    for path in paths:
        assert found(path) == {"constant-weight": "emb.weight"}


@pytest.mark.parametrize("numel", [40, 3_000_000], ids=["one block", "several blocks"])
def test_a_constant_weight_is_whole(numel: int, tmp_path: Path) -> None:
    """Half of a tensor may be constant: only all of it is odd."""
    for constant in (True, False):
        weight = torch.full((numel // 4, 4), 0.5)
        if not constant:
            weight[-1, -1] = 0.25
        moment = torch.rand_like(weight)
        state = {0: {"step": torch.tensor(9.0), "exp_avg": moment, "exp_avg_sq": moment}}
        group = {"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}
        tree = {"model": {"w": weight}, "optimizer": {"state": state, "param_groups": [group]}, "step": 9}
        torch.save(tree, tmp_path / "a.pt")
        assert found(tmp_path / "a.pt") == ({"constant-weight": "w"} if constant else {})


def test_what_nobody_trained_may_be_constant(tmp_path: Path) -> None:
    def unused(tree: Any) -> None:
        ids = tree["optimizer_state_dict"]["param_groups"][0]["params"]
        tree["model_state_dict"]["emb.weight"].fill_(0)
        for key in ("exp_avg", "exp_avg_sq"):
            tree["optimizer_state_dict"]["state"][ids[0]][key].zero_()

    assert found(saved(tmp_path / "a.pt", unused)) == {}
    alone = convert(tmp_path / "a.pt", tmp_path / "files", to="universal")  # a file for each parameter
    assert found(alone.destination) == {}

    def first(tree: Any) -> None:
        tree["model_state_dict"]["emb.weight"].fill_(0)
        tree["global_step"] = 1

    assert found(saved(tmp_path / "b.pt", first)) == {}


def test_moments_that_are_zero_everywhere(tmp_path: Path) -> None:
    def zero(tree: Any) -> None:
        for state in tree["optimizer_state_dict"]["state"].values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    for path in everywhere(saved(tmp_path / "a.pt", zero)):
        assert found(path).keys() == {"moments-zero"}


def test_what_lion_makes_and_never_looks_at_may_be_zero(tmp_path: Path) -> None:
    """DeepSpeed's on the CPU has a mean of squares too; its groups have betas and no eps."""

    def lion(tree: Any) -> None:
        for group in tree["optimizer_state_dict"]["param_groups"]:
            del group["eps"]
        for state in tree["optimizer_state_dict"]["state"].values():
            state["exp_avg"].add_(0.5)
            state["exp_avg_sq"].zero_()

    assert found(saved(tmp_path / "a.pt", lion)) == {}


def test_a_flood_of_denormals(tmp_path: Path) -> None:
    def flood(tree: Any) -> None:
        weight = tree["model_state_dict"]["emb.weight"]
        weight.view(-1)[::3] = 1e-42

    for path in everywhere(saved(tmp_path / "a.pt", flood)):
        assert found(path) == {"denormal-flood": "emb.weight"}

    def fading(tree: Any) -> None:  # the moments of rows that are never seen
        for state in tree["optimizer_state_dict"]["state"].values():
            state["exp_avg"].fill_(1e-42)
            state["exp_avg_sq"].fill_(1e-42)

    assert found(saved(tmp_path / "b.pt", fading)) == {}


def test_no_state_of_an_optimizer_that_keeps_some(tmp_path: Path) -> None:
    def empty(tree: Any) -> None:
        tree["optimizer_state_dict"]["state"] = {}
        group = tree["optimizer_state_dict"]["param_groups"][0]
        group["param_names"] = [n for n in tree["model_state_dict"] if n != "head.weight"][
            : len(group["params"])
        ]

    at = saved(tmp_path / "a.pt", empty)
    assert found(at) == {"optimizer-empty": ""}
    assert found(convert(at, tmp_path / "dcp", to="dcp").destination) == {"optimizer-empty": ""}
    for to in ("zero0", "zero2", "zero3", "universal"):  # DeepSpeed would begin it anew without a word
        with pytest.raises(Unsupported) as caught:
            convert(at, tmp_path / to, to=to)
        assert caught.value.id == "state-incomplete" and not (tmp_path / to).exists()
    convert(at, tmp_path / "anew", to="zero2", reset_optimizer=True)
    tree = torch.load(at, weights_only=True)
    for group in tree["optimizer_state_dict"]["param_groups"]:
        del group["betas"]
        group["momentum"] = 0  # SGD without momentum keeps nothing
    torch.save(tree, at)
    assert found(at) == {}
    tree["optimizer_state_dict"]["param_groups"][0]["momentum"] = 0.9
    torch.save(tree, at)
    assert found(at) == {"optimizer-empty": ""}


def experts(*gone: str) -> dict[str, torch.Tensor]:
    out = {"embed.weight": torch.randn(4, 4)}
    for layer in range(2):
        out[f"layers.{layer}.mlp.gate.weight"] = torch.randn(4, 8)
        for i in range(4):
            for part in ("up", "down"):
                out[f"layers.{layer}.mlp.experts.{i}.{part}.weight"] = torch.randn(2, 2)
    return {name: tensor for name, tensor in out.items() if not any(part in name for part in gone)}


def test_missing_experts(tmp_path: Path) -> None:
    at = tmp_path / "model.safetensors"
    layer = "layers.1.mlp.experts"
    for gone in ((f"{layer}.1.",), (f"{layer}.3.",), (f"{layer}.2.up",)):
        save_file(experts(*gone), at, {"format": "pt"})
        assert found(at) == {"experts-missing": layer}
    save_file(experts(f"{layer}.3.", "gate"), at, {"format": "pt"})
    assert found(at) == {}  # two layers, two numbers: which is right nobody knows
    for gone in ((), ("gate",)):
        save_file(experts(*gone), at, {"format": "pt"})
        assert found(at) == {}


def test_adapters_without_elements(tmp_path: Path) -> None:
    name = "base_model.model.q.lora_A.weight"
    weights = {name: torch.empty(0), "base_model.model.q.lora_B.weight": torch.randn(4, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert found(tmp_path / "adapter_model.safetensors") == {"lora-empty": name}
    weights[name] = torch.randn(2, 4)
    weights["none"] = torch.empty(0)
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert found(tmp_path / "adapter_model.safetensors") == {}


@pytest.mark.parametrize(
    "weights",
    [
        {"a.weight": torch.empty(0), "b.weight": torch.empty(0)},
        {"a.weight": torch.empty(0), "b.weight": torch.empty(0), "ln.weight": torch.randn(3)},
        {"lm_head": torch.empty(0), "wte": torch.empty(0), "position_ids": torch.arange(3)},
        {
            "base_model.model.q.lora_A.weight": torch.empty(0),
            "base_model.model.q.lora_B.weight": torch.empty(0),
        },
    ],
)
def test_weights_without_elements(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """What ZeRO-3 leaves of parameters that were not gathered."""
    torch.save(weights, tmp_path / "a.pt")
    torch.save({"model_state_dict": weights, "epoch": 1}, tmp_path / "b.pt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "llama"}')
    for path in ("hf/model.safetensors", "c.safetensors"):
        save_file(weights, tmp_path / path, {"format": "pt"})
    for name in ("a.pt", "b.pt", "hf", "c.safetensors"):
        assert found(tmp_path / name) == {"weights-empty": next(iter(weights))}
        assert not verify(tmp_path / name).ok


def test_a_tensor_without_elements_beside_weights_is_good(tmp_path: Path) -> None:
    for beside in ({"none": torch.empty(0)}, {"a.bias": torch.empty(0), "b.weight": torch.empty(0, 3)}):
        torch.save({"a.weight": torch.randn(4, 2), **beside}, tmp_path / "a.pt")
        assert found(tmp_path / "a.pt") == {} and verify(tmp_path / "a.pt").ok
    torch.save({"none": torch.empty(0), "ids": torch.arange(3)}, tmp_path / "b.pt")
    assert found(tmp_path / "b.pt") == {}
    layer = torch.nn.Linear(0, 4).state_dict()  # of a condition that a run does without
    torch.save(
        {**{f"cond.{name}": value for name, value in layer.items()}, "w": torch.randn(2)}, tmp_path / "c.pt"
    )
    torch.save({"head.w": torch.randn(2), "crit.weight": torch.empty(0)}, tmp_path / "d.pt")
    boxes = {"boxes": torch.empty(0, 4), "scores": torch.empty(0)}
    torch.save({"ids": torch.arange(3), **boxes}, tmp_path / "e.pt")
    assert all(found(tmp_path / f"{name}.pt") == {} for name in "cde")


def test_weights_on_the_meta_device(tmp_path: Path) -> None:
    meta = torch.empty(2, 2, device="meta")
    for weight in (meta, torch.nn.Parameter(meta)):
        torch.save({"b.weight": torch.randn(2), "w.weight": weight}, tmp_path / "a.pt")
        (tmp_path / "hf").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "a.pt", tmp_path / "hf/pytorch_model.bin")
        for path in (tmp_path / "a.pt", tmp_path / "hf"):
            (finding,) = (f for f in verify(path).findings if f.severity == "error")
            assert (finding.id, finding.where) == ("weights-empty", "w.weight")
            assert "on the meta device: saved without data" in finding.message


def test_a_file_of_weights_without_a_tensor(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors", {"format": "pt"})
    assert found(tmp_path / "a.safetensors") == {"weights-empty": ""}
    assert not verify(tmp_path / "a.safetensors").ok


def test_buffers_that_a_merger_repeated(tmp_path: Path) -> None:
    good = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4)).state_dict()
    for name in ("1.num_batches_tracked", "1.running_mean"):
        bad = {**good, name: torch.cat([good[name].reshape(-1)] * 2)}
        torch.save(bad, tmp_path / "a.pt")
        assert found(tmp_path / "a.pt") == {"buffer-repeated": name}
        dcp.save({"model": bad}, checkpoint_id=tmp_path / name, no_dist=True)
        assert found(tmp_path / name) == {"buffer-repeated": name}
    torch.save(good, tmp_path / "a.pt")
    assert found(tmp_path / "a.pt") == {}


def trained(path: Path, weights: dict[str, torch.Tensor], beside: dict[str, torch.Tensor]) -> Path:
    """A training checkpoint of these weights, with moments and steps; `beside` are not trained."""
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.rand_like(w), "exp_avg_sq": torch.rand_like(w)}
        for i, w in enumerate(weights.values())
    }
    hyper = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    group = hyper | {"params": list(range(len(weights))), "param_names": list(weights)}
    optimizer = {"state": state, "param_groups": [group]}
    said = {"buffer_names": [name for name in beside if "lora" not in name], "global_step": 3}
    torch.save({"model": {**weights, **beside}, "optimizer": optimizer, **said}, path)
    return path


def test_every_format_shows_what_names_and_shapes_show(tmp_path: Path) -> None:
    layer, adapter = "layers.1.mlp.experts", "q.lora_A.default.weight"
    norm = torch.nn.BatchNorm1d(4).state_dict()
    weights = experts(f"{layer}.3.") | {"n.weight": torch.rand(4), "n.bias": torch.rand(4)}
    beside = {f"n.{name}": norm[name] for name in ("running_mean", "running_var")}
    beside["n.num_batches_tracked"] = torch.tensor([7, 7])
    bad = trained(tmp_path / "bad.pt", weights, beside | {adapter: torch.empty(0)})
    expected = {
        "experts-missing": layer,
        "buffer-repeated": "n.num_batches_tracked",
        "lora-empty": adapter,
    }
    for path in everywhere(bad):
        assert found(path) == expected, path
    beside |= {"n.num_batches_tracked": torch.tensor(7), adapter: torch.rand(2, 4)}
    weights |= experts()
    for path in everywhere(trained(tmp_path / "good.pt", weights, beside)):
        assert found(path) == {}, path


@pytest.mark.parametrize("name", ["z2_bf16_ws2", "z3_bf16_ws2"])
def test_a_rank_of_a_larger_world(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "deepspeed-0.19.8" / name, tmp_path / "run")
    for path in [*folder.glob("*/*_pp_rank_1_*")]:
        shutil.copy(path, path.with_name(path.name.replace("rank_1_", "rank_2_")))
    assert "shard-extra" in {f.id for f in verify(folder).findings if f.severity == "error"}


def test_leftovers_of_another_world_size(tmp_path: Path) -> None:
    (source, *_) = sorted((FIXTURES / "hf-trainer/deepspeed").iterdir())
    folder = shutil.copytree(source, tmp_path / source.name)
    assert found(folder) == {}
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_2.pth")
    assert found(folder).keys() == {"rank-files-stale"}
    dcp_folder = shutil.copytree(FIXTURES / "dcp/fsdp2_ws2", tmp_path / "dcp")
    shutil.copy(dcp_folder / "__1_0.distcp", dcp_folder / "__2_0.distcp")
    assert "shard-extra" in {f.id for f in verify(dcp_folder).findings}


TOPS = sorted(path for path in FIXTURES.iterdir() if path.is_dir())


@pytest.mark.parametrize("top", TOPS, ids=name_of)
def test_no_good_checkpoint_is_suspected(top: Path) -> None:
    """Every checkpoint below, and every file of it that can be looked at alone."""
    looked = 0
    files = [p for p in top.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")]
    for path in [*paths(top), *files]:
        if "truth" in path.parts:
            continue
        try:
            fired = found(path)
        except CkptError:
            continue  # a rank's own file
        looked += 1
        assert fired == {}, path
    assert looked or not files


@pytest.mark.parametrize("index", ["999999999", "2000000000", "1" * 5000])
def test_the_number_of_an_expert_is_no_measure(index: str, tmp_path: Path) -> None:
    names = ("gate", "experts.0", "experts.1", f"experts.{index}")
    weights = {f"moe.{name}.w": torch.arange(4.0) for name in names}
    torch.save({"model_state_dict": weights}, tmp_path / "a.pt")
    expected = {"experts-missing"} if index == "999999999" else set()
    assert set(found(tmp_path / "a.pt")) == expected
