"""The trainer's settings. `demo.yaml` in this folder is the commented example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Struct, field
from msgspec.structs import asdict, replace

from ckpttools.errors import UsageError
from ckpttools.trainer.typed import Meta, assign, bad, decode, unaliased

Positive = Annotated[int, Meta(ge=1, description="a whole number above 0")]
Updates = Annotated[int, Meta(ge=0, description="a number of updates, or 0 for none")]
Minutes = Annotated[float, Meta(gt=0, description="a number of minutes above 0")]
Share = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 up to 1")]
Samples = Annotated[int, Meta(ge=0, description="a number of samples, or 0 for none")]


class Model(Struct, frozen=True, kw_only=True):
    """A causal language model, or a classifier of images, built from a config with random weights."""

    family: Literal["llama", "gpt2", "vit"] = "llama"
    hidden_size: Positive = 64
    intermediate_size: Positive = 256
    layers: Positive = 2
    heads: Positive = 4
    tie_embeddings: bool = False


class Data(Struct, frozen=True, kw_only=True):
    """`source` is `stdlib` or `path:FILE` (.txt or .jsonl); a sample is `sequence_length` bytes.

    With `digits`, the images that scikit-learn ships, a sample is an image, and the model must be a `vit`.
    """

    source: str = "stdlib"
    text_key: str = "text"
    max_bytes: Positive = 1_000_000
    sequence_length: Annotated[int, Meta(ge=2, description="2 or more")] = 128
    validation_samples: Samples = 32


class Batch(Struct, frozen=True, kw_only=True):
    """global = micro x ranks x accumulation; leave out micro or accumulation and it is derived."""

    global_batch_size: Positive = 16
    micro_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive | None = None


class Optimizer(Struct, frozen=True, kw_only=True):
    """AdamW; weight decay acts on matrices and embeddings only."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0


class Schedule(Struct, frozen=True, kw_only=True):
    """Linear warmup from 0, then a cosine to `min_ratio` x lr, or a straight line to 0.

    DeepSpeed's schedulers give the first two updates a learning rate of 0.
    """

    kind: Literal["cosine", "linear"] = "cosine"
    warmup_steps: Positive = 10
    min_ratio: float = 0.1
    total_steps: Positive | None = None  # None: epochs x updates per epoch


class Zero(Struct, frozen=True, kw_only=True):
    """DeepSpeed's partitioning; stage 0 is no DeepSpeed: plain torch, with DDP where there are ranks."""

    stage: Annotated[Literal[0, 1, 2, 3], Meta(description="0, 1, 2 or 3")] = 2
    round_robin_gradients: bool = False


class Save(Struct, frozen=True, kw_only=True):
    """Step checkpoints every `save_steps` updates (0: none) and one at the end of each epoch."""

    save_steps: Updates = 100
    epochs: bool = True
    layout: Literal["iter", "bundle", "monolithic", "experiment"] = "iter"
    group: str = ""  # of `experiment`: output/GROUP/CONFIG/TAG; "": the config's own folder


class BestModel(Struct, frozen=True, kw_only=True):
    """best_model.pt, in addition, whenever the validation loss is the lowest so far.

    With `save_best_only` the epoch checkpoints of other epochs are left out, and step checkpoints.
    """

    enabled: bool = False
    save_best_only: bool = False


class Evaluation(Struct, frozen=True, kw_only=True):
    """Every epoch's end evaluates all held-out samples. What is done besides."""

    partial_eval_during_training: bool = False  # an eighth of them, before each step checkpoint
    full_eval_at_end: bool = True
    eval_best_model_only: bool = False  # at the end: the best model in place of the last one


class Training(Struct, frozen=True, kw_only=True):
    """What is kept, what is evaluated, what is logged. `skip_evaluation` overrules the rest (policy.py)."""

    save_total_limit: Positive | None = None  # per kind; also written max_keep_ckpts
    save_minutes: Minutes | None = None  # a step checkpoint after so much time as well
    save_all_checkpoints: bool = False
    skip_evaluation: bool = False
    best_model_tracking: BestModel = field(default_factory=BestModel)
    evaluation: Evaluation = field(default_factory=Evaluation)
    label_smoothing: Share = 0.0
    log_steps: Positive = 1  # a line on the console every so many updates; the log files have all
    tensorboard: bool = True  # where it is installed


class Config(Struct, frozen=True, kw_only=True):
    """Everything that defines a run."""

    experiment: str = ""  # "": the config file's name
    work_dirs: str = ""  # "": work_dirs, or output for the layout `experiment`
    seed: Annotated[int, Meta(ge=0, description="0 or more")] = 0
    epochs: Positive = 1
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    freeze: tuple[str, ...] = ()
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    zero: Zero = field(default_factory=Zero)
    save: Save = field(default_factory=Save)
    training: Training = field(default_factory=Training)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As dicts, lists and scalars: what config.yaml and the checkpoints hold."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: object) -> object:
    if isinstance(value, Struct):
        return {name: _plain(inner) for name, inner in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


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
        config = decode(Config, unaliased({} if data is None else data))
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
    experiment = config.save.layout == "experiment"
    return replace(
        config,
        experiment=config.experiment or path.stem,
        work_dirs=config.work_dirs or ("output" if experiment else "work_dirs"),
        save=replace(
            config.save, group=config.save.group or (path.absolute().parent.name if experiment else "")
        ),
    )


def _check(config: Config) -> None:
    training, save = config.training, config.save
    rules: list[tuple[str, object, bool, str]] = [
        (
            "model.hidden_size",
            config.model.hidden_size,
            config.model.hidden_size % (2 * config.model.heads) == 0,
            "a multiple of 2 x model.heads",
        ),
        ("experiment", config.experiment, is_name(config.experiment), "a folder name"),
        ("save.group", save.group, is_name(save.group), "a folder name"),
        (
            "data.source",
            config.data.source,
            config.data.source in ("stdlib", "digits") or config.data.source.startswith("path:"),
            "stdlib, digits or path:FILE",
        ),
        (
            "model.family",
            config.model.family,
            (config.model.family == "vit") == (config.data.source == "digits"),
            "vit for data.source digits" if config.data.source == "digits" else "llama or gpt2 for text",
        ),
        (
            "precision",
            config.precision,
            config.zero.stage > 0 or config.precision != "fp16",
            "bf16 or fp32 where zero.stage is 0",
        ),
        (
            "save.layout",
            save.layout,
            save.layout != "monolithic" or config.zero.stage == 0,
            "a layout of folders: a ZeRO checkpoint is no single file (zero.stage: 0 makes single files)",
        ),
        (
            "save.layout",
            save.layout,
            save.layout != "bundle" or config.zero.stage > 0,
            "another layout than bundle, which has DeepSpeed's files in it, where zero.stage is 0",
        ),
        (
            "training.best_model_tracking.enabled",
            True,
            not training.best_model_tracking.enabled
            or training.skip_evaluation
            or config.data.validation_samples > 0,
            "false where data.validation_samples is 0",
        ),
    ]
    for path, value, good, wanted in rules:
        if not good:
            raise bad(path, wanted, value)


def is_name(text: str) -> bool:
    """Whether it names a folder inside another, and no other place."""
    return text not in (".", "..") and "/" not in text
