"""Which of how many workers this process is: as the launcher that started it says in the environment.

torchrun         RANK, WORLD_SIZE
srun             SLURM_PROCID, SLURM_NTASKS (of a step with several tasks)
sbatch --array   SLURM_ARRAY_TASK_ID, _MIN, _COUNT; its tasks need not run at the same time
mpirun           OMPI_COMM_WORLD_RANK and _SIZE, or PMI_RANK and PMI_SIZE
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.errors import UsageError


class Worker(Struct, frozen=True):
    """Worker `rank` of `world`. `waits`: the others run at the same time, so that it can wait for them.

    `job` is the same for all workers of one launch and for no other launch; "" where the launcher names none.
    """

    rank: int
    world: int
    waits: bool = True
    job: str = ""


_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def worker(environment: Mapping[str, str] = os.environ) -> Worker:
    """This process. Raises UsageError where no launcher started it, or what it says makes no sense."""
    found = []
    for rank, world in _VARIABLES:
        if rank in environment and world in environment:
            found.append(_worker(environment, rank, world))
    for each in found:
        if each.world > 1:
            return each
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        return _of_array(environment)
    if found:
        return found[0]
    raise UsageError(
        "no-launcher",
        "--spread shares the work between processes that a launcher starts; none started this one",
        why="alone it would wait for the others, or do the work of all of them",
        hint="torchrun --no-python --nproc-per-node 2 ckpt ..., or srun ckpt ...; or leave out --spread",
    )


def _worker(environment: Mapping[str, str], rank: str, world: str) -> Worker:
    found = _checked(rank, _number(environment, rank), _number(environment, world))
    return replace(found, job=_job(environment))


def _job(environment: Mapping[str, str]) -> str:
    if environment.get("TORCHELASTIC_RUN_ID", "none") != "none":
        names: tuple[str, ...] = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    elif "SLURM_JOB_ID" in environment:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    else:
        return ""
    return "-".join(environment.get(name, "0") for name in names)


def _of_array(environment: Mapping[str, str]) -> Worker:
    first = _number(environment, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    at = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
    found = _checked("SLURM_ARRAY_TASK_ID", at, _number(environment, "SLURM_ARRAY_TASK_COUNT"))
    return replace(found, waits=False)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UsageError(
            "no-launcher", f"{name} is not a number", hint="start ckpt with torchrun or srun"
        ) from None


def _checked(name: str, rank: int, world: int) -> Worker:
    if not 0 <= rank < world <= 65536:
        raise UsageError(
            "no-launcher",
            f"{name} says worker {rank} of {world}",
            why="ranks are 0 to one less than the number of workers, which is at most 65,536",
            hint="start ckpt with torchrun or srun",
        )
    return Worker(rank, world)
