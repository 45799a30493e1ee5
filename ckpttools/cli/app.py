"""The click application: the command table, lazy imports, aliases, and one place where errors end."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import click

from ckpttools import __version__

# command -> (module, one-line help); the function in the module is named `command`
COMMANDS = {
    "inspect": "format, step, ranks, dtypes, settings: header reads only",
    "verify": "check a checkpoint: every byte, or headers with --quick",
    "ls": "the checkpoints of a run or of a tree of runs; ckpt DIR is the same",
    "latest": "the checkpoint that a resume would take, and why",
    "resume-check": "will it resume, where, with which learning rate; what changed",
    "digest": "one digest of all weights and optimizer state, equal in every layout",
    "diff": "how two checkpoints differ, whatever their layouts",
    "prove": "the same training state, identical except ..., or different",
    "runs": "experiments side by side: settings, progress, losses; a plot over samples",
    "report": "one self-contained page of a run, of runs, or of two checkpoints",
    "explain": "what a check or an error means, and how to mend it",
    "extract": "weights only, as safetensors or .pt",
    "convert": "to another format, optimizer state, schedule and counters kept",
    "copy": "a whole checkpoint to another place, verified on the way, resumable",
    "average": "the mean of the weights of several checkpoints",
    "reshard": "move a ZeRO checkpoint to another number of ranks, optimizer state kept",
    "rebase-schedule": "another batch size: same sample, right learning rate",
    "prune": "remove old checkpoints: of what stays headers are checked first, and you are asked",
    "pin": "keep a checkpoint from every clean-up",
    "unpin": "take back a pin",
    "batch": "effective batch, iterations, what an old iteration means, ways to keep the batch",
    "train": "the reference trainer: DeepSpeed ZeRO or plain torch",
    "demo": "train, verify, extract, reshard and resume on this machine's CPU",
}
ALIASES = {
    "info": "inspect",
    "check": "verify",
    "validate": "verify",
    "compare": "diff",
    "merge": "extract",
    "consolidate": "extract",
}


class Commands(click.Group):
    """Imports a command's module only when it is asked for; options accept `-` and `_` alike."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"ckpttools.cli.{name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            # the commands themselves start without them
            from ckpttools.errors import UsageError, escape
            from ckpttools.stores.files import is_folder
            from ckpttools.suggest import did_you_mean

            if is_folder(Path(name)):
                return super().resolve_command(ctx, ["ls", *args])
            raise UsageError(
                "bad-usage",
                f"there is no command '{escape(name)}'",
                where="ckpt",
                why="usage: ckpt COMMAND ..., or ckpt DIR for the checkpoints in a folder",
                hint=did_you_mean(name, [*COMMANDS, *ALIASES]) or f"the commands are {', '.join(COMMANDS)}",
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        result = super().invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = {name: [a for a, of in ALIASES.items() if of == name] for name in COMMANDS}
        rows = [
            (name, COMMANDS[name] + (f" (also: {', '.join(also)})" if also else ""))
            for name, also in names.items()
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
@click.version_option(__version__, prog_name="ckpt")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; the exit code stays.")
def app(debug: bool) -> None:
    """Trust, understand, move and change training checkpoints."""


def _dashes(arg: str) -> str:
    """`--world_size=4` is `--world-size=4`; values are left alone."""
    if not arg.startswith("--"):
        return arg
    name, eq, value = arg.partition("=")
    return name.replace("_", "-") + eq + value


class _Output:
    """stdout whose reader may leave, as in `ckpt inspect ... | head`: the rest goes nowhere, and the command
    goes on to its exit code. Any other error ends it, but of `messages`, which are no answer.
    """

    def __init__(self, stream: TextIO, *, messages: bool = False) -> None:
        self._stream = stream
        self._messages = messages
        self.lost = False  # from now on nobody sees what is written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text == "":
            return 0  # a probe, whose error nobody would see
        with self._to_the_end():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._to_the_end():
            self._stream.flush()

    @contextmanager
    def _to_the_end(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = True
            # what is left in the buffer would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._messages and not isinstance(error, BrokenPipeError):
                raise


class _Interrupts:
    """Remembers Ctrl-C: libraries that it meets while they load turn it into errors of their own."""

    def __init__(self) -> None:
        self.seen = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit."""
    interrupts = _Interrupts()
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = _Output(sys.stdout)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _Output(sys.stderr, messages=True)
    args = list(sys.argv[1:] if argv is None else argv)
    head, dash, tail = args, [], []  # type: tuple[list[str], list[str], list[str]]
    if "--" in args:
        cut = args.index("--")
        head, dash, tail = args[:cut], ["--"], args[cut + 1 :]
    # numpy's linear algebra is never used here: without its threads it loads in two thirds of the time
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # headers are millions of small values that live to the end: to look for cycles among them again and
    # again would take a quarter of the time; of one checkpoint about a hundred values are in cycles
    gc.set_threshold(10_000_000, 10, 10)
    debug, as_json = "--debug" in head, "--json" in head
    head = [_dashes(a) for a in head if a != "--debug"]
    try:
        code: Any = app.main(head + dash + tail, prog_name="ckpt", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as help:
        help.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _interrupted()
    except Exception as problem:
        from ckpttools.cli.failure import report
        from ckpttools.errors import CkptError

        if interrupts.seen and not isinstance(problem, CkptError | click.ClickException):
            _interrupted()
        sys.exit(report(problem, as_json=as_json, debug=debug))


def _interrupted() -> NoReturn:
    click.echo("interrupted: a destination is either absent, as it was, or whole", err=True)
    sys.exit(130)
