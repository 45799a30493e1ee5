"""Single files of torch.save: weights under every customary key, read as torch reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FIXTURES, name_of, tensor_differences

from ckpttools.errors import UsageError
from ckpttools.formats import open_checkpoint
from ckpttools.formats.torch.names import WEIGHTS

MONOLITHIC = FIXTURES / "monolithic"
FILES = sorted(p for p in MONOLITHIC.rglob("*") if p.is_file())
LIGHTNING = FIXTURES / "lightning/file/epoch=0-step=3.ckpt"
BARE = {"bare", "bf16", "mixed", "tied", "views", "legacy", "no_checksums"}


def weights_of(path: Path) -> dict[str, Any]:
    """What the fixture's file holds, by the knowledge of who made it; prefixes removed."""
    value = torch.load(path, weights_only=False)
    case = path.parent.name
    if case not in BARE:
        keys = [k for k in ("model_state_dict", "state_dict", "model", "model_state") if k in value]
        assert len(keys) == 1
        value = value[keys[0]]
    return {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in value.items()}


@pytest.mark.parametrize("path", [*FILES, LIGHTNING], ids=name_of)
def test_weights_are_those_that_torch_loads(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    expected = weights_of(path)
    assert list(checkpoint.tensors) == list(expected)
    assert tensor_differences(checkpoint.tensors, expected) == []
    assert checkpoint.layout.format == "pt"
    assert [role.nbytes for role in checkpoint.files] == [path.stat().st_size]


def test_progress_and_losses() -> None:
    state = open_checkpoint(MONOLITHIC / "full/epoch_2_step_40.pt").training
    assert (state.epoch, state.step, state.train_loss, state.val_loss) == (2, 40, 1.25, 1.5)
    assert state.scheduler["T_max"] == 10
    assert state.scheduler["last_epoch"] == 3


@pytest.mark.parametrize(
    ("file", "step", "iteration", "epoch"),
    [
        ("model/step_30.pt", 30, None, None),
        ("ddp/last.pt", 20, None, 1),
        ("compiled/last.pt", 20, 20, None),
        ("pcdet/checkpoint_epoch_4.pth", 80, 80, 4),
        ("timm/checkpoint-5.pth.tar", None, None, 5),
        ("mmengine/epoch_4.pth", None, 80, 4),
        ("bare/model.pth", None, None, None),
    ],
)
def test_counters_under_many_names(
    file: str, step: int | None, iteration: int | None, epoch: int | None
) -> None:
    state = open_checkpoint(MONOLITHIC / file).training
    assert (state.step, state.iteration, state.epoch) == (step, iteration, epoch)


def test_lightning_counters() -> None:
    state = open_checkpoint(LIGHTNING).training
    assert (state.step, state.epoch) == (3, 0)
    (scheduler,) = state.scheduler
    assert scheduler["T_max"] == 8


def test_notes_say_what_was_removed_and_what_is_unchecked() -> None:
    def notes(file: str) -> str:
        return "; ".join(open_checkpoint(MONOLITHIC / file).notes)

    assert "the prefix 'module.'" in notes("ddp/last.pt")
    assert "the prefix 'module._orig_mod.'" in notes("compiled/last.pt")
    assert "older serialization" in notes("legacy/weights.pth")
    assert "older serialization" in notes("pcdet/checkpoint_epoch_4.pth")
    assert "without checksums" in notes("no_checksums/weights.pt")
    assert notes("bare/model.pth") == ""


def test_checksums_where_the_file_has_them() -> None:
    assert open_checkpoint(MONOLITHIC / "bare/model.pth").checks
    assert open_checkpoint(MONOLITHIC / "no_checksums/weights.pt").checks == ()
    assert open_checkpoint(MONOLITHIC / "legacy/weights.pth").checks == ()


def test_dtypes() -> None:
    assert open_checkpoint(MONOLITHIC / "bf16/weights.pt").layout.dtype == "bf16"
    assert open_checkpoint(MONOLITHIC / "bare/model.pth").layout.dtype == "fp32"
    assert open_checkpoint(MONOLITHIC / "mixed/weights.pt").layout.dtype is None


def test_tied_weights() -> None:
    checkpoint = open_checkpoint(MONOLITHIC / "tied/weights.pt")
    assert checkpoint.shared == {"out.weight": "emb.weight"}
    assert checkpoint.tensors["out.weight"].chunks == checkpoint.tensors["emb.weight"].chunks


def test_a_file_says_what_it_holds() -> None:
    (role,) = open_checkpoint(MONOLITHIC / "full/epoch_2_step_40.pt").files
    assert role.role.startswith("weights under 'model_state_dict', with epoch, global_step, optimizer")
    (role,) = open_checkpoint(MONOLITHIC / "bare/model.pth").files
    assert role.role == "a bare state dict"


# --- made here ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], Path]:
    def save(value: object) -> Path:
        torch.save(value, tmp_path / "file.pt")
        return tmp_path / "file.pt"

    return save


@pytest.mark.parametrize("key", WEIGHTS)
def test_every_customary_key(key: str, saved: Callable[[object], Path]) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    checkpoint = open_checkpoint(saved({"epoch": 1, key: weights}))
    assert tensor_differences(checkpoint.tensors, weights) == []
    assert checkpoint.training.epoch == 1


def test_a_prefix_that_not_all_names_have_stays(saved: Callable[[object], Path]) -> None:
    weights = {"module.a": torch.ones(2), "b": torch.zeros(3)}
    checkpoint = open_checkpoint(saved(weights))
    assert list(checkpoint.tensors) == ["module.a", "b"]
    assert checkpoint.notes == ()


def test_a_name_that_is_only_the_prefix_stays(saved: Callable[[object], Path]) -> None:
    assert list(open_checkpoint(saved({"module.": torch.ones(1)})).tensors) == ["module."]


def test_a_bare_state_dict_with_a_counter_among_the_weights(saved: Callable[[object], Path]) -> None:
    """A tensor called `step` is a weight, not progress."""
    checkpoint = open_checkpoint(saved({"w": torch.ones(2), "step": torch.tensor(7)}))
    assert checkpoint.training.step is None
    assert set(checkpoint.tensors) == {"w", "step"}


def test_parameters_and_aliases(saved: Callable[[object], Path]) -> None:
    weight = torch.nn.Parameter(torch.arange(4.0))
    checkpoint = open_checkpoint(saved({"model": {"w": weight, "view": weight.data[1:], "same": weight}}))
    expected = {"w": weight.data, "view": weight.data[1:], "same": weight.data}
    assert tensor_differences(checkpoint.tensors, expected) == []
    assert checkpoint.shared == {"same": "w"}


def odd_tensors() -> dict[str, torch.Tensor]:
    complex_ = torch.randn(3, dtype=torch.complex64)
    return {
        "conjugated": complex_.conj(),
        "negated": complex_.conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "half a complex number": torch.zeros(2, dtype=torch.complex32),
        "four bits": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "bits": torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
    }


@pytest.mark.parametrize("kind", list(odd_tensors()))
def test_tensors_that_are_no_plain_bytes_are_not_read_as_such(
    kind: str, saved: Callable[[object], Path]
) -> None:
    """torch flips the sign of what lies in the storage of the first two when they are used."""
    checkpoint = open_checkpoint(saved({"model": {"w": torch.ones(2), kind: odd_tensors()[kind]}, "step": 1}))
    assert list(checkpoint.tensors) == ["w"]
    assert list(checkpoint.extra_state) == [kind]
    (note,) = checkpoint.notes
    assert note.startswith("1 tensor is of a kind that is not read") and kind in note


@pytest.mark.parametrize("kind", [kind for kind in odd_tensors() if kind != "meta"])
def test_a_file_of_such_alone_says_so(kind: str, saved: Callable[[object], Path]) -> None:
    path = saved({"w": odd_tensors()[kind]})
    assert torch.load(path, weights_only=True).keys() == {"w"}
    with pytest.raises(UsageError, match="without model weights") as error:
        open_checkpoint(path)
    assert error.value.why is not None and "of a kind that is not read" in error.value.why
    assert error.value.id == "not-a-checkpoint"


def test_empty_tensors_are_not_tied(saved: Callable[[object], Path]) -> None:
    checkpoint = open_checkpoint(saved({"a": torch.empty(0, 3), "b": torch.empty(0, 3)}))
    assert checkpoint.shared == {}
    assert [ref.shape for ref in checkpoint.tensors.values()] == [(0, 3), (0, 3)]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"epoch": 3},
        [],
        [torch.ones(2), 3],
        torch.ones(3),
        "text",
        7,
        None,
        {"model": {}},
        {1: torch.ones(1)},
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        {"python": (3, ()), "numpy": (), "cpu": torch.get_rng_state()},
    ],
    ids=range(12),
)
def test_a_torch_file_without_named_weights(value: object, saved: Callable[[object], Path]) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(saved(value))
    assert caught.value.id == "not-a-checkpoint"
