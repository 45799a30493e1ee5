"""A file within a file: torch files one after the other, as torch's distributed checkpoints have them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from support import as_torch

from ckpttools.containers.torch_file import read_opened
from ckpttools.errors import CkptError
from ckpttools.stores.files import opened


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_in_a_file(tmp_path: Path, legacy: bool) -> None:
    tensors = [torch.arange(5.0), torch.arange(6).reshape(2, 3), torch.randn(4, 4).T]
    data, places = b"noise", []
    for tensor in tensors:
        buffer = io.BytesIO()
        torch.save(tensor, buffer, _use_new_zipfile_serialization=not legacy)
        places.append((len(data), buffer.tell()))
        data += buffer.getvalue()
    path = tmp_path / "items"
    path.write_bytes(data + b"noise")
    with opened(path) as file:
        for tensor, place in zip(tensors, places, strict=True):
            item = read_opened(file.window(*place))
            view = item.view(item.value)
            assert view is not None and as_torch(view.ref).equal(tensor)
            for check in item.checks():
                assert check.source.end <= sum(place)
        with pytest.raises(CkptError) as caught:
            read_opened(file.window(places[0][0], places[0][1] + 1))
        assert caught.value.where == str(path)
        with pytest.raises(CkptError):
            file.window(3, len(data) + 6)
        inner = file.window(2, 3).window(1, 2)
        assert inner.head(9) == b"se" and inner.range(0, 2).start == 3
