"""The page of a run, or of runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from ckpttools import checks, runs
from ckpttools.charts import Chart, Dot, Line, Panel, State, number, thinned
from ckpttools.checks import refused
from ckpttools.errors import CkptError, counted, escape
from ckpttools.findings import INFO
from ckpttools.location import Location
from ckpttools.operations.experiments import Experiment, Experiments, experiments
from ckpttools.operations.figures import SAMPLES, forecast, over_samples
from ckpttools.operations.logbook import result
from ckpttools.operations.ls import GOOD, LATEST, PINNED, UNKNOWN, WEIGHTS, WRONG, Listed, Run, ls
from ckpttools.operations.prune import Pruning, plan_of
from ckpttools.operations.writing import Bar
from ckpttools.pages import duration, size
from ckpttools.pages.sections import Figure, Gathered, Section, Table, Told, state, told
from ckpttools.runs.retain import Policy
from ckpttools.stores.files import local

LANES, LOOKED_AT = 16, 24  # runs on the line; checkpoints whose findings are shown
ROWS, SETTINGS = 1200, 200  # of tables


def gather(
    folder: Location,
    *,
    keep_last: int,
    new_bs: int | None,
    verify: bool,
    workers: int = 0,
    bar: Bar | None = None,
) -> Gathered:
    """Headers of everything below, with `verify` every byte. Raises UsageError for no checkpoint."""
    found = runs.grouped(folder)
    compared = experiments(folder, found=found)
    listed = ls(folder, verify=verify, workers=workers, bar=bar, found=found)
    try:
        pruning: Pruning | None = plan_of(local(folder), Policy(last=keep_last), found=found)
        planned: tuple[str, ...] = ()
    except CkptError as error:
        pruning, planned = None, (f"What ckpt prune would remove is not known: {error.message}.",)
    gone = {entry.path for entry in pruning.removed} if pruning is not None else set()
    newest = _findings(listed, workers)
    sections = [
        Section(
            id="overview", title="Overview", text=_summary(compared, listed), tables=(_overview(compared),)
        ),
        _line(compared, listed, gone, keep_last, planned),
        _curves(compared, new_bs),
        _sizes(compared, listed),
        Section(id="settings", title="Settings", tables=tuple(_settings(compared))),
        Section(
            id="findings",
            title="Findings",
            text=(_looked(*newest),),
            findings=tuple(newest[0]),
        ),
        Section(
            id="checkpoints",
            title="Checkpoints",
            tables=tuple(
                _checkpoints(run, each, gone) for run, each in zip(listed, compared.runs, strict=True)
            ),
        ),
        Section(id="notes", title="Notes", text=tuple(_notes(compared, listed))),
    ]
    title = compared.runs[0].tag if len(compared.runs) == 1 else f"{len(compared.runs)} runs in {folder.name}"
    how = "every byte was read" if verify else "headers were read; ckpt verify reads every byte"
    damaged = sum(_state(each, gone)[0] == "damaged" for run in listed for each in run.checkpoints)
    return Gathered(title=title, how=how, sections=sections, damaged=damaged)


# --- overview -----------------------------------------------------------------------------------------


def _summary(compared: Experiments, listed: Sequence[Run]) -> tuple[str, ...]:
    every = [each for run in listed for each in run.checkpoints]
    damaged = sum(bool(WRONG & set(each.marks)) for each in every)
    nbytes = sum(each.entry.nbytes for each in every)
    pinned = sum(PINNED in each.marks for each in every)
    text = f"{counted(len(every), 'checkpoint')} in {counted(len(listed), 'run')}, {size(nbytes)}: "
    text += f"{damaged} damaged, {pinned} pinned."
    latest = (f"A resume of {each.tag} would take {_latest(run)}." for run, each in _both(listed, compared))
    return text, *list(latest)[:LANES]


def _both(listed: Sequence[Run], compared: Experiments) -> Iterator[tuple[Run, Experiment]]:
    yield from zip(listed, compared.runs, strict=True)


def _latest(run: Run) -> str:
    if run.latest is None:
        return "nothing that is known"
    marks = next((each.marks for each in run.checkpoints if LATEST in each.marks), ())
    but = [mark for mark in marks if mark in (WEIGHTS, *WRONG, UNKNOWN)]
    return run.latest.name + (f" ({', '.join(but)})" if but else "")


def _overview(compared: Experiments) -> Table:
    rows = []
    for each in compared.runs:
        total = f" of {each.total}" if each.total is not None else ""
        at = f"{each.unit} {each.step}{total}" if each.step is not None else None
        span = duration(each.seconds) if each.seconds is not None else None
        said = "; ".join(each.schedule) or None
        rows.append((each.tag, each.framework, each.batch, at, each.samples, result(each), said, span))
    return Table(
        caption="Runs",
        heads=("run", "by", "batch", "progress", "samples", "result", "schedule", "time"),
        rows=tuple(rows),
        numbers=frozenset({2, 4}),
    )


# --- charts -------------------------------------------------------------------------------------------


def _place(each: Listed, of: Experiment, *, samples: bool) -> float | None:
    """Where a checkpoint stands on the axis; None where it does not say."""
    entry = each.entry
    if not samples:
        return entry.count("iteration" if of.unit == "iteration" else "step")
    count = entry.count("iteration") if of.unit == "iteration" else entry.count("step")
    if count is not None and of.per_step:
        return float(count * of.per_step)
    return float(entry.state.samples) if entry.state.samples is not None else None


def _state(each: Listed, gone: set[Location]) -> tuple[State, str]:
    """What it is drawn as, and all of it in words."""
    marks, names = set(each.marks), [mark for mark in each.marks if mark != UNKNOWN]
    if not marks & {*WRONG, GOOD}:
        names.append("not checked" if UNKNOWN in marks else "headers are good")
    if each.entry.path in gone:
        names.append("would be pruned")
    words = ", ".join(names)
    if marks & WRONG:
        return "damaged", words
    if PINNED in marks:
        return "pinned", words
    if each.entry.path in gone:
        return "pruned", words
    return ("good" if GOOD in marks else "unverified"), words


def _line(
    compared: Experiments,
    listed: Sequence[Run],
    gone: set[Location],
    keep_last: int,
    planned: tuple[str, ...],
) -> Section:
    shown = list(_both(listed, compared))[:LANES]
    samples = any(of.per_step for _, of in shown)
    dots: list[Dot] = []
    nowhere = 0
    for lane, (run, of) in enumerate(reversed(shown)):
        for each in run.checkpoints:
            x = _place(each, of, samples=samples)
            if x is None:
                nowhere += 1
                continue
            name, words = _state(each, gone)
            dots.append(Dot(x=x, y=lane, state=name, label=f"{of.tag}: {each.entry.path.name}: {words}"))
    text = [*planned]
    if nowhere:
        text.append(
            f"{nowhere} do not say how far they are, or their batch is not known: they are not drawn."
        )
    if len(listed) > LANES:
        text.append(f"The newest {LANES} of {len(listed)} runs are drawn.")
    if not dots:
        return Section(id="line", title="The line of checkpoints", text=tuple(text))
    xlabel = SAMPLES if samples else "steps (batch not known)"
    lanes = tuple(of.tag if len(shown) > 1 else "" for _, of in reversed(shown))
    panel = Panel(title="checkpoints", dots=tuple(dots), lanes=lanes, height=max(40, 26 * len(shown)))
    caption = (
        "Disc: every byte verified. Square: no damage seen, not every byte was read. Cross: damaged. "
        f"Diamond: pinned. Ring: ckpt prune --keep-last {keep_last} would remove it."
    )
    chart = Chart(title="Checkpoints and their state", xlabel=xlabel, panels=(panel,))
    return Section(
        id="line",
        title="The line of checkpoints",
        text=tuple(text),
        charts=(Figure(chart=chart, caption=caption),),
    )


def _curves(compared: Experiments, new_bs: int | None) -> Section:
    ahead: dict[str, list[Line]] = {}
    text: list[str] = []
    for slot, each in enumerate(compared.runs):
        if each.training is None:
            continue
        planned = thinned(forecast(each.training, each.per_step))
        if planned:
            name = f"{each.tag} as scheduled"
            ahead[each.tag] = [Line(name=name, points=planned, slot=slot, faint=True)]
        if new_bs is not None:
            line, said = _rebased(each, new_bs, slot + len(compared.runs))
            text.append(said)
            ahead.setdefault(each.tag, []).extend(line)
    chart = over_samples(compared.runs, ahead)
    if not any(panel.lines for panel in chart.panels):
        return Section(
            id="curves", title="Loss and learning rate", text=("No loss that is a number was logged.", *text)
        )
    lost = [each.tag for each in compared.runs if each.log.series and each.tag in chart.title]
    caption = f"Over {chart.xlabel}." + (
        f" Not drawn, the batch is not known: {', '.join(lost)}." if lost else ""
    )
    figure = Figure(chart=chart, caption=caption)
    rows = [
        (f"{panel.title}: {line.name}", *(number(v) for v in (*line.points[0], *line.points[-1])))
        for panel in chart.panels
        for line in panel.lines
    ]
    heads = ("line", "from", "value", "to", "value")
    table = Table(
        caption="The same in figures",
        heads=heads,
        rows=tuple(rows),
        numbers=frozenset({1, 2, 3, 4}),
        folded=True,
    )
    return Section(
        id="curves", title="Loss and learning rate", text=tuple(text), charts=(figure,), tables=(table,)
    )


def _rebased(each: Experiment, new_bs: int, slot: int) -> tuple[list[Line], str]:
    """The learning rate after a rebase of the newest good checkpoint, and what to say of it."""
    from ckpttools.operations.rebase import prepare
    from ckpttools.transforms.rebase import Request, curves

    entry = next((e for e in each.checkpoints if e.problem is None and e.resumes), None)
    if entry is None:
        return [], f"{each.tag}: no checkpoint that can be rebased."
    try:
        made = prepare(local(entry.path), None, Request(new_bs=new_bs)).rebased
        found = curves(made.moved)
    except CkptError as error:
        return [], f"{each.tag}: no forecast of a rebase to batch {new_bs}: {error.message}."
    said = f"{each.tag}: after ckpt rebase-schedule --new-bs {new_bs}, {entry.path.name} goes on at "
    old, new = (str(count) if count is not None else "?" for count in (made.old_count, made.new_count))
    said += f"{new} (now {old})"
    if made.lr is not None:
        said += f", with learning rate {made.lr[1]:.6g} (now {made.lr[0]:.6g})"
    if found is None:
        return [], f"{said}; its curve is not known."
    after = found[1]
    batch = made.timeline.new.total  # a curve has the samples before each update, logs those after it
    points = thinned([(x + batch, y) for x, y in zip(after.samples, after.lr, strict=True)])
    return [Line(name=f"{each.tag} rebased to {new_bs}", points=points, slot=slot)], f"{said}."


def _sizes(compared: Experiments, listed: Sequence[Run]) -> Section:
    shown = list(_both(listed, compared))
    samples = any(of.per_step for _, of in shown)
    lines = []
    for slot, (run, of) in enumerate(shown):
        points = [
            (x, each.entry.nbytes / 1e6)
            for each in run.checkpoints
            if (x := _place(each, of, samples=samples)) is not None
        ]
        if len(points) > 1:
            lines.append(Line(name=of.tag, points=thinned(sorted(points)), slot=slot))
    if not lines:
        return Section(id="sizes", title="Sizes")
    xlabel = SAMPLES if samples else "steps (batch not known)"
    chart = Chart(
        title="Sizes", xlabel=xlabel, panels=(Panel(title="MB", lines=tuple(lines), floor=0, height=120),)
    )
    return Section(
        id="sizes", title="Sizes", charts=(Figure(chart=chart, caption="MB on disk of each checkpoint."),)
    )


# --- tables -------------------------------------------------------------------------------------------


def _settings(compared: Experiments) -> Iterator[Table]:
    names = [each.tag for each in compared.runs]
    if len(names) > 1:
        rows = [(name, *map(_short, values)) for name, values in list(compared.differing.items())[:SETTINGS]]
        more = len(compared.differing) - SETTINGS
        caption = "Settings that differ" + (f"; {more} more are left out" if more > 0 else "")
        if rows:
            yield Table(caption=caption, heads=("setting", *names), rows=tuple(rows))
    for each in compared.runs[:LANES]:
        rows = [(name, _short(value)) for name, value in list(each.settings.items())[:SETTINGS]]
        if rows:
            yield Table(
                caption=f"All settings of {each.tag}",
                heads=("setting", "value"),
                rows=tuple(rows),
                folded=True,
            )


def _short(value: object) -> str | None:
    return None if value is None else escape(value, 120)


def _checkpoints(run: Run, of: Experiment, gone: set[Location]) -> Table:
    rows = []
    for each in run.checkpoints[:ROWS]:
        entry = each.entry
        name, words = _state(each, gone)
        metrics = ", ".join(f"{key} {value:.5g}" for key, value in entry.metrics.items()) or None
        when = (
            datetime.fromtimestamp(entry.time / 1e9, UTC).strftime("%Y-%m-%d %H:%M") if entry.time else None
        )
        step = entry.state.step if entry.state.step is not None else entry.state.iteration
        epoch = round(entry.state.epoch, 4) if entry.state.epoch is not None else None
        shown = state(name, words)
        rows.append(
            (entry.path.name, each.kind, step, epoch, metrics, size(entry.nbytes), entry.ranks, when, shown)
        )
    more = len(run.checkpoints) - ROWS
    return Table(
        caption=f"Checkpoints of {of.tag}" + (f"; {more} more are left out" if more > 0 else ""),
        heads=("name", "kind", of.unit, "epoch", "losses and metrics", "size", "ranks", "written", "state"),
        rows=tuple(rows),
        numbers=frozenset({2, 3, 5, 6}),
        folded=len(rows) > 60,
    )


# --- findings -----------------------------------------------------------------------------------------


def _findings(listed: Sequence[Run], workers: int) -> tuple[list[Told], int, int]:
    """Of the newest of each run and of the damaged ones, by their headers; how many were looked at, of how
    many."""
    paths: list[Location] = []
    for run in listed:
        bad = [each.entry.path for each in run.checkpoints if WRONG & set(each.marks)]
        paths += [*([run.latest] if run.latest is not None else []), *bad]
    out: list[Told] = []
    paths = list(dict.fromkeys(paths))
    for path in paths[:LOOKED_AT]:
        try:
            verdict = checks.verify(path, quick=True, workers=workers)
        except CkptError as error:
            verdict = refused(path, error)
        out += [told(finding, path.name) for finding in verdict.findings if finding.severity != INFO]
    return out, len(paths[:LOOKED_AT]), len(paths)


def _looked(found: list[Told], count: int, of: int) -> str:
    said = "" if found else " Nothing was found."
    all_of = f"{count}" if count == of else f"the first {count} of {of}"
    return (
        "The newest checkpoint of each run and the damaged ones were looked at more closely, by their "
        f"headers (ckpt verify --quick): {all_of}.{said}"
    )


def _notes(compared: Experiments, listed: Sequence[Run]) -> Iterator[str]:
    for run, each in _both(listed, compared):
        yield from (f"{each.tag}: {note}" for note in (*run.notes, *each.notes))
