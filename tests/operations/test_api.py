"""The library that the command line speaks: `import ckpttools`."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from support import FIXTURES, as_torch, identical

import ckpttools
from ckpttools import operations

ZERO = FIXTURES / "trainer" / "z2_bf16_2"
MODULES = sorted(module.name for module in pkgutil.iter_modules(operations.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES.parent)
    module = importlib.import_module(f"ckpttools.operations.{name}")
    tests = doctest.DocTestFinder().find(module, module.__name__, extraglobs={"out": tmp_path})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    if name in ckpttools.__all__:
        assert any(test.name == f"{module.__name__}.{name}" and test.examples for test in tests)


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(ckpttools.__all__) == ckpttools.__all__ == dir(ckpttools)
    for name in ckpttools.__all__:
        found = getattr(ckpttools, name)
        assert name == "__version__" or (found.__doc__ and not isinstance(found, type(ckpttools))), name
    with pytest.raises(AttributeError):
        ckpttools.nothing  # noqa: B018


def test_importing_and_opening_is_light() -> None:
    code = (
        "import sys, ckpttools\n"
        f"run = ckpttools.open({str(ZERO)!r})\n"
        "repr(run), run._repr_html_()\n"
        "print(sorted({'numpy', 'torch', 'click', 'deepspeed'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "trainer/z2_bf16_2",
        "hf/sharded",
        "hf/bin",
        "monolithic/views/weights.pt",
        "monolithic/mixed/weights.pt",
    ],
)
def test_tensors_are_what_torch_has(name: str) -> None:
    opened = ckpttools.open(FIXTURES / name)
    assert len(opened) == len(list(opened)) > 0
    for key, array in opened.items():
        expected = as_torch(opened.checkpoint.tensors[key])
        assert array.shape == tuple(expected.shape) and not array.flags.writeable
        assert (
            array.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()
            if expected.ndim
            else True
        )
        assert identical(opened.torch(key), expected)
    with pytest.raises(KeyError):
        opened["no such tensor"]


def test_a_tensor_in_one_piece_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    torch.save(
        {"weight": torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3), "one": torch.tensor(7.0)}, path
    )
    opened = ckpttools.open(path)
    mapped = opened["weight"]
    assert isinstance(mapped, np.memmap) and mapped.dtype.name == "bfloat16"
    assert mapped.astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert opened["one"].shape == () and float(opened["one"]) == 7
    master = ckpttools.open(ZERO).checkpoint.master
    name = next(iter(master))
    assert ckpttools.open(ZERO).array(master[name]).dtype == np.float32


def test_a_file_that_was_cut_is_an_error_and_no_crash(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "hf" / "single", folder)
    opened = ckpttools.open(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as cut:
        cut.truncate(file.stat().st_size // 2)
    with pytest.raises(ckpttools.CkptError):
        dict(opened)


def test_what_a_notebook_shows_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "<b>x.pt"
    torch.save({"<script>alert(1)</script>\u202e": torch.zeros(2)}, path)
    shown = ckpttools.open(path)._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "\u202e" not in shown
    assert "&lt;script&gt;" in shown


def test_the_command_is_the_call(tmp_path: Path) -> None:
    by_call = ckpttools.extract(ZERO, tmp_path / "a", dtype="bf16")
    assert run("extract", ZERO, tmp_path / "b", "--dtype", "bf16").code == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert by_call.seconds is not None and by_call.checked
    made = ckpttools.reshard(ZERO, tmp_path / "four", world_size=4, how=ckpttools.Writing(dry_run=True))
    assert made.seconds is None and not made.destination.exists() and made.plan.files
    assert ckpttools.verify(by_call.destination).ok
    with pytest.raises(ckpttools.UsageError, match="exists"):
        ckpttools.extract(ZERO, tmp_path / "a")


def test_several_checkpoints_are_refused_with_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    for version in (9, 10):
        at = folder / f"version_{version}" / "checkpoints"
        at.mkdir(parents=True)
        shutil.copy(FIXTURES / "monolithic/run/epoch_9_step_180.pt", at / "last.ckpt")
    ran = run("reshard", folder, "--world-size", "2")
    newest = folder / "version_10/checkpoints/last.ckpt"
    assert ran.code == 2 and "error[several-checkpoints]" in ran.err and f"newest is {newest}" in ran.err
    shutil.rmtree(folder / "version_9")
    assert ckpttools.open(folder).source.target == newest
