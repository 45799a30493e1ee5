"""Good ZeRO folders made bad, each by one named edit. Every edit gets a copy that it may change."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ckpttools import formats
from ckpttools.tensors import ByteRange

Edit = Callable[[Path], None]
EDITS: dict[str, tuple[str, int, Edit]] = {}  # name -> (error id, exit code, edit)


def edit(error: str, code: int = 1) -> Callable[[Edit], Edit]:
    def register(function: Edit) -> Edit:
        EDITS[function.__name__] = (error, code, function)
        return function

    return register


def tag(folder: Path) -> Path:
    return folder / (folder / "latest").read_text()


def shard(folder: Path, rank: int) -> Path:
    return tag(folder) / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model(folder: Path) -> Path:
    return tag(folder) / "mp_rank_00_model_states.pt"


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


@edit("shard-missing")
def rank_file_missing(folder: Path) -> None:
    shard(folder, 1).unlink()


@edit("model-missing")
def model_file_missing(folder: Path) -> None:
    model(folder).unlink()


@edit("file-truncated")
def rank_file_truncated(folder: Path) -> None:
    os.truncate(shard(folder, 1), shard(folder, 1).stat().st_size // 2)


@edit("file-empty")
def rank_file_of_zero_bytes(folder: Path) -> None:
    shard(folder, 0).write_bytes(b"")


@edit("checksum")
def bit_flipped_in_a_weight(folder: Path) -> None:
    master = formats.open_checkpoint(folder).groups[1].state["fp32"]["ln_f.bias"]
    (chunk,) = master.chunks
    assert isinstance(chunk, ByteRange)
    flip(chunk.path, chunk.start + 3)


@edit("file-renamed")
def two_ranks_swapped(folder: Path) -> None:
    a, b, spare = shard(folder, 0), shard(folder, 1), tag(folder) / "spare"
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


@edit("file-renamed")
def one_rank_copied_over_another(folder: Path) -> None:
    shutil.copyfile(shard(folder, 0), shard(folder, 1))


@edit("shard-extra")
def stale_rank_left_over(folder: Path) -> None:
    shutil.copyfile(shard(folder, 1), shard(folder, 2))


@edit("latest-dangling")
def latest_pointing_nowhere(folder: Path) -> None:
    (folder / "latest").write_text("global_step99")


@edit("name-unsafe")
def latest_pointing_outside(folder: Path) -> None:
    (folder / "latest").write_text("../outside")


@edit("empty-folder")
def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@edit("lfs-pointer")
def git_lfs_pointer(folder: Path) -> None:
    model(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


@edit("zip-damaged")
def bytes_appended(folder: Path) -> None:
    with shard(folder, 0).open("ab") as file:
        file.write(b"tail")


@edit("not-torch")
def text_in_place_of_a_rank(folder: Path) -> None:
    shard(folder, 0).write_text("not found\n" * 20)


@edit("not-a-file")
def a_pipe_in_place_of_a_rank(folder: Path) -> None:
    shard(folder, 0).unlink()
    os.mkfifo(shard(folder, 0))


class Runs:
    """A pickle of this runs a command when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@edit("pickle-dangerous")
def pickle_that_would_run_a_command(folder: Path) -> None:
    state = torch.load(model(folder), weights_only=False)
    torch.save(state | {"surprise": Runs()}, model(folder))


@edit("bare-pickle")
def plain_pickle_in_place_of_the_model(folder: Path) -> None:
    model(folder).write_bytes(pickle.dumps({"a": Runs()}))


@edit("step-mismatch")
def shard_of_another_step(folder: Path) -> None:
    """Rank 1 as it would have been one step later: another step count, moments and weights."""
    state = torch.load(shard(folder, 1), weights_only=False)
    own = state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    own["step"] += 1
    own["exp_avg"] *= 1.01
    torch.save(state, shard(folder, 1))


def master_weight_edited(folder: Path) -> None:
    """A changed weight with right checksums: only the comparison with the model's copy can tell."""
    state = torch.load(shard(folder, 0), weights_only=False)
    state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[5] += 1.0
    torch.save(state, shard(folder, 0))


def moment_of_nan(folder: Path) -> None:
    state = torch.load(shard(folder, 0), weights_only=False)
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"][3] = float("nan")
    torch.save(state, shard(folder, 0))


# what only reading every byte can tell: found by verify, not by the header checks of the writers
VALUES: dict[str, tuple[str, Edit]] = {
    "master_weight_edited": ("master-mismatch", master_weight_edited),
    "moment_of_nan": ("nonfinite", moment_of_nan),
}
