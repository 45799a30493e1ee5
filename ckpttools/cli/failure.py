"""Where every error ends: four parts on stderr, or one JSON document on stdout, and the exit code."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress
from errno import ENAMETOOLONG

import click

from ckpttools.cli import render
from ckpttools.errors import CkptError, UsageError
from ckpttools.suggest import did_you_mean


def report(problem: Exception, *, as_json: bool, debug: bool) -> int:
    """Show an error and return the exit code. With `debug` the traceback comes first."""
    if debug:
        traceback.print_exception(problem)
    error = problem if isinstance(problem, CkptError) else _other(problem)
    with suppress(OSError):  # a document that cannot be written is told on stderr, too
        if as_json and not getattr(sys.stdout, "lost", False):
            render.document({"ok": False, "error": error.problem.document()})
            return error.exit_code
    click.echo(error.problem.shown(), err=True)
    return error.exit_code


def _other(problem: Exception) -> CkptError:
    match problem:
        case click.ClickException():
            return _of_click(problem)
        case PermissionError():
            return UsageError(
                "no-permission",
                "the system refused access",
                where=str(problem.filename or ""),
                why="nothing was read or written there",
                hint="ask the owner for permission on it and on the folders above it",
            )
        case OSError() if problem.errno == ENAMETOOLONG:
            return UsageError(
                "system",
                "the name is too long for the file system",
                where=str(problem.filename or ""),
                why="while ckpt writes a longer name stands beside it; nothing was written",
                hint="name a DST of at most 200 bytes",
            )
        case OSError() if problem.strerror and "://" in str(problem.filename):
            return UsageError(
                "system",
                problem.strerror,
                where=str(problem.filename),
                why="the store did not give what was asked for; nothing was changed",
                hint="check the address, the network and the credentials, then run it again",
            )
        case OSError() if problem.strerror:
            return UsageError(
                "system",
                problem.strerror,
                where=str(problem.filename or ""),
                why="the operating system refused; a destination is either absent, as it was, or whole",
                hint="check permissions, free space and that the path is reachable, then run it again",
            )
    return UsageError(
        "internal",
        f"{type(problem).__name__}: {problem}",
        why="this is a defect of ckpttools; no source was changed, and no destination is half-written",
        hint="run again with --debug and report the traceback",
    )


def _of_click(problem: click.ClickException) -> CkptError:
    """click's own errors, with the usage of the command that was called."""
    context = problem.ctx if isinstance(problem, click.UsageError) else None
    if isinstance(problem, click.NoSuchOption):
        known = [name for param in context.command.params for name in param.opts] if context else []
        message, hint = f"there is no option {problem.option_name}", did_you_mean(problem.option_name, known)
    else:
        message, hint = problem.format_message().rstrip("."), _range(problem)
        message = message.partition(" is not in the range ")[0] if hint else message
    if context is None:
        return UsageError("bad-usage", message, hint=hint)
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ")
    more = f"{context.command_path} --help lists what it takes"
    return UsageError(
        "bad-usage", message, where=context.command_path, why=f"usage: {usage}", hint=hint or more
    )


def _range(problem: click.ClickException) -> str:
    """The numbers that an option takes, where another one was given."""
    kind = problem.param.type if isinstance(problem, click.BadParameter) and problem.param else None
    if not isinstance(kind, click.IntRange):
        return ""
    low, high = kind.min if kind.min is not None else "any", kind.max
    return f"give a whole number from {low} to {high:,}" if high is not None else f"give {low} or more"
