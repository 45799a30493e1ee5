"""The run that is to go on from the checkpoint, as far as somebody said what it will be.

Whatever is not said is taken as unchanged. A ds_config's "auto" (Hugging Face) counts as not said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct, field

from ckpttools.resume.model import Model


class Stated(Struct, frozen=True, kw_only=True):
    """What a configuration says in the terms of any trainer; None: it does not say.

    `micro` is the batch per rank, `steps` the length in the trainer's own unit. `values` is all of an
    MMEngine configuration or of TrainingArguments, `overlay` what its strategy sets for DeepSpeed; `unread`
    are the bases that were not.
    """

    kind: str = ""
    micro: int | None = None
    accumulation: int | None = None
    total: int | None = None
    lr: float | None = None
    epochs: int | float | None = None
    steps: int | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    overlay: Mapping[str, object] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


class NewRun(Struct, frozen=True, kw_only=True):
    """`config` is a ds_config; `arguments` are TrainingArguments; `settings` those of `ckpt train`;
    `stated` is what any of them says of batch, learning rate and length.

    `scheduler`, `groups`, `freeze`, `buffers`, `optimizer` and `strict` are what only the user's code says:
    the class of a scheduler passed to deepspeed.initialize ("none" for none at all), the number of
    parameter groups, patterns of names, the class of an optimizer passed, load_module_strict.
    """

    config: Mapping[str, object] | None = None
    arguments: Mapping[str, object] | None = None
    settings: Mapping[str, object] | None = None
    stated: Stated = field(default_factory=Stated)
    world_size: int | None = None
    model: Model | None = None
    scheduler: str | None = None
    optimizer: str | None = None
    groups: int | None = None
    freeze: tuple[str, ...] | None = None
    buffers: tuple[str, ...] = ()
    strict: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)  # of the installed "deepspeed", "torch"


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
