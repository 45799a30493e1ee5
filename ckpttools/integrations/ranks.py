"""What rank 0 finds out, on every rank: an error that only one of them had would leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ckpttools.trainer.failures import as_error, from_fields, to_fields

T = TypeVar("T")


def everywhere(function: Callable[[], T]) -> T:
    """Rank 0 calls it, its result or its error is that of all; every rank has to call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return function()
    box: list[Any] = [None, None]
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as error:  # whatever it is: a full disk, a link in circles
            problem, box[1] = error, to_fields(as_error(error))
    dist.broadcast_object_list(box, src=0)
    if problem is not None:
        raise problem
    if box[1] is not None:
        raise from_fields(box[1])
    result: T = box[0]
    return result
