"""For all tests: computing on the CPU, the shared module `support`, and what `heavy` means."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# before anything imports deepspeed or torch
for name, value in {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).parent))
# the same examples in every run: new ones are for the heavy tests and the fuzzer to find
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def no_save_is_going_on() -> None:
    """What tests damage was written a moment ago: verify would wait whether it is still being written."""
    from ckpttools.checks import changing

    changing.PAUSE = 0.0


SHARED_MEMORY = Path("/dev/shm")  # where DeepSpeed's ranks on one machine exchange gradients: 67 MB each


@pytest.fixture(scope="session", autouse=True)
def shared_memory() -> Iterator[None]:
    """Remove what ranks that were killed left: of this user, of this run, and not in use by anybody."""
    before = set(SHARED_MEMORY.glob("deepspeed_allreduce_buffer_*"))
    yield
    left = set(SHARED_MEMORY.glob("deepspeed_allreduce_buffer_*")) - before
    if left and (used := _mapped()) is not None:
        for path in left:
            with contextlib.suppress(OSError):  # another user's
                if str(path) not in used:
                    path.unlink()


def _mapped() -> str | None:
    """The memory maps of all processes that can be seen; None where they cannot be read."""
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            maps.append(path.read_text(errors="replace"))
    return "".join(maps) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long sweeps unless the -m expression names them. The files that start ranks come first:
    they are the long ones, and what comes last should keep all workers busy to the end.
    """
    heavy = [item for item in items if item.get_closest_marker("heavy")]
    if heavy and "heavy" not in (config.getoption("markexpr") or ""):
        config.hook.pytest_deselected(items=heavy)
        items[:] = [item for item in items if not item.get_closest_marker("heavy")]
    long = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in long)
