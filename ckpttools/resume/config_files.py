"""The new run's configuration from the file that a team starts its job with; nothing of it is executed.

    .py          MMEngine: assignments of literals and dict(...), `_base_` files that lie below the same root
    .yaml, .yml  OpenPCDet's (OPTIMIZATION), or any that names its batch, learning rate and length
    .json        a ds_config; Hugging Face's TrainingArguments, with a ds_config inside

`ckpt train`'s own YAML is read by the trainer. What a file does not say stays unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ckpttools.containers import jsons
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.frameworks import arguments, mmengine
from ckpttools.resume.new_run import NewRun, Stated, leaves, real, section, whole
from ckpttools.schedules.mmengine.config import TEXT, settings
from ckpttools.stores.files import is_file, is_folder, small_text
from ckpttools.stores.links import resolved, within

# keys of which at least one is in every ds_config, and in no file of Hugging Face's TrainingArguments
DEEPSPEED_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "optimizer")
ARGUMENT_KEYS = ("per_device_train_batch_size", "output_dir", "num_train_epochs", "learning_rate")
# of MMEngine's DeepSpeedStrategy: what it hands on to DeepSpeed under the same names
STRATEGY_KEYS = ("gradient_clipping", "fp16", "bf16", "zero_optimization", "gradient_accumulation_steps")
# what plain configurations call these settings, in lower case
NAMES = {
    "micro": ("batch_size_per_gpu", "per_device_train_batch_size", "micro_batch_size",
              "train_micro_batch_size_per_gpu", "batch_size"),
    "accumulation": ("gradient_accumulation_steps", "accumulate_grad_batches", "accumulation_steps",
                     "grad_accum_steps", "accum_steps"),
    "total": ("global_batch_size", "train_batch_size"),
    "lr": ("learning_rate", "lr"),
    "epochs": ("num_epochs", "max_epochs", "num_train_epochs", "epochs"),
    "steps": ("max_steps", "max_iters", "total_steps", "total_iters"),
}  # fmt: skip
DEPTH = 8  # of _base_ files that name others


def read_config(path: Path) -> NewRun:
    """Raises UsageError for a file that is absent, unreadable, or none of these."""
    if not is_file(path):
        raise UsageError("not-found", "there is no such file", where=path, hint="check --config")
    match path.suffix:
        case ".py":
            return _mmengine(path)
        case ".yaml" | ".yml":
            return _yaml(path)
    try:
        with within(path):
            values = jsons.read(path, allow_nan=True)
    except CkptError as error:
        raise _unusable(path, error.message) from None
    if any(key in values for key in ARGUMENT_KEYS):
        return of_arguments(values)
    if any(key in values for key in DEEPSPEED_KEYS):
        lr = real(section(values, "optimizer", "params").get("lr"))
        stated = Stated(
            kind="ds_config",
            micro=whole(values.get("train_micro_batch_size_per_gpu")),
            accumulation=whole(values.get("gradient_accumulation_steps")),
            total=whole(values.get("train_batch_size")),
            lr=lr,
        )
        return NewRun(config=values, stated=stated)
    raise _unusable(path, "neither a ds_config nor TrainingArguments")


def of_arguments(values: Mapping[str, object]) -> NewRun:
    """Hugging Face's TrainingArguments, which may hold a ds_config."""
    inner = values.get("deepspeed")
    own = {key: value for key, value in values.items() if key != "deepspeed"}
    config = inner if isinstance(inner, Mapping) else None
    stated = replace(_stated(arguments.KIND, own), values=arguments.configuration(own))
    return NewRun(config=config, arguments=values, stated=stated)


def _unusable(path: Path, message: str) -> UsageError:
    return UsageError(
        "run-config",
        message,
        where=path,
        why="no setting of a new run is found in it, so nothing can be foretold; a ds_config has one of "
        f"{', '.join(DEEPSPEED_KEYS)}; TrainingArguments one of {', '.join(ARGUMENT_KEYS)}",
        hint="name the file that the new job is started with: a ds_config or TrainingArguments (.json), an "
        "MMEngine config (.py), OpenPCDet's, ckpt train's or another YAML",
    )


# --- MMEngine -----------------------------------------------------------------------------------------


