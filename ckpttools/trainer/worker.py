"""One rank of a run, from its command line to its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from ckpttools.errors import CkptError
from ckpttools.trainer import config as settings
from ckpttools.trainer import failures, folders, startup, text
from ckpttools.trainer.batch import split
from ckpttools.trainer.ds_config import ds_config
from ckpttools.trainer.options import Options, parse
from ckpttools.trainer.order import Order
from ckpttools.trainer.output import Output
from ckpttools.trainer.state import Progress, progress_from

EXCHANGE = "CKPTTOOLS_TRAIN_EXCHANGE"  # a folder of the launcher, for an error and the run's path
LAUNCHED = "launched"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run this rank under torchrun and exit: 0 done, 1 a checkpoint or the training failed, 2 bad usage."""
    options = parse(arguments)
    output = Output(int(os.environ["RANK"]), options.full_log)
    try:
        _run(options, output)
    except Exception as problem:
        traceback.print_exc()  # into the log
        _report(failures.as_error(problem, output.log or ""), output)
    _leave(0)


def _report(error: CkptError, output: Output) -> NoReturn:
    exchange, of_rank = os.environ.get(EXCHANGE), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if exchange is not None:
        failures.write(Path(exchange), error)
    elif of_rank is not None:  # attempt_0/RANK/error.json in a folder of torchrun
        failures.say_once(Path(of_rank).parents[1], error.problem.shown(), output.show)
    elif os.environ["LOCAL_RANK"] == "0" or error.id == "train-crash":  # another launcher than torchrun
        output.show(error.problem.shown())
    _leave(error.exit_code)


def _leave(code: int) -> NoReturn:
    """End the process without the libraries' own endings.

    A process group would wait for ranks that wait for this one, and gloo's threads can abort the process
    ("terminate called without an active exception") after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(options: Options, output: Output) -> None:
    config = settings.load(options.config, options.overrides)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batch = split(config.batch, world)
    samples = text.read(config.data, config.batch.global_batch_size)
    order = Order(
        dataset_size=len(samples.train), global_batch_size=config.batch.global_batch_size, seed=config.seed
    )

    from ckpttools.trainer import engine as ds
    from ckpttools.trainer.loop import Training

    ds.connect(int(os.environ["LOCAL_RANK"]))
    exchange = os.environ.get(EXCHANGE)
    start = ds.from_rank0(
        lambda: startup.handed_over(Path(exchange)) if exchange else startup.decide(config, options, world)
    )
    output.attach(start.run / "logs" / f"rank_{rank}.log")
    if rank == 0:
        _announce(config, start, output)
    total = config.schedule.total_steps or config.epochs * order.updates_per_epoch
    engine = ds.make(config, ds_config(config, batch, total))
    progress = Progress()
    if start.checkpoint is not None:
        loaded = ds.load(engine, start.checkpoint, start.weights_only)
        if not start.weights_only:
            progress = progress_from(loaded, config, samples, start.checkpoint)
        ds.together()  # a rank that could not load its files ends the run before another reports anything
    output.say(
        f"{world} ranks, {batch.micro} samples each x {batch.accumulation} accumulation ="
        f" {config.batch.global_batch_size} per update; {len(samples.train)} samples,"
        f" {order.updates_per_epoch} updates per epoch, {config.epochs} epochs; at step {progress.iteration}"
    )
    training = Training(
        config=config,
        split=batch,
        order=order,
        samples=samples,
        engine=engine,
        run=start.run,
        output=output,
        progress=progress,
    )
    if progress.epoch >= config.epochs:
        done = f"epoch {progress.epoch} of {config.epochs}"
        output.say(f"Nothing to train: {start.checkpoint} is at {done}; --set=epochs=N trains longer")
    elif options.max_steps is not None and progress.iteration >= options.max_steps:
        done = f"step {progress.iteration} of --max-steps {options.max_steps}"
        output.say(f"Nothing to train: {start.checkpoint} is at {done}")
    else:
        training.train(options.max_steps)
        output.say(f"done at step {training.progress.iteration}: {start.run}")
    ds.disconnect()


def _announce(config: settings.Config, start: startup.Start, output: Output) -> None:
    import yaml

    from ckpttools.trainer.model import architecture

    folders.write_text(start.run / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))
    architecture(config).save_pretrained(start.run / folders.HF_CONFIG)
    exchange = os.environ.get(EXCHANGE)
    if exchange is not None:
        (Path(exchange) / LAUNCHED).write_text(str(start.run), "utf-8")
    output.say(f"run folder {start.run}")
    for note in start.notes:
        output.say(note)
