"""`ckpt resume-check` on every framework's checkpoints, on bad input, and about run folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Ran, run
from damage import flip
from safetensors.torch import save_file
from support import FIXTURES, SAMPLES, name_of

from ckpttools.explain import EXPLANATIONS
from ckpttools.frameworks import auto_resume
from ckpttools.resume import NewRun, Target, foretell
from ckpttools.resume.arguments import resolved
from ckpttools.resume.model import of_config, read_model
from ckpttools.trainer import search

TRAINED = FIXTURES / "trainer/z2_bf16_2"
DECAY = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"


def said(*words: object) -> tuple[int, dict[str, Any]]:
    ran = run("resume-check", *words, "--json")
    assert ran.out, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return ran.code, document


def saved_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = torch.load(
        next(checkpoint.rglob("mp_rank_00_model_states.pt")), weights_only=False
    )["ds_config"]
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]


def written(folder: Path, values: object, name: str = "new.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values))
    return path


# --- nothing changed ----------------------------------------------------------------------------------

ELASTIC = ("z2_elastic", "z2_elastic_sgd")
READABLE = [p for p in SAMPLES if not p.name.startswith(ELASTIC)]


@pytest.mark.parametrize("path", READABLE, ids=name_of)
def test_an_unchanged_run_resumes_where_it_stopped(path: Path) -> None:
    truth = torch.load(path.parent / "truth" / f"{path.name}.pt", weights_only=False)
    code, found = said(path, *(["--no-strict"] if "exclude" in path.name else []))
    assert (code, found["verdict"], found["error"]) == (0, "safe", None)
    assert found["step"] == truth["global_steps"]
    assert found["samples"] == truth["global_samples"]
    assert [group["first"] for group in found["lr"]["groups"]] == truth["lr"]
    assert all(check["ok"] is not False for check in found["checks"])


@pytest.mark.parametrize("name", ["z2_exclude_frozen", "z3_exclude_frozen", "z1_tied_frozen_exclude"])
def test_frozen_weights_that_were_left_out_are_no_safe_resume(name: str) -> None:
    """DeepSpeed's load_checkpoint, which is strict unless told otherwise, ends in Missing key(s)."""
    code, found = said(FIXTURES / f"deepspeed-0.19.8/{name}_ws2")
    assert (code, found["verdict"]) == (0, "careful")
    (row,) = found["differences"]
    assert "Missing key(s)" in row["why"] and "load_module_strict=False" in row["hint"]
    assert ("emb.weight" in row["why"]) == ("tied" in name)
    peft = said(FIXTURES / "hf-trainer/peft/checkpoint-2")[1]  # transformers loads it loosely
    assert {row["class"] for row in peft["differences"]} <= {"safe"}


def test_what_ckpt_writes_for_stage_3_says_whether_frozen_weights_were_left_out(tmp_path: Path) -> None:
    """As DeepSpeed does: nothing frozen is an empty mapping, and left out is none at all."""
    ds = FIXTURES / "deepspeed-0.19.8"
    assert run("convert", ds / "z1_bf16_ws2", tmp_path / "three", "--to", "zero3").code == 0
    assert said(tmp_path / "three", "--world-size", "2")[1]["verdict"] == "safe"
    assert run("reshard", ds / "z3_exclude_frozen_ws2", tmp_path / "less", "--world-size", "1").code == 0
    rows = said(tmp_path / "less", "--world-size", "1")[1]["differences"]
    assert any("exclude_frozen_parameters" in row["why"] for row in rows)


@pytest.mark.parametrize("path", READABLE, ids=name_of)
def test_its_own_configuration_and_weights_are_no_change(path: Path, tmp_path: Path) -> None:
    config = written(tmp_path, saved_config(path))
    code, found = said(path, "--config", config, "--model", path)
    assert (code, found["verdict"]) == (0, "safe")
    assert found["differences"] == found["tensors"] == found["overridden"] == []


