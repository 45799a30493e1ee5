"""What a format is: how its checkpoints are recognised, read, planned and checked.

A format is a folder of this package whose `__init__` ends in `FORMAT`, and a line of `table.FORMATS`. They
are asked in the order of the table, and the first that knows a folder has it: what is special comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, UsageError
from ckpttools.findings import Finding
from ckpttools.location import Location, below
from ckpttools.plan import Plan
from ckpttools.siblings import UNFINISHED
from ckpttools.stores.files import entries, is_file, is_folder
from ckpttools.stores.links import refuse_outside
from ckpttools.stores.once import kept
from ckpttools.tensors import TensorRef
from ckpttools.training import Training
from ckpttools.tree import Path


class Folder(Struct, frozen=True, kw_only=True):
    """A folder by the names in it, sorted: all that a format is recognised by."""

    path: Location
    names: tuple[str, ...]
    files: frozenset[str]  # of `names`, regular files and links to one
    folders: frozenset[str]  # the same for folders

    @staticmethod
    def of(path: Location) -> Folder:
        """Raises UsageError where it cannot be listed, or where an upload to it is not finished."""
        return _folder(path)

    def inside(self, name: str) -> Folder:
        """One of `folders`. Raises CkptError for a link that leads out of the checkpoint."""
        refuse_outside(self.path / name)
        return Folder.of(self.path / name)


@kept
def _folder(path: Location) -> Folder:
    found = entries(path)
    if any(entry.name == UNFINISHED for entry in found):
        raise unfinished(path)
    return Folder(
        path=path,
        names=tuple(entry.name for entry in found),
        files=frozenset(entry.name for entry in found if is_file(entry)),
        folders=frozenset(entry.name for entry in found if is_folder(entry)),
    )


def unfinished(path: Location) -> UsageError:
    return UsageError(
        "upload-unfinished",
        "not a checkpoint yet: an upload to this folder was not finished",
        where=path,
        why="files of it are missing, or have not been read back",
        hint="wait for it, or run the command that writes it again: it goes on",
    )


class Found(Struct, frozen=True):
    """A checkpoint recognised: the tag folder, the file or the folder, and why this one, for people."""

    target: Location
    how: str


class Inner(Struct, frozen=True):
    """A folder that is a wrapping: the checkpoint is what the folder `name` in it means."""

    name: str
    how: str


class Copy(Struct, frozen=True, kw_only=True):
    """One tensor and its copy: names, and where they lie."""

    name: str
    tensor: TensorRef
    twin: str
    copy: TensorRef


OPTIMIZER_STATE = ("state[", "state.")  # labels in a file that is an optimizer's state_dict begin so


class Checked(Struct, frozen=True):
    """What the headers show: findings, the checkpoint if it can be put together, and its torch files.

    The rest is for the pass over the bytes, and for what it finds: tensors that lie in the files twice, the
    beginnings of labels in torch files whose tensors hold padding (anything may be there) or optimizer state
    without names, the file that has all weights, where the others are for the optimizer, and the files of
    optimizers that a framework saves beside the weights.
    """

    findings: list[Finding]
    checkpoint: Checkpoint | None
    files: list[TorchFile]
    copies: tuple[Copy, ...] = ()
    padded: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    optimizers: tuple[TorchFile, ...] = ()  # of files beside those of the format
    weights: Location | None = None


def _no_torch_files(checkpoint: Checkpoint) -> tuple[TorchFile | None, tuple[TorchFile, ...]]:
    return None, ()


class Places(Struct, frozen=True, kw_only=True):
    """Where the parts lie in what is written, if they are there."""

    weights: Path
    optimizer: Path
    scheduler: Path


class Format(Struct, frozen=True, kw_only=True, eq=False):
    """One format. `holds` and `recognise` go by names alone, `read` and `check` by headers.

    `recognise` raises CkptError for what is of this format and is broken, or is not read. `check` reports
    everything that it finds; it raises Unsupported for a layout whose weights cannot be put together, and
    CkptError where there is nothing to go on with.
    `plan` writes any Checkpoint, and its notes name what the format has no place for; `targets` are the names
    that `ckpt convert --to` has for it, one for each stage. `lacking` says what a folder that no format
    knows would need to be of this one, `beside` what is wrong with files of this format in a folder that
    another one's checkpoint is made of. `torch_files` of a checkpoint that was read are the one whose
    top level is the training code's, and those of the ranks' optimizers; where `read` opens no other file,
    `state` is what the former says of the Checkpoint's `training`. `copies` are those of other ranks that
    say the same as the first. `refuse_rank_local` raises Unsupported for one that this format read and whose
    optimizer state belongs to single ranks.
    """

    name: str
    holds: Callable[[Folder], bool]  # whether the folder itself is a checkpoint of this format
    names_it: Callable[[Location], bool]  # whether what is called so, and lies there, belongs to one
    recognise: Callable[[Folder], Found | Inner | None]
    recognise_file: Callable[[Location], Found | None]
    read: Callable[[Source], Checkpoint]
    check: Callable[[Source], Checked]
    lacking: Callable[[Folder], CkptError | None] = lambda folder: None
    is_part: Callable[[str], bool] = lambda name: False  # one of several files that make one checkpoint
    inner: Callable[[Location], Iterable[Location]] = lambda target: ()  # its folders within the target
    is_weights: Callable[[str], bool] = lambda name: False  # what only one checkpoint in a folder has
    beside: Callable[[Location, list[str]], Iterable[Finding]] = lambda folder, files: ()
    torch_files: Callable[[Checkpoint], tuple[TorchFile | None, tuple[TorchFile, ...]]] = _no_torch_files
    state: Callable[[TorchFile], Training] | None = None
    copies: Callable[[Checkpoint], tuple[TorchFile, ...]] = lambda checkpoint: ()
    refuse_rank_local: Callable[[Checkpoint], None] = lambda checkpoint: None
    plan: Callable[[Checkpoint, Layout], Plan] | None = None
    targets: tuple[str, ...] = ()
    pointer: str = "latest"  # the file in a save folder that names a tag
    tagged: bool = False  # lies in the tag folders of a save folder, one of which `--tag` names
    resumes: bool = True  # has a place for the optimizer's state in its own files
    weights_alone: bool = False  # reads no more, where the folder has an optimizer's state too
    keyed: bool = False  # a file whose weights lie under a key, which `--key` names
    keys: Callable[[Checkpoint, Layout], Places] | None = None  # of what `plan` makes


class Source(Struct, frozen=True, kw_only=True):
    """A checkpoint found. `root` is what belongs to it as a whole: the folder given, or `target` itself."""

    format: Format
    target: Location  # the tag folder, the file, or the folder
    root: Location
    how: str  # why this one, for people
    key: str | None = None  # under which the weights lie, where the user says so
    # the names of each group's parameters, where an optimizer numbers them and another run tells them
    order: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.key is not None and not self.format.keyed:
            raise UsageError(
                "bad-usage",
                "--key says where the weights lie in a single file of torch.save",
                where=self.target,
                why="this is no single file, or one whose weights have one place only",
                hint="leave it off",
            )

    @property
    def inner(self) -> str:
        """The target's path below the root, with `/`; "" where they are the same."""
        return "" if self.root == self.target else below(self.target, self.root)


def no_file(path: Location) -> None:
    """`recognise_file` of a format whose checkpoints are folders."""
