"""Weights only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout, common_dtype
from ckpttools.checks import check_before_use
from ckpttools.errors import UsageError, escape
from ckpttools.formats import PLANS, Source
from ckpttools.formats.configs import ADAPTER, ADAPTER_CONFIG, CONFIG, DIFFUSERS, HEADS, config_files
from ckpttools.formats.deepspeed import SLICED, slices
from ckpttools.formats.notes import not_read
from ckpttools.location import Location
from ckpttools.operations import advice
from ckpttools.operations.destination import default_dst
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.plan import Plan
from ckpttools.stores.files import is_file, is_folder, named
from ckpttools.stores.links import refuse_outside, within
from ckpttools.tensors import FLOAT32
from ckpttools.transforms.cast import cast, dtype_named
from ckpttools.transforms.rename import rename
from ckpttools.transforms.select import Copy, select, weights_only

Form = Literal["safetensors", "pt"]
SINGLE_FILES: dict[Form, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "pt": (".pt", ".pth", ".bin", ".ckpt"),
}
# suffixes of single files that other tools write
FOREIGN = (".gguf", ".ggml", ".onnx", ".h5", ".npz", ".npy", ".msgpack", ".tflite", ".pb", ".index", ".tar")


def extract(
    src: str | Location,
    dst: str | Location | None = None,
    *,
    form: Form | None = None,
    dtype: str | None = None,
    max_shard_size: int = 5_000_000_000,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    copy: Copy | None = None,
    exclude_frozen: bool = False,
    hf_config: str | Path | None = None,
    strip_prefix: str = "",
    tag: str | None = None,
    key: str | None = None,
    how: Writing | None = None,
) -> Written:
    """Write the weights of a checkpoint, for inference or for other tools.

    `dst` is a folder, which transformers loads, or one file; `form` is by its suffix, else safetensors.
    `copy` is "master" for the fp32 master weights (the default where there are any) or "model" for those
    trained with. One torch file has what is known of global_step, epoch, train_loss and val_loss beside
    `model_state_dict`; a `.bin` and a folder are weights alone. `max_shard_size` is in bytes and holds for
    folders. `key` is where the weights lie in a file of torch.save, if under an unusual name.

    >>> made = extract("fixtures/trainer/z2_bf16_2", out / "half.safetensors", dtype="bf16")
    >>> [(file.path or made.destination.name) for file in made.plan.files]
    ['half.safetensors']
    """
    src = named(src)
    dst = named(dst) if dst is not None else None
    form = form_of(form, dst)
    target = dtype_named(dtype)
    single = dst is not None and dst.name.endswith(SINGLE_FILES[form])
    if single and hf_config is not None:
        raise UsageError(
            "bad-usage",
            "a configuration needs a folder as DST",
            where=dst or "",
            why="config.json lies beside the weights of a model folder",
            hint="leave the suffix off DST",
        )
    source = replace(find(src, tag), key=key)
    how = how or Writing()
    checkpoint = check_before_use(source, only_looks=how.dry_run)
    chosen = select(checkpoint, include=include, exclude=exclude, exclude_frozen=exclude_frozen)
    chosen = weights_only(chosen, copy)
    if strip_prefix:
        chosen = rename(chosen, lambda name: name.removeprefix(strip_prefix))
    if target is not None:
        chosen = cast(chosen, target)
    made = (note for note in chosen.notes if note not in checkpoint.notes)
    chosen = replace(chosen, notes=(*slices(checkpoint.client.get(SLICED)), *made))
    dst = dst or default_dst(src, "weights", "")
    config = Path(hf_config) if hf_config is not None else None
    return write(chosen, src, source, dst, form, max_shard_size, config, how, "extract")


def write(
    weights: Checkpoint,
    src: Location,
    source: Source,
    dst: Location,
    form: Form,
    max_shard_size: int,
    config: Path | None,
    how: Writing | None,
    label: str,
) -> Written:
    """Weights as a model's folder, or one file by `dst`'s suffix, with the configuration of `source`.

    A torch file of weights that were `extract`ed has the source's counters; a mean has none of its own.
    """
    single = dst.name.endswith(SINGLE_FILES[form])
    # transformers loads a .bin, as a bare state dict
    keyed = single and label == "extract" and dst.suffix != ".bin"
    variant = None if form != "pt" else "pt" if keyed else "bin"
    layout = Layout(format="hf", variant=variant, single=single, max_shard_size=max_shard_size)
    plan = PLANS[layout.format](weights, layout)
    plan = replace(plan, notes=(*weights.notes, *plan.notes, *not_read(weights)))
    if not single:
        plan = with_config(plan, config, source.root)
    diffusers = weights.layout.stem == DIFFUSERS
    configured = not diffusers and is_configured(plan)
    state = weights.training
    counted = (state.step, state.epoch, state.train_loss, state.val_loss) != (None,) * 4
    kept = variant == "pt" and counted
    fp32 = common_dtype(weights.tensors) == FLOAT32.short
    steps = advice.weights(dst, form, single=single, configured=configured, keyed=kept, fp32=fp32)
    return carry_out(src, dst, plan, how or Writing(), label=label, next=steps)


def form_of(asked: Form | None, dst: Location | None) -> Form:
    """What is asked for, else what DST's suffix says, else safetensors."""
    name = dst.name.lower() if dst is not None else ""
    if name.endswith(FOREIGN):
        raise UsageError(
            "bad-usage",
            f"'{escape(Path(name).suffix)}' files are not written by ckpt extract",
            where=str(dst),
            why="the file would be named like another format than it has",
            hint=f"single files: {', '.join(end for ends in SINGLE_FILES.values() for end in ends)}; "
            "without one of these suffixes DST is a folder",
        )
    by_name = next((f for f, ends in SINGLE_FILES.items() if name.endswith(ends)), None)
    if asked is not None and by_name is not None and asked != by_name:
        raise UsageError(
            "bad-usage",
            f"DST is named like a {by_name} file, but {asked} is asked for",
            where=dst or "",
            why="loaders go by the suffix",
            hint="change the suffix of DST, or leave it off for a folder",
        )
    return asked or by_name or "safetensors"


