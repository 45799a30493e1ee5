"""What happens when an optimizer's saved state is loaded into an optimizer of another class.

`Optimizer.load_state_dict` compares only the number of groups and of parameters. It takes the saved
param_groups whole, so settings that the new class reads and the old one never wrote are missing (KeyError
at the first update), unless `__setstate__` fills them in; states are taken as they are. Source: torch 2.13,
torch/optim/*.py; each row was seen with DeepSpeed 0.19.8 on real checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE, SAFE, Class
from ckpttools.resume.forecast import Moment, Refusal
from ckpttools.resume.new_run import section

# `optimizer.type` values that DeepSpeed builds itself, compared in lower case; others are torch's
DEEPSPEED = ("adam", "adamw", "lamb", "onebitadam", "onebitlamb", "zerooneadam", "lion", "adagrad", "muadam",
             "muadamw", "musgd", "muon")  # fmt: skip
ADAM = ("AdamW", "Adam")  # torch's: AdamW is a subclass, and the saved group says how it decays
# DeepSpeed's: the same state and settings; how they decay is the object's, and not saved
NATIVE = ("FusedAdam", "DeepSpeedCPUAdam")
L2 = " with L2 decay"
UNNAMED = "DeepSpeed's Adam"  # one of NATIVE, by what it wrote


class Reads(Struct, frozen=True, kw_only=True):
    """What a class reads of a saved state, in its order.

    `load` are state names read while loading, if there is any state; `eager` if even an empty state is looked
    into. `first`, `state` and `group` are read at the first update: group settings, then names in a state
    that is not empty, then group settings again.
    """

    load: tuple[str, ...] = ("step",)
    eager: bool = False
    first: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()  # further arguments of the constructor


_ADAM = Reads(
    first=("betas",),
    state=("exp_avg", "exp_avg_sq", "step"),
    group=("lr", "weight_decay", "eps"),
    settings=("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
)
TORCH: dict[str, Reads] = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "NAdam": Reads(
        load=("step", "mu_product"),
        first=("betas",),
        state=("exp_avg", "exp_avg_sq", "mu_product", "step"),
        group=("lr", "weight_decay", "momentum_decay", "eps"),
        settings=("decoupled_weight_decay", "foreach", "maximize", "capturable", "differentiable"),
    ),
    "RAdam": Reads(
        first=("betas",),
        state=("exp_avg", "exp_avg_sq", "step"),
        group=("lr", "weight_decay", "eps"),
        settings=("decoupled_weight_decay", "foreach", "maximize", "capturable", "differentiable"),
    ),
    "Adamax": Reads(
        first=("betas",),
        state=("exp_avg", "exp_inf", "step"),
        group=("eps", "lr", "weight_decay"),
        settings=("foreach", "maximize", "differentiable", "capturable"),
    ),
    "Adagrad": Reads(
        eager=True,
        state=("sum", "step"),
        group=("lr", "weight_decay", "lr_decay", "eps"),
        settings=("initial_accumulator_value", "foreach", "maximize", "differentiable", "fused"),
    ),
    "RMSprop": Reads(
        state=("square_avg", "step"),
        group=("lr", "alpha", "eps", "weight_decay"),
        settings=("momentum", "centered", "capturable", "foreach", "maximize", "differentiable"),
    ),
    "ASGD": Reads(
        load=("step", "eta", "mu"),
        state=("mu", "ax", "eta", "step"),
        group=("lambd", "lr", "t0", "alpha", "weight_decay"),
        settings=("foreach", "maximize", "differentiable", "capturable"),
    ),
    "SGD": Reads(
        load=(),
        first=("momentum",),
        group=("weight_decay", "lr", "dampening"),
        settings=("nesterov", "maximize", "foreach", "differentiable", "fused"),
    ),
}
OTHERS = ("Rprop", "LBFGS", "SparseAdam", "Adadelta", "Adafactor", "Muon")  # torch's that are not forecast
# settings by which a saved param_group shows its class, most telling first
_SIGNS = (
    ("bias_correction", UNNAMED), ("momentum_decay", "NAdam"), ("lambd", "ASGD"),
    ("lr_decay", "Adagrad"),
    ("centered", "RMSprop"), ("dampening", "SGD"), ("amsgrad", "Adam"),
)  # fmt: skip


class Outcome(Struct, frozen=True, kw_only=True):
    """A change of the optimizer's class, judged."""

    cls: Class
    why: str
    refusal: Refusal | None = None


