"""Every copy of the same fact: the 16-bit weights beside DeepSpeed's, and the counters of all files.

    checkpoint-200/   deepspeed/, hf_model/ and training_info.json: a bundle; module, hf_model and the client
                      state say the same thrice
    checkpoint-20/    the Trainer's model.safetensors or adapter_model.safetensors beside DeepSpeed's tag
                      folder, and its trainer_state.json
    *.ckpt, ...       one file's framework counts updates as DeepSpeed's own counter beside it does

The copies are compared bit by bit by the pass over the bytes, which reads them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import cast

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields, jsons
from ckpttools.errors import CkptError, some
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.formats import FORMATS, Folder, Format, Source
from ckpttools.formats.buffers import is_buffer
from ckpttools.formats.format import Copy
from ckpttools.location import Location
from ckpttools.stores.files import is_file, is_folder
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, ByteRange, TensorRef
from ckpttools.training import Training

BUNDLE, MODEL = "deepspeed", "hf_model"
ADAPTER_CONFIG = "adapter_config.json"
STEPS = ("global_step", "step", "iteration", "iter")
KEYS = (*STEPS, "epoch", "train_loss", "val_loss")


def check_copies(source: Source, found: Checkpoint, training: Training) -> tuple[list[Finding], list[Copy]]:
    """What the headers of the copies show, and the tensors whose bytes are to be compared."""
    findings = [*_counters(source, training), *_stated(source, found)]
    copies: list[Copy] = []
    for folder, model in _models(source) if source.format.tagged else ():
        try:
            other = model.read(Source(format=model, target=folder, root=folder, how=""))
        except CkptError:
            continue  # reported by whoever checks the files beside the checkpoint
        more, pairs = _weights(found, folder, other)
        findings += more
        copies += pairs
    return findings, copies


def missing_state(path: Location) -> Iterator[Finding]:
    """A bundle whose deepspeed/ is gone reads as a model: its optimizer state and shards are lost."""
    info = next((name for name in frameworks.STATED if is_file(path / name)), None)
    if is_folder(path / MODEL) and info and not is_folder(path / BUNDLE):
        yield Finding(
            id="bundle-incomplete",
            severity=ERROR,
            file=str(path),
            where=BUNDLE,
            message=f"{MODEL}/ and {info} are here, and {BUNDLE}/ is not: no training can be resumed",
            hint=f"copy {BUNDLE}/ from where the checkpoint was saved; the weights are in {path / MODEL}",
        )


def unfinished(*paths: Location) -> Iterator[Finding]:
    """A save that its framework's own marks call not finished: of the first of these folders that has one."""
    if path := next(filter(frameworks.unfinished, paths), None):
        yield Finding(
            id="save-unfinished",
            severity=ERROR,
            file=str(path),
            message="the save was not finished",
            why=frameworks.unfinished(path) or "",
            hint="use an older checkpoint; the weights may be whole: ckpt extract reads them",
        )


def _models(source: Source) -> Iterator[tuple[Location, Format]]:
    """The folders beside a tag folder that hold the model once more, and their formats."""
    for folder in (source.root / MODEL, source.root):
        if folder != source.target and is_folder(folder):
            listed = Folder.of(folder)
            found = (format for format in FORMATS if not format.tagged and format.holds(listed))
            yield from ((folder, format) for format in islice(found, 1))


