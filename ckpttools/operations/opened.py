"""A checkpoint as a mapping of names to arrays, read when they are asked for."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import UsageError, escape
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.dangers import Dangers, dangers, read_judged
from ckpttools.stores.files import named
from ckpttools.stores.links import within
from ckpttools.tensors import TensorRef

if TYPE_CHECKING:
    from ckpttools.values import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened(Mapping[str, "Array"]):
    """The weights and buffers of a checkpoint by name; `checkpoint` describes all that it holds.

    Nothing is loaded: `opened[name]` maps the tensor from its file where it lies there in one piece.
    """

    source: Source
    checkpoint: Checkpoint

    @property
    def dangers(self) -> Dangers:
        """Every file of it, and what loading that file would run: `()` is good. Reads their pickles."""
        return dangers(self.source, self.checkpoint)

    def __getitem__(self, name: str) -> Array:
        """A tensor as a read-only array. Raises KeyError, or CkptError where it cannot be read."""
        return self.array(self.checkpoint.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)

    def array(self, ref: TensorRef) -> Array:
        """Any tensor of the checkpoint: `opened.array(opened.checkpoint.master[name])`."""
        from ckpttools.passes.arrays import array

        with within(self.source.root):
            return array(ref)

    def torch(self, name: str) -> Any:
        """A tensor as a torch.Tensor of its own memory. Raises UsageError where torch is not installed."""
        try:
            import torch
        except ModuleNotFoundError:
            raise UsageError(
                "torch-needed", "torch is not installed", hint="opened[name] gives a numpy array without it"
            ) from None
        ref = self.checkpoint.tensors[name]
        dtype = getattr(torch, ref.dtype.name)
        if not ref.numel:
            return torch.empty(ref.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.array(ref).tobytes()), dtype=dtype).reshape(ref.shape)

    def _rows(self) -> Iterator[tuple[str, object]]:
        layout, state = self.checkpoint.layout, self.checkpoint.training
        yield "path", self.source.root
        yield "format", layout.format
        yield "found", self.source.how
        yield "step", state.step
        yield "epoch", state.epoch
        yield "ranks", layout.ranks
        yield "tensors", len(self)
        yield "bytes", sum(ref.nbytes for ref in self.checkpoint.tensors.values())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {escape(value)}" for name, value in self._rows() if value is not None)
        return f"<checkpoint: {shown}>"

    def _repr_html_(self) -> str:
        """For notebooks: every text that came out of a file is escaped, twice."""
        rows = [(name, value) for name, value in self._rows() if value is not None]
        facts = "".join(_row(name, value) for name, value in rows)
        refs = list(self.checkpoint.tensors.items())
        tensors = "".join(_row(name, ref.dtype.short, list(ref.shape)) for name, ref in refs[:100])
        more = f"<p>and {len(refs) - 100} more</p>" if len(refs) > 100 else ""
        tensors = f"<details><summary>tensors</summary><table>{tensors}</table>{more}</details>"
        return f"<table>{facts}</table>{tensors}"


def _row(*cells: object) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(escape(cell))}</td>" for cell in cells) + "</tr>"


def open(path: str | Location, tag: str | None = None) -> Opened:
    """Open the one checkpoint at or below a path: headers only.

    >>> run = open("fixtures/trainer/z2_bf16_2")
    >>> len(run), run.checkpoint.layout.format, run.checkpoint.training.step
    (..., 'zero2', 3)
    >>> name = next(iter(run))
    >>> run[name].dtype, run[name].shape == run.checkpoint.tensors[name].shape
    (dtype(bfloat16), True)
    """
    source, checkpoint = read_judged(named(path), tag)
    return Opened(source=source, checkpoint=checkpoint)
