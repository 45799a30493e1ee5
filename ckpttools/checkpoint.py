"""What a training checkpoint holds, whatever its format: tensors by name, optimizer state, counters."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from ckpttools.location import Location
from ckpttools.plan import SourceCheck
from ckpttools.tensors import TensorRef
from ckpttools.training import Training
from ckpttools.tree import Key, Value

FP32 = "fp32"  # the kind of master weights, whatever their dtype
# ours, the key where no other place of a file tells it: how many tensors there are without what was frozen
EXCLUDES_FROZEN = "exclude_frozen_parameters"
STEP = "step"  # what the usual optimizers count
PARAM_NAMES = "param_names"  # in groups of torch >= 2.6, of optimizers made from named parameters


class ParamGroup(Struct, frozen=True, kw_only=True):
    """One parameter group of the optimizer.

    `params` maps each fully qualified name to its shape, in the group's canonical order (the order of the
    optimizer that training code made, before any permutation for a rank count). `state` holds the tensors of
    the parameter's shape, per kind (FP32 for master weights, else the optimizer's own key such as
    "exp_avg") and name; `scalars` what else the optimizer keeps for a parameter: a step as an int or a 0-d
    tensor, a factored moment. A kind whose state is nested has its keys in `paths` (bitsandbytes); else its
    key is its name. `hyper` is lr, betas, weight_decay and so on as saved, without `params`. `named`: the
    optimizer was made from named parameters, and its run looks for PARAM_NAMES.
    """

    params: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Mapping[str, TensorRef]]
    hyper: Mapping[str, Value]
    scalars: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    paths: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    named: bool = False

    @property
    def idle(self) -> frozenset[str]:
        """Kinds of state that the optimizer makes and never looks at.

        DeepSpeedCPULion, with betas and no eps, leaves exp_avg_sq as it began (deepspeed/ops/lion).
        """
        unread = "betas" in self.hyper and "eps" not in self.hyper
        return frozenset(("exp_avg_sq",)) if unread else frozenset()


class Layout(Struct, frozen=True, kw_only=True):
    """How the state is spread over files."""

    format: str  # "zero2", "pt", "hf" ...: the name that `ckpt inspect` prints
    zero_stage: int | None = None
    ranks: int | None = None  # that saved it, where its files say so
    dp_degree: int = 1  # that it is cut for
    mesh: tuple[int, ...] = ()  # to be written for: data-parallel times tensor-parallel ranks; else dp_degree
    tag: str | None = None
    dtype: str | None = None  # of the saved model weights: "bf16" ...
    writer: str | None = None  # the library and version that saved it, where known
    variant: str | None = None  # of the format, e.g. "BF16_Optimizer", "elastic"
    round_robin: bool = False
    aligned: bool = False  # zero_optimization.parameter_alignment
    ranked: bool = False  # its files are written for `dp_degree` ranks
    prefix: str = ""  # that DDP or torch.compile put before every name, and that was removed
    single: bool = False  # one file of weights, not a folder
    max_shard_size: int | None = None  # of files of weights, in bytes
    stem: str | None = None  # of the weight files, where it is not the usual one: "adapter_model" (PEFT)


class FileRole(Struct, frozen=True, kw_only=True):
    """What one file of the checkpoint is, for people; `dangers` what loading it would run, None where it was
    not looked at.
    """

    path: Location
    nbytes: int
    role: str
    dangers: tuple[str, ...] | None = None


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A logical, unpartitioned description; nothing is loaded.

    `tensors` are the model's weights and buffers as saved, by name; tied names share their chunks.
    `shared` maps an alias to its owner, `frozen` and `buffers` name entries of `tensors`,
    `left_out` parameters that the model has and the files do not (name -> shape). `excludes_frozen`: frozen
    ones were left out, and no file names them. `roles_guessed`: nothing in the files tells buffers from
    frozen weights, so that `frozen` may name buffers. `groups_guessed`: nor which parameters make a group,
    and in which order. `extra_state` is what the model's state holds beside tensors. `unread` are the places
    of keys that are no text, of the weights or of the whole: what lies under them is nowhere else in here.
    `text_keys`: its files hold keys of dicts as text, numbers too.
    `optimizer` is the class of the optimizer where the files name it ("AdamW"). `loss_scaler` is its state
    as plain values. `client` is what training code saved beside all that, by key; `settings` the run's
    configuration as saved (ds_config). `template` is what the
    source's own format keeps to write files as they were: opaque to everyone else, never needed, never more
    than fidelity.
    """

    path: Location
    layout: Layout
    tensors: Mapping[str, TensorRef]
    groups: tuple[ParamGroup, ...] = ()
    training: Training = field(default_factory=Training)
    shared: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    roles_guessed: bool = False
    groups_guessed: bool = False
    text_keys: bool = False
    left_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    excludes_frozen: bool = False
    extra_state: Mapping[str, Value] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    files: tuple[FileRole, ...] = ()
    checks: tuple[SourceCheck, ...] = ()  # checksums that the files state for their parts
    notes: tuple[str, ...] = ()  # what a reader should know: unknown classes, missing checksums ...
    optimizer: str | None = None
    loss_scaler: Mapping[str, Value] = field(default_factory=dict)
    client: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    below: tuple[str, ...] = ()  # folders in its own with other weights, which are not read
    several: bool = False  # more ranks than the first ones have weights of their own, which are not read
    template: object = None

    @property
    def master(self) -> Mapping[str, TensorRef]:
        """The fp32 master weights by name, gathered anew at each call; empty where there are none."""
        return {fqn: ref for group in self.groups for fqn, ref in group.state.get(FP32, {}).items()}

    @property
    def unnamed(self) -> tuple[str, ...]:
        """The keys of `client` under which states of optimizers lie whose parameters are not known by name:
        they are carried as they are, and fit the tensors only as they are, in their order.
        """
        return tuple(key for key, value in self.client.items() if _holds(value, ("state", "param_groups")))

    @property
    def schedules(self) -> tuple[str, ...]:
        """The keys of `client` under which states of learning rate schedulers lie."""
        kinds = (("last_epoch",), ("last_batch_iteration",))  # torch's, DeepSpeed's
        return tuple(key for key, value in self.client.items() if any(_holds(value, each) for each in kinds))

    def best_copies(self) -> dict[str, TensorRef]:
        """The model's tensors by name, in its order: the fp32 master where there is one, of the name itself
        or of the one that it is tied to, else the weight as saved. What a target with one copy writes.
        """
        master = self.master
        out = {
            name: master.get(name) or master.get(self.shared.get(name, name), ref)
            for name, ref in self.tensors.items()
        }
        return out | {name: ref for name, ref in master.items() if name not in out}


def _holds(value: Value, keys: tuple[str, ...], depth: int = 2) -> bool:
    """Whether a value is a mapping with these keys, or a list or mapping of such (one for each model)."""
    if isinstance(value, Mapping) and all(key in value for key in keys):
        return True
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return depth > 0 and any(_holds(each, keys, depth - 1) for each in inner)


def common_dtype(tensors: Mapping[str, TensorRef]) -> str | None:
    """The short name of the dtype that all floating point tensors have; None where there are several."""
    found = {ref.dtype.short for ref in tensors.values() if ref.dtype.is_float}
    return found.pop() if len(found) == 1 else None
