"""transformers' TrainingArguments: the saved ones as data, and what other ones do to a resumed run.

Source: transformers/trainer.py and its optimizer's and scheduler's state, as seen in resumed runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpttools.containers.edit import Opaque, value
from ckpttools.containers.pickles import Object
from ckpttools.containers.torch_file import is_torch_file, read_torch_file
from ckpttools.errors import CkptError
from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE, SAFE, About, Setting
from ckpttools.location import Location
from ckpttools.stores.files import is_file

KIND = "TrainingArguments"
PLAIN = (str, int, float, bool)  # what a person set
KWARGS = "lr_scheduler_kwargs"


def read_arguments(path: Location) -> dict[str, object]:
    """The plain attributes of the pickled object, enums as their text; {} where they cannot be read."""
    if not is_file(path) or not is_torch_file(path):
        return {}
    try:
        file = read_torch_file(path)
    except CkptError:
        return {}
    node = file.value
    found = value(file, node.state if isinstance(node, Object) and node.has_state else node)
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: _text(item) for key, item in pairs if isinstance(key, str)}


def _text(found: object) -> object:
    """SchedulerType("linear") as its text: enum members are pickled as a call of the class."""
    node = found.node if isinstance(found, Opaque) else None
    if isinstance(node, Object) and len(node.args) == 1 and isinstance(node.args[0], str):
        return node.args[0]
    return found


def configuration(arguments: Mapping[str, object]) -> dict[str, object]:
    """The settings of a run that can be compared, saved or as a file states them."""
    kept = {key: each for key, each in arguments.items() if isinstance(each, PLAIN) or key == KWARGS}
    if isinstance(kind := kept.get("optim"), str):
        kept["optim"] = kind.removesuffix("_fused")  # the same class and state
    return kept


# the first pattern that matches the whole name counts
SETTINGS = (
    Setting(
        pattern=rf"lr_scheduler_type|warmup_(steps|ratio)|{KWARGS}.*", about=About.SCHEDULE, cls=CAREFUL,
        why="the Trainer computes the schedule from it anew and continues it at the old step: the learning "
        "rate jumps after the first update",
    ),
    Setting(
        pattern=r"optim", about=About.OPTIMIZER, cls=IMPOSSIBLE,
        why="the optimizer's state is saved for its class",
    ),
    Setting(
        pattern=r"weight_decay|adam_(beta1|beta2|epsilon)", cls=SAFE,
        why="no effect: the saved param_groups are loaded",
    ),
    Setting(
        pattern=r"max_grad_norm|label_smoothing_factor|neftune_noise_alpha|average_tokens_across_devices|optim_.*",
        cls=CAREFUL,
        why="the gradients are others from here on",
    ),
    Setting(
        pattern=r"bf16|fp16|tf32", about=About.ENGINE, cls=CAREFUL,
        why="the updates are computed in another precision from here on",
    ),
    Setting(
        pattern=r"seed|data_seed|dataloader_drop_last|ignore_data_skip|group_by_length|train_sampling_strategy|"
        r"remove_unused_columns|full_determinism",
        about=About.DATA, cls=CAREFUL,
        why="it decides which samples come next",
    ),
    # batch, rate and length have rules of their own; the rest is logging, evaluation, saving ...
    Setting(pattern=r".*", cls=SAFE, why=""),
)  # fmt: skip
