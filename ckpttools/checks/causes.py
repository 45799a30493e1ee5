"""One cause, one finding: what follows from another finding is counted there, and not listed.

A file that several checks stumble over is named once. Where a shard was swapped, or is of another save, every
tensor in it differs: the cause leads, "and N tensors differ in consequence".
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from ckpttools.errors import some
from ckpttools.findings import ERROR, Finding
from ckpttools.formats import Checked

# what makes a whole file the wrong one
CAUSES = ("rank-misplaced", "file-renamed", "step-mismatch")
# what is then to be expected of every tensor in it
TENSORS = ("master-mismatch", "moments-disagree", "negative-square", "copies-differ")
CONSEQUENCES = (*TENSORS, "mapping-mismatch", "partition-size", "padding-mismatch")
ALIKE = 3  # tensors of one file that are named one by one; more are one finding


def by_cause(findings: Iterable[Finding], checked: Checked | None = None) -> list[Finding]:
    """The findings without repetitions and consequences, otherwise in their order."""
    once = {(f.id, f.file, f.where, f.message): f for f in reversed(list(findings))}
    kept = list(reversed(once.values()))
    causes = [f for f in kept if f.id in CAUSES and f.severity == ERROR]
    wrong = dict.fromkeys(f.file for f in causes)
    for file in wrong:
        lead, *others = [f for f in causes if f.file == file]
        follows = [f for f in kept if f.file == file and (f.id in CONSEQUENCES or f in others)]
        tensors = len([f for f in follows if f.id in TENSORS])
        kept = [f for f in kept if f not in follows]
        also = [f.message for f in others]
        if tensors:
            also.append(f"{tensors} tensor{'s differ' if tensors > 1 else ' differs'} in consequence")
        if also:
            kept[kept.index(lead)] = replace(lead, message="; and ".join([lead.message, *also]))
    if checked is not None and checked.weights is not None:
        shards = {str(file.path) for file in checked.files} - {str(checked.weights)}
        kept = _foreign_model(kept, str(checked.weights), shards)
    return _alike(kept)


def _foreign_model(findings: list[Finding], model: str, shards: set[str]) -> list[Finding]:
    """Where the shards of all ranks differ from the file of the weights, it is the one of another save."""
    differ = [f for f in findings if f.id == "master-mismatch"]
    if len(shards) < 2 or {f.file for f in differ} != shards:
        return findings
    names = list(dict.fromkeys(f.where for f in differ))
    counts = [f for f in findings if f.id == "counter-mismatch" and f.file == model]
    said = f"; {counts[0].message}" if counts else ""
    shown = some(names)
    tensors = f"{len(names)} tensors of module ({shown}) are" if len(names) > 1 else f"{shown} in module is"
    lead = replace(
        differ[0],
        file=model,
        message=f"{tensors} not what the fp32 master weights of the {len(shards)} ranks are, rounded: the "
        f"model file is of another save, or was changed{said}",
    )
    rest = [f for f in findings if f not in differ and f not in counts[:1]]
    return [lead, *rest]


def _alike(findings: list[Finding]) -> list[Finding]:
    """Many tensors of one file that differ from another file's are one finding: it is not of the save."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.id in TENSORS and finding.where:
            groups.setdefault((finding.id, finding.file), []).append(finding)
    out: list[Finding] = []
    for finding in findings:
        group = groups.get((finding.id, finding.file), [])
        if len(group) <= ALIKE or finding not in group:
            out.append(finding)
        elif finding is group[0]:
            names = some([f.where for f in group])
            out.append(replace(finding, message=f"{len(group)} tensors ({names}); {finding.message}"))
    return out
