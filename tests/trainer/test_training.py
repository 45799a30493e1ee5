"""Real DeepSpeed on two CPU ranks: what is learned, what is saved, and that resuming changes nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from trainer.launched import CKPT, Launch, losses, records

pytestmark = pytest.mark.distributed


def load(tag: Path, name: str = "mp_rank_00_model_states.pt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(tag / name, weights_only=False)
    return content


def test_learns_and_saves_both_kinds_side_by_side(whole: Path) -> None:
    lines = (whole.parent / "said").read_text().splitlines()
    assert len([line for line in lines if line.startswith("step ")]) == 22
    assert len(lines) < 35, "the console shows more than the trainer's own lines"
    by_step = losses(whole)
    assert list(by_step) == list(range(1, 23))
    assert by_step[22][0] < by_step[1][0] - 1.5
    tags = {p.name for p in whole.glob("*.pth")}
    assert tags == {f"iter_{i:06d}.pth" for i in (6, 12, 18)} | {"epoch_001.pth", "epoch_002.pth"}
    assert (whole / "last_checkpoint").read_text() == (whole / "latest").read_text() == "epoch_002.pth"
    assert {p.name for p in (whole / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert not list(whole.glob(".last_checkpoint*"))


def test_what_a_checkpoint_says(whole: Path) -> None:
    epoch, step = load(whole / "epoch_001.pth"), load(whole / "iter_000012.pth")
    keys = ("epoch", "iter", "global_steps", "samples_seen", "samples_in_epoch", "dataset_size")
    assert [epoch[k] for k in keys] == [1, 11, 11, 176, 0, 179]
    assert [step[k] for k in keys] == [1, 12, 12, 192, 16, 179]
    assert epoch["train_loss"] == losses(whole)[11][0]
    assert [epoch["val_loss"]] == [
        r["val_loss"] for r in records(whole) if r.get("val_loss") and r["step"] == 11
    ]
    assert step["val_loss"] is None
    assert step["config"]["batch"]["micro_batch_size"] == 4
    optimizer = load(whole / "iter_000012.pth", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    groups = optimizer["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_interrupted_twice_and_resumed_is_the_same_run(whole: Path, launch: Launch, tmp_path: Path) -> None:
    nothing = launch.tried(tmp_path, "--resume", "--max-steps", 8)  # stops in the middle of an epoch
    assert "No checkpoint found under work_dirs/tiny: starting from step 0" in nothing.stdout
    (run,) = (tmp_path / "work_dirs/tiny").iterdir()
    assert (run / "last_checkpoint").read_text() == "iter_000008.pth"
    middle = launch.tried(tmp_path, "--resume", "--max-steps", 11)  # stops at the end of one
    name = run.relative_to(tmp_path)
    assert f"Auto resumed from the latest checkpoint {name}/iter_000008.pth" in middle.stdout
    end = launch.tried(tmp_path, "--resume")
    assert f"Auto resumed from the latest checkpoint {name}/epoch_001.pth" in end.stdout
    assert list((tmp_path / "work_dirs/tiny").iterdir()) == [run]

    assert losses(run) == losses(whole)  # loss, learning rate and gradient norm, to the last bit
    assert [r["val_loss"] for r in records(run) if "val_loss" in r] == [
        r["val_loss"] for r in records(whole) if "val_loss" in r
    ]
    for file in (whole / "epoch_002.pth").iterdir():
        assert same(load(run / "epoch_002.pth", file.name), load(file.parent, file.name))


def same(a: Any, b: Any) -> bool:
    """Equal values, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "loss_scaler")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_weights_only_on_another_number_of_ranks(whole: Path, launch: Launch, tmp_path: Path) -> None:
    source = whole / "iter_000018.pth"
    done = launch.tried(tmp_path, "--resume-from", source, "--work-dir", "new", "--max-steps", 1, nproc=1)
    assert done.returncode == 0, done.stderr
    assert f"Weights loaded from {source}; optimizer, schedule and counters start anew" in done.stdout
    (step,) = losses(tmp_path / "new")
    assert step == 1
    loss, lr, _ = losses(tmp_path / "new")[1]
    assert loss < losses(whole)[1][0] - 1.0  # the same samples as step 1 there, with trained weights
    assert lr == 0.0
    saved = load(tmp_path / "new/iter_000001.pth")
    assert (saved["iter"], saved["global_steps"], saved["samples_seen"]) == (1, 1, 16)
    # At lr 0 the masters that were rebuilt from the 16-bit weights give back the same weights.
    assert same(saved["module"], load(source)["module"])


