"""Which checkpoint a path means: every layout of the fixtures, and every way in which a path misleads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import FIXTURES, REFUSED_SAMPLES, ZERO3_SAMPLES, ZERO_FIXTURES, name_of, resharded

from ckpttools.checks import verify
from ckpttools.errors import CkptError, Unsupported, UsageError
from ckpttools.formats import locate, open_checkpoint
from ckpttools.formats.locate import Several
from ckpttools.operations.source import find
from ckpttools.runs import newest
from ckpttools.stores.links import followed

ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
LIGHTNING = "epoch=0-step=3.ckpt"

# path -> format, the target below the root
FOUND: dict[str, tuple[str, str]] = {
    "deepspeed-0.19.8/z2_bf16_ws2": ("zero", "global_step3"),
    "deepspeed-0.19.8/z2_bf16_ws2/global_step3": ("zero", ""),
    "trainer/z2_bf16_2": ("zero", "iter_000003.pth"),
    "trainer/z2_bf16_2/iter_000003.pth": ("zero", ""),
    "hf-trainer/deepspeed/checkpoint-4": ("zero", "global_step4"),
    f"lightning/deepspeed/{LIGHTNING}": ("zero", "checkpoint"),
    "accelerate/deepspeed": ("zero", "pytorch_model"),
    "bundle/checkpoint-200": ("zero", "deepspeed/global_step3"),
    "bundle/checkpoint-200/deepspeed": ("zero", "global_step3"),
    "bundle/checkpoint-200/hf_model": ("hf", ""),
    "mmengine/run/iter_1500.pth": ("zero", ""),
    "hf/single": ("hf", ""),
    "hf/sharded": ("hf", ""),
    "hf/bin": ("hf", ""),
    "hf/bin_sharded": ("hf", ""),
    "hf/gpt2_tied": ("hf", ""),
    "hf/peft": ("hf", ""),
    "hf/single/model.safetensors": ("hf", ""),
    "hf-trainer/plain/checkpoint-2": ("hf", ""),
    "accelerate/plain": ("hf", ""),
    "monolithic/full/epoch_2_step_40.pt": ("pt", ""),
    "monolithic/legacy/weights.pth": ("pt", ""),
    "monolithic/timm/checkpoint-5.pth.tar": ("pt", ""),
    f"lightning/file/{LIGHTNING}": ("pt", ""),
    "hf/bin/pytorch_model.bin": ("pt", ""),
}


@pytest.mark.parametrize("path", FOUND)
def test_every_layout_is_found(path: str) -> None:
    source = locate(FIXTURES / path)
    assert (source.format.name, source.inner) == FOUND[path]
    assert source.root == FIXTURES / path
    assert source.how


@pytest.mark.parametrize("path", [*ZERO_FIXTURES, *ZERO3_SAMPLES, *REFUSED_SAMPLES], ids=name_of)
def test_every_deepspeed_fixture_is_found(path: Path) -> None:
    source = locate(path)
    ranked = list(source.target.glob("zero_pp_rank_*_model_states.pt"))  # a model file of each rank: stage 3
    assert source.format.name == ("zero3" if ranked else "zero")
    assert list(source.target.glob("*_model_states.pt"))


def test_an_index_stands_for_its_folder() -> None:
    source = locate(FIXTURES / "hf/sharded/model.safetensors.index.json")
    assert (source.format.name, source.target) == ("hf", FIXTURES / "hf/sharded")


def test_a_run_folder_with_one_checkpoint() -> None:
    source = locate(FIXTURES / "mmengine/run")
    assert source.target == FIXTURES / "mmengine/run/iter_1500.pth"
    assert "the only checkpoint in" in source.how


def test_all_frameworks_layouts_are_read() -> None:
    for path in FOUND:
        assert open_checkpoint(FIXTURES / path).tensors


def test_a_tag_with_folders_in_its_name(tmp_path: Path) -> None:
    """DeepSpeed joins the paths: it saves and loads `epoch_1/step 3`."""
    shutil.copytree(ZERO / "global_step3", tmp_path / "epoch_1/step 3")
    for name in (
        "epoch_1/step 3",
        "epoch_1/step 4",
        "epoch_1/../epoch_1/step 3",
        "epoch_1//step 3",
        "/epoch_1",
    ):
        (tmp_path / "latest").write_text(name)
        if name == "epoch_1/step 3":
            assert locate(tmp_path).target == tmp_path / name
            assert open_checkpoint(tmp_path).layout.tag == "step 3"
            assert newest(tmp_path).path == tmp_path / name
            assert [f.id for f in verify(tmp_path).findings if f.severity != "info"] == []
            continue
        with pytest.raises(CkptError) as refused:
            locate(tmp_path)
        assert refused.value.id == ("latest-dangling" if name.endswith("4") else "name-unsafe")


def test_a_tag_that_is_asked_for(tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "run")
    shutil.copytree(ZERO / "global_step3", tmp_path / "run/global_step2")
    assert locate(tmp_path / "run").target.name == "global_step3"
    source = locate(tmp_path / "run", "global_step2")
    assert (source.target, source.root) == (tmp_path / "run/global_step2", tmp_path / "run")


# --- several ------------------------------------------------------------------------------------------


def refused(path: Path, tag: str | None = None) -> CkptError:
    with pytest.raises(CkptError) as caught:
        open_checkpoint(path, tag)
    error = caught.value
    assert error.id and error.message and error.where
    return error


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("hf-trainer/deepspeed", ["checkpoint-4", "checkpoint-2"]),
        ("hf-trainer/plain", ["checkpoint-4", "checkpoint-2"]),
        ("monolithic/run", ["epoch_10_step_200.pt", "epoch_9_step_180.pt"]),
    ],
)
def test_a_run_folder_is_refused_with_its_list(path: str, names: list[str]) -> None:
    error = refused(FIXTURES / path)
    assert error.id == "several-checkpoints"
    assert isinstance(error, UsageError)
    shown = [line.strip() for line in error.why.splitlines()[1:]]
    assert shown == names  # the newest number first: epoch 10 before epoch 9
    with pytest.raises(Several) as caught:
        find(FIXTURES / path)
    assert f"the newest is {FIXTURES / path / names[0]}" in caught.value.hint
    assert [line.split()[0] for line in caught.value.why.splitlines()[1:]] == names


def test_a_folder_named_deepspeed_makes_no_bundle() -> None:
    error = refused(FIXTURES / "hf-trainer")  # runs of a Trainer: deepspeed/, plain/ and others
    assert error.id == "not-a-checkpoint"
    with pytest.raises(Several) as caught:
        find(FIXTURES / "hf-trainer")
    runs = {found.parent.name for found in caught.value.found}
    assert {"deepspeed", "plain"} <= runs
    with pytest.raises(Several) as caught:  # deepspeed/ is a checkpoint itself, and one of two
        find(FIXTURES / "accelerate")
    assert [found.name for found in caught.value.found] == ["plain", "deepspeed"]


def test_tag_folders_without_latest(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        shutil.copytree(ZERO / "global_step3", tmp_path / f"run/global_step{step}")
    error = refused(tmp_path / "run")
    assert error.id == "several-checkpoints"
    assert [line.strip() for line in error.why.splitlines()[1:]] == [f"global_step{n}" for n in (100, 20, 3)]


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for step in range(25):
        shutil.copy(FIXTURES / "monolithic/bare/model.pth", tmp_path / f"step_{step}.pth")
    error = refused(tmp_path)
    assert "the folder holds 25 checkpoints" in error.message
    assert "and 15 more" in error.why and "step_24.pth" in error.why and "step_3.pth" not in error.why


def test_side_files_are_no_checkpoints(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "monolithic/bare/model.pth", tmp_path / "last.pth")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        shutil.copy(FIXTURES / "monolithic/full/epoch_2_step_40.pt", tmp_path / name)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "log.txt").write_text("text")
    assert locate(tmp_path).target == tmp_path / "last.pth"


def test_names_from_a_folder_are_safe_to_print(tmp_path: Path) -> None:
    for name in ("a\x1b[31m.pt", "b\n.pt"):
        shutil.copy(FIXTURES / "monolithic/bare/model.pth", tmp_path / name)
    error = refused(tmp_path)
    assert "\x1b" not in error.why and "\\x1b[31m.pt" in error.why and "b\\n.pt" in error.why


# --- links --------------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(ZERO)
    assert locate(tmp_path / "run").target == tmp_path / "run/global_step3"
    (tmp_path / "last.pt").symlink_to(FIXTURES / "monolithic/full/epoch_2_step_40.pt")
    assert open_checkpoint(tmp_path / "last.pt").training.step == 40
    (tmp_path / "model").mkdir()
    for file in (FIXTURES / "hf/sharded").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    assert refused(tmp_path / "model").id == "link-outside"
    with followed():
        assert open_checkpoint(tmp_path / "model").tensors.keys() == (
            open_checkpoint(FIXTURES / "hf/sharded").tensors.keys()
        )


def test_shards_may_be_links(tmp_path: Path) -> None:
    tag = tmp_path / "save/global_step3"
    tag.mkdir(parents=True)
    for file in (ZERO / "global_step3").iterdir():
        (tag / file.name).symlink_to(file)
    (tmp_path / "save/latest").write_text("global_step3")
    with followed():
        made = resharded(tmp_path / "save", 3, tmp_path / "out")
    assert all(not p.is_symlink() for p in made.rglob("*"))


def test_a_tag_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "save/newest").symlink_to(ZERO / "global_step3")
    (tmp_path / "save/latest").write_text("newest")
    assert refused(tmp_path / "save").id == "link-outside"
    with followed():
        assert open_checkpoint(tmp_path / "save").layout.dp_degree == 2
    shutil.copytree(ZERO / "global_step3", tmp_path / "save/global_step3")
    (tmp_path / "save/newest").unlink()
    (tmp_path / "save/newest").symlink_to("global_step3")
    assert open_checkpoint(tmp_path / "save").layout.dp_degree == 2


def test_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "last.pt").symlink_to(tmp_path / "gone.pt")
    error = refused(tmp_path / "last.pt")
    assert error.id == "not-found" and "leads nowhere" in error.message


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refused(tmp_path / "loop").id == "not-found"


def test_a_dangling_shard(tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "save")
    shard = tmp_path / "save/global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.unlink()
    shard.symlink_to("gone")
    assert refused(tmp_path / "save").id == "not-found"


# --- not a checkpoint ---------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 123456\n"


def text(path: Path) -> None:
    path.write_text("not a checkpoint, just a text\n" * 20)


def folder(path: Path) -> None:
    path.mkdir()


def folder_of_text(path: Path) -> None:
    path.mkdir()
    text(path / "notes.txt")


def lfs_pointer(path: Path) -> None:
    path.write_bytes(LFS)


def lfs_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    lfs_pointer(path / "model.safetensors")


def lfs_shard(path: Path) -> None:
    shutil.copytree(ZERO, path)
    lfs_pointer(path / "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")


def empty_file(path: Path) -> None:
    path.touch()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def pipe_as_latest(path: Path) -> None:
    shutil.copytree(ZERO, path)
    (path / "latest").unlink()
    os.mkfifo(path / "latest")


def pipe_as_shard(path: Path) -> None:
    shutil.copytree(FIXTURES / "hf/single", path)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def config_alone(path: Path) -> None:
    path.mkdir()
    shutil.copy(FIXTURES / "hf/single/config.json", path)


def one_shard(path: Path) -> None:
    path.mkdir()
    shard = next((ZERO / "global_step3").glob("*optim*"))
    shutil.copy(shard, path)


def latest_names_a_file(path: Path) -> None:
    shutil.copytree(ZERO, path)
    (path / "latest").write_text("latest")


def latest_names_an_empty_folder(path: Path) -> None:
    shutil.copytree(ZERO, path)
    (path / "global_step4").mkdir()
    (path / "latest").write_text("global_step4")


def universal_checkpoint(path: Path) -> None:
    (path / "zero/a.weight").mkdir(parents=True)
    (path / "zero/a.weight/fp32.pt").touch()


def empty_bundle(path: Path) -> None:
    (path / "deepspeed").mkdir(parents=True)
    (path / "training_info.json").write_text("{}")


NOTHING: dict[str, Callable[[Path], None]] = {
    "not-a-checkpoint text": text,
    "empty-folder folder": folder,
    "not-a-checkpoint folder of text": folder_of_text,
    "lfs-pointer file": lfs_pointer,
    "lfs-pointer in a model folder": lfs_folder,
    "lfs-pointer for a shard": lfs_shard,
    "file-empty file": empty_file,
    "not-a-file pipe": pipe,
    "not-a-file pipe as latest": pipe_as_latest,
    "not-a-file pipe as weights": pipe_as_shard,
    "not-a-file device": device,
    "no-weights config alone": config_alone,
    "model-missing one shard": one_shard,
    "latest-dangling names a file": latest_names_a_file,
    "latest-dangling names an empty folder": latest_names_an_empty_folder,
    "model-missing universal": universal_checkpoint,
    "empty-folder in a bundle": empty_bundle,
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("name", ["thing", "thing.pt", "thing.safetensors"])
def test_what_is_no_checkpoint_is_told_apart(case: str, name: str, tmp_path: Path) -> None:
    expected = case.split()[0]
    NOTHING[case](tmp_path / name)
    error = refused(tmp_path / name)
    if name == "thing.safetensors" and (tmp_path / name).is_file() and expected == "not-a-checkpoint":
        assert error.id.startswith("safetensors")  # by its name it claims to be one
    else:
        assert error.id == expected
    assert str(tmp_path / name) in error.where


def test_nothing_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone").id == "not-found"
    assert refused(ZERO, "global_step9").id == "tag-missing"
    assert refused(FIXTURES / "monolithic/bare/model.pth", "tag").id == "bad-usage"


def test_one_ranks_file_is_not_a_checkpoint() -> None:
    error = refused(ZERO / "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert error.id == "one-shard" and isinstance(error, Unsupported)
    assert str(ZERO / "global_step3") in error.hint


def test_the_model_file_alone_gives_the_weights() -> None:
    path = ZERO / "global_step3/mp_rank_00_model_states.pt"
    assert open_checkpoint(path).tensors.keys() == open_checkpoint(ZERO).tensors.keys()


# --- permissions --------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Takes every permission from a path until the test is over."""
    done: list[tuple[Path, int]] = []

    def close(path: Path) -> None:
        done.append((path, path.stat().st_mode))
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")

    yield close
    for path, mode in done:
        path.chmod(mode)


def test_a_folder_that_may_not_be_listed(closed: Callable[[Path], None], tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "save")
    closed(tmp_path / "save")
    assert refused(tmp_path / "save").id == "no-permission"


@pytest.mark.parametrize("file", ["latest", "global_step3/mp_rank_00_model_states.pt"])
def test_a_file_that_may_not_be_read(closed: Callable[[Path], None], file: str, tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "save")
    closed(tmp_path / "save" / file)
    assert refused(tmp_path / "save").id == "no-permission"


def test_weights_that_may_not_be_read(closed: Callable[[Path], None], tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf/single", tmp_path / "model")
    closed(tmp_path / "model/model.safetensors")
    assert refused(tmp_path / "model").id == "no-permission"


def test_a_parent_that_may_not_be_entered(closed: Callable[[Path], None], tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "parent/save")
    closed(tmp_path / "parent")
    assert refused(tmp_path / "parent/save").id == "no-permission"
