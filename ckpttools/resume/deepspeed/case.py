"""The facts that DeepSpeed's loader compares: the engine that saved, and the one that is to load."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod

from msgspec import Struct

from ckpttools.errors import escape
from ckpttools.formats.deepspeed import original
from ckpttools.resume.deepspeed import optimizers, schedulers
from ckpttools.resume.deepspeed.saved import Saved
from ckpttools.resume.fit import Fit, fit
from ckpttools.resume.model import Shape, matches
from ckpttools.resume.new_run import NewRun, section, whole


class Triple(Struct, frozen=True, kw_only=True):
    """micro x accumulation x ranks = total, as DeepSpeed completes it; `problem` where it refuses."""

    total: int | None = None
    micro: int | None = None
    accumulation: int | None = None
    problem: str = ""


def triple(config: Mapping[str, object], ranks: int) -> Triple:
    """DeepSpeedConfig._set_batch_related_parameters and _batch_assertion (runtime/config.py)."""
    total = whole(config.get("train_batch_size"))
    micro = whole(config.get("train_micro_batch_size_per_gpu"))
    steps = whole(config.get("gradient_accumulation_steps"))
    if total is None and micro is None:
        return Triple()
    if total is None:
        assert micro is not None
        steps = 1 if steps is None else steps
        total = micro * steps * ranks
    elif micro is None:
        steps = 1 if steps is None else steps
        micro = total // ranks // max(1, steps)
    elif steps is None:
        steps = total // max(1, micro) // ranks
    problem = ""
    if min(total, micro, steps) < 1:
        problem = "has to be greater than 0"
    elif total != micro * steps * ranks:
        problem = (
            "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
            f"gradient_acc_step * world_size {total} != {micro} * {steps} * {ranks}"
        )
    return Triple(total=total, micro=micro, accumulation=steps, problem=problem)


def dtype_of(config: Mapping[str, object]) -> str:
    """The training dtype that a ds_config asks for."""
    if any(section(config, name).get("enabled") is True for name in ("bf16", "bfloat16")):
        return "bf16"
    return "fp16" if section(config, "fp16").get("enabled") is True else "fp32"


def stage_of(config: Mapping[str, object], default: int) -> int:
    stage = whole(section(config, "zero_optimization").get("stage"))
    return stage if stage is not None else default if "zero_optimization" in config else 0


def shard_name(dtype: str) -> str:
    return f"{'bf16_' if dtype == 'bf16' else ''}zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Case(Struct, frozen=True, kw_only=True, dict=True):
    """What was saved, and what the new run makes of it. `config` is the new ds_config, or the saved one."""

    saved: Saved
    run: NewRun

    @cached_property
    def config(self) -> Mapping[str, object]:
        return self.saved.config if self.run.config is None else self.run.config

    @property
    def configured(self) -> bool:
        return self.run.config is not None

    @property
    def place(self) -> str:
        return escape(self.saved.place)

    # --- batch, ranks, stage, dtype

    @property
    def ranks(self) -> int:
        return self.run.world_size or self.saved.ranks

    @cached_property
    def was(self) -> Triple:
        """As configured, else as DeepSpeed counts: its samples grow by the batch with each update."""
        stated, saved = triple(self.saved.config, self.saved.ranks), self.saved
        if stated.total is None and saved.samples and saved.step and saved.samples % saved.step == 0:
            return Triple(total=saved.samples // saved.step)
        return stated

    @cached_property
    def batch(self) -> Triple:
        return triple(self.config, self.ranks)

    @property
    def batch_meaning(self) -> str:
        """What the counter would mean under the new batch, in words."""
        step, old, new = self.saved.step, self.was.total, self.batch.total
        if step is None or old is None or new is None:
            return ""
        return (
            f": {step} updates of {old} were {step * old} samples; {new} at a time, the same number would be "
            f"{step * new}"
        )

    @property
    def as_saved(self) -> bool:
        return self.run.config is None or not self.saved.config

    @property
    def stage(self) -> int:
        return self.saved.stage if self.as_saved else stage_of(self.config, self.saved.stage)

    @property
    def dtype(self) -> str:
        return self.saved.dtype if self.as_saved else dtype_of(self.config)

    @property
    def other_stage(self) -> bool:
        return self.stage != self.saved.stage

    @property
    def other_files(self) -> bool:
        """Whether the new stage looks for other files: 1 and 2 save the same."""
        return self.other_stage and not {self.stage, self.saved.stage} <= {1, 2}

    @property
    def shard(self) -> str:
        """The optimizer file that the new engine opens first."""
        return str(self.saved.folder / shard_name(self.dtype))

    # --- parameter groups and their flat layout

    @property
    def held_groups(self) -> int:
        return len(self.saved.hyper) or len(self.saved.groups)

    @property
    def other_groups(self) -> bool:
        return self.run.groups is not None and self.run.groups != self.held_groups

    @cached_property
    def compares_layout(self) -> bool:
        """Whether the loader compares param_alignment_paddings: saved since 0.19.7, unread by
        BF16_Optimizer."""
        accumulated = section(self.config, "data_types").get("grad_accum_dtype")
        device = section(self.config, "zero_optimization", "offload_optimizer").get("device")
        bf16_optimizer = (
            self.stage == 1
            and self.dtype == "bf16"
            and accumulated == "fp32"
            and device not in ("cpu", "nvme")
        )
        return self.saved.gaps is not None and self.stage in (1, 2) and not bf16_optimizer

    @property
    def flat(self) -> bool:
        """Whether both engines keep flat groups of stages 1 and 2, and a configuration says how."""
        return self.configured and self.saved.stage in (1, 2) and self.stage in (1, 2)

    def zero(self, key: str) -> tuple[bool, bool]:
        """A flag of zero_optimization: as it was, and as it is to be."""
        return tuple(  # type: ignore[return-value]
            section(c, "zero_optimization").get(key) is True for c in (self.saved.config, self.config)
        )

    @property
    def round_robin_moves(self) -> bool:
        return any(list(original(tuple(g), self.saved.ranks)) != list(g) for g in self.saved.groups)

    @property
    def other_gaps(self) -> bool:
        """param_alignment_paddings: every parameter but the last starts at 16 bytes of the model's dtype."""
        unit = 4 if self.dtype == "fp32" else 8
        aligned = self.zero("parameter_alignment")[1]
        wanted = []
        for group in self.saved.groups:
            gaps = [-prod(shape) % unit if aligned else 0 for shape in group.values()]
            wanted.append((*gaps[:-1], 0) if gaps else ())
        return self.saved.gaps is not None and self.saved.gaps != tuple(wanted)

    # --- model and what of it is trained

    @property
    def left_out(self) -> str:
        """What exclude_frozen_parameters left out of the file, in words; "" where it did not."""
        names = self.saved.left_out
        known = (
            f"{escape(', '.join(names[:4]), 200)} and whatever else was frozen"
            if names
            else "what was frozen"
        )
        return "" if names is None or self.run.model is not None else known

    @cached_property
    def fit(self) -> Fit | None:
        if self.run.model is None:
            return None
        return fit(dict(self.saved.tensors), dict(self.saved.shared), self.run.model)

    @cached_property
    def trained(self) -> Trained | None:
        """Which parameters are trained, then and now; None where no difference can be seen."""
        saved, run, found = self.saved, self.run, self.fit
        shared = dict(saved.shared)
        names = list(saved.tensors)
        if saved.left_out is not None:  # module may lack what was frozen after the optimizer was built
            names += [name for name in saved.trainable if name not in saved.tensors]
        if run.model is not None and found is not None:
            if saved.stage != 3 and (found.reshaped or (run.strict and (found.missing or found.unexpected))):
                return None  # it is refused before
            shared, names = dict(run.model.shared), list(run.model.tensors)
            for alias, owner in saved.shared.items():
                if alias not in run.model.tensors or owner not in run.model.tensors:
                    shared[alias] = owner
                    names += [n for n in (alias, owner) if n not in names]
            if run.model.ties and "lm_head.weight" in saved.tensors and "lm_head.weight" not in names:
                names.append("lm_head.weight")
                shared.setdefault("lm_head.weight", "model.embed_tokens.weight")
        frozen = [
            name
            for name in names
            if (matches(name, run.freeze) if run.freeze is not None else name in saved.frozen)
            and name not in shared
        ]
        if run.freeze is None and not run.strict:  # nobody said whether what is new is trained
            names = [name for name in names if name in saved.tensors or name in saved.trainable]
        buffers = {name for name in names if name in saved.buffers or matches(name, run.buffers)}
        now = [name for name in names if name not in shared and name not in buffers and name not in frozen]
        if saved.stage == 0 and saved.hyper:
            counted = sum(saved.counts)
            same = len(now) == counted or (run.model is None and run.freeze is None)
            return None if same else Trained(before=[], now=now, counted=counted)
        before = saved.trainable
        if not before or set(now) == set(before):
            return None
        tensors = run.model.tensors if run.model is not None else saved.tensors
        lost = [
            n for n in frozen if n not in buffers and saved.fragments is not None and n not in saved.fragments
        ]
        return Trained(
            before=before,
            now=now,
            lost=lost[0] if lost else None,
            shapes_before=[s for group in saved.groups for s in group.values()],
            shapes_now=[tensors[name].shape for name in now if name in tensors],
        )

    # --- optimizer and scheduler

    @cached_property
    def old_optimizer(self) -> str | None:
        named = optimizers.configured(self.saved.config)
        if named is None and self.saved.hyper:
            return optimizers.of_state(self.saved.hyper[0], self.saved.state[0])
        return named

    @cached_property
    def optimizer(self) -> str | None:
        return self.run.optimizer or optimizers.configured(self.config) or self.old_optimizer

    @property
    def optimizer_type(self) -> str | None:
        """The ds_config's, where both classes can be told."""
        name = section(self.config, "optimizer").get("type")
        known = self.old_optimizer is not None and self.optimizer is not None
        return name if isinstance(name, str) and known else None

    @property
    def known_optimizer(self) -> bool:
        name = (self.optimizer_type or "").lower()
        return (
            self.optimizer in optimizers.TORCH
            or name in optimizers.DEEPSPEED
            or self.optimizer_type in optimizers.OTHERS
        )

    @property
    def tested_optimizer(self) -> bool:
        own = ("adam", "adamw", "lion", "adagrad", "muon")
        new = self.optimizer or ""
        return (
            new in optimizers.ADAM or optimizers.is_native(new) or (self.optimizer_type or "").lower() in own
        )

    @cached_property
    def scheduler(self) -> str | None:
        return schedulers.in_effect(self.saved, self.run, self.config)

    @property
    def old_scheduler(self) -> str | None:
        state = self.saved.scheduler
        own = schedulers.type_of(self.saved.config) if state is not None and schedulers.OWN in state else None
        return own or ("client" if state is not None else None)

    @property
    def other_scheduler(self) -> bool:
        return self.scheduler not in (self.old_scheduler, "client")


class Trained(Struct, frozen=True, kw_only=True, dict=True):
    """Two sets of trained parameters that differ; at stage 0 only their numbers are saved."""

    before: list[str]
    now: list[str]
    counted: int | None = None
    lost: str | None = None  # frozen now, without a copy among those frozen when it was saved
    shapes_before: list[Shape] | None = None
    shapes_now: list[Shape] | None = None

    @property
    def other_number(self) -> bool:
        return len(self.now) != len(self.before)

    @property
    def numbers(self) -> tuple[object, object]:
        if self.counted is not None:
            return self.counted, len(self.now)
        differing = ", ".join(sorted(set(self.now) ^ set(self.before))[:4])
        return f"{len(self.before)}", f"{len(self.now)}: {differing} differ"

    @property
    def names(self) -> tuple[object, object]:
        gone = ", ".join(n for n in self.before if n not in self.now)[:200]
        return gone, ", ".join(n for n in self.now if n not in self.before)[:200]
