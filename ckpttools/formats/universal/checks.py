"""Checks on the headers of a universal checkpoint: is every parameter's state there, and do all files fit?

DeepSpeed loads what it finds: state that is missing for every parameter of a group is not missed, a file of
another run at the same step is loaded without a word. The masters are held against the model file's weights
by the pass over the bytes, where there is a model file of stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from ckpttools.checkpoint import FP32, STEP
from ckpttools.containers import fields
from ckpttools.containers.pickles import plain
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError, escape
from ckpttools.findings import ERROR, INFO, WARNING, Finding, of_error
from ckpttools.formats.engine import number_of
from ckpttools.formats.files import Attempts, archive_roots, check_files, dangers_at
from ckpttools.formats.format import Checked
from ckpttools.formats.found import found as _of
from ckpttools.formats.found import missing
from ckpttools.formats.universal.names import ZERO, find
from ckpttools.formats.universal.read import ONE_SAVE, Universal, assemble, checkpoint
from ckpttools.location import Location

T = TypeVar("T")
Findings = Iterator[Finding]
_found = partial(_of, hint=ONE_SAVE)
COUNTERS = ("global_steps", "skipped_steps", "global_samples", "dp_world_size", "lr_scheduler", "ds_version")
SHOWN = 20  # of stray folders


def check(path: Location) -> Checked:
    """Every finding, the checkpoint as far as it can be put together, and the files that could be read."""
    attempts = Attempts()

    def report(error: CkptError) -> None:
        attempts.findings.append(of_error(error))

    def attempt(path: Location, action: Callable[[], T]) -> T | None:
        made = attempts(action)
        if made is None:  # what it would run is said all the same
            attempts.findings += dangers_at(path)
        return made

    try:
        files = find(path)
    except CkptError as error:
        if error.exit_code != 1:
            raise
        return Checked([of_error(error)], None, [])
    found = assemble(files, attempt, report)
    if found is None:
        return Checked(attempts.findings, None, [])
    extra = [attempt(p, lambda p=p: read_torch_file(p)) for p in _aside(found)]  # type: ignore[misc]
    read = [*found.torch_files, *(file for file in extra if file is not None)]
    attempts.findings[:0] = [*check_files(read), *archive_roots(read)]
    for each in CHECKS:
        attempts.findings += each(found)
    return Checked(attempts.findings, attempts(lambda: checkpoint(found)), read)


def finished(found: Universal) -> Findings:
    """ds_to_universal leaves its fragments where it was killed; the next run merges them with its own."""
    if found.files.unfinished:
        message = "tmp/ holds fragments of a conversion that was not finished"
        hint = "remove tmp/ if the conversion was repeated since; else convert the ZeRO folder anew"
        yield _found("save-unfinished", found.files.folder, "tmp", message, severity=WARNING, hint=hint)


def model_files(found: Universal) -> Findings:
    """ZeRO-3 writes one for each rank, with its parts of frozen weights; DeepSpeed loads that of rank 0."""
    model = found.models[0]
    if found.files.model is not None:
        return
    ranks = model.dp_world_size or 1
    gone = sorted(set(range(ranks)) - found.files.stage3.keys())
    if gone:
        path = found.files.folder / f"zero_pp_rank_{gone[0]}_mp_rank_00_model_states.pt"
        lost = f": {len(model.frozen_shapes)} frozen weights are lost" if model.frozen_shapes else ""
        message = f"{len(gone)} of {ranks} ranks' model files are missing{lost}"
        severity = ERROR if lost or not gone[0] else WARNING
        yield _found("shard-missing", path, "", message, severity=severity)


def same_counters(found: Universal) -> Findings:
    """All model files are of one save."""
    first = found.models[0]
    for model in found.models[1:]:
        for key in COUNTERS:
            mine, theirs = (plain(each.root.get(key)) for each in (model, first))
            if mine != theirs:
                says, said = (escape(repr(value), 80) for value in (mine, theirs))
                message = f"says {says}, {first.file.path.name} says {said}"
                yield _found("ranks-differ", model.file.path, key, message)


def fields_present(found: Universal) -> Findings:
    """What every DeepSpeed writes into the model file."""
    for model in found.models:
        for key in ("global_steps", "ds_version"):
            if key not in model.root:
                yield missing(model.file.path, key)


def kinds(found: Universal) -> Findings:
    """Adam keeps a second moment wherever it keeps exp_avg, and a run that has made steps keeps moments."""
    done = _done(found)
    for g, (params, hyper) in enumerate(zip(found.shapes, found.settings.groups, strict=True)):
        held = {kind for name in params for kind in found.files.params.get(name, ())} - {FP32, STEP}
        file = found.settings.file.path
        if params and "eps" in hyper and held == {"exp_avg"}:
            yield _found("moment-missing", file, f"group {g}", "no parameter has exp_avg_sq")
        elif params and "betas" in hyper and not held and done:
            message = f"no parameter has optimizer state after {done} steps: a resume would begin it anew"
            hint = "use another checkpoint; or go on with fresh moments, and a warmup"
            yield _found("moment-missing", file, f"group {g}", message, hint=hint)


def _done(found: Universal) -> int | None:
    root = found.models[0].root
    made = fields.integer(root.get("global_steps"))
    return None if made is None else made - (fields.integer(root.get("skipped_steps")) or 0)


def steps(found: Universal) -> Findings:
    """One step for all parameters of a group: DeepSpeed stops at another. And that of the counters."""
    done = _done(found)
    for g, params in enumerate(found.shapes):
        held = {n: found.states[n][STEP] for n in params if STEP in found.states[n]}
        made = {name: number_of(state.value) for name, state in held.items()}
        known = {name: number for name, number in made.items() if number is not None}
        for name in made.keys() - known.keys():
            message = f"the step of {escape(name)} is no number"
            yield _found("field-damaged", held[name].file.path, STEP, message)
        values = sorted(known.values())
        usual = max(set(values), key=values.count) if values else None
        for name in sorted(n for n, number in known.items() if number != usual):
            message = f"{escape(name)} has made {known[name]:g} steps, others of group {g} {usual:g}"
            yield _found("step-mismatch", held[name].file.path, STEP, message)
        if usual is not None and done is not None and usual - done not in (0, 1):
            message = (
                f"the model file counts {done} updates, group {g} made {usual:g}: the optimizer was reset, "
                "the run was rebased to another batch size, or the files are of different saves"
            )
            file = found.models[0].file.path
            yield _found("counter-mismatch", file, "global_steps", message, severity=WARNING)


def module(found: Universal) -> Findings:
    """The model file's weights are those of the parameters."""
    model = found.models[0]
    for params in found.shapes:
        for name, shape in params.items():
            ref = model.weights.get(name)
            if ref is None:
                message = f"{escape(name)} is not in module"
                yield _found("tensor-missing", model.file.path, name, message, severity=WARNING)
            elif found.files.model is not None and ref.shape != shape:
                message = f"{list(ref.shape)} in module, {list(shape)} in param_shapes"
                yield _found("shape-mismatch", model.file.path, name, message)


