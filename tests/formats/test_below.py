"""Weights in folders below a model's: verified, and named by every command that does not read them."""

from __future__ import annotations

from pathlib import Path

import torch
from commands import run
from safetensors.torch import save_file

from ckpttools.checks import verify
from ckpttools.findings import ERROR
from ckpttools.formats import open_checkpoint


def layered(folder: Path, dense: float = 1.0) -> Path:
    """As sentence-transformers saves a model: a further layer in a folder of its own."""
    (folder / "2_Dense").mkdir(parents=True)
    save_file({"a.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    save_file({"linear.weight": torch.full((4,), dense)}, folder / "2_Dense/model.safetensors")
    for path in (folder, folder / "2_Dense"):
        (path / "config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    return folder


def test_weights_below_a_model_are_verified(tmp_path: Path) -> None:
    folder = layered(tmp_path / "model")
    good = verify(folder, workers=1)
    assert good.ok and any("other weights of 1 tensor" in f.message for f in good.findings)
    weights = folder / "2_Dense/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    bad = verify(folder, workers=1)
    assert [(f.id, f.file) for f in bad.findings if f.severity == ERROR] == [("file-truncated", str(weights))]


def test_weights_below_a_model_are_named_where_they_are_not_read(tmp_path: Path) -> None:
    one, two = layered(tmp_path / "one"), layered(tmp_path / "two", dense=7.0)
    note = "other weights below it are not read: 2_Dense"
    assert note in run("inspect", one).out
    assert note in run("extract", one, tmp_path / "weights").err
    assert note in run("convert", one, tmp_path / "made.pt", "--to", "pt").err
    ran = run("diff", one, two)
    assert ran.code == 1 and "note: not compared: the weights in 2_Dense" in ran.out
    assert ran.out.endswith("no difference in what was compared\n")
    ran = run("prove", one, two)
    assert ran.code == 1 and "not compared: the weights in 2_Dense" in ran.out
    assert "note: not in the digests: the weights in 2_Dense" in run("digest", one).out


def test_the_checkpoints_of_a_run_beside_its_last_model_are_not_below_it(tmp_path: Path) -> None:
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-4"):
        folder.mkdir()
        save_file({"a.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path / "run").below == ()
    assert "not read" not in run("inspect", tmp_path / "run").out
