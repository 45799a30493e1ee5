"""The zip container of torch.save, read strictly and written as torch writes it.

Layout (torch's PyTorchStreamWriter over miniz; PKWARE APPNOTE 6.3 for the fields):

    for each record   local header, name, extra ("FB" padding so that the data starts at a multiple of 64),
                      data (stored), data descriptor (16 bytes, 24 for records that are larger than or
                      begin behind 4 GiB; none for empty records)
    central directory one entry per record, with the CRC-32
    zip64 end record, zip64 locator, end record; nothing after it

A record that is larger than or begins behind 4 GiB has a zip64 extra, in its header as in the directory.
Record names are `<root>/<name>`, where the root is the file's stem at the time of saving. A CRC-32 of 0
for a record that is not empty means that it was saved without checksums (`compute_crc32=False`).
"""

from ckpttools.containers.archive.alike import Directory
from ckpttools.containers.archive.directory import damaged, end_nbytes
from ckpttools.containers.archive.layout import (
    BIG,
    CRC_AT,
    DESCRIPTOR_MAGIC,
    END,
    SERIALIZATION_ID,
    Archive,
    Record,
    entry_of,
)
from ckpttools.containers.archive.profile import around, belong_together, unexplained
from ckpttools.containers.archive.read import ends_like_zip, is_zip, read_archive, read_record
from ckpttools.containers.archive.write import archive_segments

__all__ = [
    "BIG",
    "CRC_AT",
    "DESCRIPTOR_MAGIC",
    "END",
    "SERIALIZATION_ID",
    "Archive",
    "Directory",
    "Record",
    "archive_segments",
    "around",
    "belong_together",
    "damaged",
    "end_nbytes",
    "ends_like_zip",
    "entry_of",
    "is_zip",
    "read_archive",
    "read_record",
    "unexplained",
]
