"""Real text as tokens: one token per byte and one between documents, cut into equal samples."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from array import array
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.trainer.config import Data

END_OF_DOCUMENT = 256  # after the 256 byte values
VOCAB_SIZE = 257


class Samples(Struct, frozen=True, kw_only=True):
    """Token ids (int16), and the numbers of the samples to train on and of those held out."""

    tokens: array[int]
    sequence_length: int
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    sha256: str  # of tokens and sequence length: equal means that a position means the same sample

    def sample(self, number: int) -> array[int]:
        """The tokens of one sample."""
        return self.tokens[number * self.sequence_length : (number + 1) * self.sequence_length]


def read(data: Data, global_batch_size: int) -> Samples:
    """Read up to `max_bytes` of text; hold out samples at even distances. Raises UsageError."""
    tokens = array("h")
    left = data.max_bytes
    for document in _documents(data):
        tokens.extend(document[:left])  # iterating over bytes gives 0..255
        tokens.append(END_OF_DOCUMENT)
        left -= len(document)
        if left <= 0:
            break
    count = len(tokens) // data.sequence_length
    if count - data.validation_samples < global_batch_size:
        raise UsageError(
            "train-data",
            f"{len(tokens)} bytes of text make {count} samples; {data.validation_samples} are held out and"
            f" one update needs {global_batch_size}",
            where=data.source,
            why="an epoch would hold no update",
            hint="give more text, raise data.max_bytes, or lower data.sequence_length",
        )
    held_out = {i * count // data.validation_samples for i in range(data.validation_samples)}
    digest = hashlib.sha256(f"train {data.sequence_length} {data.validation_samples} ".encode())
    digest.update(tokens.tobytes())
    return Samples(
        tokens=tokens,
        sequence_length=data.sequence_length,
        train=tuple(i for i in range(count) if i not in held_out),
        held_out=tuple(sorted(held_out)),
        sha256=digest.hexdigest(),
    )


def _documents(data: Data) -> Iterator[bytes]:
    if data.source == "stdlib":
        # The top level only: the packages below it differ between distributions (tests, idlelib).
        for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            yield source.read_bytes()
        return
    path = Path(data.source.removeprefix("path:")).expanduser()
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path, data.text_key)
        else:
            with path.open("rb") as file:
                yield file.read(data.max_bytes)
    except OSError as problem:
        raise UsageError(
            "train-data",
            f"cannot read the text: {problem.strerror}",
            where=path,
            why="there is nothing to train on",
            hint="set data.source to stdlib, or to path:FILE of a .txt or .jsonl that every rank can read",
        ) from problem


def _json_lines(path: Path, key: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[key]
                yield text.encode("utf-8", "surrogatepass")
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise UsageError(
                    "train-data",
                    f'line {number} is not a JSON object with text under "{key}"',
                    where=path,
                    why="leaving the line out would shift every sample after it",
                    hint="correct the line, or set data.text_key to the key that holds the text",
                ) from problem
