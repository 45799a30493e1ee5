"""The verdict on a name: what calling it, or importing and holding it, can do. Nothing is looked up."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import lru_cache

from ckpttools.containers.pickles.known import (
    BY_ARGUMENTS,
    INERT,
    KNOWN,
    KNOWN_PATTERN,
    RENAMED,
    RUNNER_MODULES,
    RUNNERS,
    RUNNING,
    SPECIAL,
    STDLIB,
    STRICT,
)
from ckpttools.containers.pickles.nodes import Dict, Global, Node, Object
from ckpttools.errors import escape

# their anneal_func is a static method, which protocol 2 pickles as getattr(class, name): torch's up to 2.1
ONE_CYCLE = (
    "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler",
    "torch.optim.lr_scheduler.OneCycleLR",
)
STORAGE = "torch.storage._load_from_bytes"  # unpickles what it is given


class Verdict(StrEnum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    DANGEROUS = "dangerous"


def name_of(node: Node) -> str:
    """A callable's name, as Python 3 spells it, escaped."""
    if isinstance(node, Global):
        return _spelled(node.module, node.name)
    if isinstance(node, Object) and isinstance(node.cls, Global):
        return f"the result of {name_of(node.cls)}"
    return "something computed" if isinstance(node, Object) else "something that is no function"


@lru_cache(maxsize=1024)  # a checkpoint calls few functions, some a hundred thousand times
def _spelled(module: str, name: str) -> str:
    return escape(f"{RENAMED.get(module, module)}.{name}", 120)


def is_known(name: str) -> bool:
    return name in KNOWN or name in BY_ARGUMENTS or KNOWN_PATTERN.fullmatch(name) is not None


def _judge_name(name: str, *, held: bool = False) -> Verdict:
    """The verdict on a callable by its name alone; `held`: it is not called."""
    module, _, last = name.rpartition(".")
    root = name.partition(".")[0]
    if is_known(name):
        return Verdict.KNOWN
    if held and module in INERT and last not in RUNNING:
        return Verdict.KNOWN
    if root in STDLIB or root in RUNNERS or last in RUNNING:
        return Verdict.DANGEROUS
    if any(name == m or name.startswith(m + ".") for m in RUNNER_MODULES):
        return Verdict.DANGEROUS
    if root in STRICT and not held and not last.lstrip("_")[:1].isupper():
        return Verdict.DANGEROUS
    if "__main__" in module.split(".")[1:]:
        return Verdict.DANGEROUS  # a program: importing it is running it
    if re.search(r"(?:^|\.)(?:os|sys|subprocess|builtins|posix|pty|shutil|runpy|pickle)$", module):
        return Verdict.DANGEROUS  # a module that some library imports for itself
    return Verdict.KNOWN if held and root in STRICT else Verdict.UNKNOWN


def judge_global(node: Global) -> Verdict:
    """The verdict on a name that is called."""
    name = name_of(node)
    if name in ("builtins.getattr", "builtins.type", "builtins.iter", STORAGE):
        return Verdict.DANGEROUS  # as somebody's argument: what it does depends on what it is given
    return Verdict.DANGEROUS if _reaches_through(node) else _judge_name(name)


def judge_held(node: Global) -> Verdict:
    """The verdict on a name that is looked up and not called."""
    if name_of(node) in ONE_CYCLE:
        return Verdict.KNOWN
    return Verdict.DANGEROUS if _reaches_through(node) else _judge_name(name_of(node), held=True)


def _reaches_through(node: Global) -> bool:
    # a dotted name reaches through what a module holds: `torch.serialization` `os.system`
    return any(part in STDLIB or part.startswith("__") for part in node.name.split(".")[:-1])


def special(state: Node) -> bool:
    """Whether a state sets what Python itself looks up, such as `__class__`."""
    parts = state if isinstance(state, tuple) else (state,)
    for part in parts[:4]:
        for key, _ in part.pairs if isinstance(part, Dict) else ():
            if isinstance(key, str) and key in SPECIAL:
                return True
    return False
