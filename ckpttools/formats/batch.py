"""The batch settings in ds_config, kept true when the number of ranks changes.

DeepSpeed never reads these copies on load; they are for people and tools.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.formats.counters import BATCH
from ckpttools.tree import at


def kept_batch(checkpoint: Checkpoint, layout: Layout) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """The settings that keep the global batch over the new ranks, and what to say about them."""
    # the schedules are a heavy import, which only a reshard needs
    from ckpttools.schedules.evidence import kept, known, of_deepspeed, of_samples

    state, ranks = checkpoint.training, checkpoint.layout.dp_degree
    batch = known((*of_deepspeed(dict(state.saved_batch), ranks), *of_samples(state.samples, state.step)))
    iteration = at(checkpoint.client, "meta", "iter")  # MMEngine's, which counts micro-batches
    counted = type(iteration) is int
    new = kept(batch, layout.dp_degree, "micro" if counted else "update", iteration if counted else None)
    values = {"micro": new.micro, "accumulation": new.accumulation}
    had = dict(state.saved_batch)
    if "micro" in had and "global" not in had:
        had.setdefault("accumulation", 1)  # what DeepSpeed takes for none
    changed = {BATCH[k]: v for k, v in values.items() if v is not None and k in had and v != had[k]}
    return changed, new.notes