def configured(config: Mapping[str, object]) -> str | None:
    """The class that DeepSpeed builds for a ds_config; None where the user's code builds it."""
    name = section(config, "optimizer").get("type")
    if not isinstance(name, str):
        return None
    params = section(config, "optimizer", "params")
    device = section(config, "zero_optimization", "offload_optimizer").get("device")
    old_name = section(config, "zero_optimization").get("cpu_offload") is True
    on_cpu = device in ("cpu", "nvme") or old_name
    match name.lower():
        case "adam" | "adamw":
            decoupled = name.lower() == "adamw" or params.get("adam_w_mode", True)
            if params.get("torch_adam"):
                return "AdamW" if decoupled else "Adam"
            return ("DeepSpeedCPUAdam" if on_cpu else "FusedAdam") + ("" if decoupled else L2)
        case "adagrad" if not on_cpu:
            return "Adagrad"
        case low if low in DEEPSPEED:
            return f"DeepSpeed's {low}"
        case _:
            return name


def of_state(hyper: Mapping[str, object], state: frozenset[str] | None) -> str | None:
    """The class of a saved optimizer, by what it wrote; None where nothing shows it."""
    for sign, name in _SIGNS:
        if sign in hyper:
            if name == "Adam" and hyper.get("decoupled_weight_decay") is True:
                return "AdamW"
            return name
    if "betas" in hyper and state is not None:
        if "exp_inf" in state:
            return "Adamax"
        if "exp_avg_sq" in state and "decoupled_weight_decay" in hyper:
            return "RAdam"
    return None


def unknown_setting(config: Mapping[str, object]) -> tuple[str, str] | None:
    """A parameter of ds_config's optimizer that torch's constructor does not take: (class, name)."""
    name = configured(config)
    reads = TORCH.get(name or "")
    if name is None or reads is None:
        return None
    known = {
        *reads.first,
        *reads.group,
        *reads.settings,
        "torch_adam",
        "adam_w_mode",
        "fp32_optimizer_states",
    }
    for key in section(config, "optimizer", "params"):
        if key not in known:
            return name, key
    return None


def changed(old: str, new: str, hyper: Mapping[str, object], state: frozenset[str] | None) -> Outcome:
    """What loading the state of class `old` into one of class `new` does."""
    if is_native(old) or is_native(new):
        found = _native(old, new, hyper)
        if found is not None:
            return found
    reads = TORCH.get(new)
    if reads is None or old not in TORCH:
        return Outcome(
            cls=IMPOSSIBLE,
            why=f"the saved state is {old}'s; what {new} makes of it is not forecast",
        )
    missing = _first_missing(reads, hyper, state)
    if missing is not None:
        moment, key = missing
        return Outcome(
            cls=IMPOSSIBLE,
            why=f"{new} looks for '{key}', which {old} did not save",
            refusal=Refusal(moment=moment, error="KeyError", text=f"'{key}'"),
        )
    if old in ADAM and new in ADAM:
        if new == "Adam":
            return Outcome(
                cls=CAREFUL,
                why="it loads, and goes on as AdamW: the saved param_groups say decoupled_weight_decay",
            )
        return Outcome(
            cls=CAREFUL, why="it loads, and weight decay is decoupled from now on; the moments are Adam's"
        )
    return Outcome(
        cls=IMPOSSIBLE,
        why=f"it loads without an error, and {new} goes on with moments and settings of {old}",
    )


def is_native(name: str) -> bool:
    return name.removesuffix(L2) in (*NATIVE, UNNAMED)


def _native(old: str, new: str, hyper: Mapping[str, object]) -> Outcome | None:
    """Changes from and to DeepSpeed's own Adam; None where they are not forecast."""
    if is_native(new):
        if not is_native(old):
            if old in ADAM and "bias_correction" not in hyper:
                return Outcome(
                    cls=IMPOSSIBLE,
                    why=f"{new.removesuffix(L2)} looks for 'bias_correction', which torch's {old} "
                    "did not save",
                    refusal=Refusal(moment=Moment.UPDATE, error="KeyError", text="'bias_correction'"),
                )
            return None
    elif new not in ADAM:
        return None
    decoupled = new == "AdamW" if new in ADAM else not new.endswith(L2)
    if old == UNNAMED:
        return Outcome(cls=CAREFUL, why=f"it loads, and {_decay(decoupled)}; how it did is not saved")
    if decoupled == (not old.endswith(L2)):
        return Outcome(cls=SAFE, why="both make the same update from the same state")
    return Outcome(cls=CAREFUL, why=f"it loads, and {_decay(decoupled)} from now on")


def _decay(decoupled: bool) -> str:
    return "weight decay is decoupled" if decoupled else "weight decay is added to the gradient"


def _first_missing(
    reads: Reads, hyper: Mapping[str, object], state: frozenset[str] | None
) -> tuple[Moment, str] | None:
    """When and which name is looked for first that was not saved."""
    if state is not None and (state or reads.eager):
        for key in reads.load:
            if key not in state:
                return Moment.OPTIMIZER_STATE, key
    for key in reads.first:
        if key not in hyper:
            return Moment.UPDATE, key
    if state:
        for key in reads.state:
            if key not in state:
                return Moment.UPDATE, key
    for key in reads.group:
        if key not in hyper:
            return Moment.UPDATE, key
    return None
