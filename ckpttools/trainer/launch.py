"""Start the ranks under torchrun on this machine, wait, and turn what went wrong into one error."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from ckpttools.errors import CkptError, UsageError
from ckpttools.trainer import failures, signals, startup
from ckpttools.trainer.config import load
from ckpttools.trainer.exchange import exchange
from ckpttools.trainer.options import Options
from ckpttools.trainer.split import split
from ckpttools.trainer.worker import EXCHANGE, LAUNCHED

GRACE = 45  # seconds; torchrun gives its ranks 30 before it kills them


def launch(options: Options, nproc: int | None, *, console: int | None = None) -> tuple[int, Path | None]:
    """Train on `nproc` ranks (one per GPU, or two on a machine without GPUs); returns the exit code and
    the run folder. What the ranks say goes to `console`, a file descriptor or subprocess.DEVNULL.

    The code is 0, or 128 and the number of the signal that asked the run to save and stop. Raises CkptError.
    """
    _require("yaml", "msgspec", "torch", "deepspeed", "transformers")
    config = load(options.config, options.overrides)  # a mistake shows before anything starts
    gpus = _gpus()
    ranks = nproc or gpus or 2
    split(config.batch, ranks)
    start = startup.decide(config, options, ranks)
    with exchange() as (folder, held):
        startup.hand_over(start, folder)
        environment = {**os.environ, EXCHANGE: str(folder)}
        if gpus == 0:
            environment.setdefault("DS_ACCELERATOR", "cpu")
            environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, for a single rank too
        with signals.forwarded(folder) as asked:
            code = _torchrun(ranks, options, environment, folder / "torchrun.log", held, console)
        if code != 0:
            raise failures.read(folder) or _silent(folder, code)
        run = folder / LAUNCHED
        place = Path(run.read_text("utf-8")) if run.exists() else None
        return (0 if asked.number is None else 128 + asked.number), place


def _torchrun(
    ranks: int,
    options: Options,
    environment: dict[str, str],
    messages: Path,
    held: int,
    console: int | None,
) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--log-dir={messages.parent}"]  # else torchrun leaves a folder among the temporary files
    command += ["-m", "ckpttools.trainer", *options.arguments()]
    with messages.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=None if options.full_log else file,
            pass_fds=(held,),
            start_new_session=True,  # Ctrl-C reaches only us; torchrun is asked to end its ranks
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            raise


def _silent(folder: Path, code: int) -> CkptError:
    """No rank could say what happened: it was killed, or it never started."""
    run, messages = folder / LAUNCHED, folder / "torchrun.log"
    lines = messages.read_text("utf-8", "replace").splitlines() if messages.exists() else []
    telling = [line.strip() for line in lines if "Error" in line or "exitcode" in line or "Signal" in line]
    return CkptError(
        "train-crash",
        f"a rank ended without a message (torchrun exit code {code})",
        where=Path(run.read_text("utf-8")) / "logs" if run.exists() else "",
        why="\n".join(telling[-3:]) or "it was killed from outside, or could not start",
        hint="exitcode -9 is often too little memory: try a smaller model or fewer ranks"
        "\nrun again with --full-log to see everything",
    )


def _gpus() -> int:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return int(torch.cuda.device_count())


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            "train-requires",
            f"the trainer needs {', '.join(missing)}",
            why="training runs real DeepSpeed; no other command needs these packages",
            hint="pip install 'ckpttools[train]'",
        )
