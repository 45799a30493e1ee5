"""The libraries that own a format load what `convert` wrote, and train on as if nothing had happened.

Runs of real DeepSpeed (ZeRO-2 and 3, fp32) go on in torch: a plain loop, DDP, FSDP2 and HSDP. Their losses
are those that DeepSpeed had itself, but for the order in which ranks add: one part in a million. Runs of
torch's own go through another format and come back: their losses are equal to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support import FIXTURES, as_torch, identical, truth_of

from ckpttools.errors import Unsupported
from ckpttools.execute import execute
from ckpttools.formats import open_checkpoint, zero3
from ckpttools.operations.convert import convert
from ckpttools.operations.request import TARGETS

ORACLES = Path(__file__).parents[1] / "oracles"
SAMPLES = FIXTURES / "deepspeed-0.19.8"
TORCHRUN = pytest.mark.distributed
HEAVY = [pytest.mark.distributed, pytest.mark.heavy]


def launched(ranks: int, job: str, *arguments: object) -> None:
    """A job of tests/oracles under torchrun, or alone for no ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks else []), str(ORACLES / job), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def written(source: Path, folder: Path, to: str, **options: Any) -> Path:
    name = "run.pt" if to == "pt" else "run"
    folder.mkdir(parents=True)
    return convert(source, folder / name, to=to, **options).destination  # type: ignore[arg-type]


def of_stage_3(source: Path, folder: Path) -> Path:
    """A folder of the same model that tells which tensor is a frozen parameter: torch's own do not."""
    found = open_checkpoint(source)
    with pytest.raises(Unsupported, match="frozen is in no parameter group"):
        written(source, folder / "refused", "zero3")
    known = {"frozen": frozenset({"frozen"}), "buffers": frozenset({"count", "mask", "mean"})}
    told = replace(found, **known, roles_guessed=False, template=None)
    execute(zero3.plan(told, replace(found.layout, dp_degree=2)), folder / "tag", source=source)
    return folder / "tag"


CASES = [  # what DeepSpeed saved, as what it is written, what loads it, on how many ranks
    pytest.param("z2_fp32_ws2", "pt", {}, "pt-plain", 0, marks=HEAVY),
    pytest.param("z2_fp32_ws2", "pt", {}, "pt-ddp", 2, marks=HEAVY),
    pytest.param("z3_fp32_ws2", "pt", {}, "pt-plain", 0, marks=TORCHRUN),
    pytest.param("z2_fp32_ws2", "dcp", {"world_size": 3}, "nested-fsdp2", 2, marks=TORCHRUN),
    pytest.param("z2_fp32_ws2", "dcp", {}, "nested-fsdp2", 1, marks=HEAVY),
    pytest.param("z3_fp32_ws2", "dcp", {"dcp_layout": "titan"}, "titan-fsdp2", 4, marks=HEAVY),
    pytest.param("z3_fp32_ws2", "dcp", {"dcp_layout": "flat", "mesh": "2x2"}, "flat-hsdp", 4, marks=HEAVY),
    pytest.param("z1_fp32_ws2", "dcp", {}, "nested-ddp", 2, marks=HEAVY),
]


@pytest.mark.parametrize(
    ("name", "to", "options", "how", "ranks"), [c for c in CASES if "groups" not in c.values[0]]
)
def test_torch_goes_on_where_deepspeed_was(
    name: str, to: str, options: dict[str, Any], how: str, ranks: int, tmp_path: Path
) -> None:
    made = written(SAMPLES / name, tmp_path / "out", to, **options)
    losses = tmp_path / "losses.json"
    launched(ranks, "owners_job.py", name.rpartition("_ws")[0], how, made, losses)
    expected = truth_of(SAMPLES / name)["losses"]
    assert json.loads(losses.read_text()) == pytest.approx(expected, rel=2e-6)
    assert len(set(expected)) == len(expected)


THROUGH = [to for to in TARGETS if to not in ("hf", "dcp")]
BACK = [  # what torch saved, how it is written in the end, what loads it, on how many ranks
    ("fsdp2_ws2", {"world_size": 2}, "fsdp2-nested", 2),
    ("fsdp2_ws2", {"dcp_layout": "titan"}, "fsdp2-titan", 4),
    ("fsdp2_ws2", {"dcp_layout": "accelerate"}, "fsdp2-accelerate", 1),
    ("fsdp2_ws2", {"mesh": "2x2"}, "hsdp-nested", 4),
    ("tp_ws4", {"mesh": "2x2"}, "tp-bare-sgd-nested", 4),
]
GRID = [
    pytest.param(through, *back, marks=TORCHRUN if (through, i) == ("zero2", 0) else HEAVY)
    for through in THROUGH
    for i, back in enumerate(BACK)
]


