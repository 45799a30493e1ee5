"""A run of the trainer beside the checkpoint that it continues: what resume-check says about the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ckpttools import frameworks
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.formats import read
from ckpttools.frameworks.reference import FRAMEWORK
from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE
from ckpttools.resume import NewRun, Target, foretell, trainers
from ckpttools.resume.forecast import Difference
from ckpttools.resume.model import of_config
from ckpttools.resume.new_run import Stated
from ckpttools.trainer import config as settings
from ckpttools.trainer.config import Config
from ckpttools.trainer.ds_config import ds_config
from ckpttools.trainer.split import split
from ckpttools.trainer.text import VOCAB_SIZE
from ckpttools.training import Training


def warnings(checkpoint: Path, config: Config, where: Path, world: int) -> Iterator[str]:
    """What goes on otherwise than before, in the words of resume-check.

    Raises CkptError where DeepSpeed would refuse the checkpoint, or load something wrong without an error.
    """
    target = Target.find(checkpoint)
    if target.saved is None:
        differences = tuple(_of_file(read(target.source).client.get("config"), config))
    elif isinstance(target.saved.client.get("dataset_size"), int):
        run = new_run(config, target, NewRun(world_size=world), where)
        differences = foretell(target, run).differences
    else:
        return  # not this trainer's: startup and the ranks say so
    wrong = [d for d in differences if d.cls == IMPOSSIBLE]
    if wrong:
        raise CkptError(
            "resume-failed",
            f"{wrong[0].setting}: {_short(wrong[0].old)} -> {_short(wrong[0].new)}",
            where=checkpoint,
            why="\n".join(d.why for d in wrong),
            hint="\n".join(dict.fromkeys([d.hint for d in wrong if d.hint]))
            or "set it as the checkpoint has it",
        )
    for d in differences:
        if d.cls == CAREFUL:
            yield f"careful: {d.setting}: {_short(d.old)} -> {_short(d.new)}: {d.why}"
            yield from (f"  {line}" for line in d.hint.splitlines())


def _of_file(saved: object, config: Config) -> Iterator[Difference]:
    """The same for plain torch, by the settings that the checkpoint was saved with."""
    if isinstance(saved, Mapping):
        old = Training(framework=FRAMEWORK.name, unit="update", configuration=saved)
        yield from trainers.settings(old, NewRun(stated=Stated(values=_values(config, saved))))


def _values(config: Config, saved: Mapping[Any, object]) -> dict[str, object]:
    """What it says; where the schedule has a length of its own, the number of epochs changes nothing."""
    epochs = config.epochs if config.schedule.total_steps is None else saved.get("epochs")
    return {**config.plain(), "epochs": epochs}


def _short(value: object) -> str:
    return escape("-" if value is None else value, 60)


def read_new_run(config: Path, target: Target, run: NewRun) -> NewRun:
    """`run` with all that the trainer's configuration file decides. Raises UsageError."""
    if not config.is_file():
        raise UsageError("not-found", "there is no such file", where=config, hint="check --config")
    return new_run(settings.load(config), target, run, config)


def new_run(wanted: Config, target: Target, run: NewRun, where: Path) -> NewRun:
    """The same for a configuration that was read already; `where` names its file in errors."""
    saved = target.saved
    ranks = run.world_size or (saved.ranks if saved is not None else None)
    size: object
    if saved is not None:
        size = saved.client.get("dataset_size")
    else:
        old = frameworks.read(target.source, read(target.source))
        size = old.size
        values = _values(wanted, old.configuration)
        values["batch"] = old.configuration.get("batch", {})  # the numbers say it
        stated = replace(run.stated, total=wanted.batch.global_batch_size, values=values)
        run = replace(run, stated=stated)
    total = wanted.schedule.total_steps
    if isinstance(size, int):  # as long as this run is, not as the saved one was
        updates = wanted.epochs * (size // wanted.batch.global_batch_size)
        run = replace(run, stated=replace(run.stated, steps=updates))
    if total is None:
        if not isinstance(size, int):
            raise UsageError(
                "run-config",
                "the length of the schedule is not in the configuration",
                where=where,
                why="the checkpoint does not say how many samples there are, as one of ckpt train's does",
                hint="set schedule.total_steps, or give a ds_config (JSON)",
            )
        total = wanted.epochs * (size // wanted.batch.global_batch_size)
    net, length = wanted.model, wanted.data.sequence_length
    kinds: dict[str, dict[str, object]] = {
        "llama": {
            "hidden_size": net.hidden_size,
            "intermediate_size": net.intermediate_size,
            "num_hidden_layers": net.layers,
            "num_attention_heads": net.heads,
        },
        "gpt2": {
            "n_embd": net.hidden_size,
            "n_inner": net.intermediate_size,
            "n_layer": net.layers,
            "n_head": net.heads,
            "n_positions": length,
        },
    }
    architecture = {
        "model_type": net.family,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": net.tie_embeddings,
        **kinds.get(net.family, {}),
    }
    return replace(
        run,
        config=ds_config(wanted, split(wanted.batch, ranks), total) if ranks is not None else None,
        settings=wanted.plain(),
        world_size=ranks,
        freeze=run.freeze or tuple(wanted.freeze),
        model=run.model or (of_config(architecture, where) if net.family in kinds else None),
    )
