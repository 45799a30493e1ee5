"""Files of torch.save, both serializations: their values as nodes, their tensors as byte ranges.

Zip (torch >= 1.6): records `data.pkl` (the pickle), `data/<key>` (one storage each), `version`,
`byteorder` and others. Legacy: five parts one after another in a plain file: pickles of a magic number,
the protocol 1001, system information, the value, the storage keys; then per key an int64 element count
and the storage's data. Source: torch/serialization.py.

A storage is a persistent id `('storage', <class>, key, location, numel)`; a tensor is a call of
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, with offsets in elements.
`read_torch_file` gives the tree of nodes (zip, legacy), `TorchFile.view` and `labelled` its tensors
(views), `write_torch_file` a file like it (write).
"""

from ckpttools.containers.torch_file.dangers import dangers_in, dangers_of
from ckpttools.containers.torch_file.read import is_torch_file, read_opened, read_torch_file
from ckpttools.containers.torch_file.storages import Storage
from ckpttools.containers.torch_file.views import FORMS, TorchFile, View, labelled, scalar, size, slots
from ckpttools.containers.torch_file.write import (
    new_storage,
    size_node,
    stored,
    tensor_node,
    write_torch_file,
)

__all__ = [
    "FORMS",
    "Storage",
    "TorchFile",
    "View",
    "dangers_in",
    "dangers_of",
    "is_torch_file",
    "labelled",
    "new_storage",
    "read_opened",
    "read_torch_file",
    "scalar",
    "size",
    "size_node",
    "slots",
    "stored",
    "tensor_node",
    "write_torch_file",
]