@pytest.mark.parametrize(("through", "source", "options", "kind", "ranks"), GRID)
def test_torch_goes_on_after_a_way_through_another_format(
    through: str, source: str, options: dict[str, Any], kind: str, ranks: int, tmp_path: Path
) -> None:
    """The losses of a run on the same ranks from torch's own folder, to the last bit."""
    ours = FIXTURES / "dcp" / source
    layout = {"titan": "titan", "accelerate": "accelerate"}.get(str(options.get("dcp_layout")))
    torchs = written(ours, tmp_path / "same", "dcp", dcp_layout=layout) if layout else ours
    like = of_stage_3(ours, tmp_path / "like") if through == "zero3" else None
    between = written(ours, tmp_path / "between", through, like=like)
    made = written(between, tmp_path / "out", "dcp", **options)
    losses = []
    for i, folder in enumerate((torchs, made)):
        out = tmp_path / f"{i}.json"
        launched(ranks, "dcp_job.py", "resume", kind, folder, "--losses", out)
        losses.append(json.loads(out.read_text()))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


@pytest.mark.distributed
@pytest.mark.heavy
@pytest.mark.parametrize("through", THROUGH)
def test_accelerate_goes_on(through: str, tmp_path: Path) -> None:
    """What its functions for FSDP saved (the Trainer uses them), through another format and back."""
    saved, losses = tmp_path / "saved", [tmp_path / "one.json", tmp_path / "two.json"]
    launched(2, "dcp_accelerate.py", "save", saved, losses[0])
    between = written(saved, tmp_path / "between", through)
    made = written(between, tmp_path / "out", "dcp", dcp_layout="accelerate", world_size=3)
    launched(2, "dcp_accelerate.py", "load", made, losses[1])
    assert losses[0].read_text() == losses[1].read_text()


@pytest.mark.distributed
@pytest.mark.heavy
def test_the_trainer_goes_on_with_fsdp(tmp_path: Path) -> None:
    """Its folder of FSDP2 through a file and DeepSpeed's stage 3, and back into checkpoint-3."""
    run, losses = tmp_path / "run", [tmp_path / "one.json", tmp_path / "two.json"]
    launched(2, "trainer_fsdp.py", run, losses[0])
    source = run / "checkpoint-3"
    file = written(source, tmp_path / "file", "pt")
    assert torch.load(file, weights_only=True)["global_step"] == 3  # trainer_state.json has it
    between = written(file, tmp_path / "between", "zero3", world_size=3)
    made = written(between, tmp_path / "out", "dcp", dcp_layout="accelerate")
    again = shutil.copytree(source, tmp_path / "again/checkpoint-3")
    for part in made.iterdir():
        if part.is_dir():
            shutil.rmtree(again / part.name)
            shutil.copytree(part, again / part.name)
    launched(2, "trainer_fsdp.py", tmp_path / "more", losses[1], again)
    assert losses[0].read_text() == losses[1].read_text()


# --- transformers -------------------------------------------------------------------------------------


def gpt2(tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=17, n_positions=16, tie_word_embeddings=tied
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "through", [None, *(to for to in TARGETS if to not in ("pt", "hf", "zero0", "zero1"))]
)
def test_transformers_loads_it(tied: bool, through: str | None, tmp_path: Path) -> None:
    """from_pretrained gives the model that was trained, to the last bit; tied ends stay one."""
    from transformers import AutoModelForCausalLM

    model = gpt2(tied).train()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    tokens = torch.arange(12).reshape(2, 6)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    saved = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    source = tmp_path / "run.pt"
    torch.save({**saved, "global_step": 2}, source)
    if through is not None:
        source = written(source, tmp_path / "between", through)
    made = written(source, tmp_path / "out", "hf")
    model.config.save_pretrained(made)
    loaded, told = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    for name, parameter in model.named_parameters():
        assert identical(loaded.get_parameter(name), parameter), name
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tied
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_transformers_loads_what_its_own_trainer_saved_with_deepspeed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (source, *_) = sorted((FIXTURES / "hf-trainer/deepspeed").iterdir())
    made = written(source, tmp_path / "out", "hf")
    if not (made / "config.json").exists():
        shutil.copy(source / "config.json", made)
    loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    checkpoint = open_checkpoint(source)
    masters = checkpoint.master
    assert masters
    for name, ref in masters.items():
        assert identical(loaded.get_parameter(name), as_torch(ref)), name