@pytest.mark.parametrize("name", ["z2_elastic_ws2", "z3_bf16_ws2", "z0_bf16_ws2"])
def test_other_stages_and_forms(name: str) -> None:
    code, found = said(FIXTURES / "deepspeed-0.19.8" / name)
    assert code == (1 if "elastic" in name else 0)
    assert found["step"] == 3
    assert (found["lr"]["first"] is None) == ("elastic" in name)


@pytest.mark.parametrize("name", ["moe_ws2", "pp_ws2"])
def test_layouts_that_are_not_foretold(name: str) -> None:
    ran = run("resume-check", FIXTURES / "deepspeed-0.19.8" / name)
    assert (ran.code, ran.out) == (2, "")
    assert "layout-unsupported" in ran.err


@pytest.mark.parametrize(
    ("path", "step", "first"),
    [
        ("monolithic/full/epoch_2_step_40.pt", 40, 0.007938926261462366),
        ("hf-trainer/plain/checkpoint-2", 2, 0.005),
        ("hf-trainer/deepspeed/checkpoint-2", 2, 0.005),
        ("lightning/file/epoch=0-step=3.ckpt", 3, 0.006913417161825449),
        ("lightning/deepspeed/epoch=0-step=3.ckpt", 3, 0.006913417161825449),
        ("accelerate/plain", 8, 0.0),
        ("monolithic/pcdet/checkpoint_epoch_4.pth", 80, 0.003),
    ],
)
def test_other_containers(path: str, step: int, first: float) -> None:
    code, found = said(FIXTURES / path)
    assert (code, found["verdict"]) == (0, "safe")
    assert (found["step"], found["lr"]["first"]) == (step, first)


def test_the_next_rate_is_that_of_torch() -> None:
    """The saved scheduler, stepped once by torch. Whether that comes with the next update is not saved: it
    was stepped 3 times, as the optimizer was, and 2 epochs are done.
    """
    saved = torch.load(FIXTURES / "monolithic/full/epoch_2_step_40.pt", weights_only=False)
    groups = saved["optimizer_state_dict"]["param_groups"]
    optimizer = torch.optim.SGD([{**groups[0], "params": [torch.zeros(1)]}], lr=1.0)
    optimizer.param_groups[0].update({k: v for k, v in groups[0].items() if k != "params"})
    state = saved["scheduler_state_dict"]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, state["T_max"])
    optimizer.param_groups[0]["lr"] = groups[0]["lr"]
    scheduler.load_state_dict(state)
    optimizer.step()
    scheduler.step()
    found = said(FIXTURES / "monolithic/full/epoch_2_step_40.pt")[1]["lr"]
    assert found["next"] is None
    assert f"; its next step gives {optimizer.param_groups[0]['lr']:.6g}" in found["note"]


def test_weights_alone_do_not_resume() -> None:
    code, found = said(FIXTURES / "hf/single")
    assert (code, found["verdict"]) == (1, "impossible")


# --- what changed -------------------------------------------------------------------------------------


def test_each_difference_has_a_class_a_reason_and_what_to_do(tmp_path: Path) -> None:
    config = saved_config(TRAINED)
    config["train_batch_size"] *= 2
    config["gradient_accumulation_steps"] *= 2
    config["optimizer"]["params"]["lr"] = 0.5
    config["optimizer"]["params"]["betas"] = [0.5, 0.6]
    config["steps_per_print"] = 3
    code, found = said(TRAINED, "--config", written(tmp_path, config))
    assert (code, found["verdict"], found["resumes"], found["ok"]) == (0, "careful", True, True)
    classes = {d["setting"]: d["class"] for d in found["differences"]}
    assert classes == {
        "train_batch_size": "careful",
        "optimizer.params.lr": "safe",
        "optimizer.params.betas": "safe",
        "steps_per_print": "safe",
    }
    batch = next(d for d in found["differences"] if d["setting"] == "train_batch_size")
    assert "--old-bs 8 --new-bs 16" in batch["hint"]
    assert "3 updates of 8 were 24 samples" in batch["why"]
    over = {o["setting"]: (o["configured"], o["used"]) for o in found["overridden"]}
    assert over["optimizer.params.betas"] == ([0.5, 0.6], [0.9, 0.95])
    assert over["optimizer.params.lr"] == (0.5, found["lr"]["first"])
    assert not next(c for c in found["checks"] if c["name"] == "effective batch")["ok"]
    shown = run("resume-check", TRAINED, "--config", tmp_path / "new.json")
    assert "without effect" in shown.out and "hint: ckpt rebase-schedule" in shown.out