def _aside(found: Universal) -> list[Location]:
    """What zero/ holds beside trained parameters."""
    trained = {name for params in found.shapes for name in params}
    held = [each for name, each in found.files.params.items() if name not in trained]
    return [path for each in held for path in each.values()]


def strays(found: Universal) -> Findings:
    """ds_to_universal copies frozen parameters, buffers and aliases; what else is there is a leftover."""
    model, zero = found.models[0], found.files.folder / ZERO
    trained = {name for params in found.shapes for name in params}
    known = model.weights.keys() | model.frozen | model.shared.keys()
    others = [name for name in found.files.params if name not in trained]
    stray = [name for name in others if name not in known]
    for name in stray[:SHOWN]:
        message = f"{escape(name)} is no parameter of this model: left over from another save"
        yield _found("shard-extra", zero / name, name, message, hint="move the folder away")
    if len(stray) > SHOWN:
        message = f"and {len(stray) - SHOWN} more folders of no parameter of this model"
        yield _found("shard-extra", zero, "", message)
    alone = [name for name in others if name in known]
    if alone:
        message = f"{len(alone)} copies that no load reads, the first {escape(alone[0])}"
        yield _found("frozen-excluded", zero, "", message, severity=INFO, hint="")


CHECKS: tuple[Callable[[Universal], Findings], ...] = (
    finished,
    model_files,
    same_counters,
    fields_present,
    kinds,
    steps,
    module,
    strays,
)
