"""Charts of runs: loss and learning rate over samples, so that runs with other batches can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ckpttools import schedules
from ckpttools.charts import Chart, Line, Panel, Point, png, svg, thinned
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.operations.experiments import Experiment
from ckpttools.runs import logs
from ckpttools.runs.logs import Series
from ckpttools.training import Training
from ckpttools.transforms.rebase import Curve, Rebased

SUFFIXES = (".svg", ".png", ".pdf")
SAMPLES = "samples seen"


def over_samples(found: Sequence[Experiment], ahead: Mapping[str, Sequence[Line]] | None = None) -> Chart:
    """Loss above, learning rate below. `ahead` are more lines by the tag of their run: a forecast.

    Where the batch of no run is known, over the runs' own steps. A run that has none while others do is left
    out, and named in the title.
    """
    ahead = ahead or {}
    known = [each for each in found if _any(each, lambda each, series: each.over_samples(series))]
    if known or any(ahead.values()):
        lost = [each.tag for each in found if each not in known and each.log.series]
        title = "Loss and learning rate" + (f" (without {', '.join(lost)}: batch not known)" if lost else "")
        return _chart(title, SAMPLES, found, lambda each, series: each.over_samples(series), ahead)
    units = " or ".join(dict.fromkeys(f"{each.unit}s" for each in found)) or "steps"
    return _chart("Loss and learning rate", f"{units} (batch not known)", found, lambda _, s: s.points, {})


def _any(each: Experiment, points: Callable[[Experiment, Series], object]) -> bool:
    return any(points(each, s) for names in (logs.LOSS, logs.VAL, logs.RATE) if (s := each.log.first(names)))


def _chart(
    title: str,
    xlabel: str,
    found: Sequence[Experiment],
    points: Callable[[Experiment, Series], tuple[Point, ...] | None],
    ahead: Mapping[str, Sequence[Line]],
) -> Chart:
    def lines(names: Sequence[str], *, faint: bool = False, said: str = "") -> Iterator[Line]:
        for slot, each in enumerate(found):
            series = each.log.first(names)
            own = thinned(points(each, series) or ()) if series is not None else ()
            if own:  # of values that are no numbers none is left
                yield Line(name=f"{each.tag}{said}", points=own, slot=slot, faint=faint)

    val = tuple(lines(logs.VAL, said=" validation"))
    train = tuple(lines(logs.LOSS, faint=bool(val), said=" training" if val else ""))
    rate = tuple(lines(logs.RATE))
    more = tuple(line for each in found for line in ahead.get(each.tag, ()))
    panels = []
    if train or val:
        panels.append(Panel(title="loss", lines=(*train, *val)))
    if rate or more:
        panels.append(Panel(title="learning rate", lines=(*more, *rate), height=150))
    return Chart(title=title, xlabel=xlabel, panels=tuple(panels))


def forecast(training: Training, per_step: int | None) -> tuple[Point, ...]:
    """The schedule's learning rate of each update over the samples after it, as logs have it, from the start
    to the end of the schedule, as far as it can be replayed."""
    for saved in training.schedules:
        optimizers = training.optimizers
        groups = optimizers[saved.optimizer].groups if saved.optimizer < len(optimizers) else ()
        unit = saved.unit or training.unit
        if unit not in ("micro", "update") or unit != training.unit or not per_step:
            continue
        try:
            program = schedules.recognise(saved.framework, list(saved.states), list(groups), saved.about)
            length = program.length() or training.total_count
            if not program.known or not length or length > 10**7:
                continue
            rates = program.curve(length)
        except CkptError:
            continue
        size = max(1, len(rates) // 400)
        return tuple((float((at + 1) * per_step), rates[at]) for at in range(0, len(rates), size))
    return ()


def of_rebase(curves: tuple[Curve, Curve, Curve], result: Rebased) -> Chart:
    """The learning rate before a rebase, after it, and without one."""
    before, after, without = (thinned(list(zip(c.samples, c.lr, strict=True)), 1000) for c in curves)
    old, new = result.timeline.old.total, result.timeline.new.total
    lines = [
        Line(name=f"before: batch {old}", points=before, slot=7, faint=True),
        Line(name=f"after: batch {new}", points=after, slot=0),
        Line(name=f"batch {new} without a rebase", points=without, slot=1),
    ]
    if result.samples is not None:
        top = max((y for line in lines for _, y in line.points), default=1.0)
        lines.append(
            Line(name="this checkpoint", points=((result.samples[1], 0.0), (result.samples[1], top)), slot=2)
        )
    title = "learning rate of the first parameter group: " + ", ".join(result.families)
    panel = Panel(title=title, lines=tuple(lines), floor=0, height=320)
    return Chart(title="The learning rate over samples", xlabel=SAMPLES, panels=(panel,))


def picture(chart: Chart, path: Path) -> bytes:
    """The chart as the kind of picture that a file's name says. Raises UsageError."""
    check_picture(path)
    if not any(panel.lines or panel.dots for panel in chart.panels):
        raise UsageError(
            "nothing-to-draw",
            "no loss and no learning rate that is a number was logged",
            where=path,
            why=f"{logs.STATE}, train_log.jsonl, vis_data, metrics.csv, TensorBoard: in none",
            hint="ckpt runs without --plot shows what is known",
        )
    suffix = path.suffix.lower()
    return svg.draw(chart, standalone=True).encode() if suffix == ".svg" else png.draw(chart, suffix[1:])


def check_picture(path: Path) -> None:
    """What can be known before anything is read. Raises UsageError."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            "bad-usage",
            f"'{escape(path)}' is not a picture's name",
            where="--plot",
            why="the suffix says what is drawn",
            hint="use FILE.svg, .png or .pdf",
        )
    if path.suffix.lower() != ".svg":
        png.check()
