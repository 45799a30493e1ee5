"""Changed values in saved files: what is edited changes, and nothing else, as torch.load sees it."""

from __future__ import annotations

import copy
import json
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import FIXTURES, name_of, tree_differences

from ckpttools.checks import verify
from ckpttools.containers.edit import Opaque, alike, edited, value
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.plan import Plan
from ckpttools.training import ABSENT, Edit, Place
from ckpttools.tree import Key

FILES = sorted(
    p
    for folder in ("monolithic", "lightning/file", "hf-trainer/plain", "accelerate/plain")
    for p in (FIXTURES / folder).rglob("*")
    if p.suffix in (".pt", ".pth", ".ckpt", ".bin") and "rng" not in p.name
)


def edit(path: Path, new: object, *at: Key, old: object = None) -> Edit:
    return Edit(place=Place(file=path, at=at), old=old, new=new, why="test")


def written(path: Path, out: Path, *edits: Edit) -> Any:
    """The file with the edits made, as torch loads it."""
    file, checks = edited(path, "", edits)
    execute(Plan(files=(file,), checks=checks), out, source=path)
    return torch.load(out, weights_only=False)


def saved(path: Path, tree: object, **how: Any) -> Path:
    torch.save(tree, path, **how)
    return path


TREE: dict[str, Any] = {
    "step": 3,
    "lr": np.float64(0.5),
    "count": np.int64(7),
    "tensor": torch.tensor([5]),
    "scalar": torch.tensor(0.25),
    "milestones": Counter({30: 1, 60: 2}),
    "ordered": OrderedDict(a=1.0, b=(0.9, 0.999)),
    "groups": [{"lr": 0.1, "params": [0, 1]}],
    7: "seven",
    "weights": torch.arange(6.0).reshape(2, 3),
    "none": None,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_value_is_put_back_as_what_it_was(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "a.pt", TREE, _use_new_zipfile_serialization=zipped)
    made = [
        edit(path, 4, "step"),
        edit(path, 0.125, "lr"),
        edit(path, 9, "count"),
        edit(path, 6, "tensor"),
        edit(path, 0.75, "scalar"),
        edit(path, {15: 1, 31: 2}, "milestones"),
        edit(path, (0.8, 0.99), "ordered", "b"),
        edit(path, 0.2, "groups", 0, "lr"),
        edit(path, "eight", 7),
        edit(path, {"from": 1, "to": [2.5, None]}, "marker", old=ABSENT),
    ]
    found = written(path, tmp_path / "b.pt", *made)
    expected = {
        **TREE,
        "step": 4,
        "lr": np.float64(0.125),
        "count": np.int64(9),
        "tensor": torch.tensor([6]),
        "scalar": torch.tensor(0.75),
        "milestones": Counter({15: 1, 31: 2}),
        "ordered": OrderedDict(a=1.0, b=(0.8, 0.99)),
        "groups": [{"lr": 0.2, "params": [0, 1]}],
        7: "eight",
        "marker": {"from": 1, "to": [2.5, None]},
    }
    assert list(tree_differences(found, expected)) == []
    assert verify(tmp_path / "b.pt").findings == () or all(
        f.severity == "info" for f in verify(tmp_path / "b.pt").findings
    )
    assert (read_torch_file(tmp_path / "b.pt").archive is not None) == zipped


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_but_the_edit_changes(path: Path, tmp_path: Path) -> None:
    """A key is added to a real file: torch finds the same tree and the key."""
    before = torch.load(path, weights_only=False)
    if not isinstance(before, dict):
        pytest.skip("not a dict")
    after = written(path, tmp_path / path.name, edit(path, 1, "added", old=ABSENT))
    assert after.pop("added") == 1
    assert list(tree_differences(before, after)) == []


def test_what_is_read_is_what_torch_reads(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", TREE)
    file = read_torch_file(path)
    shown = value(file, file.value)
    assert isinstance(shown, dict)
    assert isinstance(shown.pop("weights"), Opaque)
    rest = {key: item for key, item in TREE.items() if key != "weights"}
    plain = {k: v.item() if isinstance(v, torch.Tensor | np.generic) else v for k, v in rest.items()}
    assert shown == plain


def test_what_is_not_looked_into_survives_a_copy(tmp_path: Path) -> None:
    """Schedules are computed on copies of their states; MMEngine's one-cycle holds a function."""
    state = {"anneal": torch.optim.lr_scheduler.OneCycleLR._annealing_cos, "n": 1}
    path = saved(tmp_path / "a.pt", {"state": state})
    file = read_torch_file(path)
    shown = value(file, file.value)
    assert isinstance(shown, dict)
    copied = copy.deepcopy(shown["state"]) | {"n": 2}
    assert "_annealing_cos" in str(copied["anneal"])
    assert written(path, tmp_path / "b.pt", edit(path, copied, "state")) == {"state": {**state, "n": 2}}


def test_a_number_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"n": torch.tensor([1], dtype=torch.int32)})
    with pytest.raises(CkptError, match="cannot be stored"):
        edited(path, "", [edit(path, 2**40, "n")])


def test_two_edits_of_one_place_are_a_defect(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", TREE)
    with pytest.raises(AssertionError):
        edited(path, "", [edit(path, 1, "step"), edit(path, 2, "step")])


def test_json_keeps_everything_else(tmp_path: Path) -> None:
    path = FIXTURES / "hf-trainer/plain/checkpoint-2/trainer_state.json"
    made = [edit(path, 4, "global_step"), edit(path, 2, "log_history", 0, "step")]
    file, _ = edited(path, "trainer_state.json", made)
    execute(Plan(files=(file,)), tmp_path / "out", source=path)
    expected = json.loads(path.read_text())
    expected["global_step"], expected["log_history"][0]["step"] = 4, 2
    assert json.loads((tmp_path / "out/trainer_state.json").read_text()) == expected
    assert (tmp_path / "out/trainer_state.json").read_text().splitlines()[1] == path.read_text().splitlines()[
        1
    ]


def test_lists_that_share_lists_are_looked_at_once(tmp_path: Path) -> None:
    """Twenty-eight of them are a few hundred bytes, and a quarter of a milliard values one by one."""
    read: list[Any] = []
    for depth in (8, 28):
        for last in (1.0, 1.0, 2.0):
            kept: list[Any] = [last]
            for _ in range(depth):
                kept = [kept, kept]
            torch.save({"kept": kept}, tmp_path / "a.pt")
            file = read_torch_file(tmp_path / "a.pt")
            found = value(file, file.value)
            assert isinstance(found, dict) and found["kept"][0] is found["kept"][1]
            read.append(found)
        one, same, other = read[-3:]
        assert alike(one, same) and not alike(one, other)


def test_nan_is_alike_wherever_it_lies() -> None:
    nan = float("nan")
    for make in (lambda x: x, lambda x: [1, {"a": (x,)}], lambda x: {"b": [x, x]}):
        assert alike(make(nan), make(float("nan"))) and not alike(make(nan), make(1.0))
    assert alike([1, 2], (1, 2)) and not alike([1, 2], [1]) and not alike({"a": 1}, [1])