def is_configured(plan: Plan) -> bool:
    """Whether transformers loads what is written."""
    head = ADAPTER_CONFIG if _is_adapter(plan) else CONFIG
    return any(file.path == head for file in plan.files)


def _is_adapter(plan: Plan) -> bool:
    return any(file.path.startswith(ADAPTER) for file in plan.files)


def with_config(plan: Plan, asked: Path | None, root: Location) -> Plan:
    """Configuration and tokenizer from the folder asked for, else from beside the checkpoint."""
    near = (root, root / "hf_model", root / "hf_config")
    there = (f for f in near if is_folder(f))
    folder = asked or next((f for f in there if any(is_file(f / head) for head in HEADS)), None)
    if folder is None:
        return replace(
            plan, notes=(*plan.notes, "no config.json: transformers needs one; give it with --hf-config DIR")
        )
    if asked is None:
        with within(root):
            refuse_outside(folder)
    files = config_files(folder)
    found = [file.path for file in files]
    if not _is_adapter(plan) and CONFIG in found and ADAPTER_CONFIG in found:
        del files[found.index(ADAPTER_CONFIG)]  # transformers would look for an adapter
        note = f"not copied: {ADAPTER_CONFIG}, as the weights are a model's"
        plan = replace(plan, notes=(*plan.notes, note))
    if asked is not None and not files:
        raise UsageError(
            "no-config",
            "the folder holds no configuration or tokenizer",
            where=asked,
            why="transformers could not load the result",
        )
    names = ", ".join(file.path for file in files)
    return replace(
        plan, files=(*plan.files, *files), notes=(*plan.notes, f"copied from {escape(folder)}: {names}")
    )