def test_other_rank_count_is_refused_with_the_command_that_helps(whole: Path, launch: Launch) -> None:
    source = whole / "iter_000006.pth"
    refused = launch.tried(whole, "--resume", "--resume-from", source, nproc=4)
    assert refused.returncode == 2
    lines = refused.stderr.splitlines()
    assert lines[0] == "error[world-size]: saved by 2 ranks, this run has 4"
    assert lines[1] == f"  in {source}"
    assert lines[-1] == f"hint: ckpt reshard {source} --world-size 4"
    assert len(lines) == 4


def test_variants_for_fixtures_and_no_compiler(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """DeepSpeed's own all-reduce wants one, and a build folder without spaces: gloo takes its place."""
    without = {"CXX": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "with a space")}
    settings = {
        "model.family": "gpt2",
        "model.tie_embeddings": "true",
        "freeze": "[transformer.h.0.mlp.*]",
        "precision": "fp32",
        "schedule.kind": "linear",
        "zero.round_robin_gradients": "true",
        "deepspeed": "{zero_optimization: {overlap_comm: false}}",
        "save.save_steps": "1",
    }
    options = ["--work-dir=run", "--max-steps=1", *(f"--set={k}={v}" for k, v in settings.items())]
    said = Launch(config, environment | without).train(tmp_path, *options)
    assert "done at step 1" in said
    tag = tmp_path / "run/iter_000001.pth"
    names = sorted(p.name for p in tag.iterdir())
    shards = [f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)]
    assert names == ["mp_rank_00_model_states.pt", *shards]
    saved = load(tag)
    assert saved["shared_params"] == {"lm_head.weight": "transformer.wte.weight"}
    assert "transformer.h.0.mlp.c_fc.weight" in saved["frozen_param_shapes"]
    assert len(saved["param_shapes"]) == 2
    assert saved["ds_config"]["zero_optimization"]["round_robin_gradients"] is True
    assert saved["ds_config"]["zero_optimization"]["overlap_comm"] is False
    assert saved["ds_config"]["scheduler"]["type"] == "WarmupDecayLR"


def test_a_damaged_newest_checkpoint_is_passed_over(whole: Path, launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shard = run / "epoch_002.pth/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:-2000])
    done = launch.tried(tmp_path, "--work-dir", "run", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[1].startswith("Searched run: 5 checkpoints, newest first: epoch_002.pth, iter_000018.pth")
    assert said[2].startswith(f"Passed over run/epoch_002.pth: {shard.name}: ")
    assert said[3] == "Auto resumed from the latest checkpoint of those that verify run/iter_000018.pth"
    assert said[1:4] == [
        line for line in (run / "logs/rank_0.log").read_text().splitlines() if line in said[1:4]
    ]
    assert losses(run) == losses(whole)  # steps 19 to 22 once more, to the last bit
    assert (run / "last_checkpoint").read_text() == "epoch_002.pth"

    again = launch.tried(tmp_path, "--work-dir", "run", "--resume")
    assert again.returncode == 0, again.stderr
    last = again.stdout.splitlines()[-1]
    assert last == "Nothing to train: run/epoch_002.pth is at epoch 2 of 2; --set=epochs=N trains longer"
    assert not [line for line in again.stdout.splitlines() if line.startswith(("step ", "done "))]


def test_a_failure_inside_a_rank_is_one_clear_message(whole: Path, launch: Launch, tmp_path: Path) -> None:
    tag = tmp_path / "iter_000006.pth"
    shutil.copytree(whole / tag.name, tag)
    file = tag / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["seed"] += 1  # only the ranks see that the order of samples would be another
    torch.save(content, file)
    failed = launch.tried(tmp_path, "--resume", "--resume-from", tag, "--work-dir", "run")
    assert failed.returncode == 1
    lines = failed.stderr.splitlines()
    assert lines[0].startswith("error[data-changed]: ")
    assert lines[1] == f"  in {tag}"
    assert "Traceback" not in failed.stdout + failed.stderr
    logs = (tmp_path / "run/logs").glob("rank_*.log")  # the first rank to fail ends the others
    assert any("Traceback" in log.read_text() for log in logs)


def test_interrupt_ends_every_rank(config: Path, environment: dict[str, str], tmp_path: Path) -> None:
    command = [*CKPT, "train", str(config), "--nproc=2", "--set=epochs=1000", "--set=save.save_steps=0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        next(line for line in process.stdout if line.startswith("step "))
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 3  # torchrun and two ranks
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 130
    psutil.wait_procs(ranks)  # returns when they have ended


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--set=zero.stage=7", "error[train-config]: zero.stage: expected 0, 1, 2 or 3, got 7"),
        ("--work-dir={whole}", "error[run-exists]: the run folder already holds 5 checkpoints"),
    ],
)
def test_under_torchrun_an_error_shows_once(
    whole: Path, config: Path, environment: dict[str, str], option: str, message: str
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "ckpttools.trainer", str(config), option.format(whole=whole)]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    assert failed.stdout.count(message) == 1
    assert "Traceback" not in failed.stdout
