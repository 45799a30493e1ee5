"""What prune keeps, in any folder: the rules one by one over random runs, and killed at every system call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from commands import run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from run_folders import FOLDERS, LOSSES, Folder, One, kept_by_guard, saved, snapshot
from support import FIXTURES

import ckpttools
from ckpttools import siblings
from ckpttools.operations.replacing import somebodys
from ckpttools.runs import pins

TRAINER = FIXTURES / "hf-trainer" / "plain"


def check(folder: Folder, last: int, root: Path) -> None:
    """Every rule, on one folder that is made below `root`."""
    path = folder.make(root)
    before = snapshot(root)
    named = path / "last_checkpoint"
    pointed = Path(named.read_text()).name if named.exists() else None
    plan = ckpttools.prune(path, keep_last=last, dry_run=True)
    assert snapshot(root) == before  # a dry run does nothing
    done = ckpttools.prune(path, keep_last=last)
    assert [e.path for e in plan.removed] == [e.path for e in done.removed] and plan.nbytes == done.nbytes
    after = snapshot(root)
    gone = {entry.path.name for entry in done.removed}
    names = {one.name for one in folder.checkpoints}
    assert gone <= names  # nothing that is no checkpoint
    # each is there as it was, to the last byte, or not there at all
    inside = lambda name: name.split("/")[1] if name.startswith("run/") else ""  # noqa: E731
    assert after == {name: data for name, data in before.items() if inside(name) not in gone}
    for one in folder.checkpoints:
        if kept_by_guard(one, pointed):
            assert one.name not in gone, one
    for good in folder.series().values():
        stay = good[:last]
        best = min(good, key=lambda one: LOSSES[one.step])
        assert not gone & {one.name for one in stay}, "a torn one took a place"
        if best.kind != "hf":
            assert best.name not in gone
        for one in good[last:]:  # and it does remove what nothing keeps
            older = all(other.step > one.step for other in stay)
            if older and len(stay) == last and not kept_by_guard(one, pointed) and one != best:
                assert one.name in gone, one
    again = ckpttools.prune(path, keep_last=last)
    assert not again.removed and snapshot(root) == after


@settings(max_examples=160, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(folder=FOLDERS, last=st.integers(1, 3))
def test_every_rule_in_random_folders(
    folder: Folder, last: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("random")
    check(folder, last, root)
    shutil.rmtree(root)


@pytest.mark.heavy
@settings(max_examples=10_000, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
@given(folder=FOLDERS, last=st.integers(1, 4))
def test_every_rule_in_ten_thousand_folders(
    folder: Folder, last: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("random")
    check(folder, last, root)
    shutil.rmtree(root)


def test_two_damaged_ones_of_a_run_that_names_in_two_ways(tmp_path: Path) -> None:
    """One takes its place by its name: it says nothing about the time of the other."""
    names = (("hf", 11, False), ("hf", 2, True), ("iter", 3, True), ("epoch", 7, False))
    check(Folder(tuple(One("b_", kind, step, torn) for kind, step, torn in names)), 1, tmp_path)


def make(tmp_path: Path, *steps: int, torn: tuple[int, ...] = (), kind: str = "iter") -> Path:
    return Folder(tuple(One("", kind, step, step in torn) for step in steps)).make(tmp_path)


def best_of(*steps: int) -> str:
    return f"iter_{min(steps, key=lambda step: LOSSES[step])}.pth"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    [
        *("model_{}.pt", "checkpoint-{}.pt", "snapshot_{}.pt", "seed={}.ckpt", "model_{}"),
        *("rep_{}.pt", "deep{}.pt", "jupiter{}.pt", "footstep{}.pt"),
        *("fold={}-epoch=3.ckpt", "lr=0.0{}1-step=9.ckpt", "model_{}_epoch_3.pt"),
    ],
)
@pytest.mark.parametrize("said", [{}, {"epoch": 2}, {"epoch": 100}, {"global_step": 5000}])
def test_a_number_of_which_nothing_is_known_may_be_a_seed(
    tmp_path: Path, name: str, said: dict[str, int]
) -> None:
    import torch
    from safetensors.torch import save_file

    for seed in range(4):
        path = tmp_path / name.format(seed)
        if path.suffix:
            torch.save({"model": {"a.weight": torch.full((3,), float(seed))}, **said}, path)
        else:
            path.mkdir()
            save_file({"a.weight": torch.full((3,), float(seed))}, path / "model.safetensors")
    assert not ckpttools.prune(tmp_path, keep_last=1).removed
    assert len(left(tmp_path)) == 4


@pytest.mark.parametrize("counter", ["epoch", "global_step"])
def test_a_number_that_the_file_counts_by_is_a_series(tmp_path: Path, counter: str) -> None:
    import torch

    for count in (3, 4, 5):
        torch.save({"model": {"a.weight": torch.ones(3)}, counter: count}, tmp_path / f"model_{count}.pt")
    assert ckpttools.prune(tmp_path, keep_last=1).removed
    assert left(tmp_path) == {"model_5.pt"}


@pytest.mark.parametrize("own", [False, True])
def test_universal_folders_are_a_series(tmp_path: Path, own: bool) -> None:
    """What DeepSpeed has written below zero/ is part of the checkpoint; what else lies there is not."""
    source = FIXTURES / "universal/z2_groups/global_step3_universal"
    for step in (1, 2, 3):
        tag = shutil.copytree(source, tmp_path / f"global_step{step}_universal")
        os.utime(tag / "mp_rank_00_model_states.pt", (2e9 + step, 2e9 + step))
    if own:
        (tmp_path / "global_step1_universal/zero/notes.txt").write_text("mine")
    gone = {entry.path.name for entry in ckpttools.prune(tmp_path, keep_last=1).removed}
    assert gone == {"global_step2_universal"} | (set() if own else {"global_step1_universal"})


def test_what_lies_in_somebodys_folder_called_zero_is_not_the_checkpoints(tmp_path: Path) -> None:
    """Only the zero/ of a universal checkpoint holds parameters' state, not one that the run lies in."""
    folder = shutil.copytree(TRAINER, tmp_path / "zero")
    assert ckpttools.prune(folder, keep_last=1, dry_run=True).removed
    for name in ("fp32.pt", "notes.pt"):
        (folder / "checkpoint-2" / name).write_text("mine")
    assert not ckpttools.prune(folder, keep_last=1, dry_run=True).removed


