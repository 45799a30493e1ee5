"""The trainer's settings. `demo.yaml` in this folder is the commented example."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckpttools.errors import UsageError
from ckpttools.trainer.decode import assign, bad, decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A causal language model built from a config with random weights."""

    family: Literal["llama", "gpt2"] = "llama"
    hidden_size: int = 64
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    tie_embeddings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """`source` is `stdlib` or `path:FILE` (.txt or .jsonl); a sample is `sequence_length` bytes."""

    source: str = "stdlib"
    text_key: str = "text"
    max_bytes: int = 1_000_000
    sequence_length: int = 128
    validation_samples: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """global = micro x ranks x accumulation; leave out micro or accumulation and it is derived."""

    global_batch_size: int = 16
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW; weight decay acts on matrices and embeddings only."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warmup from 0, then a cosine to `min_ratio` x lr, or a straight line to 0.

    DeepSpeed's schedulers give the first two updates a learning rate of 0.
    """

    kind: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = 10
    min_ratio: float = 0.1
    total_steps: int | None = None  # None: epochs x updates per epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """DeepSpeed's optimizer state partitioning."""

    stage: int = 2
    round_robin_gradients: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Step checkpoints every `save_steps` updates (0: none) and one at the end of each epoch."""

    save_steps: int = 100
    epochs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    experiment: str = ""  # "": the config file's name
    work_dirs: str = "work_dirs"
    seed: int = 0
    epochs: int = 1
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    freeze: tuple[str, ...] = ()
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    zero: Zero = field(default_factory=Zero)
    save: Save = field(default_factory=Save)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As dicts, lists and scalars: what config.yaml and the checkpoints hold."""
        data = dataclasses.asdict(self)
        data["freeze"] = list(self.freeze)
        return data


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check every value. Raises UsageError."""
    try:
        import yaml
    except ImportError:
        raise UsageError(
            "train-requires",
            "reading a configuration of `ckpt train` needs PyYAML, which is not installed",
            where=path,
            hint="pip install 'ckpttools[train]'",
        ) from None

    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise bad(f"--set {override}", "key.sub=value", override)
            data = {} if data is None else data
            if isinstance(data, dict):
                assign(data, key, yaml.safe_load(value))
        config = decode(Config, {} if data is None else data)
        _check(config)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UsageError(
            "train-config",
            f"not a YAML file: {' '.join(str(problem).split())}",
            where=path,
            why="the settings of the run cannot be read",
            hint="`ckpt demo DIR` leaves a commented example, DIR/demo.yaml",
        ) from problem
    except UsageError as error:
        error.where = str(path)
        raise
    return dataclasses.replace(config, experiment=config.experiment or path.stem)


def _check(config: Config) -> None:
    positive = {
        "epochs": config.epochs,
        "model.hidden_size": config.model.hidden_size,
        "model.intermediate_size": config.model.intermediate_size,
        "model.layers": config.model.layers,
        "model.heads": config.model.heads,
        "data.max_bytes": config.data.max_bytes,
        "batch.global_batch_size": config.batch.global_batch_size,
        "batch.micro_batch_size": config.batch.micro_batch_size,
        "batch.gradient_accumulation_steps": config.batch.gradient_accumulation_steps,
        "schedule.warmup_steps": config.schedule.warmup_steps,
        "schedule.total_steps": config.schedule.total_steps,
    }
    for path, value in positive.items():
        if value is not None and value < 1:
            raise bad(path, "a whole number above 0", value)
    if config.save.save_steps < 0:
        raise bad("save.save_steps", "a number of updates, or 0 for none", config.save.save_steps)
    if config.data.validation_samples < 0:
        raise bad(
            "data.validation_samples", "a number of samples, or 0 for none", config.data.validation_samples
        )
    if config.data.sequence_length < 2:
        raise bad("data.sequence_length", "at least 2 tokens", config.data.sequence_length)
    if config.model.hidden_size % (2 * config.model.heads):
        raise bad("model.hidden_size", "a multiple of 2 x model.heads", config.model.hidden_size)
    if config.zero.stage not in (1, 2):
        raise bad("zero.stage", "1 or 2", config.zero.stage)
    if config.seed < 0:
        raise bad("seed", "0 or more", config.seed)
    if config.experiment in (".", "..") or "/" in config.experiment:
        raise bad("experiment", "a folder name", config.experiment)
    if not (config.data.source == "stdlib" or config.data.source.startswith("path:")):
        raise bad("data.source", "stdlib or path:FILE", config.data.source)