def test_another_number_of_ranks_names_the_command_that_helps() -> None:
    ran = run("resume-check", TRAINED, "--world_size", "4")
    assert ran.code == 1
    assert "ZeRORuntimeException" in ran.out
    assert f"hint: ckpt reshard {TRAINED} --world-size 4" in ran.out


def test_ckpt_trains_own_configuration(tmp_path: Path) -> None:
    config = yaml.safe_load((TRAINED / "config.yaml").read_text())
    code, found = said(TRAINED, "--config", written(tmp_path, config, "same.yaml"))
    assert (code, found["verdict"], found["differences"], found["tensors"]) == (0, "safe", [], [])
    config["model"]["hidden_size"], config["seed"], config["save"]["save_steps"] = 16, 1, 50
    code, found = said(TRAINED, "--config", written(tmp_path, config, "other.yaml"))
    assert (code, found["error"]["class"]) == (1, "RuntimeError")
    classes = {d["setting"]: d["class"] for d in found["differences"]}
    assert classes == {"model: shapes": "impossible", "seed": "impossible", "save.save_steps": "safe"}
    weights = torch.load(next(TRAINED.rglob("mp_rank_00_model_states.pt")), weights_only=False)["module"]
    assert {t["name"] for t in found["tensors"]} == set(weights)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_from_a_configuration_are_those_of_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        settings = transformers.LlamaConfig(
            vocab_size=33, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
    else:
        settings = transformers.GPT2Config(
            vocab_size=33, n_embd=24, n_layer=2, n_head=2, n_positions=9, tie_word_embeddings=tied
        )
    settings.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = read_model(tmp_path)
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == expected
    assert bool(found.shared) == tied


def test_a_model_is_compared_by_name_shape_and_dtype(tmp_path: Path) -> None:
    weights = torch.load(next(DECAY.rglob("mp_rank_00_model_states.pt")), weights_only=False)["module"]
    changed = {name: value.clone() for name, value in weights.items()}
    first, second, third = list(changed)[:3]
    changed[first] = torch.zeros(2, 2, dtype=torch.bfloat16)
    changed[second] = changed[second].float()
    changed["new.weight"] = changed.pop(third)
    save_file(changed, tmp_path / "model.safetensors")
    code, found = said(DECAY, "--model", tmp_path / "model.safetensors")
    assert (code, found["error"]["class"]) == (1, "RuntimeError")
    problems = {(t["name"], t["problem"]) for t in found["tensors"]}
    assert problems == {
        (first, "shape"),
        (second, "dtype"),
        (third, "unexpected"),
        ("new.weight", "missing"),
    }


def test_trainer_arguments(tmp_path: Path) -> None:
    plain = FIXTURES / "hf-trainer/plain/checkpoint-4"
    arguments = {"output_dir": "x", "per_device_train_batch_size": 8, "learning_rate": 0.5}
    code, found = said(plain, "--config", written(tmp_path, arguments))
    assert (code, found["verdict"], found["lr"]["next"]) == (0, "careful", None)
    assert [o["setting"] for o in found["overridden"]] == ["learning_rate"]
    arguments["num_train_epochs"] = 90
    settings = {d["setting"] for d in said(plain, "--config", written(tmp_path, arguments))[1]["differences"]}
    assert "num_train_epochs" in settings


def test_auto_is_what_the_arguments_or_the_checkpoint_say() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    }
    saved = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"params": {"betas": [0.9, 0.95]}},
    }
    arguments = {"per_device_train_batch_size": 4, "learning_rate": 0.1}
    assert resolved(NewRun(config=config, arguments=arguments), saved) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}},
    }
    assert resolved(NewRun(), saved) is None


