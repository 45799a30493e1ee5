"""The files of a DeepSpeed tag folder, by name, whatever the stage.

    [bf16_]zero_pp_rank_{dp}_mp_rank_00_optim_states.pt     one per data-parallel rank
    mp_rank_00_model_states.pt                              ZeRO-1 and ZeRO-2
    zero_pp_rank_{dp}_mp_rank_00_model_states.pt            ZeRO-3

The number after `pp_rank` is the data-parallel rank, not padded: rank 10 sorts before rank 2 as text, so
ranks are always compared as numbers. `bf16_zero_pp_rank_0_optim_states.pt` without `mp_rank` appears only
in third-party documents; it is read and never written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ckpttools.checkpoint import FileRole
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.location import Location
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import entries, is_file, size_of

OPTIM = re.compile(
    r"(?P<prefix>bf16_|fp16_)?zero_pp_rank_(?P<dp>\d{1,6})(_mp_rank_(?P<mp>\d{2,6}))?(?P<bar>_?)optim_states\.pt"
)
MODEL_NAME = "mp_rank_00_model_states.pt"
MODEL = re.compile(r"mp_rank_(\d{2,6})_model_states\.pt")
STAGE3_MODEL = re.compile(r"zero_pp_rank_(?P<dp>\d{1,6})_mp_rank_(?P<mp>\d{2,6})_model_states\.pt")
EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim.*")
LAYER = re.compile(r"layer_\d+-model(_\d+-model)?_states\.pt")
PART = re.compile(r".*_states\.pt-\d+\.\d+")
# moments of torch's and DeepSpeed's optimizers, which are always as long as a rank's masters
FLAT = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "momentum_buffer"}
# of ZeRO-3's files: what is left of the flat vectors after the parameters is padding, which nobody cleared
PADDED = ("optimizer_state_dict", "frozen_param_fragments")
SWAPPED = "offloaded_tensors"  # NVMe offload: the masters and moments are in files of the swapper
# name -> kind, layout, what reading it would need
OTHER_LAYOUTS = (
    (EXPERT, "mixture-of-experts", "moe", "expert weights lie on expert-parallel ranks"),
    (LAYER, "pipeline-parallel", "pipeline", "each layer has files, and module is empty"),
    (PART, "FAST-writer", "deepspeed", "each torch file is split over several writers"),
    (re.compile(SWAPPED), "NVMe offload", "zero3", "masters and moments are in the swapper's own files"),
)


class TagFolder:
    """A tag folder's files. `optim` and `stage3` are by rank in numeric order, `others` regular files that
    ZeRO does not name, the manifest aside.
    """

    def __init__(self, folder: Location) -> None:
        """Raises Unsupported for pipeline, expert, tensor-parallel and split files."""
        listed = entries(folder)
        for entry in listed:
            refuse_other_layouts(folder, entry.name)
        self.folder = folder
        self.optim: dict[int, Location] = {}
        self.stage3: dict[int, Location] = {}
        self.models: list[Location] = []
        self.others: list[Location] = []
        self._styles: set[tuple[str, bool]] = set()
        for entry in listed:
            path = folder / entry.name
            if match := OPTIM.fullmatch(entry.name) or STAGE3_MODEL.fullmatch(entry.name):
                if match["mp"] not in (None, "00"):
                    raise tensor_parallel(folder)
                self._of_rank(int(match["dp"]), match, path)
            elif MODEL.fullmatch(entry.name):
                self.models.append(path)
            elif is_file(entry) and entry.name != MANIFEST:
                self.others.append(path)
        self.optim, self.stage3 = dict(sorted(self.optim.items())), dict(sorted(self.stage3.items()))
        if len(self.models) > 1:
            raise tensor_parallel(folder)

    def _of_rank(self, rank: int, match: re.Match[str], path: Location) -> None:
        if match.re is STAGE3_MODEL:
            self.stage3[rank] = path
            return
        if rank in self.optim:
            raise CkptError(
                "shard-duplicate",
                f"two files hold the optimizer states of dp rank {rank}",
                where=self.folder,
                why=f"{self.optim[rank].name} and {path.name} cannot both be right",
                hint="move the one that does not belong to this save out of the folder",
            )
        self.optim[rank] = path
        self._styles.add((match["prefix"] or "", not match["bar"]))

    @property
    def style(self) -> tuple[str, bool]:
        """The prefix of the optimizer files ("bf16_" or ""), and whether they lack the underscore before
        `optim_states` (DeepSpeed up to 0.3.13). Raises CkptError where they are named in several styles.
        """
        if len(self._styles) > 1:
            raise CkptError(
                "shard-mixed",
                "the optimizer files are named in several styles",
                where=self.folder,
                why="they come from several saves: DeepSpeed names them by the engine's dtype",
                hint="keep the files of one save and move the others out of the folder",
            )
        return next(iter(self._styles))


def optim_name(rank: int, prefix: str, *, old: bool = False) -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00{'' if old else '_'}optim_states.pt"


def refuse_other_layouts(folder: Location, name: str) -> None:
    """Raise Unsupported where a file's name shows pipeline, expert, split or swapped files."""
    for pattern, kind, layout, need in OTHER_LAYOUTS:
        if pattern.fullmatch(name):
            raise _other(folder, kind, layout, f"{need} ({name})")


def experts(where: Location, why: str) -> Unsupported:
    return _other(where, "mixture-of-experts", "moe", why)


def _other(where: Location, kind: str, layout: str, why: str) -> Unsupported:
    return Unsupported(
        "layout-unsupported",
        f"a {kind} checkpoint, which is recognised but not read yet",
        where=where,
        why=why,
        hint="ckpt verify checks its files one by one, and ckpt extract takes the weights of one file",
        layout=layout,
    )


def tensor_parallel(folder: Location) -> CkptError:
    return Unsupported(
        "layout-unsupported",
        "a tensor-parallel checkpoint (several mp_rank files), which is recognised but not read yet",
        where=folder,
        why="each mp rank holds a slice of every weight; joining them needs the model's parallel layout",
        hint="merge it with the training framework that sliced it",
        layout="tensor-parallel",
    )


def role_of(file: TorchFile, role: str) -> FileRole:
    return FileRole(path=file.path, nbytes=file.size, role=role, dangers=file.dangers)


def roles_of_others(paths: Iterable[Location]) -> Iterator[FileRole]:
    return (FileRole(path=path, nbytes=size_of(path), role="not part of the ZeRO layout") for path in paths)


def unchecked(files: Sequence[TorchFile]) -> Iterator[str]:
    """Notes of the files that have no checksums."""
    without = [file.path.name for file in files if file.archive is not None and not file.has_checksums]
    legacy = [file.path.name for file in files if file.archive is None]
    if without:
        yield f"saved without checksums (compute_crc32=False): {', '.join(map(escape, without))}"
    if legacy:
        yield f"in torch's older serialization, which has no checksums: {', '.join(map(escape, legacy))}"
