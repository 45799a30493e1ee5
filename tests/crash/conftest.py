"""Shows the table of kills after the tests."""

from __future__ import annotations

import sys
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    core = sys.modules.get("crash.core")  # not imported where nothing was killed
    if core is not None and core.TALLIES:
        terminalreporter.section("kills")
        terminalreporter.write_line(core.table(core.TALLIES))
