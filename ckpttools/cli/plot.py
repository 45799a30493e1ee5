"""The picture of a rebase: the learning rate over samples, with matplotlib."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpttools.transforms.rebase import Curve, Rebased


def draw(curves: tuple[Curve, Curve, Curve], result: Rebased, path: Path) -> None:
    """Write the picture of before, after and without; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    before, after, without = curves
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    old, new = result.timeline.old, result.timeline.new
    axes.plot(before.samples, before.lr, color="0.6", linewidth=4, label=f"before: batch {old.total}")
    axes.plot(after.samples, after.lr, color="C0", label=f"after: batch {new.total}")
    axes.plot(
        without.samples, without.lr, color="C3", linestyle="--", label=f"batch {new.total} without a rebase"
    )
    if result.samples is not None:
        axes.axvline(result.samples[1], color="0.3", linewidth=1, linestyle=":", label="this checkpoint")
    axes.set_xlabel("samples seen")
    axes.set_ylabel("learning rate of the first parameter group")
    axes.set_ylim(bottom=0)
    axes.set_title(", ".join(result.families))
    axes.legend()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(name, dpi=120)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
