"""What must outlive a clean-up or a --force, each as somebody could have it: runs in runs, sweeps in one
folder, files that belong together, pins in a framework's own folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

import ckpttools
from ckpttools.operations.replacing import holding
from ckpttools.runs import pins

TRAINER = FIXTURES / "hf-trainer" / "plain"
DAY = 86_400


def save(path: Path, *, at: float | None = None, **said: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    adam = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 2)
    adam.step()
    torch.save(
        {"model_state_dict": {"a.weight": weight.data}, "optimizer_state_dict": adam.state_dict(), **said},
        path,
    )
    if at is not None:
        os.utime(path, (at, at))
    return path


def series(folder: Path, names: Iterable[str]) -> Path:
    """Files with their step and times in the order of their names."""
    for age, name in enumerate(names):
        step = int("".join(filter(str.isdigit, name.rpartition("step")[2].split(".")[0].split("_r")[0])))
        save(folder / name, at=time.time() - DAY + age, global_step=step)
    return folder


def gone(folder: Path, **options: object) -> set[str]:
    plan = ckpttools.prune(folder, **{"keep_last": 1, **options})  # type: ignore[arg-type]
    return {str(entry.path.relative_to(folder)) for entry in plan.removed}


# --- --force ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ckpt", "checkpoints", "mine"])
def test_what_is_pinned_in_a_frameworks_own_folder_is_not_replaced(tmp_path: Path, name: str) -> None:
    kept = Path(shutil.copytree(TRAINER / "checkpoint-4", tmp_path / "run" / name / "checkpoint-4"))
    assert run("pin", kept).code == 0
    for dst in (kept.parent, kept.parent.parent):
        ran = run("extract", TRAINER / "checkpoint-2", dst, "--force")
        assert ran.code == 2 and "error[pinned]" in ran.err and (kept / "model.safetensors").exists()
        assert f"ckpt unpin {kept}" in ran.err
    assert run("unpin", kept).code == 0
    assert run("extract", TRAINER / "checkpoint-2", kept.parent, "--force", "-q").code == 0


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("hf-trainer/peft/checkpoint-2", "dcp/fsdp2_ws2", "step-500"),
        ("verl/actor_ws2", "dcp/fsdp2_ws2", "step-5"),
        ("dcp/fsdp2_ws2", "hf-trainer/peft/checkpoint-2", "model"),
        ("deepspeed-0.19.8/z2_bf16_ws2/global_step3", "dcp/fsdp2_ws2", "later"),
    ],
)
def test_a_second_checkpoint_of_another_format_is_not_replaced(
    tmp_path: Path, first: str, second: str, name: str
) -> None:
    dst = Path(shutil.copytree(FIXTURES / first, tmp_path / "dst"))
    shutil.copytree(FIXTURES / second, dst / name)
    ran = run("extract", TRAINER / "checkpoint-2", dst, "--force")
    assert ran.code == 2 and "error[not-replaced]" in ran.err and "several checkpoints" in ran.err
    assert (dst / name).is_dir()
    shutil.rmtree(dst / name)
    assert run("extract", TRAINER / "checkpoint-2", dst, "--force", "-q").code == 0


def test_the_folders_of_one_checkpoint_are_one_place() -> None:
    """Whatever its framework puts into folders within."""
    ones = (
        *(
            "bundle/checkpoint-200",
            "hf-trainer/deepspeed/checkpoint-2",
            "dcp/accelerate_ws2",
            "verl/actor_ws2",
        ),
        *("universal/z2_groups/global_step3_universal", "deepspeed-0.19.8/z3_fp32_ws2/global_step3"),
    )
    assert [(each, holding(FIXTURES / each)) for each in ones] == [(each, {FIXTURES / each}) for each in ones]


# --- prune --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "deep/er", "2_Tuned"])
def test_another_run_within_a_checkpoint_stays(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(TRAINER, tmp_path / "run"))
    shutil.copytree(TRAINER, folder / "checkpoint-2" / name)
    plan = ckpttools.prune(folder, keep_last=1)
    assert not plan.removed and (folder / "checkpoint-2" / name / "checkpoint-2").is_dir()
    assert any("somebody's own" in why or "other checkpoints" in why for d in plan.kept for why in d.reasons)


def test_what_each_save_has_within_goes_with_it(tmp_path: Path) -> None:
    """A second adapter, as PEFT saves it beside the first: the newest has one, too."""
    folder = Path(shutil.copytree(FIXTURES / "hf-trainer" / "peft", tmp_path / "run"))
    for save_folder in folder.glob("checkpoint-*"):
        (save_folder / "second").mkdir()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(save_folder / name, save_folder / "second")
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert gone(folder) == {path.name for path in steps[:-1]}


@pytest.mark.parametrize(
    "setting",
    [
        "accum_steps_{}-step_",
        "warmup_steps={}-step=",
        "pretrain_epoch_{}-step_",
        "start_step{}_step",
        "epoch_{}-epoch_9_step_",
    ],
)
def test_a_setting_makes_another_series(tmp_path: Path, setting: str) -> None:
    names = [f"{setting.format(value)}{step}.pt" for value in (4, 8) for step in (100 + value, 200 + value)]
    removed = gone(series(tmp_path, names))
    assert removed == {names[0], names[2]}


def test_two_at_one_point_are_perhaps_of_two_runs(tmp_path: Path) -> None:
    names = [f"aux_loss=0.{value}-step={step}.pt" for value in (1, 5) for step in (100, 200)]
    assert gone(series(tmp_path, names)) == set()
    assert gone(series(tmp_path, ["aux_loss=0.3-step=90.pt"])) == {"aux_loss=0.3-step=90.pt"}


@pytest.mark.parametrize(
    "names", [("step_{}_rank_0.pt", "step_{}_rank_1.pt"), ("G_step_{}.pt", "D_step_{}.pt")]
)
def test_what_was_saved_together_stays_together(tmp_path: Path, names: tuple[str, str]) -> None:
    """The second file of the last save was cut: the save before it is the newest whole one."""
    series(tmp_path, [name.format(step) for step in (100, 200, 300) for name in names])
    os.truncate(tmp_path / names[1].format(300), 900)
    assert gone(tmp_path) == {name.format(100) for name in names}


def test_at_one_counter_the_number_in_the_name_tells(tmp_path: Path) -> None:
    """A loop that states the epoch alone, copied in the order of the alphabet."""
    for age, step in enumerate((1000, 200, 400, 600, 800)):
        save(tmp_path / f"step_{step}.pt", at=time.time() - DAY + age, epoch=0)
    assert run("latest", tmp_path).out.strip().endswith("step_1000.pt")
    assert gone(tmp_path) == {f"step_{step}.pt" for step in (200, 400, 600, 800)}


@pytest.mark.parametrize("options", [{}, {"keep_within": 3600.0}])
def test_what_is_written_now_stays_though_others_are_further_on(
    tmp_path: Path, options: dict[str, float]
) -> None:
    series(tmp_path, [f"step_{step}.pt" for step in (100, 200, 900, 1000)])
    half = save(tmp_path / "step_300.pt", global_step=300)
    os.truncate(half, 900)
    os.utime(half, (time.time() - 60, time.time() - 60))
    assert gone(tmp_path, **options) == {f"step_{step}.pt" for step in (100, 200, 900)}


@pytest.mark.parametrize("key", ["state_dict_ema", "discriminator"])
def test_slim_loses_no_second_weights(tmp_path: Path, key: str) -> None:
    for step in (1, 2, 3):
        other = {key: {"a.weight": torch.zeros(2, 2)}} if step != 2 else {}
        save(tmp_path / f"step_{step}.pt", global_step=step, **other)
    plan = ckpttools.prune(tmp_path, keep_last=1, slim=True)
    assert [entry.path.name for entry in plan.removed] == ["step_2.pt"]
    assert (tmp_path / "step_1.pt").exists() and (tmp_path / "weights-of-step_2").exists()
    (why,) = (d.reasons for d in plan.kept if d.entry.path.name == "step_1.pt")
    assert any(key in each and "other weights" in each for each in why)


def test_two_of_one_name_do_not_share_the_place_of_their_weights(tmp_path: Path) -> None:
    for folder in ("ckpt", "checkpoints"):
        for step in (1, 2):
            save(tmp_path / folder / f"step_{step}.pth", global_step=step, seed=folder)
    plan = ckpttools.prune(tmp_path, keep_last=1, slim=True)
    assert len(plan.removed) == 1 and (tmp_path / "weights-of-step_1").exists()


def test_a_checkpoint_whose_shards_another_uses_stays(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TRAINER, tmp_path / "run"))
    from safetensors import safe_open

    with safe_open(folder / "checkpoint-2/model.safetensors", "pt") as file:
        where = dict.fromkeys(file.keys(), "../checkpoint-2/model.safetensors")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (folder / "checkpoint-6/model.safetensors").unlink()
    (folder / "checkpoint-6/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    state = folder / "checkpoint-6/trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 6}))
    plan = ckpttools.prune(folder, keep_last=1)
    assert not plan.removed and (folder / "checkpoint-2").is_dir()


def test_a_run_that_does_not_say_how_good_it_is_keeps_its_best(tmp_path: Path) -> None:
    for name, values in (("a", (3.0, 1.0, 2.0)), ("b", (None,) * 3), ("c", (float("nan"),) * 3)):
        for step, loss in enumerate(values):
            said = {} if loss is None else {"val_loss": loss}
            save(tmp_path / name / f"step_{step}.pt", global_step=step, **said)
    ran = run("prune", tmp_path, "--keep-best", "-y", "--json")
    told = json.loads(ran.out)
    assert ran.code == 1 and len(told["notes"]) == 2 and not told["ok"]
    assert [Path(each["path"]).relative_to(tmp_path).as_posix() for each in told["removed"]] == [
        "a/step_0.pt"
    ]


def test_the_best_by_its_name_stays(tmp_path: Path) -> None:
    for step, loss in ((100, 0.3), (200, 0.1), (300, 0.2)):
        save(tmp_path / f"step={step}-val_loss={loss}.pt", global_step=step)
    assert gone(tmp_path) == {"step=100-val_loss=0.3.pt"}


def test_a_manifest_comes_back_where_its_file_may_not_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with the sticky bit a file of somebody else's cannot be renamed, one's own manifest can."""
    series(tmp_path, ["step_1.pt", "step_2.pt"])
    assert run("verify", tmp_path / "step_1.pt", "--write-manifest", "-q").code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename = Path.rename

    def sticky(self: Path, target: Path) -> Path:
        if self.name == "step_1.pt":
            raise PermissionError(1, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sticky)
    with pytest.raises(ckpttools.UsageError, match="not-removed"):
        ckpttools.prune(tmp_path, keep_last=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_where_one_stands_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(TRAINER, tmp_path / "run"))
    monkeypatch.chdir(folder / "checkpoint-2")
    assert not ckpttools.prune("..", keep_last=1).removed