def _weights(found: Checkpoint, folder: Location, other: Checkpoint) -> tuple[list[Finding], list[Copy]]:
    """Each tensor of the model folder with the one of the checkpoint that has its name."""
    findings: list[Finding] = []
    pairs: list[Copy] = []
    own = _same_names(found.tensors, other.tensors)
    for name, mine in own.items():
        tensor, copy = found.tensors[mine], other.tensors[name]
        if tensor.shape != copy.shape:
            message = f"is {list(copy.shape)}, and {list(tensor.shape)} in DeepSpeed's module"
            findings.append(_differs(_file(copy, folder), name, message))
        else:
            pairs.append(Copy(name=name, tensor=copy, twin=f"{mine} of DeepSpeed's module", copy=tensor))
    part = is_file(folder / ADAPTER_CONFIG)  # an adapter's own names and few of the weights, as PEFT has it
    if other.tensors and not own and not part:
        first, copy = next(iter(other.tensors.items()))
        message = f"none of its {len(other.tensors)} tensors is in DeepSpeed's module: of another model"
        return [_differs(_file(copy, folder), first, message)], []
    lost = [] if part or len(own) < len(other.tensors) else _lost(found, set(own.values()))
    if lost:
        findings.append(
            Finding(
                id="tensor-missing",
                severity=WARNING,
                file=str(folder),
                where=lost[0],
                message=f"{len(lost)} of the {len(found.tensors)} tensors of DeepSpeed's module are not in "
                "this copy of the model",
                hint="whoever loads the copy makes them anew: take the weights with ckpt extract",
            )
        )
    unlike = [pair.name for pair in pairs if not (_same_bytes(pair) or _rounded(pair))]
    unlike += [name for name in other.tensors if name not in own]
    if unlike:
        findings.append(
            Finding(
                id="copies-not-compared",
                severity=INFO,
                file=str(folder),
                message=f"{len(unlike)} of {len(other.tensors)} tensors are not compared with DeepSpeed's "
                f"module, of another type or name there: {some(unlike, 3)}",
            )
        )
    return findings, pairs


def _file(tensor: TensorRef, folder: Location) -> str:
    return next((str(chunk.path) for chunk in tensor.chunks if isinstance(chunk, ByteRange)), str(folder))


def _same_names(module: Mapping[str, TensorRef], copies: Mapping[str, TensorRef]) -> dict[str, str]:
    """The names of the copies -> those in the module: the same, or the same at their ends, where a library
    saves its models under another prefix, and only one of the module's tensors of that shape ends so.
    """
    names = {_plain(name): name for name in module}
    own: dict[str, str] = {}
    for name in copies:
        found = name if name in module else names.get(_plain(name))
        if found is not None:
            own[name] = found
    if len(own) == len(copies):
        return own
    ends: dict[str, list[str]] = {}
    for name in module.keys() - own.values():
        for end in _ends(_plain(name)):
            ends.setdefault(end, []).append(name)
    for name in copies.keys() - own.keys():
        longest = next((ends[end] for end in _ends(_plain(name)) if end in ends), [])
        alike = [each for each in longest if module[each].shape == copies[name].shape]
        if len(alike) == 1:
            own[name] = alike[0]
    taken = Counter(own.values())
    return {name: own[name] for name in copies if name in own and taken[own[name]] == 1}


def _ends(name: str) -> Iterator[str]:
    """What a name ends with, the longest first, down to a module and its parameter."""
    parts = name.split(".")
    return (".".join(parts[at:]) for at in range(len(parts) - 1))


def _lost(found: Checkpoint, copied: Collection[str]) -> list[str]:
    """The weights of which there is no copy, under none of their names. Buffers need not be saved."""
    tied = {found.shared.get(name, name) for name in copied}
    return [
        name
        for name, ref in found.tensors.items()
        if name not in found.buffers and not is_buffer(name, ref) and found.shared.get(name, name) not in tied
    ]


def _same_bytes(pair: Copy) -> bool:
    """Whether the pass compares them."""
    one, other = pair.tensor, pair.copy
    single = all(len(ref.chunks) == 1 and isinstance(ref.chunks[0], ByteRange) for ref in (one, other))
    return one.dtype is other.dtype and single


def _rounded(pair: Copy) -> bool:
    """Whether `check_rounded` compares them."""
    plain = all(isinstance(chunk, ByteRange) for ref in (pair.tensor, pair.copy) for chunk in ref.chunks)
    kinds = {pair.tensor.dtype, pair.copy.dtype}
    return plain and len(kinds) == 2 and kinds < {FLOAT32, BFLOAT16, FLOAT16}


