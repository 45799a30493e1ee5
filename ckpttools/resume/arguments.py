"""Settings that reach DeepSpeed through a trainer: TrainingArguments, and those of `ckpt train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE, SAFE, About
from ckpttools.resume.deepspeed import Saved
from ckpttools.resume.forecast import Difference, Moment, Refusal
from ckpttools.resume.new_run import NewRun, leaves, section

# what transformers fills in for "auto" (integrations/deepspeed.py)
ARGUMENTS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def resolved(run: NewRun, saved: Mapping[str, object]) -> Mapping[str, object] | None:
    """The ds_config of the new run, None where nothing says anything of it.

    "auto" is replaced by the arguments, else by what the saved run had there. Where another configuration
    speaks of the batch, or an MMEngine strategy of more, that is laid over the saved ds_config.
    """
    given = {key: (run.arguments or {}).get(name) for key, name in ARGUMENTS.items()}
    config = run.config
    if config is None and run.arguments and saved:
        config = {**saved, **dict.fromkeys(_BATCH, "auto"), "train_batch_size": "auto"}
    if config is None:
        said = run.stated
        batch = {"train_batch_size": said.total, _BATCH[0]: said.micro, _BATCH[1]: said.accumulation}
        over = {key: value for key, value in batch.items() if value is not None} | dict(said.overlay)
        if not over or not saved:
            return None
        kept = dict(saved)
        if said.total is None:
            kept.pop("train_batch_size", None)  # DeepSpeed computes it
        elif said.micro is None or said.accumulation is None:
            kept = {key: value for key, value in kept.items() if key != _BATCH[said.micro is not None]}
        return kept | over
    out = _filled(config, saved, given, "")
    if config.get("train_batch_size") == "auto" and any(given[key] is not None for key in _BATCH):
        out.pop("train_batch_size", None)  # DeepSpeed computes it
    return out


def _filled(
    config: Mapping[str, object], saved: Mapping[str, object], given: Mapping[str, object], at: str
) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in config.items():
        path = f"{at}.{key}" if at else key
        if isinstance(value, Mapping):
            out[key] = _filled(value, section(saved, key), given, path)
        elif value == "auto":
            found = given.get(path)
            found = saved.get(key) if found is None else found
            if found is not None:
                out[key] = found
        else:
            out[key] = value
    return out


# --- ckpt train ---------------------------------------------------------------------------------------

FREE = {"experiment", "work_dirs", "save", "training", "epochs"}
DATA = {"data", "seed"}  # they decide which sample is next
LOSS = {"training.label_smoothing"}
TEXT = {"data.text_key", "data.max_bytes", "data.validation_samples", "data.source"}


def trainer_settings(saved: Saved, settings: Mapping[str, object]) -> Iterator[Difference]:
    """Settings of `ckpt train` that its ds_config does not show."""
    old = saved.client.get("config")
    if not isinstance(old, Mapping):
        return
    was, now = dict(leaves(old)), dict(leaves(settings))
    inside = bool(saved.client.get("samples_in_epoch"))
    for key in sorted({*was, *now}):
        part = key.partition(".")[0]
        if was.get(key) == now.get(key) or part not in FREE | DATA:
            continue
        if key not in was and part in FREE:
            continue  # a release before this setting wrote the checkpoint: nothing to differ from
        common: dict[str, Any] = {"setting": key, "old": was.get(key), "new": now.get(key)}
        if key in LOSS:
            yield Difference(
                **common, about=About.SETTING, cls=CAREFUL, why="the loss is another from here on"
            )
        elif part in FREE:
            why = "it has no part in what is saved"
            if key == "epochs":
                why = "the run ends earlier or later; the schedule's length is judged by itself"
            yield Difference(**common, about=About.SETTING, cls=SAFE, why=why)
        elif inside:
            yield Difference(
                **common,
                about=About.DATA,
                cls=IMPOSSIBLE,
                why="the next sample is not defined: the checkpoint stopped inside an epoch of the old order"
                + ("; it is refused unless the text turns out to be the same" if key in TEXT else ""),
                hint="keep data and seed, or resume from a checkpoint of an epoch's end",
                refusal=Refusal(moment=Moment.DATA, error="data-changed", text="is not the one that this"),
            )
        else:
            why = "it goes on with other data at the start of an epoch"
            yield Difference(**common, about=About.DATA, cls=CAREFUL, why=why)
