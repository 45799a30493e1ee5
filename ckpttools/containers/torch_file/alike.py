"""Reading a torch file by one that was read before and differs from it in numbers alone.

The files of one run hold the same names, shapes and objects: what changes from save to save are counters,
losses and learning rates, and the data. A file whose directory and whose pickle are those of the first, with
other numbers in those places, is read by comparing bytes; any other difference is for the whole reader.
"""

from __future__ import annotations

from collections.abc import Set

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.containers.archive import Directory, read_record
from ckpttools.containers.pickles import MAX_BYTES, Template
from ckpttools.containers.torch_file.views import TorchFile
from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.stores.files import opened

FRAMED = 4  # the protocol since which a pickle states lengths of its parts


class Alike(Struct, frozen=True):
    """What the files of a run have in common, from one of them."""

    file: TorchFile
    directory: Directory
    template: Template

    @classmethod
    def of(cls, file: TorchFile, counts: Set[str]) -> Alike | None:
        """None where the file is of no kind that is read so. `counts` are the keys of whole numbers that may
        differ: those that nothing else in the file depends on.
        """
        archive = file.archive
        if archive is None or archive.base or file.pickle.protocol >= FRAMED:
            return None
        with opened(file.path) as opened_file:
            directory = Directory.of(opened_file, archive)
            if directory is None:
                return None
            data = read_record(opened_file, archive.records["data.pkl"], MAX_BYTES)
        return cls(file, directory, Template.of(data, counts))

    def read(self, path: Location) -> TorchFile | None:
        """The header of a file that is alike, None for any other and for one that is damaged.

        Its nodes are shared with the first file's but for the way to the numbers. It is for its values: the
        archive is left out, and with it the checksums, and so is the table of storages.
        """
        try:
            with opened(path) as file:
                records = self.directory.of_other(file)
                if records is None or "data.pkl" not in records:
                    return None
                order = records.get("byteorder")
                if order is not None and read_record(file, order, 16) != b"little":
                    return None
                numbers = self.template.numbers(read_record(file, records["data.pkl"], MAX_BYTES))
        except CkptError:
            return None
        if numbers is None:
            return None
        return replace(
            self.file,
            path=path,
            value=self.template.filled(self.file.value, numbers),
            storages={},
            archive=None,
            borrowed=True,
            _views={},
        )