def test_old_deepspeed_with_new_torch_is_foretold() -> None:
    versions = {"deepspeed": "0.14.5", "torch": "2.13.0+cpu"}
    forecast = foretell(Target.find(DECAY), NewRun(versions=versions))
    assert forecast.refusal is not None and forecast.refusal.error == "UnpicklingError"
    assert foretell(Target.find(DECAY), NewRun(versions={**versions, "torch": "2.5.1"})).resumes


# --- damage and bad input -----------------------------------------------------------------------------


def test_damage_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(DECAY, copy)
    shard = sorted(copy.rglob("*_optim_states.pt"))[1]
    data = shard.stat().st_size // 2
    flip(shard, data)
    code, found = said(copy, "--full")
    assert (code, found["ok"]) == (1, False)
    assert any(c["name"] == "intact" and c["ok"] is False for c in found["checks"])
    shard.unlink()
    code, found = said(copy)
    assert (code, found["resumes"]) == (1, False)
    assert any(c["name"] == "complete" and c["ok"] is False for c in found["checks"])
    (copy / "latest").write_text("global_step99")
    code, found = said(copy)
    assert (code, found["resumes"]) == (1, False)
    assert found["auto_resume"][0]["problem"] == "it is not there: loading fails"


@pytest.mark.parametrize(
    ("words", "text", "id"),
    [
        (("--config", "absent.json"), None, "not-found"),
        (("--config", "new.json"), "{", "run-config"),
        (("--config", "new.json"), "[1]", "run-config"),
        (("--config", "new.json"), '{"a": 1}', "run-config"),
        (("--config", "new.yaml"), "nonsense: 1", "run-config"),
        (("--config", "absent.yaml"), None, "not-found"),
        (("--model", "absent"), None, "not-found"),
        (("--tag", "absent"), None, "tag-missing"),
    ],
)
def test_bad_input_is_explained(words: tuple[str, str], text: str | None, id: str, tmp_path: Path) -> None:
    option, value = words
    if text is not None:
        (tmp_path / value).write_text(text)
    ran: Ran = run("resume-check", DECAY, option, tmp_path / value if option != "--tag" else value)
    assert ran.code in (1, 2) and ran.out == ""
    assert f"error[{id}]" in ran.err and id in EXPLANATIONS


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_bad_numbers_are_refused(value: str) -> None:
    assert run("resume-check", DECAY, f"--world-size={value}").code == 2


def test_odd_values_in_a_configuration_break_nothing(tmp_path: Path) -> None:
    """Whatever stands in a ds_config: an answer, never a defect."""
    base = saved_config(DECAY)
    for key in (*base, "optimizer", "scheduler", "fp16", "data_types", "checkpoint"):
        for value in (
            None,
            0,
            -1,
            "x",
            [],
            {},
            [1],
            {"type": 5, "params": 7},
            {"params": {"lr": "x"}},
            True,
            1e400,
        ):
            ran = run("resume-check", DECAY, "--config", written(tmp_path, {**base, key: value}))
            assert ran.code in (0, 1, 2), (key, value, ran.err)
            assert "internal" not in ran.err, (key, value, ran.err)


# --- which checkpoint an automatic resume takes -------------------------------------------------------


def chosen(folder: Path) -> dict[str, Any]:
    return {found.framework: found for found in auto_resume(folder)}


