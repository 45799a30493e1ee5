"""Shows the table of faults after the tests."""

from __future__ import annotations

import sys
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    core = sys.modules.get("faults.core")  # not imported where no fault was tested
    if core is not None and core.TRIED:
        terminalreporter.section("faults")
        terminalreporter.write_line(core.table(core.TRIED))
