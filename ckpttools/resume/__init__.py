"""Will a checkpoint resume under the settings of a new run, and where would it go on?

    Target.find(path)      what a path means, and what lies there
    foretell(target, run)   the Forecast: read headers, launch nothing

`deepspeed` is the loader's rules as tables, `trainers` the other containers by their frameworks' own rules,
`report` what a forecast says, `new_run` and `arguments` what somebody said of the new run, `model` and `fit`
its tensors.
"""

from __future__ import annotations

from ckpttools.resume.config_files import read_config, read_yaml
from ckpttools.resume.forecast import Forecast
from ckpttools.resume.model import read_model
from ckpttools.resume.new_run import NewRun
from ckpttools.resume.target import Target, foretell, unreadable, with_verdict

__all__ = [
    "Forecast",
    "NewRun",
    "Target",
    "foretell",
    "read_config",
    "read_model",
    "read_yaml",
    "unreadable",
    "with_verdict",
]
