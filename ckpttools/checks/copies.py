"""Every copy of the same fact: the 16-bit weights beside DeepSpeed's, and the counters of all files.

    checkpoint-200/   deepspeed/, hf_model/ and training_info.json: a bundle; module, hf_model and the client
                      state say the same thrice
    checkpoint-20/    the Trainer's model.safetensors or adapter_model.safetensors beside DeepSpeed's tag
                      folder, and its trainer_state.json
    *.ckpt, ...       one file's framework counts updates as DeepSpeed's own counter beside it does

The copies are compared bit by bit by the pass over the bytes, which reads them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import cast

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields, jsons
from ckpttools.errors import CkptError
from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.formats import FORMATS, Folder, Format, Source
from ckpttools.formats.format import Copy
from ckpttools.frameworks import STATED
from ckpttools.location import Location
from ckpttools.stores.files import is_file, is_folder
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, ByteRange

BUNDLE, MODEL = "deepspeed", "hf_model"
STEPS = ("global_step", "step", "iteration", "iter")
KEYS = (*STEPS, "epoch", "train_loss", "val_loss")


def check_copies(source: Source, found: Checkpoint) -> tuple[list[Finding], list[Copy]]:
    """What the headers of the copies show, and the tensors whose bytes are to be compared."""
    findings = [*_counters(source, found), *_stated(source, found)]
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
    info = next((name for name in STATED if is_file(path / name)), None)
    if is_folder(path / MODEL) and info and not is_folder(path / BUNDLE):
        yield Finding(
            id="bundle-incomplete",
            severity=ERROR,
            file=str(path),
            where=BUNDLE,
            message=f"{MODEL}/ and {info} are here, and {BUNDLE}/ is not: no training can be resumed",
            hint=f"copy {BUNDLE}/ from where the checkpoint was saved; the weights are in {path / MODEL}",
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
    names = {_plain(name): name for name in found.tensors}
    place = str(folder / other.files[0].path.name if other.files else folder)
    for name, copy in other.tensors.items():
        own = name if name in found.tensors else names.get(_plain(name))
        if own is None:
            continue
        tensor = found.tensors[own]
        if tensor.shape != copy.shape:
            message = f"is {list(copy.shape)}, and {list(tensor.shape)} in DeepSpeed's module"
            findings.append(_differs(place, name, message))
        elif tensor.dtype is copy.dtype or tensor.dtype.itemsize != copy.dtype.itemsize:
            pairs.append(Copy(name=name, tensor=copy, twin=f"{own} of DeepSpeed's module", copy=tensor))
    if not pairs and not findings and other.tensors:
        if any(_plain(name) in names for name in other.tensors):
            return [], []  # fp16 beside bf16: neither holds what the other does
        message = f"none of its {len(other.tensors)} tensors is in DeepSpeed's module: of another model"
        findings.append(_differs(place, next(iter(other.tensors)), message))
    return findings, pairs


def check_rounded(copies: Iterable[Copy]) -> Iterator[Finding]:
    """Copies of another type, which the pass does not compare: fp32, rounded, is its copy of 16 bits.

    Both are read once more. Nothing where a file cannot be read: the pass says so.
    """
    from ckpttools.passes.read import Reader, blocks  # numpy: of no use to headers
    from ckpttools.values import BLOCK_NBYTES, same_after_cast

    differ: list[Copy] = []
    compared = 0
    try:
        with Reader() as reader:
            for copy in copies:
                narrow, wide = sorted((copy.tensor, copy.copy), key=lambda ref: ref.dtype.itemsize)
                plain = all(isinstance(chunk, ByteRange) for ref in (narrow, wide) for chunk in ref.chunks)
                if not plain or wide.dtype is not FLOAT32 or narrow.dtype not in (BFLOAT16, FLOAT16):
                    continue
                compared += 1
                long = blocks(cast(tuple[ByteRange, ...], wide.chunks), FLOAT32, BLOCK_NBYTES, reader)
                short = blocks(
                    cast(tuple[ByteRange, ...], narrow.chunks), narrow.dtype, BLOCK_NBYTES // 2, reader
                )
                pairs = zip(long, short, strict=True)
                if any(same_after_cast(a, b, narrow.dtype) is not None for a, b in pairs):
                    differ.append(copy)
    except CkptError:
        return
    if differ:
        chunk = differ[0].tensor.chunks[0]
        assert isinstance(chunk, ByteRange)
        what = f"{len(differ)} of {compared} tensors are, rounded, not their copies in DeepSpeed's module"
        yield _differs(str(chunk.path), differ[0].name, what)


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
    path = next((p for name in STATED if is_file(p := source.root / name)), None)
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


def _counters(source: Source, found: Checkpoint) -> Iterator[Finding]:
    """The framework's count of updates against DeepSpeed's own."""
    if not source.format.tagged:
        return
    try:
        training = frameworks.read(source, found)
    except CkptError:
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
