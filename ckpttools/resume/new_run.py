"""The run that is to go on from the checkpoint, as far as somebody said what it will be.

Whatever is not said is taken as unchanged. A ds_config's "auto" (Hugging Face) counts as not said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpttools.containers import jsons
from ckpttools.errors import CkptError, UsageError
from ckpttools.resume.model import Model

# keys of which at least one is in every ds_config, and in no file of Hugging Face's TrainingArguments
DEEPSPEED_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "optimizer")
ARGUMENT_KEYS = ("per_device_train_batch_size", "output_dir", "num_train_epochs", "learning_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """`config` is a ds_config; `arguments` are TrainingArguments; `settings` those of `ckpt train`.

    `scheduler`, `groups`, `freeze`, `buffers`, `optimizer` and `strict` are what only the user's code says:
    the class of a scheduler passed to deepspeed.initialize ("none" for none at all), the number of
    parameter groups, patterns of names, the class of an optimizer passed, load_module_strict.
    """

    config: Mapping[str, object] | None = None
    arguments: Mapping[str, object] | None = None
    settings: Mapping[str, object] | None = None
    world_size: int | None = None
    model: Model | None = None
    scheduler: str | None = None
    optimizer: str | None = None
    groups: int | None = None
    freeze: tuple[str, ...] | None = None
    buffers: tuple[str, ...] = ()
    strict: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)  # of the installed "deepspeed", "torch"


def read_config(path: Path) -> NewRun:
    """A JSON file: a ds_config, or Hugging Face's TrainingArguments. Raises UsageError for anything else."""
    if not path.is_file():
        raise UsageError("not-found", "there is no such file", where=path, hint="check --config")
    try:
        values = jsons.read(path, allow_nan=True)
    except CkptError as error:
        raise UsageError(
            "run-config",
            error.message,
            where=path,
            why="the settings of the new run cannot be read, so nothing can be foretold",
            hint="name the JSON file that the new job is started with, or the YAML file of ckpt train",
        ) from None
    if any(key in values for key in ARGUMENT_KEYS):
        inner = values.get("deepspeed")
        return NewRun(config=inner if isinstance(inner, dict) else None, arguments=values)
    if any(key in values for key in DEEPSPEED_KEYS):
        return NewRun(config=values)
    raise UsageError(
        "run-config",
        "neither a ds_config nor TrainingArguments",
        where=path,
        why=f"a ds_config has one of {', '.join(DEEPSPEED_KEYS)}; TrainingArguments one of "
        f"{', '.join(ARGUMENT_KEYS)}",
        hint="name the JSON file that the new job is started with, or the YAML file of ckpt train",
    )


def section(config: Mapping[str, object], *keys: str) -> Mapping[str, object]:
    """A section within sections; {} where it is absent or no section.

    >>> section({"a": {"b": {"c": 1}}}, "a", "b")
    {'c': 1}
    """
    for key in keys:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def leaves(config: Mapping[str, object], at: str = "") -> Iterator[tuple[str, object]]:
    """Every value with its path, `zero_optimization.stage`; "auto" is left out."""
    for key, value in config.items():
        path = f"{at}.{key}" if at else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        elif value != "auto":
            yield path, list(value) if isinstance(value, tuple) else value


def whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def real(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
