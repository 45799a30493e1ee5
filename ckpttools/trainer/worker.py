"""One rank of a run, from its command line to its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from msgspec.structs import replace

from ckpttools.errors import CkptError, UsageError, counted
from ckpttools.trainer import config as settings
from ckpttools.trainer import failures, folders, startup
from ckpttools.trainer.ds_config import ds_config
from ckpttools.trainer.options import Options, parse
from ckpttools.trainer.order import Order
from ckpttools.trainer.output import Output
from ckpttools.trainer.policy import policy
from ckpttools.trainer.signals import Asked
from ckpttools.trainer.split import Split, split
from ckpttools.trainer.state import Progress, kept_state, progress_from

if TYPE_CHECKING:
    from ckpttools.trainer.task import Data

EXCHANGE = "CKPTTOOLS_TRAIN_EXCHANGE"  # a folder of the launcher, for an error and the run's path
LAUNCHED = "launched"
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run this rank under torchrun and exit: 0 done, 1 a checkpoint or the training failed, 2 bad usage."""
    options = parse(arguments)
    if missing := [name for name in LAUNCHERS if name not in os.environ]:
        error = UsageError(
            "train-launch",
            f"this is one rank of a run, and nothing says which: {', '.join(missing)} not set",
            where=options.config,
            hint=f"ckpt train {options.config}, or torchrun --nproc-per-node N -m ckpttools.trainer",
        )
        sys.stderr.write(f"{error.problem.shown()}\n")
        _leave(error.exit_code)
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
    world = int(os.environ["WORLD_SIZE"])
    batch = split(config.batch, world)

    from ckpttools.trainer import engine as ds
    from ckpttools.trainer import task

    samples = task.read(config)
    order = Order(
        dataset_size=len(samples.train), global_batch_size=config.batch.global_batch_size, seed=config.seed
    )
    ds.connect(int(os.environ["LOCAL_RANK"]))
    exchange = os.environ.get(EXCHANGE)
    start = ds.from_rank0(
        lambda: startup.handed_over(Path(exchange)) if exchange else startup.decide(config, options, world)
    )
    if start.mode == "evaluate":
        from ckpttools.trainer.evaluation import evaluate

        evaluate(config, batch, samples, start, output)
    else:
        _train(options, config, batch, order, samples, start, output)
    ds.disconnect()


def _train(
    options: Options,
    config: settings.Config,
    batch: Split,
    order: Order,
    samples: Data,
    start: startup.Start,
    output: Output,
) -> None:
    from ckpttools.trainer import engine as ds
    from ckpttools.trainer.engines import make
    from ckpttools.trainer.loop import Training
    from ckpttools.trainer.monitor import Monitor
    from ckpttools.trainer.saving import Saving, clean
    from ckpttools.trainer.task import Task

    exchange, rank = os.environ.get(EXCHANGE), int(os.environ["RANK"])
    asked = Asked(exchange)
    layout, plans = config.save.layout, policy(config)
    output.attach(folders.log(start.run, layout, rank))
    updates = config.epochs * order.updates_per_epoch
    if rank == 0:
        clean(folders.place(start.run, layout))
        _announce(config, start, (*start.notes, *plans.notes), output)
    weights = start.checkpoint if start.mode in ("reset", "weights") else None
    engine = make(config, ds_config(config, batch, config.schedule.total_steps or updates), weights)
    progress = Progress()
    if start.checkpoint is not None and start.mode != "weights":
        if start.mode == "reset":
            loaded = kept_state(start.checkpoint)
        else:
            loaded = engine.read(start.checkpoint)
        progress = progress_from(loaded, config, samples, start.checkpoint)
        if start.mode == "reset":
            engine.at(progress.iteration)
    ds.together()  # a rank that could not load its files ends the run before another reports anything
    ranks, each = counted(batch.world, "rank"), counted(batch.micro, "sample")
    length, epochs = counted(order.updates_per_epoch, "update"), counted(config.epochs, "epoch")
    output.say(
        f"{ranks}, {each} each x {batch.accumulation} accumulation = {config.batch.global_batch_size} per"
        f" update; {len(samples.train)} samples, {length} per epoch, {epochs}; at step {progress.iteration}"
    )
    saving = Saving(
        run=start.run,
        layout=layout,
        zero=config.zero.stage > 0,
        verify=options.verify_saves,
        limit=plans.limit,
        say=output.say,
    )
    origin, loss, lowest = start.checkpoint, progress.val_loss, progress.best_val_loss
    if plans.best and origin is not None and start.mode != "weights":
        progress = replace(
            progress, best_val_loss=ds.from_rank0(lambda: saving.known_best(origin, loss, lowest))
        )
    if progress.epoch >= config.epochs:
        done = f"epoch {progress.epoch} of {config.epochs}"
        output.say(f"Nothing to train: {start.checkpoint} is at {done}; --set=epochs=N trains longer")
        return
    if options.max_steps is not None and progress.iteration >= options.max_steps:
        done = f"step {progress.iteration} of --max-steps {options.max_steps}"
        output.say(f"Nothing to train: {start.checkpoint} is at {done}")
        return
    logged = config.training
    training = Training(
        config=config,
        policy=plans,
        split=batch,
        order=order,
        task=Task(data=samples, device=engine.device, smoothing=logged.label_smoothing),
        engine=engine,
        saving=saving,
        monitor=Monitor(
            start.run, output, rank=rank, total=updates, every=logged.log_steps, scalars=logged.tensorboard
        ),
        asked=asked,
        progress=progress,
    )
    by = training.train(options.max_steps)
    if by is not None:
        output.say(f"stopped by {by} at step {training.progress.iteration}; --resume goes on from there")
        return
    if plans.best_at_end:
        from ckpttools.trainer.evaluation import of_checkpoint

        best = training.saving.place / folders.BEST
        if best.exists():
            measured = of_checkpoint(config, batch, samples, best)
            training.monitor.evaluated(training.progress, f"best model {best}", measured, of="best")
    at, saved = training.progress.iteration, training.saved_step
    left = "nothing to resume from was saved" if saved < 0 else f"saved up to step {saved}"
    output.say(f"done at step {at}: {start.run}" + (f"; {left}" if saved != at else ""))


def _announce(config: settings.Config, start: startup.Start, notes: tuple[str, ...], output: Output) -> None:
    import yaml

    from ckpttools.trainer.model import architecture

    folders.place(start.run, config.save.layout).mkdir(parents=True, exist_ok=True)
    folders.write_text(start.run / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))
    architecture(config).save_pretrained(start.run / folders.HF_CONFIG)
    exchange = os.environ.get(EXCHANGE)
    if exchange is not None:
        (Path(exchange) / LAUNCHED).write_text(str(start.run), "utf-8")
    output.say(f"run folder {start.run}")
    for note in notes:
        output.say(note)