def _mmengine(path: Path) -> NewRun:
    unread: list[str] = []
    values = _inherited(path, _root(path), unread, (resolved(path),))
    loader, wrapper = section(values, "train_dataloader"), section(values, "optim_wrapper")
    loop, strategy = section(values, "train_cfg"), section(values, "strategy")
    if not any((loader, wrapper, loop)):
        raise _unusable(path, "no MMEngine configuration: no train_dataloader, optim_wrapper or train_cfg")
    zero = bool(strategy)
    steps = strategy.get("gradient_accumulation_steps") if zero else wrapper.get("accumulative_counts")
    micro = strategy.get("train_micro_batch_size_per_gpu") or loader.get("batch_size")
    overlay: dict[str, object] = {key: strategy[key] for key in STRATEGY_KEYS if key in strategy}
    if whole(micro) is not None:
        overlay["train_micro_batch_size_per_gpu"] = micro
    return NewRun(
        stated=Stated(
            kind=mmengine.KIND,
            micro=whole(micro),
            # MMEngine's own default, unless a base that might say otherwise was not read
            accumulation=1 if steps is None and not unread and not zero else whole(steps),
            lr=real(section(wrapper, "optimizer").get("lr")),
            epochs=whole(loop.get("max_epochs")),
            steps=whole(loop.get("max_iters")),
            values=values,
            overlay=overlay,
            unread=tuple(unread),
        )
    )


def _root(path: Path) -> Path:
    """The folder that `_base_` files may lie in: that of configs/_base_, else the file's own."""
    own = resolved(path).parent
    return next((folder for folder in (own, *own.parents) if is_folder(folder / "_base_")), own)


def _inherited(path: Path, root: Path, unread: list[str], seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's settings laid over those of its bases, as mmengine/config/config.py merges them."""
    try:
        with within(path):
            text = small_text(path, TEXT)
        ast.parse(text)
    except CkptError as error:
        raise _unusable(path, error.message) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise _unusable(path, f"not a Python file that can be read as data: {problem}") from None
    own = settings(text)
    bases = own.pop("_base_", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        where = resolved(path.parent / base) if isinstance(base, str) else None
        inside = where is not None and not Path(base).is_absolute() and where.is_relative_to(root)
        if where is None or not inside or where in seen or len(seen) > DEPTH or not is_file(where):
            unread.append(escape(base))
            continue
        merged = _merged(merged, _inherited(where, root, unread, (*seen, where)))
    return _merged(merged, own)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            own = {k: v for k, v in value.items() if k != "_delete_"}
            below = out.get(key)
            kept = isinstance(below, dict) and not value.get("_delete_")
            out[key] = _merged(below, own) if kept and below is not None else own
        else:
            out[key] = value
    return out


# --- YAML ---------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError."""
    try:
        import yaml
    except ImportError:
        raise UsageError(
            "train-requires",
            "reading a YAML configuration needs PyYAML, which is not installed",
            where=path,
            hint="pip install pyyaml",
        ) from None
    try:
        with within(path):
            values = yaml.safe_load(small_text(path, TEXT))
    except CkptError as error:
        raise _unusable(path, error.message) from None
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        raise _unusable(path, f"not a YAML file: {' '.join(str(problem).split())[:300]}") from None
    if not isinstance(values, dict):
        raise _unusable(path, "the YAML file holds no settings by name")
    return values


def _yaml(path: Path) -> NewRun:
    values = read_yaml(path)
    inner = values.get("OPTIMIZATION")
    if isinstance(inner, dict):
        stated = _stated("OpenPCDet config", inner)
    elif ARGUMENT_KEYS[0] in values:
        return of_arguments(values)
    else:
        stated = _stated("YAML", values)
    if (stated.micro, stated.total, stated.lr, stated.epochs, stated.steps) == (None,) * 5:
        raise _unusable(path, "no batch, learning rate or length of a run is found in the YAML file")
    return NewRun(stated=stated)


def _stated(kind: str, values: Mapping[str, object]) -> Stated:
    """The settings by their usual names, at any depth. One that is named twice with two values is unknown."""
    by_name: dict[str, list[object]] = {}
    for path, value in leaves({str(k): v for k, v in values.items()}):
        by_name.setdefault(path.rpartition(".")[2].lower(), []).append(value)

    def known(which: str) -> Iterator[float]:
        for name in NAMES[which]:
            numbers = {_number(value) for value in by_name.get(name, [])} - {None}
            if numbers:
                yield from (n for n in numbers if n is not None and len(numbers) == 1)
                return

    def count(which: str) -> int | None:
        number = next(known(which), None)
        return int(number) if number is not None and number == int(number) and number > 0 else None

    return Stated(
        kind=kind,
        micro=count("micro"),
        accumulation=count("accumulation"),
        total=count("total"),
        lr=next(known("lr"), None),
        epochs=_epochs(next(known("epochs"), None)),
        steps=count("steps"),
    )


def _epochs(number: float | None) -> int | float | None:
    """The Trainer takes 1.5 of them, too."""
    if number is None or number <= 0:
        return None
    return int(number) if number == int(number) else number


def _number(value: object) -> float | None:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            return None
    number = real(value)
    return number if number is not None and abs(number) < 1e15 else None