def check_rounded(copies: Iterable[Copy]) -> Iterator[Finding]:
    """Copies of another type, which the pass does not compare: fp32, rounded, is its copy of 16 bits; fp16
    and bf16 can be the same numbers, rounded.

    Both are read once more. Nothing where a file cannot be read: the pass says so.
    """
    from ckpttools.passes.read import Reader, blocks  # numpy: of no use to headers
    from ckpttools.values import BLOCK_NBYTES, same_after_cast, same_before_cast

    differ: list[Copy] = []
    compared = 0
    try:
        with Reader() as reader:
            for copy in filter(_rounded, copies):
                wide, narrow = sorted((copy.tensor, copy.copy), key=lambda ref: -ref.dtype.itemsize)
                compared += 1
                size = BLOCK_NBYTES // FLOAT32.itemsize
                long, short = (
                    blocks(
                        cast(tuple[ByteRange, ...], ref.chunks), ref.dtype, size * ref.dtype.itemsize, reader
                    )
                    for ref in (wide, narrow)
                )
                for a, b in zip(long, short, strict=True):
                    if wide.dtype is FLOAT32:
                        same = same_after_cast(a, b, narrow.dtype) is None
                    else:
                        same = same_before_cast(a, wide.dtype, b, narrow.dtype)
                    if not same:
                        differ.append(copy)
                        break
    except CkptError:
        return
    if differ:
        what = f"{len(differ)} of {compared} tensors are, rounded, not their copies in DeepSpeed's module"
        yield _differs(_file(differ[0].tensor, Path()), differ[0].name, what)


def _plain(name: str) -> str:
    """A name as the model has it: PEFT names its adapter in module ("default"), and not in its files."""
    return name.removeprefix("module.").replace(".default.", ".")


def _differs(file: str, name: str, message: str) -> Finding:
    return Finding(
        id="copies-differ",
        severity=ERROR,
        file=file,
        where=name,
        message=message,
        hint="the folder was put together from two saves: copy it again from one",
    )


def _stated(source: Source, found: Checkpoint) -> Iterator[Finding]:
    """The framework's own file against the client state of DeepSpeed's model file, key by key."""
    path = next((p for name in frameworks.STATED if is_file(p := source.root / name)), None)
    if not source.format.tagged or path is None:
        return
    try:
        info: Mapping[str, object] = jsons.read(path, allow_nan=True)
    except CkptError:
        return  # reported by whoever checks the files beside the checkpoint
    where = {path: field for field, path in found.training.keys.items()}
    for key in KEYS:
        kept = getattr(found.training, where[key,]) if (key,) in where else found.client.get(key)
        said, own = info.get(key), fields.number(kept)
        if isinstance(said, int | float) and own is not None and said != own and said == said:
            yield Finding(
                id="counter-mismatch",
                severity=ERROR if key in STEPS else WARNING,
                file=str(path),
                where=key,
                message=f"is {said:g}, and {own:g} in DeepSpeed's model file",
                hint="the files are of different saves: copy the folder again from one",
            )


def _counters(source: Source, training: Training) -> Iterator[Finding]:
    """The framework's count of updates against DeepSpeed's own."""
    if not source.format.tagged:
        return
    counts = {c.name: c for c in training.counters if c.role == "position" and c.unit == "update"}
    own, other = counts.get("global_steps"), counts.get("global_step")
    if own is None or other is None or other.repeats != 1:
        return
    if own.value + own.offset != other.value + other.offset:
        yield Finding(
            id="counter-mismatch",
            severity=WARNING,
            file=str(other.places[0].file),
            where=str(other.places[0]),
            message=f"{training.framework} counts {other.value} updates, DeepSpeed {own.value}",
            hint="the files are of different saves, or one of them was edited: a resume goes on with both",
        )
