"""Every format: what is written reads as it was, and what was changed reads as changed, with and without what
the source's own files add. What a format has no place for is named in the notes of its plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from changes import CHANGES, Change, content_differences
from msgspec.structs import replace
from support import FIXTURES

from ckpttools.checkpoint import Checkpoint
from ckpttools.execute import execute
from ckpttools.formats import FORMATS, PLANS, Format, counters, locate, open_checkpoint, read
from ckpttools.formats.deepspeed import NEW_SCALER
from ckpttools.operations.request import TARGETS
from ckpttools.training import Training
from ckpttools.transforms.select import weights_only
from ckpttools.tree import Value

SOURCES = {
    "zero": ("deepspeed-0.19.8/z2_groups_ws2",),  # more in test_zero.py
    "zero0": tuple(f"deepspeed-0.19.8/z0_{name}_ws2" for name in ("bf16", "fp16", "fp32")),
    "zero3": tuple(f"deepspeed-0.19.8/z3_{name}_ws2" for name in ("groups", "lora", "fp16", "nostep", "sgd")),
    "universal": ("universal/z2_groups", "universal/z2_frozen", "universal/z3_groups"),
    "pt": (
        "monolithic/full/epoch_2_step_40.pt",
        "monolithic/timm/checkpoint-5.pth.tar",
        "monolithic/tied/weights.pt",
        "lightning/file/epoch=0-step=3.ckpt",
    ),
    "dcp": tuple(
        f"dcp/{name}" for name in ("fsdp2_ws2", "flat_ws2", "step-3", "plain-sgd_ws1", "accelerate_ws2")
    ),
    "hf": ("hf/single", "hf/gpt2_tied", "hf/peft"),  # more in test_hf.py
}
FORMATS_WRITTEN = [format for format in FORMATS if format.plan is not None]
CASES = [
    pytest.param(format, source, id=f"{format.name}-{Path(source).name}")
    for format in FORMATS_WRITTEN
    for source in SOURCES.get(format.name, ())
]

# fields that a format has no place for, of the Checkpoint or of its Training, and a word by which the notes
# of its plan name each; where a value was found is no content
SETTINGS = {"settings": "settings", "optimizer": "class", "loss_scaler": "loss scaler"}
OTHERS = {
    "iteration": "iteration",
    "samples": "samples",
    "skipped_steps": "skipped",
    "scheduler": "scheduler",
}
ACCELERATES = "accelerate's two folders hold model and optimizer alone"
COUNTS = ("step", "iteration", "epoch", "samples", "skipped_steps", "train_loss", "val_loss", "scheduler")
DROPPED: Mapping[str, Mapping[str, str]] = {
    "zero": {},
    "zero0": {},
    "zero3": {},
    "universal": {},
    "pt": SETTINGS,
    "dcp": {**SETTINGS, "left_out": "weights of the model"},
    "dcp/accelerate_ws2": dict.fromkeys(("client", *COUNTS), ACCELERATES),
    "hf": {
        "settings": "settings",
        "client": "training code",
        "frozen": "frozen",
        "buffers": "buffers",
        **OTHERS,
    },
}
# where a distributed checkpoint keeps counters, which are the client's values, too
CLIENTS_OWN = {*counters.STEP, *counters.EPOCH, *counters.SAMPLES, *counters.SCHEDULER, *counters.VAL_LOSS}
CLIENTS_OWN |= {*counters.TRAIN_LOSS, "skipped_steps", "train_state"}


def held(format: Format, source: str, checkpoint: Checkpoint, notes: str | None = None) -> Checkpoint:
    """What of a Checkpoint the format has a place for; every other thing must be in the notes."""
    nothing = Training()
    for field, word in (*DROPPED[format.name].items(), *DROPPED.get(source, {}).items()):
        of = checkpoint if hasattr(checkpoint, field) else checkpoint.training
        if getattr(of, field) in (None, {}, frozenset()):
            continue
        assert notes is None or word in notes, f"{field} is dropped, and no note says so: {notes}"
        if of is checkpoint:
            checkpoint = replace(checkpoint, **{field: type(getattr(checkpoint, field))()})
        else:
            state = replace(checkpoint.training, **{field: getattr(nothing, field)})
            checkpoint = replace(checkpoint, training=state)
    if not format.resumes:
        return weights_only(checkpoint)
    if format.name == "zero0" and checkpoint.layout.dtype == "fp16" and not checkpoint.loss_scaler:
        begun = {**NEW_SCALER, "cur_iter": checkpoint.training.step}  # its wrapper does not load without one
        return replace(checkpoint, loss_scaler=begun)
    if format.name == "dcp":
        own = {key: value for key, value in checkpoint.client.items() if key not in CLIENTS_OWN}
        if _in_text(own) != own:
            assert notes is None or "that are no text are written as text" in notes
        return replace(checkpoint, client=_in_text(own))
    return checkpoint


def _in_text(value: Value) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _in_text(inner) for key, inner in value.items()}
    return value


def there_and_back(format: Format, checkpoint: Checkpoint, folder: Path) -> tuple[Checkpoint, str]:
    """What reads of what was written, and the notes."""
    assert format.plan is not None
    plan = format.plan(checkpoint, checkpoint.layout)
    place = folder / ("out.pt" if plan.is_single_file else "out")
    execute(plan, place)
    return read(locate(place)), "\n".join(plan.notes)


def unlike(format: Format, source: str, changed: Checkpoint, template: str, folder: Path) -> list[str]:
    written = changed if template == "kept" else replace(changed, template=None)
    made, notes = there_and_back(format, written, folder)
    expected = held(format, source, changed, notes)
    return list(content_differences(held(format, source, made), expected, but=("keys",)))


@pytest.mark.parametrize(("format", "source"), CASES)
@pytest.mark.parametrize("template", ["kept", "stripped"])
def test_what_is_written_reads_as_it_was(format: Format, source: str, template: str, tmp_path: Path) -> None:
    assert unlike(format, source, open_checkpoint(FIXTURES / source), template, tmp_path) == []


@pytest.mark.parametrize(("format", "source"), CASES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("template", ["kept", "stripped"])
def test_what_is_changed_reads_as_changed(
    format: Format, source: str, change: Change, template: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(FIXTURES / source)
    if not checkpoint.groups and change.__name__ in NEEDS_GROUPS:
        pytest.skip("the source has no optimizer with names")
    changed = change(checkpoint)
    if not list(content_differences(changed, checkpoint)):
        pytest.skip("nothing in this source that the change could change")
    assert unlike(format, source, changed, template, tmp_path) == []


@pytest.mark.parametrize("name", ["zero", "zero0", "zero3", "universal"])
@pytest.mark.parametrize("template", ["kept", "stripped"])
def test_what_a_model_holds_beside_tensors_is_written(name: str, template: str, tmp_path: Path) -> None:
    (format,), source = [each for each in FORMATS if each.name == name], SOURCES[name][0]
    extra = {"up._extra_state": b"amax", "down._extra_state": None}
    changed = replace(open_checkpoint(FIXTURES / source), extra_state=extra)
    assert unlike(format, source, changed, template, tmp_path) == []


NEEDS_GROUPS = ("learning_rate", "cast", "frozen_name", "tied_pair", "reordered")


def test_every_format_that_is_written_is_held_to_it() -> None:
    assert set(SOURCES) == set(DROPPED) - set(SOURCES["dcp"]) == {format.name for format in FORMATS_WRITTEN}
    for format in FORMATS_WRITTEN:
        assert {locate(FIXTURES / source).format for source in SOURCES[format.name]} == {format}
    assert sorted(PLANS) == sorted(TARGETS)  # of `convert --to`, which asks for options of each
