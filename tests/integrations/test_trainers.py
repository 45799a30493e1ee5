"""The callbacks in real runs of each framework: saves verified, old ones gone, damage refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FIXTURES

from ckpttools.errors import CkptError
from ckpttools.integrations.guard import Guard, Rules, newest_good
from ckpttools.manifest import places
from ckpttools.siblings import VERIFIED

ROOT = Path(__file__).parents[2]
MMENGINE = os.environ.get("CKPT_MMENGINE_PYTHON", "")


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), float(at)), "labels": torch.tensor([float(at)])}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2000)  # most of a file is tensors

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x) - labels).square().mean()}


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def kept(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def test_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from ckpttools.integrations.transformers import VerifySaves

    def trainer(steps: int, rules: Rules | None = None) -> tuple[Any, VerifySaves]:
        saves = VerifySaves(rules or Rules(keep_last=2))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model=Net(), args=arguments, train_dataset=Numbers(), callbacks=[saves]), saves

    first, saves = trainer(9)
    first.train(resume_from_checkpoint=saves.resume_from(tmp_path / "out"))
    out = tmp_path / "out"
    assert kept(out, "checkpoint-*") == {"checkpoint-6", "checkpoint-9"}
    assert (out / VERIFIED).read_text() == "checkpoint-9"
    assert places(out / "checkpoint-9")
    assert 0 < saves.guard.seconds < 60
    flip(next((out / "checkpoint-9").glob("model.safetensors")))
    second, saves = trainer(12)
    assert saves.resume_from(out) == str(out / "checkpoint-6")
    with pytest.raises(CkptError) as caught:
        second.train(resume_from_checkpoint=str(out / "checkpoint-9"))
    assert "nothing was trained" in caught.value.why
    assert second.state.global_step == 9
    third, saves = trainer(12)
    third.train(resume_from_checkpoint=saves.resume_from(out))
    assert (out / VERIFIED).read_text() == "checkpoint-12"


def test_lightning(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckpttools.integrations.lightning import VerifySaves

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    folder = tmp_path / "checkpoints"
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=2)

    def fit(steps: int, ckpt_path: str | None) -> VerifySaves:
        saves = VerifySaves(Rules(keep_last=2))
        every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[every, saves],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader, ckpt_path=ckpt_path)
        return saves

    fit(9, VerifySaves.resume_from(folder))
    assert kept(folder, "*.ckpt") == {"step=6.ckpt", "step=9.ckpt"}
    assert (folder / VERIFIED).read_text() == "step=9.ckpt"
    flip(folder / "step=9.ckpt")
    with pytest.raises(CkptError):
        fit(12, str(folder / "step=9.ckpt"))
    assert VerifySaves.resume_from(folder) == str(folder / "step=6.ckpt")
    fit(12, VerifySaves.resume_from(folder))
    assert (folder / VERIFIED).read_text() == "step=12.ckpt"


PLAIN = """
import json, sys, time
import deepspeed, torch
from pathlib import Path
from ckpttools.errors import CkptError
from ckpttools.integrations.deepspeed import Saves
from ckpttools.integrations.guard import Rules

CONFIG = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
          "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}}}

