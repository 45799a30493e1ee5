"""Is a checkpoint whole? Headers, the files against each other, and every byte.

`verify` reports everything that it finds instead of stopping at the first problem; `quick` leaves the
bytes of the tensors alone. `check_before_use` is for commands that write from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ckpttools import manifest
from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.checks.beside import check_beside, check_last_checkpoint, check_pointer
from ckpttools.checks.causes import TENSORS, by_cause
from ckpttools.checks.changing import Watch
from ckpttools.checks.copies import check_copies, check_rounded, missing_state, unfinished
from ckpttools.checks.headers import check_headers
from ckpttools.checks.held import KEYS, Held, check_held, holds, lacks
from ckpttools.checks.incidents import check_incidents
from ckpttools.checks.keys import check_keys
from ckpttools.checks.manifests import check_manifest, entry_of, ranges_of, read_back, stated
from ckpttools.checks.manifests import describe as describe_files
from ckpttools.checks.rates import check_rates
from ckpttools.checks.settings import check_settings
from ckpttools.checks.untouched import check_untouched, glance
from ckpttools.checks.verdict import Verdict, refused
from ckpttools.containers.safetensors import read_safetensors
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.findings import ERROR, INFO, Finding, of_error, raised
from ckpttools.formats import Checked, Source, locate
from ckpttools.formats.files import dangers_at
from ckpttools.formats.format import Copy
from ckpttools.formats.unjoined import IN_PARTS, in_parts
from ckpttools.location import Location
from ckpttools.plan import SourceCheck
from ckpttools.progress import Progress
from ckpttools.stores.files import is_folder, stat
from ckpttools.stores.links import within
from ckpttools.training import Training

if TYPE_CHECKING:
    from ckpttools.checks.contents import Passing
    from ckpttools.checks.subset import Subset
    from ckpttools.passes.hashes import Sinks
    from ckpttools.passes.run import Digest

Bar = Callable[[int], AbstractContextManager[Progress | None]]  # total bytes -> a progress bar
SinksOf = Callable[[Checkpoint], "Sinks"]  # who wants the bytes of what was read from its headers

__all__ = ["Finding", "Verdict", "check_before_use", "manifest_of_staged", "refused", "verify"]


def verify(
    path: Location,
    tag: str | None = None,
    *,
    quick: bool = False,
    describe: bool = False,
    require: Collection[str] = (),
    subset: Subset | None = None,
    workers: int = 0,
    bar: Bar | None = None,
    key: str | None = None,
    crcs: Mapping[Location, int] | None = None,
    passing: Passing | None = None,
    sinks: SinksOf | None = None,
    glancing: bool = False,
) -> Verdict:
    """Check the one checkpoint that `path` means; `describe` it also for a manifest, from the same bytes.

    What of `require` (held.KEYS) it lacks is an error. `subset` is the part of the bytes that is read.
    `key` is where the weights of a single file lie, if under an unusual name. `crcs` are the CRC-32s of files
    that were just written: with them, what is read to `describe` is held against what was written; `passing`
    reads the bytes. The bytes that are read to `describe` what was written are given to `sinks`, too.
    `glancing`, a `quick` check looks at a few bytes of the moments.

    Raises UsageError or Unsupported (exit code 2) where there is nothing that can be checked, also where the
    files change meanwhile ("checkpoint-changing") or are not what was written ("write-failed"); damage is
    reported in the verdict.
    """
    watch = Watch(path)
    try:
        verdict = _verify(
            path,
            tag,
            watch,
            quick,
            describe,
            require,
            key,
            subset,
            workers,
            bar,
            crcs,
            passing,
            sinks,
            glancing,
        )
    except (CkptError, OSError) as error:
        raise watch.explain(error) from error
    watch.refuse(verdict.findings)
    return verdict


def _verify(
    path: Location,
    tag: str | None,
    watch: Watch,
    quick: bool,
    describe: bool,
    require: Collection[str],
    key: str | None,
    subset: Subset | None,
    workers: int,
    bar: Bar | None,
    crcs: Mapping[Location, int] | None,
    passing: Passing | None,
    sinks: SinksOf | None,
    glancing: bool,
) -> Verdict:
    whole = True
    try:
        source = replace(locate(path, tag), key=key)
    except Unsupported as reason:
        if reason.id != "layout-unsupported":
            raise
        # recognised by what the folder holds: universal and distributed checkpoints
        source, whole = in_parts(path, reason), False
    except CkptError as error:
        dangerous = [] if is_folder(path) else dangers_at(path)
        if error.exit_code != 1 and not dangerous:
            raise
        return refused(path, error, dangerous)
    watch.below(source.target)
    with within(path):
        pointers = [*check_last_checkpoint(path), *(check_pointer(path, source) if tag is None else ())]
    held: Held = {}
    state = Training()
    copies: list[Copy] = []
    with within(source.root):
        checked = check_headers(source, in_parts=True, wanted="few" if quick and crcs is None else "each")
        findings, found = checked.findings, checked.checkpoint
        whole = whole and all(finding.id != IN_PARTS for finding in findings)
        beside = check_beside(source, checked)
        findings += [*beside.findings, *pointers]
        checked = replace(checked, optimizers=tuple(beside.optimizers))
        if found is not None:
            ids = {finding.id for finding in findings}
            findings += [*check_keys(found), *(check_incidents(source, found, ids) if whole else ())]
            held, state = dict.fromkeys(KEYS), found.training
            if whole:
                held, state, damage = holds(source, found)
                # what a listing calls damaged is not good here; the checks say more of what they know, too
                if damage is not None and not any(finding.severity == ERROR for finding in findings):
                    findings.append(of_error(damage))
            findings += check_held(found, held, require)
            if whole:
                rates = list(check_rates(state))
                findings += [
                    *rates,
                    *check_settings(source, found, state, rates=bool(rates)),
                ]
                differ, copies = check_copies(source, found, state)
                findings += [*differ, *missing_state(path), *unfinished(source.root, path)]
            found = replace(found, checks=(*found.checks, *beside.checks))
            checked = replace(checked, checkpoint=found)
        nbytes = 0
        said = stated(source.target)
        digests: Mapping[Location, Digest] = {}
        own = manifest.own_files(source.target, source.format.inner(source.target))
        if crcs is not None:
            wanted = sinks(found) if sinks is not None and found is not None else None
            digests = read_back(
                ranges_of([*own, *crcs], found, checked.files), crcs, workers, wanted, passing
            )
        elif not quick or describe:
            from ckpttools.checks.contents import check_contents, tasks_of  # numpy: of no use to headers

            tasks = [] if quick else tasks_of(checked, copies)
            hashed = [p for p in own if describe or said.covers(p)]
            if subset is not None and found is not None:
                tasks, chosen = subset.of(tasks, found.checks)
                found = replace(found, checks=chosen)
                checked = replace(checked, checkpoint=found)
                hashed = subset.take(hashed, [stat(p).size for p in hashed])
            nbytes = sum(task.nbytes for task in tasks)
            hashes = ranges_of(hashed, found, checked.files)
            with bar(nbytes) if bar else nullcontext() as progress:
                more, digests = check_contents(checked, tasks, hashes, workers, progress, passing)
            findings += more
            if found is not None and not quick:
                findings += check_untouched(found, state)
                findings += check_rounded(copies) if subset is None else ()
        if found is not None and quick and glancing:
            findings += glance(found, state)
        findings += check_manifest(source.target, own, said, digests)
        described = {n: entry_of(p, digests) for p, n in own.items() if p in digests} if describe else None
        contents = b"" if described is None else manifest.dump(described, output=crcs is not None)
    findings = by_cause(sorted(findings, key=lambda f: (f.severity != ERROR, f.severity == INFO)), checked)
    return Verdict(
        path=path,
        format=found.layout.format if found else source.format.name,
        state=state,
        findings=(*findings, *_rescue(checked, findings, quick=quick, workers=workers)),
        nbytes_read=nbytes,
        manifest=None if described is None else (manifest.place(source.target), contents),
        lacks=lacks(held),
    )


def _rescue(checked: Checked, findings: list[Finding], *, quick: bool, workers: int) -> Iterator[Finding]:
    """What is left where optimizer files are lost or damaged: the file of the weights, if it is whole."""
    bad = {f.file for f in findings if f.severity == ERROR and f.exit_code == 1}
    if not bad or checked.weights is None or str(checked.weights) in bad:
        return
    if any(f.id in TENSORS for f in findings):
        return  # which of the files is the wrong one is not known
    try:
        whole = verify(checked.weights, quick=quick, workers=workers).ok
    except CkptError:
        return
    if whole:
        yield Finding(
            id="rescue",
            severity=INFO,
            file=str(checked.weights),
            message=f"the weights{' (their headers)' if quick else ''} are whole: "
            f"ckpt extract {escape(checked.weights, 1000)} --weights-only",
        )


def manifest_of_staged(
    staged: Location, name: str, *, workers: int = 0, crc: int | None = None, sinks: SinksOf | None = None
) -> bytes:
    """The manifest of a single file that is going to be called `name`, after its header checks; its bytes are
    given to `sinks`, too.

    Raises CkptError where something is wrong with it, or where its CRC-32 is not `crc`.
    """
    if name.endswith(".safetensors"):
        tensors = read_safetensors(staged).tensors
        found, files = Checkpoint(path=staged, layout=Layout(format="safetensors"), tensors=tensors), []
    else:
        found = check_before_use(locate(staged))
        files = [found.template] if isinstance(found.template, TorchFile) else []
    crcs: dict[Location, int] = {} if crc is None else {staged: crc}
    wanted = sinks(found) if sinks is not None else None
    (entry,) = describe_files({staged: name}, found, files, workers, crcs, wanted).values()
    return manifest.dump({name: entry}, output=True)


def check_before_use(source: Source, *, beside: bool = False, only_looks: bool = False) -> Checkpoint:
    """Read a checkpoint for a command that writes from it: header checks first, the first error raised.

    `beside`: the command carries the files around it along, so these are checked, too. `only_looks`: no
    tensor is going to be read, so the headers between those of a store are left alone.
    """
    checked = check_headers(source, wanted="none" if only_looks else "each")
    findings = checked.findings
    checks: list[SourceCheck] = []
    around = ""
    if beside and not any(finding.severity == ERROR for finding in findings):
        with within(source.root):
            beside_it = check_beside(source, checked)
            findings, checks = beside_it.findings, beside_it.checks
            around = f"\nor leave out what lies around its tensors: give {escape(source.target, 1000)} alone"
    for finding in findings:
        if finding.severity == ERROR:
            error = raised(finding)
            error.hint = (error.hint + (around if source.inner else "")).strip()
            raise error
    assert checked.checkpoint is not None
    return replace(checked.checkpoint, checks=(*checked.checkpoint.checks, *checks))
