"""Will a checkpoint resume under the settings of a new run, and where would it go on?

    Subject.find(path)       what a path means, and what lies there
    foretell(subject, run)   the Forecast: read headers, launch nothing

`engine` reads what a DeepSpeed loader looks at, `rules`, `schedule`, `models` and `optimizers` say what
it does with that under other settings, `rates` the learning rates, `plain` the other containers, `auto`
which checkpoint each framework would take in a folder.
"""

from __future__ import annotations

from ckpttools.resume.report import Forecast
from ckpttools.resume.run import NewRun, read_config
from ckpttools.resume.shapes import read_model
from ckpttools.resume.subject import Subject, foretell, unreadable, with_verdict

__all__ = [
    "Forecast",
    "NewRun",
    "Subject",
    "foretell",
    "read_config",
    "read_model",
    "unreadable",
    "with_verdict",
]