def resume_and_train(run):
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=CONFIG)
    saves = Saves(run, Rules(keep_last=2))
    try:
        state = saves.load(engine)
    except CkptError as error:
        print(f"refused {error.id}\\n", end="", flush=True)  # one write: torchrun starts ranks with python -u
        return
    start = 0 if state is None else state["step"]
    print(f"from {start}\\n", end="", flush=True)
    for step in range(start + 1, start + 5):
        engine.backward(engine(torch.ones(1, 8, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        saves.save(engine, f"global_step{step}", {"step": step})
    saves.close()

deepspeed.init_distributed("gloo")
for run in sys.argv[1:]:
    resume_and_train(run)
"""


@pytest.mark.distributed
def test_a_plain_deepspeed_loop(tmp_path: Path) -> None:
    script, run = tmp_path / "loop.py", tmp_path / "run"
    script.write_text(PLAIN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def launch(*runs: Path) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*command, str(script), *map(str, runs)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "is damaged" not in done.stderr, done.stderr[-2000:]
        return done.stdout

    assert launch(run).count("from 0") == 2
    assert kept(run, "global_step*") == {"global_step3", "global_step4"}
    assert (run / VERIFIED).read_text() == "global_step4"
    ruined = tmp_path / "ruined"
    shutil.copytree(run, ruined)
    for file in ruined.rglob("*_optim_states.pt"):
        flip(file)
    flip(run / "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    said = launch(run, ruined)
    assert said.count("from 3") == 2 and said.count("refused none-verified") == 2
    assert (run / VERIFIED).read_text() == "global_step7"


ERRORS = """
import errno, sys
import torch.distributed as dist
from ckpttools.errors import CkptError
from ckpttools.integrations.ranks import everywhere

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
for error in (OSError(errno.ENOSPC, "no space left"), CkptError("checksum", "damaged"), ValueError("other")):
    def fails():
        raise error
    try:
        everywhere(fails)
    except Exception as caught:
        print(getattr(caught, "id", type(caught).__name__), flush=True)
print(everywhere(lambda: sys.argv[2]), flush=True)
"""


def test_an_error_of_rank_0_is_that_of_all(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", ERRORS, str(tmp_path / "meeting")]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    said = [rank.communicate()[0].split() for rank in ranks]
    assert said[0] == ["OSError", "checksum", "ValueError", "0"]
    assert said[1] == ["train-crash", "checksum", "train-crash", "0"]


def test_transformers_says_what_it_could_not_look_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace

    from ckpttools.integrations.transformers import VerifySaves

    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", elsewhere)
    arguments, state = SimpleNamespace(output_dir=str(out)), SimpleNamespace(global_step=4)
    saves = VerifySaves()
    saves.on_train_begin(arguments, state, None)
    assert "not verified" in caplog.text
    caplog.clear()
    assert saves.resume_from(elsewhere / "checkpoint-4") == str(elsewhere / "checkpoint-4")
    saves.on_train_begin(arguments, state, None)
    assert not caplog.text
    os.truncate(elsewhere / "checkpoint-4" / "model.safetensors", 100)
    with pytest.raises(CkptError):
        saves.resume_from(elsewhere / "checkpoint-4")


@pytest.mark.skipif(not MMENGINE, reason="CKPT_MMENGINE_PYTHON names no interpreter with MMEngine")
def test_mmengine(tmp_path: Path) -> None:
    script = Path(__file__).with_name("run_mmengine.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("CKPT_MMENGINE_PATH", "")]),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # MMEngine's own torch.load
    }
    work = tmp_path / "work"

    def launch(epochs: int) -> subprocess.CompletedProcess[str]:
        command = [MMENGINE, str(script), str(work), str(epochs)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = launch(3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(work, "*.pth") == {"epoch_2.pth", "epoch_3.pth"}
    assert (work / VERIFIED).read_text() == "epoch_3.pth"
    again = launch(4)
    assert again.returncode == 0, again.stderr[-3000:]
    assert kept(work, "*.pth") == {"epoch_3.pth", "epoch_4.pth"}
    flip(work / "epoch_4.pth")
    refused = launch(5)
    assert refused.returncode != 0
    assert "nothing was trained" in refused.stderr or "epoch_4.pth" in refused.stderr
    assert kept(work, "*.pth") == {"epoch_3.pth", "epoch_4.pth"}


def of_the_trainer(folder: Path) -> Path:
    """A run of two checkpoints, and another one in a folder below."""
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", folder)
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", folder / "older")
    return folder


def test_old_ones_of_another_run_below_stay(tmp_path: Path) -> None:
    folder = of_the_trainer(tmp_path / "run")
    command = [sys.executable, "-m", "ckpttools.integrations.background", str(folder / "checkpoint-4")]
    done = subprocess.run([*command, "[1, false, null]"], capture_output=True, text=True, check=True)
    assert kept(folder, "checkpoint-*") == {"checkpoint-4"}, done.stdout
    assert kept(folder / "older", "checkpoint-*") == {"checkpoint-2", "checkpoint-4"}


def test_a_resume_takes_none_of_another_run_below(tmp_path: Path) -> None:
    folder = of_the_trainer(tmp_path / "run")
    assert newest_good(folder) == folder / "checkpoint-4"
    for step in (2, 4):
        os.truncate(folder / f"checkpoint-{step}" / "model.safetensors", 100)
    with pytest.raises(CkptError) as caught:  # not the good ones below
        newest_good(folder)
    assert caught.value.id == "none-verified"
    for step in (2, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert newest_good(folder) is None


@pytest.mark.parametrize("kind", ["file", "plain", "deepspeed"])
def test_what_is_saved_again_under_its_name_is_not_damaged(tmp_path: Path, kind: str) -> None:
    guard = Guard(rules=Rules(on_damage="raise"))
    path = written = tmp_path / "last.ckpt"
    if kind != "file":
        (source,) = (FIXTURES / "hf-trainer" / kind).glob("checkpoint-4")
        path = Path(shutil.copytree(source, tmp_path / source.name))
        written = next(path.rglob("*optim*.pt"))

    def save(more: int) -> None:
        state = (
            torch.load(written, weights_only=False)
            if kind != "file"
            else {"model": {"a.weight": torch.ones(9)}}
        )
        torch.save({**state, "more": torch.ones(more)}, written)
        for file in path.glob("*") if path.is_dir() else ():
            if "manifest" not in file.name:
                os.utime(file)

    for more in (1, 2000):
        save(more)
        guard.saved(path)
        guard.close()
    assert newest_good(tmp_path) == path
    if kind == "file":  # a framework removes its file, not the manifest beside, and takes the name again
        path.unlink()
        for more in (5, 3000, 7):  # the last ones while the first is read
            save(more)
            guard.saved(path)
        guard.close()
        assert newest_good(tmp_path) == path
    assert list(tmp_path.rglob("*ckpt-manifest.json"))
    flip(written)  # what changes without a save is damage still
    with pytest.raises(CkptError):
        newest_good(tmp_path)


def test_damage_is_told_and_may_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "step_1.pt"
    torch.save({"model": {"a.weight": torch.ones(1000)}, "step": 1}, path)
    goes_on, stops = Guard(rules=Rules()), Guard(rules=Rules(on_damage="raise"))
    flip(path)  # headers are good: the background finds it
    goes_on.saved(path)
    goes_on.close()
    assert "step_1.pt is damaged" in caplog.text
    assert not (tmp_path / VERIFIED).exists()
    stops.saved(path)
    with pytest.raises(CkptError):
        stops.close()
    os.truncate(path, 300)
    with pytest.raises(CkptError):
        stops.saved(path)
    with pytest.raises(CkptError):
        newest_good(tmp_path)
    assert newest_good(tmp_path / "none") is None
