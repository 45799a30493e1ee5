"""For all tests: computing on the CPU, the shared module `support`, and what `heavy` means."""

from __future__ import annotations

import os
import sys
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long sweeps unless the -m expression names them."""
    if "heavy" in (config.getoption("markexpr") or ""):
        return
    heavy = [item for item in items if item.get_closest_marker("heavy")]
    if heavy:
        config.hook.pytest_deselected(items=heavy)
        items[:] = [item for item in items if not item.get_closest_marker("heavy")]