OF_FRAMEWORKS = {  # a checkpoint of each layout that is a folder, and a name of the run's series for it
    "tag": ("deepspeed-0.19.8/z2_bf16_ws2/global_step3", "global_step{}"),
    "zero3": ("deepspeed-0.19.8/z3_fp32_ws2/global_step3", "global_step{}"),
    "universal": ("universal/z2_groups/global_step3_universal", "global_step{}_universal"),
    "dcp": ("dcp/fsdp2_ws2", "step-{}"),
    "accelerate": ("dcp/accelerate_ws2", "checkpoint-{}"),
    "trainer": ("hf-trainer/plain/checkpoint-2", "checkpoint-{}"),
    "trainer with DeepSpeed": ("hf-trainer/deepspeed/checkpoint-2", "checkpoint-{}"),
    "peft": ("hf-trainer/peft/checkpoint-2", "checkpoint-{}"),
    "bundle": ("bundle/checkpoint-200", "checkpoint-{}"),
    "verl": ("verl/actor_ws2", "step_{}"),
}
STEMS = (
    "notes",
    "my",
    "fp32 copy",
    "results",
    "exp_avg_sq_old",
    "eval_model_states",
    "mine_optim_states",
    "best",
)
SUFFIXES = (".pt", ".pth", ".txt", ".json", ".bin", ".distcp", ".safetensors", ".model", ".py", ".npz", "")


