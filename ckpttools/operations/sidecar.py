"""The manifest of a single file that a command writes: never beside a file that it does not describe.

File and manifest are two names, and no rename moves both. So: what is written is checked and its manifest
computed while it is still staged; an older manifest goes right before the file gets its name, the new one
comes right after. Whatever ends the program in between leaves a whole file without a manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.location import Location, Stored
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import local

if TYPE_CHECKING:
    from ckpttools.checks import SinksOf


class Sidecar:
    """`finish` before the destination appears, `write` afterwards."""

    def __init__(self, dst: Location, workers: int) -> None:
        from ckpttools import manifest
        from ckpttools.execute.staging import clear_stale

        self.dst, self.workers = dst, workers
        self.contents = b""
        if isinstance(dst, Stored):
            return
        self.place = local(manifest.beside(dst))
        with suppress(OSError):  # a folder that cannot be listed is explained where the file is written
            clear_stale(self.place)  # of a run that was killed between the two

    def finish(
        self,
        staged: Location,
        crcs: Mapping[Location, int],
        more: Callable[[bytes, Location], bytes],
        sinks: SinksOf | None = None,
    ) -> Mapping[str, bytes]:
        """Check the staged file by its headers, and make the manifest, to which `more` adds. The bytes that
        are read back are given to `sinks`.

        Raises CkptError: an error here is a defect of ckpttools. For a file in a store, returns the manifest.
        """
        from ckpttools import manifest
        from ckpttools.checks import manifest_of_staged
        from ckpttools.execute.removing import remove_file
        from ckpttools.execute.system import write_errors

        try:
            self.contents = manifest_of_staged(
                staged, self.dst.name, workers=self.workers, crc=crcs[staged], sinks=sinks
            )
        except CkptError as error:
            # what says that it cannot be used, rather than read, says that it is not what was meant
            if isinstance(error, UsageError) and error.id != "not-a-checkpoint":
                raise
            raise written_wrong(self.dst, error.message, error.id, error.where) from None
        self.contents = more(self.contents, manifest.beside(staged))
        if isinstance(self.dst, Stored):
            return {f"{self.dst.name}.{MANIFEST}": self.contents}
        with write_errors(self.dst):
            remove_file(self.place)
        return {}

    def write(self) -> list[str]:
        """Write the manifest; returns what to tell where that failed. The destination is whole either way."""
        from ckpttools.execute.small import replace

        try:
            replace(self.place, self.contents)
        except CkptError as error:
            return [
                f"{escape(self.dst.name)} is whole, but its manifest could not be written: "
                f"{escape(error.message, 300)}; ckpt verify --write-manifest writes it"
            ]
        return []


def written_wrong(dst: Location, problem: str, id: str, where: str) -> CkptError:
    return CkptError(
        "written-wrong",
        f"what was written does not verify: {problem} [{id}]",
        where=where,
        why="this is a defect of ckpttools; the source is unchanged",
        hint=f"do not use {escape(dst)}; report this with the output of ckpt inspect on the source",
    )
