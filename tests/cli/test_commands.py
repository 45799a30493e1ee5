"""What the commands print and write on good input, held against torch, safetensors and transformers."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Ckpt, ckpt_process
from safetensors import safe_open
from safetensors.torch import load_file
from support import FIXTURES, SAMPLES, ZERO_FIXTURES, name_of

from ckpttools.cli.app import ALIASES, COMMANDS
from ckpttools.explain import EXPLANATIONS

GOOD = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
TIED = FIXTURES / "deepspeed-0.19.8" / "z2_tied_ws2"
OTHERS = [
    *sorted(p for p in (FIXTURES / "monolithic").iterdir() if p.name != "run"),
    *sorted((FIXTURES / "monolithic/run").iterdir()),
    *sorted((FIXTURES / "hf").iterdir()),
    *sorted((FIXTURES / "hf-trainer/plain").iterdir()),
    FIXTURES / "accelerate/plain",
    *sorted((FIXTURES / "lightning/file").glob("*")),
]


@pytest.mark.parametrize("path", [*ZERO_FIXTURES, *OTHERS], ids=name_of)
def test_good_checkpoints_are_inspected_and_verified(path: Path, ckpt: Ckpt) -> None:
    ran = ckpt("inspect", path, "--tensors")
    assert ran.code == 0 and str(path) in ran.out, ran.err
    document = json.loads(ckpt("inspect", path, "--json", "--tensors").out)
    assert document["parameters"] > 0 and document["tensors"] and document["files"]
    ran = ckpt("verify", path, "--json")
    assert ran.code == 0, ran.out
    worst = {f["severity"] for c in json.loads(ran.out)["checkpoints"] for f in c["findings"]}
    assert worst <= {"info"}, ran.out


def test_a_command_imports_what_it_needs() -> None:
    """Starting is most of the time of a small command. A number may fall, and rise for a reason alone."""
    script = (
        "import sys; from ckpttools.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    slow = {
        "torch",
        "numpy",
        "deepspeed",
        "random",
        "hashlib",
        "secrets",
        "socket",
        "ssl",
        "ctypes",
        "tempfile",
    }
    slow |= {"concurrent.futures", "logging", "multiprocessing", "difflib", "xxhash", "isal"}
    for args, most in (
        (["inspect", str(GOOD), "--tensors"], 120),
        (["--help"], 4),
        (["verify", "--help"], 21),
        (["train", "--help"], 20),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", script, *args], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, (args, ran.stderr)
        found = set(ran.stderr.split())
        ours = sorted(name for name in found if name.startswith("ckpttools"))
        assert not found & slow and len(ours) <= most, (args, len(ours), found & slow, ours)
        others = ("dcp", "hf", "torch", "universal", "verl", "zero0", "zero3")
        assert not found & {f"ckpttools.formats.{name}.read" for name in others}


def test_verify_many(ckpt: Ckpt, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(GOOD, bad)
    next(bad.glob("*/*rank_1*")).unlink()
    ran = ckpt("verify", GOOD, bad, TIED)
    assert ran.code == 1 and ran.out.splitlines()[-1] == "2 of 3 checkpoints are good"
    ran = ckpt("verify", GOOD, tmp_path / "nothing")
    assert ran.code == 2 and "not-found" in ran.out
    document = json.loads(ckpt("verify", GOOD, bad, "--json").out)
    assert [c["ok"] for c in document["checkpoints"]] == [True, False] and document["ok"] is False
    assert document["checkpoints"][0]["step"] == 3


def test_reshard_and_back_by_command(ckpt: Ckpt, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOOD, run)
    ran = ckpt("reshard", run, "--world_size", "3")  # underscores as dashes
    assert ran.code == 0 and ran.out.strip() == str(tmp_path / "ws3-of-run")
    assert ckpt("verify", tmp_path / "ws3-of-run").code == 0
    ran = ckpt("reshard", tmp_path / "ws3-of-run", "--world-size", "2", "--json")
    document = json.loads(ran.out)
    assert document["destination"] == str(tmp_path / "ws2-of-run") and document["ok"]
    assert ckpt("reshard", GOOD, tmp_path / "q", "--world-size", "2", "-q").err == ""


def test_dry_run_shows_the_plan_and_writes_nothing(ckpt: Ckpt, tmp_path: Path) -> None:
    ran = ckpt("reshard", GOOD, tmp_path / "out", "--world-size", "5", "--dry-run")
    assert ran.code == 0 and "zero_pp_rank_4_mp_rank_00_optim_states.pt" in ran.out
    document = json.loads(ckpt("extract", GOOD, tmp_path / "out", "--dry-run", "--json").out)
    assert document["dry_run"] and [f["path"] for f in document["files"]] == ["model.safetensors"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [*SAMPLES[:3], TIED], ids=name_of)
def test_extract_forms_hold_the_same_weights(path: Path, ckpt: Ckpt, tmp_path: Path) -> None:
    for args in (
        ["folder"],
        ["one.safetensors"],
        ["torch.pt"],
        ["bin", "--format", "pt"],
        ["sharded", "--max_shard_size", "300"],
        ["safe", "--safe_serialization"],
    ):
        ran = ckpt("extract", path, tmp_path / args[0], "--weights-only", *args[1:])
        assert ran.code == 0, ran.err
    one = load_file(tmp_path / "one.safetensors")
    whole = torch.load(tmp_path / "torch.pt", weights_only=True)["model_state_dict"]
    sharded: dict[str, torch.Tensor] = {}
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        sharded |= load_file(tmp_path / "sharded" / shard)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in sharded.values())
    assert sharded.keys() == one.keys() == load_file(tmp_path / "folder/model.safetensors").keys()
    assert whole.keys() == torch.load(tmp_path / "bin/pytorch_model.bin", weights_only=True).keys()
    assert all(torch.equal(one[name], whole[name]) and torch.equal(one[name], sharded[name]) for name in one)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        about = file.metadata()
    assert about["format"] == "pt" and about["step"] == "3"
    for alias in whole.keys() - one.keys():  # tied: stored once, the header names the owner
        assert whole[alias].data_ptr() == whole[about[alias]].data_ptr()


def test_one_torch_file_keeps_counters_and_losses(ckpt: Ckpt, tmp_path: Path) -> None:
    source = FIXTURES / "monolithic/full/epoch_2_step_40.pt"
    saved = torch.load(source, weights_only=True)
    for name in ("w.pt", "w.pth", "w.ckpt"):
        ran = ckpt("extract", source, tmp_path / name, "--format", "pt")
        assert ran.code == 0 and "['model_state_dict']" in ran.err, ran
        made = torch.load(tmp_path / name, weights_only=True)
        kept = ["model_state_dict", "global_step", "epoch", "train_loss", "val_loss"]
        assert list(made) == kept and all(made[key] == saved[key] for key in kept[1:])
        assert all(torch.equal(made["model_state_dict"][n], t) for n, t in saved["model_state_dict"].items())
        shown = json.loads(ckpt("inspect", tmp_path / name, "--json").out)
        assert (shown["step"], shown["epoch"], shown["val_loss"]) == (40, 2, saved["val_loss"])
    ran = ckpt("extract", source, tmp_path / "w.bin")  # transformers loads it
    assert "val loss" in ran.err
    assert torch.load(tmp_path / "w.bin", weights_only=True).keys() == saved["model_state_dict"].keys()
    assert ckpt("extract", FIXTURES / "monolithic/bare/model.pth", tmp_path / "b.pt").code == 0
    assert "model_state_dict" not in torch.load(tmp_path / "b.pt", weights_only=True)


def test_extract_options(ckpt: Ckpt, tmp_path: Path) -> None:
    frozen = FIXTURES / "deepspeed-0.19.8" / "z2_frozen_ws2"
    assert ckpt("extract", frozen, tmp_path / "a.pt", "--source", "model").code == 0
    saved = torch.load(next(frozen.glob("*/mp_rank*")), weights_only=False)
    weights = torch.load(tmp_path / "a.pt", weights_only=True)["model_state_dict"]
    assert weights.keys() == saved["module"].keys()
    assert all(torch.equal(weights[n], t) and weights[n].dtype == t.dtype for n, t in saved["module"].items())
    assert ckpt("extract", frozen, tmp_path / "b.pt", "--dtype", "bf16").code == 0
    cast = torch.load(tmp_path / "b.pt", weights_only=True)["model_state_dict"]
    # the master weights rounded are the weights as trained with
    assert all(torch.equal(cast[name], t) for name, t in saved["module"].items())
    assert ckpt("extract", frozen, tmp_path / "c.pt", "--exclude-frozen-parameters").code == 0
    trained = torch.load(tmp_path / "c.pt", weights_only=True)["model_state_dict"]
    assert trained.keys() == saved["module"].keys() - saved["frozen_param_shapes"].keys()
    args = ["--include", "*.weight", "--exclude", "ln*", "--strip-prefix", "emb."]
    assert ckpt("extract", frozen, tmp_path / "d.pt", *args).code == 0
    some = torch.load(tmp_path / "d.pt", weights_only=True)["model_state_dict"]
    assert "weight" in some and not any(n.startswith("ln") or n.endswith("bias") for n in some)
    config = FIXTURES / "hf" / "gpt2_tied"
    assert ckpt("extract", frozen, tmp_path / "e", "--hf-config", config).code == 0
    assert (tmp_path / "e/config.json").read_bytes() == (config / "config.json").read_bytes()


def test_extracted_weights_give_the_same_logits_in_transformers(ckpt: Ckpt, tmp_path: Path) -> None:
    """The trainer's checkpoint, extracted, is a model folder: transformers computes what DeepSpeed's does."""
    import transformers

    run = FIXTURES / "trainer"
    for case in sorted(run.iterdir()):
        config = next(iter([*case.glob("hf_config"), *case.parent.glob(f"{case.name}/**/hf_config")]), None)
        if config is None:
            continue
        out = tmp_path / case.name
        assert ckpt("extract", case, out, "--hf-config", config, "--source", "model").code == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        settings = transformers.AutoConfig.from_pretrained(config)
        plain = transformers.AutoModelForCausalLM.from_config(settings, dtype=model.dtype)
        state = torch.load(next(case.glob("**/mp_rank*")), weights_only=False)["module"]
        plain.load_state_dict(state)
        tokens = torch.arange(16).reshape(2, 8) % settings.vocab_size
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, plain(tokens).logits), case
        break
    else:
        pytest.skip("no fixture with hf_config")


def test_explain_knows_every_id_and_no_other(ckpt: Ckpt) -> None:
    raised: set[str] = set()
    strings: set[str] = set()
    package = Path(sys.modules["ckpttools"].__file__ or "").parent
    for path in package.rglob("*.py"):
        if path.name == "explain.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            values: list[ast.expr] = []
            if name in ("CkptError", "UsageError", "Unsupported", "kind", "__init__", "_found"):
                values = node.args[:1]
            if name == "Finding":
                values = [k.value for k in node.keywords if k.arg == "id"]
            raised |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    ids = {name for name in raised if re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name)}
    assert ids - EXPLANATIONS.keys() == set()
    assert EXPLANATIONS.keys() - strings == set()
    listed = ckpt("explain").out
    for id in EXPLANATIONS:
        assert re.search(rf"^{id} ", listed, re.MULTILINE)
        assert "What to do" in ckpt("explain", id).out


def test_every_command_has_help_and_the_readme_names_it(ckpt: Ckpt) -> None:
    readme = (FIXTURES.parent / "README.md").read_text()
    for name in [*COMMANDS, *ALIASES]:
        ran = ckpt(name, "--help")
        assert ran.code == 0 and "Usage: ckpt" in ran.out
    for name in COMMANDS:
        assert f"ckpt {name}" in readme


def test_output_of_names_is_escaped(ckpt: Ckpt, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"a\x1b[31mred\n\u202etxt": torch.zeros(2)}, path)
    for args in (
        ["inspect", path, "--tensors"],
        ["verify", path],
        ["extract", path, tmp_path / "o", "--dry-run"],
    ):
        ran = ckpt(*args)
        assert ran.code == 0
        assert "\x1b" not in ran.out + ran.err and "\u202e" not in ran.out + ran.err


def test_a_closed_pipe_is_no_error() -> None:
    ckpt = shlex.join([sys.executable, "-m", "ckpttools.cli", "inspect", str(GOOD), "--tensors"])
    shell = f"{ckpt} | head -n 1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr


def test_both_console_scripts_are_the_same_program() -> None:
    assert ckpt_process("--version").stdout.startswith("ckpt, version")
    scripts = Path(sys.executable).parent
    for name in ("ckpt", "ckpttools"):
        ran = subprocess.run([scripts / name, "--version"], capture_output=True, text=True, check=False)
        assert ran.stdout.startswith("ckpt, version")