def test_transformers_takes_the_same(tmp_path: Path) -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    for number in (2, 9, 10):
        shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-11.bak").mkdir()
    found = chosen(tmp_path)["Hugging Face Trainer"]
    assert str(found.path) == trainer_utils.get_last_checkpoint(str(tmp_path))
    assert found.problem == ""
    (tmp_path / "checkpoint-10/trainer_state.json").unlink()
    assert "not finished" in chosen(tmp_path)["Hugging Face Trainer"].problem
    _, document = said(tmp_path)
    assert document["path"].endswith("checkpoint-10")


def test_mmengine_takes_the_pointer_word_for_word(tmp_path: Path) -> None:
    source = FIXTURES / "monolithic/mmengine/epoch_4.pth"
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    shutil.copy(source, original / "epoch_4.pth")
    (original / "last_checkpoint").write_text(str(original / "epoch_4.pth"))
    assert chosen(original)["MMEngine"].problem == ""
    shutil.copytree(original, copy)
    found = chosen(copy)["MMEngine"]
    assert found.path == original / "epoch_4.pth" and "another folder" in found.problem
    shutil.rmtree(original)
    found = chosen(copy)["MMEngine"]
    assert found.path is None and "lies beside the pointer" in found.problem


def test_openpcdet_goes_by_time_and_lightning_by_name_and_time(tmp_path: Path) -> None:
    for number, age in ((3, 10), (12, 30), (4, 20)):
        path = tmp_path / f"checkpoint_epoch_{number}.pth"
        shutil.copy(FIXTURES / "monolithic/pcdet/checkpoint_epoch_4.pth", path)
        os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    assert chosen(tmp_path)["OpenPCDet"].path == tmp_path / "checkpoint_epoch_3.pth"
    (tmp_path / "checkpoint_epoch_3.pth").write_bytes(b"cut")
    os.utime(tmp_path / "checkpoint_epoch_3.pth", (1_700_000_000, 1_700_000_000))
    assert "silently passed over" in chosen(tmp_path)["OpenPCDet"].problem

    source = FIXTURES / "lightning/file/epoch=0-step=3.ckpt"
    shutil.copy(source, tmp_path / "epoch=0-step=3.ckpt")
    assert chosen(tmp_path)["Lightning"].path is None
    for name, age in (("last.ckpt", 9), ("last-v1.ckpt", 5)):
        shutil.copy(source, tmp_path / name)
        os.utime(tmp_path / name, (1_700_000_000 - age, 1_700_000_000 - age))
    assert chosen(tmp_path)["Lightning"].path == tmp_path / "last-v1.ckpt"


def test_our_trainer_takes_the_same(tmp_path: Path) -> None:
    shutil.copytree(TRAINED, tmp_path / "run")
    _, found = said(tmp_path / "run")
    ours = next(rule for rule in found["auto_resume"] if rule["framework"].startswith("ckpt train"))
    assert ours["path"] == str(search.newest_first(tmp_path / "run")[0])


def test_deepspeed_without_latest_loads_nothing(tmp_path: Path) -> None:
    shutil.copytree(DECAY, tmp_path / "run")
    assert chosen(tmp_path / "run")["DeepSpeed"].problem == ""
    (tmp_path / "run/latest").unlink()
    assert chosen(tmp_path / "run")["DeepSpeed"].path is None


def test_an_unknown_architecture_is_said_to_be_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    ran = run("resume-check", DECAY, "--model", tmp_path)
    assert ran.code == 2 and "error[model-config]" in ran.err
    assert (
        "lm_head.weight"
        in of_config(
            {"model_type": "gpt2", "n_embd": 4, "vocab_size": 5, "n_layer": 1, "n_positions": 3}, tmp_path
        ).tensors
    )


@pytest.mark.parametrize("options", [("--world-size", "0"), ("--groups", "-1"), ("--world-size", "2000000")])
def test_sizes_that_cannot_be(options: tuple[str, str]) -> None:
    ran = run("resume-check", FIXTURES / "trainer/z2_bf16_2", *options)
    assert ran.code == 2 and "[bad-usage]" in ran.err and "hint:" in ran.err
