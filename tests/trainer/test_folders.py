"""Which checkpoint a launch continues from, and what it says about the choice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import run_folders
import torch
from support import FIXTURES

from ckpttools import formats
from ckpttools.errors import CkptError, UsageError
from ckpttools.frameworks import read as training_of
from ckpttools.frameworks.rules import About
from ckpttools.resume import NewRun, Target, foretell
from ckpttools.resume.lengths import planned
from ckpttools.trainer import folders, search
from ckpttools.trainer.compared import new_run, warnings
from ckpttools.trainer.config import Config, load
from ckpttools.trainer.options import Options
from ckpttools.trainer.startup import Start, decide, hand_over, handed_over


def saved(run: Path, tag: str, ranks: int = 2, age: int = 0, prefix: str = "bf16_") -> Path:
    folder = run / tag
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").touch()
    for rank in range(ranks):
        (folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    os.utime(folder, ns=(1, 10**18 - age * 10**9))
    return folder


SAMPLE = FIXTURES / "trainer/z2_bf16_2"  # one checkpoint of 2 ranks at step 3


def copied(run: Path, tag: str, age: int = 0) -> Path:
    """A whole checkpoint of the trainer."""
    shutil.copytree(SAMPLE / "iter_000003.pth", run / tag)
    os.utime(run / tag, ns=(1, 10**18 - age * 10**9))
    return run / tag


def torn(checkpoint: Path, rank: int = 1) -> Path:
    """The same after a machine that stopped in the middle of a save."""
    os.truncate(checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", 2000)
    return checkpoint


def like_sample(work_dirs: Path, *overrides: str) -> Config:
    return load(SAMPLE / "config.yaml", [f"work_dirs={work_dirs}", "experiment=e", *overrides])


def resume(config: Config, path: Path | None = None) -> Options:
    return Options(config=SAMPLE / "config.yaml", resume=True, resume_from=path)


def at(checkpoint: Path, step: int) -> Path:
    """The same with another step inside."""
    file = checkpoint / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content |= {"global_steps": step, "iter": step, "global_step": step}
    torch.save(content, file)
    return checkpoint


def test_newest_is_what_last_checkpoint_names(tmp_path: Path) -> None:
    assert search.newest_first(tmp_path) == []
    first = copied(tmp_path, "iter_000002.pth")
    ten = at(copied(tmp_path, "iter_000010.pth"), 10)
    (tmp_path / "last_checkpoint").write_text("iter_000002.pth\n")
    assert search.newest_first(tmp_path) == [first, ten]
    (tmp_path / "last_checkpoint").write_text("/moved/from/here/iter_000002.pth")
    assert search.newest_first(tmp_path) == [first, ten]
    _, careful, chosen = search.search(tmp_path).notes
    assert careful.startswith("careful: iter_000010.pth is further on (step 10) than what the pointer names")
    assert chosen == f"Auto resumed from the latest checkpoint {first}"
    torn(first)
    _, passed, chosen = search.search(tmp_path).notes
    assert passed.startswith(f"Passed over {first}: ") and chosen.endswith(f" {ten}")


def test_newest_by_step_without_last_checkpoint(tmp_path: Path) -> None:
    nine = at(copied(tmp_path, "iter_000009.pth", age=1), 9)
    ten = at(copied(tmp_path, "iter_000010.pth", age=5), 10)  # copied back later than it was made
    copied(tmp_path, "iter_000010.pth.ws4")  # resharded copies are never picked by themselves
    (tmp_path / "iter_000099.pth").mkdir()  # nothing in it
    (tmp_path / "last_checkpoint").write_text("iter_000099.pth")
    assert search.newest_first(tmp_path) == [ten, nine]
    _, passed, chosen = search.search(tmp_path).notes
    assert passed.startswith(f"Passed over {tmp_path / 'iter_000099.pth'}, which last_checkpoint names: ")
    assert chosen == f"Auto resumed from the latest checkpoint {ten}"
    epoch = at(copied(tmp_path, "epoch_002.pth", age=9), 12)
    assert search.newest_first(tmp_path) == [epoch, ten, nine]


def test_a_run_with_one_checkpoint(tmp_path: Path) -> None:
    only = copied(tmp_path / "run", "iter_000003.pth")
    (tmp_path / "run/latest").write_text("iter_000003.pth")
    assert search.newest_first(tmp_path / "run") == [only]
    assert search.newest_first(tmp_path) == [only]


def test_all_of_a_run_is_evaluated_whatever_latest_names(tmp_path: Path) -> None:
    run, config = tmp_path / "run", like_sample(tmp_path)
    for step in (3, 6, 9):
        at(copied(run, f"iter_{step:06d}.pth"), step)
    torn(at(copied(run, "iter_000012.pth"), 12))

    def evaluated(path: Path) -> list[str]:
        start = decide(config, Options(config=SAMPLE / "config.yaml", evaluate=path), world=2)
        assert start.mode == "evaluate" and start.checkpoint is not None
        passed_over = f"Passed over {run}/iter_000012.pth: "
        assert [note.startswith(passed_over) for note in start.notes] == [True] * (path == run)
        return [each.name for each in (start.checkpoint, *start.others)]

    for latest in (None, "iter_000006.pth"):
        if latest is not None:
            (run / "latest").write_text(latest)
        assert evaluated(run) == ["iter_000009.pth", "iter_000006.pth", "iter_000003.pth"]
    assert evaluated(run / "iter_000003.pth") == ["iter_000003.pth"]


def test_resolve(tmp_path: Path) -> None:
    tag = saved(tmp_path, "global_step5")
    assert folders.resolve(tag) == tag
    with pytest.raises(UsageError, match="no DeepSpeed checkpoint here"):
        folders.resolve(tmp_path)
    for bad in ("../other", "global_step6"):
        (tmp_path / "latest").write_text(bad)
        with pytest.raises(UsageError, match="which holds no checkpoint"):
            folders.resolve(tmp_path)
    (tmp_path / "latest").write_text("global_step5")
    assert folders.resolve(tmp_path) == tag


def test_auto_resume_takes_the_newest_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    config = like_sample(tmp_path)
    start = decide(config, resume(config), world=2)
    assert start.checkpoint is None
    assert start.notes == (f"No checkpoint found under {tmp_path}/e: starting from step 0",)
    copied(tmp_path / "e/20250101_000000", "iter_000900.pth")
    newer = copied(tmp_path / "e/20250102_000000", "iter_000100.pth")
    (tmp_path / "e/20250103_000000").mkdir()
    start = decide(config, resume(config), world=2)
    assert (start.run, start.checkpoint) == (newer.parent, newer)
    assert start.notes == (
        f"Searched {tmp_path}/e: 2 checkpoints, newest first: "
        "20250102_000000/iter_000100.pth, 20250101_000000/iter_000900.pth",
        f"Auto resumed from the latest checkpoint {newer}",
    )


def test_damaged_checkpoints_are_passed_over_by_name(tmp_path: Path) -> None:
    config = like_sample(tmp_path)
    older = copied(tmp_path / "e/20250101_000000", "iter_000900.pth")
    run = tmp_path / "e/20250102_000000"
    good = copied(run, "iter_000003.pth", age=9)
    flipped = copied(run, "iter_000004.pth", age=5)
    model = flipped / "mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes().replace(b"\x3f", b"\x3e", 1))
    lost = copied(run, "iter_000005.pth", age=3)
    (lost / model.name).unlink()
    newest = torn(copied(run, "epoch_001.pth", age=1))
    (run / "last_checkpoint").write_text("epoch_001.pth")
    start = decide(config, resume(config), world=2)
    assert start.checkpoint == good
    searched, *passed, chosen = start.notes
    assert searched.startswith(f"Searched {tmp_path}/e: 5 checkpoints, newest first: {run.name}/")
    passed.sort()
    for note, path in zip(passed, (newest, flipped, lost), strict=True):
        assert note.startswith(f"Passed over {path}: ")
    assert "[model-missing]" in passed[2]
    assert "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt: " in passed[0]
    assert "[file-truncated]" in passed[0]
    assert chosen == f"Auto resumed from the latest checkpoint of those that verify {good}"

    for rank in (0, 1):
        torn(good, rank)
    assert decide(config, resume(config), world=2).checkpoint == older
    torn(older)
    with pytest.raises(CkptError) as caught:  # never a fresh start beside a run that was lost
        decide(config, resume(config), world=2)
    assert (caught.value.id, caught.value.exit_code) == ("none-verified", 1)
    assert f"Passed over {older}: " in caught.value.why


@pytest.mark.parametrize("form", ["epoch_1_step_{}.pt", "iter_{:06d}.pth", "ckpt/checkpoint_epoch_{}.pth"])
def test_damaged_single_files_are_passed_over_by_name(tmp_path: Path, form: str) -> None:
    files = [tmp_path / form.format(step) for step in (1, 2, 3)]
    files[0].parent.mkdir(exist_ok=True)
    for step, path in enumerate(files, 1):
        path.write_bytes(run_folders.saved(step))
        os.utime(path, (1e9 + step, 1e9 + step))
    os.truncate(files[2], 500)
    found = search.search(tmp_path)
    assert found.path == files[1]
    assert any(note.startswith(f"Passed over {files[2]}: ") for note in found.notes), found.notes
    for path in files:
        os.truncate(path, 500)
    with pytest.raises(CkptError) as caught:  # never a fresh start beside a run that was lost
        search.search(tmp_path)
    assert caught.value.id == "none-verified"


def test_a_named_checkpoint_is_refused_when_it_is_damaged(tmp_path: Path) -> None:
    config = like_sample(tmp_path)
    named = torn(copied(tmp_path / "x", "iter_000003.pth"))
    with pytest.raises(CkptError) as caught:
        decide(config, resume(config, named), world=2)
    assert (caught.value.id, caught.value.exit_code) == ("file-truncated", 1)
    assert f"ckpt verify {named}" in caught.value.hint
    weights = Options(config=SAMPLE / "config.yaml", resume_from=named)
    assert decide(config, weights, world=2).mode == "weights"  # they lie in the model file, which is whole
    os.truncate(named / "mp_rank_00_model_states.pt", 2000)
    with pytest.raises(CkptError):
        decide(config, weights, world=2)


def test_what_goes_on_otherwise_is_said(tmp_path: Path) -> None:
    named = copied(tmp_path / "x", "iter_000003.pth")
    same = like_sample(tmp_path)
    assert decide(same, resume(same, named), world=2).notes == (f"Resumed from {named}",)
    batch = same.batch.global_batch_size
    other = like_sample(tmp_path, f"batch.global_batch_size={2 * batch}")
    _, *notes = decide(other, resume(other, named), world=2).notes
    assert notes[0].startswith(f"careful: train_batch_size: {batch} -> {2 * batch}: ")
    assert f"  ckpt rebase-schedule {named} --old-bs {batch} --new-bs {2 * batch}" in notes
    longer = like_sample(tmp_path, f"epochs={same.epochs + 7}")
    _, note = decide(longer, resume(longer, named), world=2).notes
    assert note.startswith("careful: scheduler.params.total_num_steps: ")
    target = Target.find(named)  # whether anything is left of it goes by its own length
    made = new_run(longer, target, NewRun(world_size=2), named)
    training = training_of(target.source, formats.read(target.source))
    assert (training.total_count, planned(training, made)) == (23 * same.epochs, 23 * longer.epochs)
    wider = like_sample(tmp_path, f"model.hidden_size={same.model.hidden_size * 2}")
    with pytest.raises(CkptError) as caught:
        decide(wider, resume(wider, named), world=2)
    assert caught.value.id == "resume-failed"


def test_what_goes_on_otherwise_from_a_single_file_is_said(tmp_path: Path) -> None:
    """zero.stage 0: no engine's settings are saved, but the trainer's own."""
    config = like_sample(tmp_path, "zero.stage=0", "precision=fp32")
    state = {"model_state_dict": {"a.weight": torch.ones(2)}, "config": config.plain()}
    ours = {"format_version": 1, "samples_in_epoch": 0, "dataset_size": 100, "iter": 9}
    path = tmp_path / "epoch_1_step_9.pt"
    torch.save({**state, **ours, "epoch": 1, "global_step": 9}, path)

    def said(*overrides: str) -> list[str]:
        other = like_sample(tmp_path, "zero.stage=0", "precision=fp32", *overrides)
        return list(warnings(path, other, tmp_path / "a.yaml", 1))

    def foretold(*overrides: str) -> set[str]:
        """By resume-check, in the numbers of this run: how many ranks it has nobody said."""
        other = like_sample(tmp_path, "zero.stage=0", "precision=fp32", *overrides)
        target = Target.find(path)
        found = foretell(target, new_run(other, target, NewRun(), tmp_path / "a.yaml"))
        assert [c.ok for c in found.checks if c.about is About.BATCH] == [not overrides]
        about = (About.BATCH, About.LENGTH, About.SCHEDULE, About.DATA)
        return {d.setting for d in found.differences if d.about in about}

    assert said() == said("batch.micro_batch_size=1", "save.save_steps=7") == []
    assert foretold() == set()
    changes = ("batch.global_batch_size=32", "epochs=9")
    assert [line.split(": ")[1] for line in said(*changes)] == ["batch.global_batch_size", "epochs"]
    assert foretold(*changes) == {"effective batch", "epochs"}
    assert said("schedule.total_steps=8")[0].startswith("careful: schedule.total_steps: - -> 8: ")
    with pytest.raises(UsageError, match="no such file"):
        decide(config, resume(config, tmp_path / "gone.pt"), world=1)


def test_a_decision_crosses_processes(tmp_path: Path) -> None:
    for checkpoint in (None, tmp_path / "ä b/iter_000003.pth"):
        start = Start(
            run=tmp_path, checkpoint=checkpoint, mode="weights", notes=("one", "two"), others=(tmp_path,)
        )
        hand_over(start, tmp_path)
        assert handed_over(tmp_path) == start


@pytest.mark.parametrize(
    ("ranks", "prefix", "id", "hint"),
    [
        (4, "bf16_", "world-size", "ckpt reshard {} --world-size 2"),
        (0, "bf16_", "no-optimizer-states", "--resume-from {} without --resume"),
        (2, "", "precision", "without --resume"),
    ],
)
def test_what_cannot_be_loaded_is_refused_first(
    tmp_path: Path, ranks: int, prefix: str, id: str, hint: str
) -> None:
    tag = saved(tmp_path, "iter_000001.pth", ranks=ranks, prefix=prefix)
    options = Options(config=Path("c"), resume=True, resume_from=tag)
    with pytest.raises(UsageError) as caught:
        decide(Config(work_dirs=str(tmp_path)), options, world=2)
    error = caught.value
    assert (error.id, error.where) == (id, str(tag))
    assert hint.format(tag) in error.hint
    assert error.why


def test_a_new_run_does_not_overwrite_another(tmp_path: Path) -> None:
    saved(tmp_path / "run", "epoch_001.pth")
    with pytest.raises(UsageError) as caught:
        decide(Config(), Options(config=Path("c"), work_dir=tmp_path / "run"), world=2)
    assert caught.value.id == "run-exists"


def test_write_text_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    folders.write_text(tmp_path / "last_checkpoint", "a")
    folders.write_text(tmp_path / "last_checkpoint", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "b"


def test_a_limit_removes_what_the_trainer_wrote_and_nothing_else(tmp_path: Path) -> None:
    from ckpttools.trainer.saving import Saving

    run = tmp_path / "run"
    for step in (1, 2, 3):
        at(copied(run, f"iter_{step:06d}.pth"), step)
        at(copied(run / "older", f"iter_{step:06d}.pth"), step)  # another run, moved below
        torch.save({"a.weight": torch.ones(2), "global_step": step}, run / f"mine_step_{step}.pt")
    told: list[str] = []
    Saving(run=run, layout="iter", zero=True, verify="off", limit=1, say=told.append).retain()
    assert {path.name for path in run.glob("iter_*")} == {"iter_000003.pth"}, told
    assert len(list(run.glob("mine_*"))) == 3 and len(list((run / "older").iterdir())) == 3


def test_a_save_replaces_nothing_that_is_pinned(tmp_path: Path) -> None:
    from ckpttools import pin, unpin
    from ckpttools.trainer.saving import Saving

    run = tmp_path / "run"
    target, staged = copied(run, "iter_000003.pth"), copied(run, ".iter_000003.pth.ckpt-tmp-train")
    saving = Saving(run=run, layout="iter", zero=True, verify="off", limit=None, say=print)
    pin(target)
    inode = target.stat().st_ino
    with pytest.raises(UsageError) as caught:
        saving._appear(staged, target)
    assert caught.value.id == "pinned" and target.stat().st_ino == inode
    unpin(target)
    saving._appear(staged, target)
    assert target.stat().st_ino != inode


def judged(checkpoint: Path, loss: float, best: float) -> Path:
    """The same with what an evaluation measured."""
    file = checkpoint / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"val_loss": loss, "best_val_loss": best}, file)
    return checkpoint


def test_the_best_loss_is_that_of_the_best_model_which_is_there(tmp_path: Path) -> None:
    from ckpttools.formats import locate, read
    from ckpttools.trainer.saving import Saving

    run = tmp_path / "run"
    first = judged(copied(run, "epoch_001.pth"), 0.5, 0.5)
    second = judged(copied(run, "epoch_002.pth"), 0.25, 0.25)
    third = judged(copied(run, "epoch_003.pth"), 0.75, 0.25)
    told: list[str] = []
    saving = Saving(run=run, layout="iter", zero=True, verify="off", limit=None, say=told.append)
    saving.best(first)
    assert saving.known_best(first, 0.5, 0.5) == 0.5 and not told
    assert saving.known_best(third, 0.75, 0.25) == 0.5 and "0.5" in told[-1]  # ended before it was written
    assert saving.known_best(second, 0.25, 0.25) == 0.25
    assert read(locate(run / folders.BEST)).training.val_loss == 0.25
    new = Saving(run=tmp_path / "new", layout="iter", zero=True, verify="off", limit=None, say=told.append)
    new.place.mkdir()
    assert new.known_best(third, 0.75, 0.25) is None and "is not there" in told[-1]
    assert new.known_best(second, 0.25, 0.25) == 0.25 and (new.place / folders.BEST).exists()