@settings(max_examples=100, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_somebodys_own_is_seen_wherever_it_lies(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = FIXTURES / OF_FRAMEWORKS[data.draw(st.sampled_from(sorted(OF_FRAMEWORKS)))][0]
    checkpoint = Path(shutil.copytree(source, tmp_path_factory.mktemp("own") / source.name))
    assert somebodys(checkpoint) == []
    folders = [checkpoint, *sorted(path for path in checkpoint.rglob("*") if path.is_dir())]
    folder = data.draw(st.sampled_from([*folders, checkpoint / "mine", folders[-1] / "mine"]))
    name = data.draw(st.sampled_from(STEMS)) + data.draw(st.sampled_from(SUFFIXES))
    if folder.name == "mine":  # nor is a folder of one's own the framework's for the names in it
        name = data.draw(st.sampled_from([name, "config.json", "optimizer.pt", "trainer_state.json"]))
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    assert somebodys(checkpoint) == [folder / name]
    shutil.rmtree(checkpoint.parent)


@pytest.mark.parametrize("kind", sorted(OF_FRAMEWORKS))
def test_no_file_of_somebodys_goes_with_a_checkpoint(tmp_path: Path, kind: str) -> None:
    source, form = OF_FRAMEWORKS[kind]
    copies = [shutil.copytree(FIXTURES / source, tmp_path / form.format(step)) for step in (1, 2, 3)]
    inside = max((path for path in Path(copies[0]).rglob("*") if path.is_file()), key=lambda p: len(p.parts))
    (inside.parent / "notes.pt").write_text("mine")
    before = snapshot(Path(copies[0]))
    plan = ckpttools.prune(tmp_path, keep_last=1)
    assert Path(copies[0]) not in {entry.path for entry in plan.removed}
    assert snapshot(Path(copies[0])) == before


@pytest.mark.parametrize("mine", [False, True])
def test_the_card_that_peft_writes_into_every_save_is_not_somebodys(tmp_path: Path, mine: bool) -> None:
    folder = make(tmp_path, 1, 2, 3, kind="hf")
    for saved_one in folder.iterdir():
        (saved_one / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card for Model ID\n")
    if mine:
        (folder / "checkpoint-1/README.md").write_text("what I found out")
    ckpttools.prune(folder, keep_last=1)
    assert left(folder) == {"checkpoint-3"} | ({"checkpoint-1"} if mine else set())


@pytest.mark.parametrize("verified", [False, True])
def test_a_truncated_newest_does_not_cost_the_good_ones(tmp_path: Path, verified: bool) -> None:
    folder = make(tmp_path, 1, 2, 3, 5, 12, torn=(12,))
    options = ["--verified"] if verified else []
    ran = run("prune", folder, "--keep-last", 2, "-y", *options)
    assert ran.code == 0, ran.err
    assert left(folder) == {"iter_12.pth", "iter_5.pth", "iter_3.pth"}


def test_only_verified_sees_a_flipped_byte(tmp_path: Path) -> None:
    for verified, stays in (
        (False, {"iter_12.pth", "iter_9.pth"}),
        (True, {"iter_12.pth", "iter_11.pth", "iter_9.pth"}),
    ):
        folder = make(tmp_path / str(verified), 1, 9, 11, 12)
        data = bytearray((folder / "iter_12.pth").read_bytes())
        at = data.index(b"\x00\x00\x80?") if b"\x00\x00\x80?" in data else data.index(b"?\xf0") - 1
        data[at] ^= 1
        (folder / "iter_12.pth").write_bytes(data)
        ran = run("prune", folder, "--keep-last", 1, "-y", *(["--verified"] if verified else []))
        assert ran.code == 0 and left(folder) == stays, ran.out


def test_good_is_said_only_of_what_was_read(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 9, 11, 12, torn=(12,))
    for options, good in (([], None), (["--verified"], True)):
        ran = run("prune", folder, "--keep-last", 1, "--dry-run", *options)
        assert ("headers only were checked" in ran.out) is (good is None)
        ran = run("prune", folder, "--keep-last", 1, "--dry-run", "--json", *options)
        said = {Path(each["path"]).name: each["good"] for each in json.loads(ran.out)["kept"]}
        assert said["iter_11.pth"] is good and said["iter_12.pth"] is not True


def test_without_a_good_one_nothing_goes(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 2, 3, torn=(1, 2, 3))
    ran = run("prune", folder, "--keep-last", 1, "-y")
    assert ran.code == 1 and "no checkpoint of it is known to be good" in ran.out
    assert len(left(folder)) == 3


def test_nobody_to_ask_means_exit_2_and_nothing_done(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 2, 3, 12)
    before = snapshot(folder)
    ran = run("prune", folder, "--keep-last", 1)
    assert ran.code == 2 and "error[prune-unconfirmed]" in ran.err and "remove  iter_1.pth" in ran.out
    ran = run("prune", folder, "--keep-last", 1, "--json")
    assert ran.code == 2 and json.loads(ran.out)["error"]["id"] == "prune-unconfirmed"
    for bad in (
        [],
        ["--keep-last", "0"],
        ["--keep-within", "soon"],
        ["--keep-last", "1", "--keep-best", "acc"],
    ):
        assert run("prune", folder, *bad, "-y").code == 2, bad
    ran = run("prune", "--keep-best", folder)
    assert ran.code == 2 and f"--keep-best took {folder} for the metric" in ran.err, ran.err
    ran = run("prune", folder, "--keep-last", 0)
    assert "x>=1" not in ran.err and "give 1 or more" in ran.err
    assert run("prune", folder, "--keep-last", 1, "--dry-run").code == 0
    assert snapshot(folder) == before


def test_the_policy(tmp_path: Path) -> None:
    def plan(*options: object) -> set[str]:
        ran = run("prune", folder, *options, "--dry-run", "--json")
        assert ran.code == 0, ran.out
        return {Path(entry["path"]).name for entry in json.loads(ran.out)["removed"]}

    steps = [One("", "iter", step) for step in (2, 4, 6, 8)] + [One("", "epoch", step) for step in (1, 3, 5)]
    folder = Folder(tuple(steps)).make(tmp_path)
    every = left(folder)
    best = {"epoch_5.pth"}
    assert every - plan("--keep-last", 2) == {"iter_8.pth", "iter_6.pth"} | best
    assert every - plan("--keep-last", 1, "--per-kind") == {"iter_8.pth"} | best | {
        "iter_6.pth"
    }  # best of its kind
    assert every - plan("--keep-every", 4) == {"iter_8.pth", "iter_4.pth"} | best
    assert (
        every - plan("--keep-best", "val_loss:max")
        == {
            "iter_8.pth",
            "epoch_1.pth",
        }
        | best
    )
    for path in folder.iterdir():
        os.utime(path)
    os.utime(folder / "iter_2.pth", (1, 1))
    assert plan("--keep-within", "7d") == {"iter_2.pth"}


def test_a_metric_that_nobody_states_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 2, 3)
    ran = run("prune", folder, "--keep-best", "accuracy:max", "-y")
    assert ran.code == 2 and "error[best-unknown]" in ran.err and "val_loss" in ran.err


def test_tensors_that_are_no_model_and_files_without_a_number_stay(tmp_path: Path) -> None:
    import torch

    folder = make(tmp_path, 1, 2, 3, 5, 12)
    for step in range(3):
        torch.save({"predictions": torch.ones(3)}, folder / f"outputs_step_{step}.pt")
    torch.save({"a.weight": torch.ones(3)}, folder / "pretrained.pt")
    (folder / "last.pth").write_bytes(saved(1))
    before = left(folder)
    assert run("prune", folder, "--keep-last", 1, "-y").code == 0
    assert before - left(folder) == {"iter_1.pth", "iter_2.pth", "iter_3.pth"}


def test_the_trainers_own_best_stays(tmp_path: Path) -> None:
    folder = Folder(tuple(One("", "hf", step) for step in (2, 4, 6, 8))).make(tmp_path)
    for step, best in ((2, 2), (8, 4)):  # an older checkpoint says what was the best then
        path = folder / f"checkpoint-{step}" / "trainer_state.json"
        said = {"best_model_checkpoint": f"/elsewhere/out/checkpoint-{best}"}
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    assert run("prune", folder, "--keep-last", 1, "-y").code == 0
    assert left(folder) == {"checkpoint-8", "checkpoint-4"}


def test_experiments_of_one_tag_are_runs_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2", tmp_path / "runs" / name)
    before = snapshot(tmp_path)
    assert run("prune", tmp_path / "runs", "--keep-last", 1, "-y").code == 0
    assert snapshot(tmp_path) == before


def test_what_was_written_last_stays_though_others_are_further_on(tmp_path: Path) -> None:
    """A run that went on from step 2: 3 and 4 are of what was given up."""
    folder = make(tmp_path, 1, 2, 3, 4, 5)
    for step, seconds in ((4, 1000), (5, 1100), (1, 2000), (2, 2100), (3, 2200)):
        os.utime(folder / f"iter_{step}.pth", (seconds, seconds))
    plan = ckpttools.prune(folder, keep_last=1)
    assert left(folder) == {"iter_3.pth", "iter_5.pth"} | {best_of(1, 2, 3, 4, 5)}
    assert any("written last" in why for d in plan.kept for why in d.reasons)


def test_what_last_verified_names_stays(tmp_path: Path) -> None:
    """Headers of a newer one may be good, and its bytes damaged."""
    folder = make(tmp_path, 1, 2, 3, 4)
    (folder / siblings.VERIFIED).write_text("iter_2.pth")
    ckpttools.prune(folder, keep_last=1)
    assert left(folder) == {"iter_2.pth", "iter_4.pth", siblings.VERIFIED, best_of(1, 2, 3, 4)}


def test_a_tag_that_latest_names_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2", folder)
    tag = (folder / "latest").read_text()
    for step in (1, 2, 9):
        shutil.copytree(folder / tag, folder / f"global_step{step}")
    (folder / "latest").write_text("global_step1")
    assert run("prune", folder, "--keep-last", 1, "-y").code == 0
    assert {"latest", "global_step1"} <= left(folder) and len(left(folder)) < 5


def test_hard_links_free_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 2, 12, 9)
    size = (folder / "iter_1.pth").stat().st_size
    os.link(folder / "iter_2.pth", tmp_path / "other name")
    plan = ckpttools.prune(folder, keep_last=1, dry_run=True)
    assert {entry.path.name for entry in plan.removed} == {"iter_1.pth", "iter_2.pth"} and plan.nbytes == size


def test_a_pin_that_comes_after_the_plan_is_seen(tmp_path: Path) -> None:
    from ckpttools.operations.prune import carry_out, plan_of
    from ckpttools.runs.retain import Policy

    folder = make(tmp_path, 1, 2, 12)
    plan = plan_of(folder, Policy(last=1))
    ckpttools.pin(folder / "iter_1.pth")
    with pytest.raises(ckpttools.UsageError, match="prune-changed"):
        carry_out(plan)
    assert (folder / "iter_1.pth").exists()


def test_two_prunes_at_once_do_not_speak_of_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpttools.operations import prune

    folder, remove = make(tmp_path, 1, 2, 12), prune.remove_whole
    for name in ("iter_1", "iter_2"):
        assert run("verify", folder / f"{name}.pth", "--write-manifest", "-q").code == 0

    def after_another(path: Path, beside: Path | None = None) -> None:
        path.unlink()
        remove(path, beside)

    monkeypatch.setattr(prune, "remove_whole", after_another)
    with pytest.raises(ckpttools.UsageError, match="prune-changed"):
        ckpttools.prune(folder, keep_last=1)
    assert (folder / "iter_12.pth").exists()
    left = {path.name for path in folder.iterdir()} - {"iter_12.pth"}
    assert left in (
        {"iter_1.pth", "iter_1.pth.ckpt-manifest.json"},
        {"iter_2.pth", "iter_2.pth.ckpt-manifest.json"},
    )


def test_killed_at_any_moment_no_half_checkpoint_is_left(tmp_path: Path) -> None:
    """A child is killed right before its n-th rename or deletion, for every n."""
    content = Folder(
        (*(One("", "hf", step) for step in (1, 2, 12)), *(One("b_", "iter", step) for step in (1, 9)))
    )
    whole = snapshot(content.make(tmp_path / "whole"))
    ckpttools.prune(tmp_path / "whole" / "run", keep_last=1)
    done = snapshot(tmp_path / "whole" / "run")
    killed, n = 0, 0
    while True:
        folder = content.make(tmp_path / str(n))
        (folder / "b_iter_1.pth.ckpt-manifest.json").write_text("{}")
        child = os.fork()
        if not child:
            _die_at(n)
            ckpttools.prune(folder, keep_last=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for name in {one.name for one in content.checkpoints} & left(folder):
            now = {k: v for k, v in snapshot(folder).items() if k.split("/")[0] == name}
            assert now == {k: v for k, v in whole.items() if k.split("/")[0] == name}, (n, name)
        assert all(
            e.path.name in whole or (folder / e.path.name).is_dir()
            for r in ckpttools.ls(folder)
            for e in _entries(r)
        )
        ckpttools.prune(folder, keep_last=1)
        assert snapshot(folder) == done, n
        if os.WIFEXITED(status):
            break
        killed, n = killed + 1, n + 1
    assert killed > 10


def _entries(found: object) -> list[ckpttools.Entry]:
    return [each.entry for each in found.checkpoints]  # type: ignore[attr-defined]


def _die_at(n: int) -> None:
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir"):
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


# --- slim --------------------------------------------------------------------------------------------


def slim_folder(tmp_path: Path) -> Path:
    ones = (*(One("", "hf", step) for step in (2, 4, 6)), *(One("", "iter", step) for step in (3, 9, 12)))
    folder = Folder(ones).make(tmp_path)
    shutil.copytree(FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2", folder / "zero")
    tag = (folder / "zero" / "latest").read_text()
    for step in (9, 10):
        shutil.copytree(folder / "zero" / tag, folder / "zero" / f"global_step{step}")
    (folder / "zero" / "latest").write_text("global_step9")
    return folder


def test_slim_keeps_the_weights_of_what_goes(tmp_path: Path) -> None:
    folder = slim_folder(tmp_path)
    zero = folder / "zero"
    plan = ckpttools.prune(zero, keep_last=1, dry_run=True)
    (tag,) = (entry.path.name for entry in plan.removed)  # one is pointed at, one the newest
    olds = {"checkpoint-2": folder, "checkpoint-4": folder, "iter_3.pth": folder, tag: zero}
    before = {name: weights_of(place / name) for name, place in olds.items()}
    every = snapshot(folder)
    ran = run("prune", folder, "--keep-last", 1, "--slim", "--dry-run", "--json")
    planned = json.loads(ran.out)
    assert snapshot(folder) == every
    assert {Path(each["path"]).name for each in planned["slimmed"]} == set(olds)
    room = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ran = run("prune", folder, "--keep-last", 1, "--slim", "-y")
    assert ran.code == 0, ran.err
    for name, place in olds.items():
        copy = place / f"weights-of-{name.removesuffix('.pth')}"
        assert not (place / name).exists() and run("verify", copy).code == 0
        assert weights_of(copy) == before[name]
    now = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifests = sum(path.stat().st_size for path in folder.rglob("ckpt-manifest.json"))
    assert room - now + manifests == planned["nbytes"]
    again = run("prune", folder, "--keep-last", 1, "--slim", "-y")
    assert again.code == 0 and "nothing to remove" in again.out


def weights_of(path: Path) -> dict[str, bytes]:
    """The best copy of each weight, in fp32 where it is of 16 bits."""
    opened = ckpttools.open(path)
    refs = opened.checkpoint.best_copies()
    arrays = {name: opened.array(ref) for name, ref in refs.items() if name not in opened.checkpoint.shared}
    return {
        name: (each.astype("float32") if each.itemsize == 2 else each).tobytes()
        for name, each in arrays.items()
    }


def test_what_cannot_be_slimmed_stays(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 2, 3, 5, 9, 12, torn=(2,))
    data = bytearray((folder / "iter_1.pth").read_bytes())
    (chunk,) = ckpttools.open(folder / "iter_1.pth").checkpoint.tensors["model.weight"].chunks
    data[chunk.start] ^= 1  # only its checksum tells
    (folder / "iter_1.pth").write_bytes(data)
    os.utime(folder / "iter_1.pth", (10_000, 10_000))
    (folder / "weights-of-iter_3").mkdir()
    (folder / "weights-of-iter_3" / "mine").write_text("mine")
    ran = run("prune", folder, "--keep-last", 1, "--slim", "-y")
    assert ran.code == 1 and "error[checksum]" in ran.err, (ran.out, ran.err)
    assert {"iter_1.pth", "iter_2.pth", "iter_3.pth", "iter_9.pth", "iter_12.pth"} <= left(folder)
    assert "its weights cannot be kept" in ran.out


@pytest.mark.parametrize("other", ["fewer", "another training"])
def test_what_is_named_like_the_weights_and_holds_others_keeps_the_checkpoint(
    tmp_path: Path, other: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(TRAINER, folder)
    copy, old = folder / "weights-of-checkpoint-2", folder / "checkpoint-2"
    if other == "fewer":
        assert run("extract", old, "--include", "lm_head*", "-q").code == 0
    else:
        assert run("extract", folder / "checkpoint-4", copy, "-q").code == 0
    assert run("verify", copy).code == 0
    ran = run("prune", folder, "--keep-last", 1, "--slim", "-y")
    assert ran.code == 0 and "its weights cannot be kept" in ran.out, ran.out
    assert old.is_dir()
    shutil.rmtree(copy)
    assert run("extract", old, "-q").code == 0  # the whole: as an interrupted prune leaves it
    assert run("prune", folder, "--keep-last", 1, "--slim", "-y").code == 0
    assert not old.exists() and run("verify", copy).code == 0


def test_slim_killed_at_any_moment_loses_no_weights(tmp_path: Path) -> None:
    """A child is killed right before its n-th rename or deletion, for every n; then it goes on."""
    killed = n = 0
    while True:
        folder = make(tmp_path / str(n), 1, 2, 12, 9)
        expected = {step: weights_of(folder / f"iter_{step}.pth") for step in (1, 2)}
        child = os.fork()
        if not child:
            _die_at(n)
            ckpttools.prune(folder, keep_last=1, slim=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for step, weights in expected.items():
            whole = [
                p for p in (folder / f"iter_{step}.pth", folder / f"weights-of-iter_{step}") if p.exists()
            ]
            assert whole and all(weights_of(path) == weights for path in whole), (n, step)
        ckpttools.prune(folder, keep_last=1, slim=True)
        assert {name for name in left(folder) if "tmp" not in name} == {
            "iter_9.pth", "iter_12.pth", "weights-of-iter_1", "weights-of-iter_2",
        }, n  # fmt: skip
        if os.WIFEXITED(status):
            break
        killed, n = killed + 1, n + 1
    assert killed > 4


# --- pins ---------------------------------------------------------------------------------------------


def test_a_pin_keeps_and_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    folder = Folder(tuple(One("", "hf", step) for step in (2, 4, 6))).make(tmp_path)
    pinned = folder / "checkpoint-2"
    assert run("verify", pinned, "--write-manifest").code == 0
    ran = run("pin", pinned, "-m", "the paper\x1b[31m")
    assert ran.code == 0 and "\x1b" not in ran.err
    (place,) = folder.glob(".ckpt-pin-*")
    said = json.loads(place.read_text())
    assert said["reason"].startswith("the paper") and said["when"] and said["name"] == "checkpoint-2"
    assert run("verify", pinned).code == 0
    assert run("prune", folder, "--keep-last", 1, "-y").code == 0
    assert {"checkpoint-2", "checkpoint-6"} == left(folder) - {place.name}
    assert "pinned" in run("ls", folder).out and "\x1b" not in run("ls", folder).out
    assert run("unpin", pinned).code == 0 and not place.exists()
    assert run("unpin", pinned).code == 2
    assert run("prune", folder, "--keep-last", 1, "-y").code == 0 and left(folder) == {"checkpoint-6"}
    assert run("pin", folder / "nothing").code == 2


def test_no_framework_takes_a_pin_for_its_own(tmp_path: Path) -> None:
    for theirs in ("ckpt", "checkpoints"):
        path = tmp_path / theirs / "checkpoint_3"
        assert pins.place(path).parent == tmp_path
    utils = pytest.importorskip("transformers.trainer_utils")
    folder = tmp_path / "out"
    shutil.copytree(TRAINER, folder)
    ckpttools.pin(folder / "checkpoint-2")
    assert utils.get_last_checkpoint(str(folder)) == str(folder / "checkpoint-4")
    assert len(utils.sort_checkpoints(output_dir=str(folder))) == 2
    assert all(siblings.is_ours(name) for name in left(folder) if name.startswith("."))


def test_a_pin_on_a_run_keeps_all_of_it(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, 2, 12)
    pins.place(folder).write_text("damaged")
    assert not ckpttools.prune(tmp_path, keep_last=1).removed
    assert not ckpttools.prune(folder, keep_last=1).removed


@pytest.mark.parametrize("pinned", ["it", "its folder", "something in it"])
def test_nothing_that_is_pinned_is_replaced(tmp_path: Path, pinned: str) -> None:
    folder = Folder(tuple(One("", "hf", step) for step in (2, 4))).make(tmp_path)
    dst = folder / "checkpoint-2"
    kept = {"it": dst, "its folder": folder, "something in it": dst / "model.safetensors"}[pinned]
    pins.place(kept).write_text("{}")
    before = snapshot(folder)
    for options in (["--force"], ["--force", "-q"], ["--force", "--dry-run"]):
        ran = run("extract", FIXTURES / "trainer" / "z2_bf16_2", dst, *options)
        assert ran.code == 2 and "error[pinned]" in ran.err and "ckpt unpin" in ran.err, (ran.out, ran.err)
    assert snapshot(folder) == before
    pins.place(kept).unlink()
    assert run("extract", FIXTURES / "trainer" / "z2_bf16_2", dst, "--force", "-q").code == 0


def test_what_may_not_be_read_is_not_damaged(tmp_path: Path) -> None:
    """A layout that is checked in parts, one of them not readable for now. Root may read everything."""
    made = FIXTURES / "deepspeed-0.19.8"
    for step, name in ((10, "pp_ws2"), (20, "z1_bf16_ws2"), (30, "z1_bf16_ws2")):
        shutil.copytree(made / name / "global_step3", tmp_path / f"global_step{step}")
        for path in (tmp_path / f"global_step{step}").iterdir():
            os.utime(path, (1e9 + step, 1e9 + step))
    first = ckpttools.prune(tmp_path, keep_last=1, dry_run=True)  # root imports what others may not
    (tmp_path / "global_step10/layer_02-model_states.pt").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp") and folder.owner() == tmp_path.owner():
            folder.chmod(0o755)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        plan = ckpttools.prune(tmp_path, keep_last=1, dry_run=True)
    finally:
        os.seteuid(user)
    assert [e.path.name for e in first.removed] == ["global_step20"] == [e.path.name for e in plan.removed]
