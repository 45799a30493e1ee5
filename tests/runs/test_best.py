"""Which checkpoint is the best, by what the frameworks themselves wrote: it is never removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES

TRAINER = FIXTURES / "hf-trainer" / "plain"


def train(folder: Path, monitor: str, mode: str, filename: str) -> None:
    """Four epochs of a real run, the second of which is the best."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            value = (0.5, 0.1, 0.3, 0.4)[self.current_epoch]
            self.log(monitor, value if mode == "min" else -value, on_step=False, on_epoch=True)
            loss: torch.Tensor = self.linear(batch).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=[
            ModelCheckpoint(
                folder,
                monitor=monitor,
                mode=mode,
                filename=filename,
                save_top_k=-1,
                save_on_train_epoch_end=True,
            )
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2))


@pytest.mark.parametrize(
    ("monitor", "mode", "filename", "asked"),
    [("val_loss", "min", "{epoch}-{val_loss:.2f}", ""), ("accuracy", "max", "{epoch}", "accuracy:max")],
)
def test_lightnings_best_stays(tmp_path: Path, monitor: str, mode: str, filename: str, asked: str) -> None:
    folder = tmp_path / "checkpoints"
    train(folder, monitor, mode, filename)
    (best,) = folder.glob("epoch=1*")
    (newest,) = folder.glob("epoch=3*")
    moved = folder.rename(tmp_path / "moved")  # the paths inside are those of the machine that trained
    ran = run("prune", moved, "--keep-best", *filter(None, [asked]), "--dry-run", "--json")
    kept = {Path(each["path"]).name: each["reasons"] for each in json.loads(ran.out)["kept"]}
    assert set(kept) == {best.name, newest.name}, ran.out
    assert any(reason.startswith(f"the best by {monitor}") for reason in kept[best.name])
    assert run("prune", moved, "--keep-last", 1, "-y").code == 0
    assert {path.name for path in moved.iterdir()} == {best.name, newest.name}
    (listed,) = json.loads(run("ls", moved, "--json").out)["runs"]
    assert [Path(each["path"]).name for each in listed["checkpoints"] if "best" in each["marks"]] == [
        best.name
    ]


def test_a_metric_in_a_name_alone_counts(tmp_path: Path) -> None:
    for epoch, loss in enumerate((0.5, 0.1, 0.3)):
        source = FIXTURES / "lightning" / "file" / "epoch=0-step=3.ckpt"
        shutil.copy(source, tmp_path / f"epoch={epoch}-val_loss={loss:.2f}.ckpt")
    ran = run("prune", tmp_path, "--keep-best", "--dry-run", "--json")
    kept = {Path(each["path"]).name for each in json.loads(ran.out)["kept"]}
    assert "epoch=1-val_loss=0.10.ckpt" in kept and "epoch=0-val_loss=0.50.ckpt" not in kept


def trainer_run(root: Path, evaluations: dict[int, float], **said: object) -> Path:
    """Checkpoints of the Trainer at 2, 4, 6, evaluated at other steps; a log repeats what was before."""
    for step in (2, 4, 6):
        folder = root / f"checkpoint-{step}"
        shutil.copytree(TRAINER / "checkpoint-2", folder)
        path = folder / "trainer_state.json"
        state: dict[str, Any] = json.loads(path.read_text())
        state["log_history"] = [{"step": s, "eval_loss": v} for s, v in evaluations.items() if s <= step]
        path.write_text(json.dumps({**state, "global_step": step, **said}))
    return root


@pytest.mark.parametrize(("evaluations", "best"), [({2: 0.1, 6: 0.5}, 2), ({3: 0.1, 6: 0.5}, 4)])
def test_the_best_is_the_one_that_was_evaluated(
    tmp_path: Path, evaluations: dict[int, float], best: int
) -> None:
    folder = trainer_run(tmp_path, evaluations)
    (listed,) = json.loads(run("ls", folder, "--json").out)["runs"]
    marked = [Path(each["path"]).name for each in listed["checkpoints"] if "best" in each["marks"]]
    assert marked == [f"checkpoint-{best}"]
    assert run("prune", folder, "--keep-last", 1, "--keep-best", "-y").code == 0
    assert {path.name for path in folder.iterdir()} == {f"checkpoint-{best}", "checkpoint-6"}


def test_what_the_trainer_calls_the_best_wins(tmp_path: Path) -> None:
    folder = trainer_run(tmp_path, {2: 0.1, 6: 0.5}, best_model_checkpoint="/elsewhere/out/checkpoint-4")
    (listed,) = json.loads(run("ls", folder, "--json").out)["runs"]
    marked = [Path(each["path"]).name for each in listed["checkpoints"] if "best" in each["marks"]]
    assert marked == ["checkpoint-4"]
    assert run("prune", folder, "--keep-last", 1, "-y").code == 0
    assert (folder / "checkpoint-4").is_dir()
