"""Tensors as numpy arrays: mapped from the file where they lie in one piece, else read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ckpttools.passes.read import load
from ckpttools.stores.disk import binary
from ckpttools.stores.files import bytes_of
from ckpttools.tensors import ByteRange, TensorRef
from ckpttools.values import Array, numpy_dtype


def array(ref: TensorRef) -> Array:
    """The tensor, read-only; bfloat16 and float8 are ml_dtypes' types.

    An `np.memmap` reads its pages when they are touched: it holds as long as nobody changes the file. Raises
    CkptError where the file may not be read or ends too early.
    """
    match ref.chunks:
        case (ByteRange(Path() as path, start, nbytes),) if nbytes == ref.nbytes and nbytes:
            # touching a mapping past the end would end the process
            bytes_of(ByteRange(path, start + nbytes - 1, 1))
            with binary(path) as file:
                flat = np.memmap(file, numpy_dtype(ref.dtype), mode="r", offset=start, shape=(ref.numel,))
            return flat.reshape(ref.shape)
    found = load(ref)
    found.flags.writeable = False
    return found
