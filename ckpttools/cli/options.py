"""Options that several commands share."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpttools.cli import render
from ckpttools.errors import UsageError

if TYPE_CHECKING:
    from ckpttools.operations.writing import Writing, Written

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def _refuse_empty(
    kind: click.Path, value: object, param: click.Parameter | None, ctx: click.Context | None
) -> None:
    """The empty path, of a script's unset variable, is not the working folder."""
    if value == "":
        kind.fail("the path is empty: is a variable of your script not set?", param, ctx)


class _Local(click.Path):
    """A path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ckpttools.stores.files import local

        _refuse_empty(self, value, param, ctx)
        return super().convert(local(value), param, ctx)


class _Place(click.Path):
    """What is read: a path, or an address in a store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ckpttools.stores.files import named

        _refuse_empty(self, value, param, ctx)
        place = named(value)
        return super().convert(place, param, ctx) if isinstance(place, Path) else place


# readable=False: whether a path can be read is found out, and explained, by reading it
PATH = _Local(path_type=Path, readable=False)
FOLDER = _Local(path_type=Path, readable=False, file_okay=False)
PLACE = _Place(path_type=Path, readable=False)
SRC = click.argument("src", type=PLACE)
DST = click.argument("dst", type=PLACE, required=False)
TAG = click.option(
    "-t", "--tag", metavar="TAG", help="The tag folder to take, instead of what `latest` names."
)
TAGS = click.option(
    "-t",
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    help="The tag folder to take: once for all, or once for each in their order ('' for none).",
)
KEY = click.option(
    "--key", metavar="NAME", help="Where the weights lie in a .pt file, if under an unusual name: net_G, a.b."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and the result's path.")
FORCE = click.option(
    "--force",
    is_flag=True,
    help="Replace a DST, on disks atomically: an output of ckpt or a checkpoint with nothing else in it.",
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
WORKERS = click.option(
    "--workers",
    type=click.IntRange(0, 256),
    default=0,
    show_default="one per core, at most 8",
    help="Threads that read and write.",
)


def _follow(context: click.Context, _: click.Parameter, value: bool) -> None:
    """Until the command ends; it stands where files are opened, so no command passes it on."""
    if value:
        from ckpttools.stores.links import followed

        context.with_resource(followed())


FOLLOW = click.option(
    "--follow-symlinks",
    is_flag=True,
    expose_value=False,
    callback=_follow,
    help="Follow symbolic links that lead out of the checkpoint, too.",
)
SPREAD = click.option(
    "--spread",
    is_flag=True,
    help="This is one of many processes that torchrun or srun started: they share the work.",
)


def _stats(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.call_on_close(_say_stats)


def _say_stats() -> None:
    remote = sys.modules.get("ckpttools.stores.remote")  # what was not loaded was not asked
    requests, came, went = remote.used() if remote else (0, 0, 0)
    sent = f"; {render.size(went)} sent ({went} bytes)" if went else ""
    click.echo(f"stores: {requests} requests, {render.size(came)} ({came} bytes){sent}", err=True)


STATS = click.option(
    "--stats",
    is_flag=True,
    expose_value=False,
    callback=_stats,
    help="Say at the end how many requests to stores were made, what came and what was sent.",
)
HF_CONFIG = click.option(
    "--hf-config",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Copy the model's configuration and tokenizer from this folder.",
)
DIGEST = click.option(
    "--digest/--no-digest",
    default=None,
    help="Print the digest of the result and hold it against the source's; by default on, but not from "
    "stores or with --spread.",
)
NO_PROGRESS = click.option("--no-progress", is_flag=True, help="No progress bar.")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def number(*names: str, help: str) -> Callable[[F], F]:
    """An option that takes a whole number; the library says which ones make sense."""
    return click.option(*names, type=int, metavar="N", help=help)


def shown(command: F) -> F:
    """The options of a command that takes its time and shows what it found."""
    for option in (NO_PROGRESS, WORKERS, QUIET, JSON):
        command = option(command)
    return command


def reading(command: F) -> F:
    """The options of a command that reads every byte of one or more checkpoints."""
    return KEY(shown(command))


def writing(command: F) -> F:
    """The options of every command that writes a checkpoint."""
    for option in (NO_PROGRESS, STATS, SPREAD, WORKERS, QUIET, JSON, FORCE, DRY_RUN, FOLLOW, TAG):
        command = option(command)
    return command


def ask(operation: Callable[..., T], *places: object, **options: Any) -> T:
    """What an operation of the library finds, called with a command's own options, which it knows by the same
    names, and a progress bar.
    """
    own = {name: value for name, value in options.items() if name not in _SHOWING}
    return operation(
        *places, **own, bar=render.bars(enabled=not (options["no_progress"] or options["quiet"]))
    )


_SHOWING = ("as_json", "quiet", "no_progress")


def write(operation: Callable[..., Written], *places: object, **options: Any) -> None:
    """Call an operation of the library with a command's own options, which it knows by the same names, and
    show what it wrote.
    """
    own = {name: value for name, value in options.items() if name not in _WRITING}
    render.written(operation(*places, **own, how=how(options)), options)


_WRITING = ("dry_run", "force", "workers", "no_progress", "quiet", "as_json", "spread")  # of `writing`


def how(options: Mapping[str, Any]) -> Writing:
    """The options of `writing`, as the library has them."""
    from ckpttools.operations.writing import Writing, worker

    spread = worker() if options.get("spread") else None  # copy has no such option
    return Writing(
        spread=spread,
        dry_run=options["dry_run"],
        force=options["force"],
        workers=options["workers"],
        bar=render.bars(
            enabled=not (options["no_progress"] or options["quiet"] or (spread and spread.rank > 0))
        ),
    )


def parse_size(text: str) -> int:
    """`5GB` is 5 * 10^9 bytes, as in transformers; `5GiB` is 5 * 2^30."""
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(
            "bad-usage",
            f"'{text}' is not a size",
            where="--max-shard-size",
            why="a size is a number and its unit",
            hint="write it as 5GB, 500MB or 2GiB",
        )
    base = 1024 if match[3] else 1000
    return max(1, int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")))