# --- pointers -----------------------------------------------------------------------------------------


def test_a_link_called_latest_leads_to_the_checkpoint(tmp_path: Path) -> None:
    folder = series(tmp_path / "run", ["step_1.pt", "step_2.pt", "step_3.pt"])
    (folder / "latest").symlink_to("step_2.pt")
    ran = run("latest", folder)
    assert ran.code == 0 and ran.out.strip().endswith("step_2.pt") and "step 3" in ran.out + ran.err
    assert run("ls", folder).code == 0
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    ran = run("latest", folder)
    assert ran.code == 0 and ran.out.strip().endswith("step_3.pt")


def test_a_pin_keeps_the_folder_that_it_lies_beside(tmp_path: Path) -> None:
    """The framework's own folder is the checkpoint itself, and a file of it is pinned."""
    path = Path(shutil.copytree(TRAINER / "checkpoint-2", tmp_path / "ckpt"))
    assert run("pin", path / "model.safetensors").code == 0
    assert list(pins.inside(path)) == [path / "model.safetensors"]


@pytest.mark.parametrize("within", ["", "checkpoint-2"])
@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_note_that_names_nothing_keeps_all_around_it(tmp_path: Path, name: str, within: str) -> None:
    folder = Path(shutil.copytree(TRAINER, tmp_path / "run"))
    (folder / within / f".ckpt-pin-{name}.json").write_text("{}")
    replace = ("extract", TRAINER / "checkpoint-4", folder / within, "--force")
    for command in (("prune", folder, "--keep-last", 1, "--yes"), replace):
        ran = run(*command)
        assert ran.code == 2 and "error[pinned]: a pin names no checkpoint" in ran.err
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
