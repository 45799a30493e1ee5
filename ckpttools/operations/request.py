"""What convert is asked for, and whether its options fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

from ckpttools.errors import UsageError, escape
from ckpttools.location import Location
from ckpttools.tensors import DType
from ckpttools.transforms.cast import dtype_named
from ckpttools.transforms.reshard import check_ranks, ranks_of

Target = Literal["pt", "zero0", "zero1", "zero2", "zero3", "universal", "dcp", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)
ENGINE = ("zero0", "zero1", "zero2", "zero3", "universal")  # what DeepSpeed loads


class Request(Struct, frozen=True, kw_only=True):
    """Those arguments of `convert` that say what is written. Raises UsageError where two do not agree."""

    to: Target
    dst: Location
    world_size: int | None = None
    mesh: str | None = None
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    reset_optimizer: bool = False
    optimizer_class: str | None = None
    like: Path | None = None
    dcp_layout: str | None = None
    hf_config: Path | None = None

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise UsageError(
                "bad-usage",
                f"'{escape(self.to)}' is not a format that ckpt writes",
                where="--to",
                why="nothing was written",
                hint=f"choose from {', '.join(TARGETS)}",
            )
        dtype_named(self.dtype)
        if self.world_size is not None:
            check_ranks(self.world_size, "--world-size")
        self._fit()
        ranks_of(self.world_size, self.mesh)

    def _fit(self) -> None:
        """Options that do not fit together are refused, not passed over."""
        to, made = self.to, self.optimizer_class
        cut = to not in ("pt", "hf", "zero0", "universal")
        for option, given, fits, problem, why, hint in (
            ("--mesh", self.mesh, to == "dcp", "--mesh is for --to dcp",
             "only distributed checkpoints are cut over more than one dimension",
             "--world-size N, or --to dcp"),
            ("--world-size", self.world_size, cut, f"{to} files are for any number of ranks",
             "they are not cut over ranks", "leave out --world-size"),
            ("--dcp-layout", self.dcp_layout, to == "dcp", "--dcp-layout is for --to dcp",
             "it names the keys of a distributed checkpoint", "leave it out, or use --to dcp"),
            ("--hf-config", self.hf_config, to == "hf", "--hf-config is for --to hf",
             "no other format has a place for a configuration", "leave it out, or use --to hf"),
            ("--like", self.like, to != "hf", "--like is for formats with an optimizer",
             "names, groups and settings of another run's optimizer have no place in these files",
             "leave out --like"),
            ("--optimizer-class", made, to != "hf", "--optimizer-class is for formats with an optimizer",
             "no settings of groups have a place in these files", "leave it out"),
            ("--optimizer-class", made, self.like is None,
             "--optimizer-class and --like both say what loads the groups",
             "the class is taken from that checkpoint", "leave one of them out"),
        ):  # fmt: skip
            if given is not None and not fits:
                raise UsageError("bad-usage", problem, where=option, why=why, hint=hint)

    @property
    def ranks(self) -> int | None:
        return ranks_of(self.world_size, self.mesh)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The ranks along each dimension of the mesh, () without one."""
        return ranks_of(self.world_size, self.mesh)[1]

    @property
    def weights_dtype(self) -> DType | None:
        return dtype_named(self.dtype)

    @property
    def is_engine(self) -> bool:
        """Whether DeepSpeed loads what is written."""
        return self.to in ENGINE

    @property
    def goes_on(self) -> bool:
        """Whether the optimizer's state is to go on in what is written."""
        return self.to != "hf" and not self.reset_optimizer

    @property
    def by_position(self) -> bool:
        """Whether what is written is loaded by the order of the parameters: ZeRO's masters, torch's state."""
        return self.to in ("zero1", "zero2", "zero3") or (self.goes_on and self.to in ("pt", "zero0"))

    @property
    def changing_names(self) -> tuple[str, ...]:
        """The options that were given which change what tensors there are, how they are called or stored."""
        given = {
            "--include": self.include,
            "--exclude": self.exclude,
            "--rename": self.rename,
            "--dtype": self.dtype,
        }
        return tuple(option for option, value in given.items() if value)
