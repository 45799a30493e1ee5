"""Global batch = micro batch x ranks x gradient accumulation, and which rank computes which sample."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.trainer.config import Batch


class Split(Struct, frozen=True, kw_only=True):
    """How one update's samples are cut; `micro * world * accumulation` is the global batch size."""

    micro: int
    accumulation: int
    world: int

    def micro_batches(self, ids: Sequence[int], rank: int) -> list[Sequence[int]]:
        """One rank's micro batches of a global batch, in the order in which it computes them.

        The global batch is cut into the same micro batches whatever the number of ranks; only who
        computes them changes.

        >>> Split(micro=1, accumulation=2, world=2).micro_batches([10, 11, 12, 13], rank=1)
        [[11], [13]]
        """
        starts = [(a * self.world + rank) * self.micro for a in range(self.accumulation)]
        return [ids[start : start + self.micro] for start in starts]


def split(batch: Batch, world: int) -> Split:
    """Derive what the config leaves open. Raises UsageError where the numbers do not divide."""
    size, micro, accumulation = (
        batch.global_batch_size,
        batch.micro_batch_size,
        batch.gradient_accumulation_steps,
    )
    if micro is None and accumulation is None:
        accumulation = 1
    if micro is not None and accumulation is None:
        parts, rest = divmod(size, micro * world)
        formula = f"micro_batch_size {micro} x {world} ranks"
        result = Split(micro=micro, accumulation=parts, world=world)
    elif accumulation is not None and micro is None:
        parts, rest = divmod(size, accumulation * world)
        formula = f"gradient_accumulation_steps {accumulation} x {world} ranks"
        result = Split(micro=parts, accumulation=accumulation, world=world)
    else:
        assert micro is not None and accumulation is not None
        rest = size - micro * accumulation * world
        formula = f"micro_batch_size {micro} x gradient_accumulation_steps {accumulation} x {world} ranks"
        result = Split(micro=micro, accumulation=accumulation, world=world)
    if rest:
        raise UsageError(
            "train-batch",
            f"global_batch_size {size} cannot be made of {formula}",
            where="the batch section of the config",
            why="every update must see exactly the global batch, whatever the number of ranks",
            hint=_hint(size, world),
        )
    return result


def _hint(size: int, world: int) -> str:
    if size % world:
        ranks = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 64)
        return f"use a global_batch_size that {world} divides, or one of these numbers of ranks: {ranks}"
    share = size // world
    fits = ", ".join(str(m) for m in range(1, share + 1) if share % m == 0)
    return f"with {world} ranks, leave out gradient_accumulation_steps and take a micro_batch_size of: {fits}"
