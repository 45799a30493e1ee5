"""ckpt extract: weights only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckpttools.cli.options import DST, SRC, parse_size, writing
from ckpttools.cli.write import Writing, write
from ckpttools.errors import UsageError, escape
from ckpttools.plan import Plan
from ckpttools.siblings import default_dst

SINGLE_FILES = {"safetensors": (".safetensors",), "pt": (".pt", ".pth", ".bin", ".ckpt")}


@click.command("extract")
@SRC
@DST
@click.option(
    "--weights-only", is_flag=True, help="Weights and buffers, no optimizer state (always so here)."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "pt"]),
    help="safetensors (the default) or torch files.",
)
@click.option("--safe-serialization", is_flag=True, help="The same as --format safetensors.")
@click.option(
    "--dtype", metavar="DTYPE", help="Cast every floating point tensor: fp32, bf16, fp16, float32 ..."
)
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="The largest file of a folder."
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Only tensors whose name matches (repeatable)."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors whose name matches (repeatable).")
@click.option(
    "--source",
    "copy",
    type=click.Choice(["master", "model"]),
    help="fp32 master weights (the default where there are any) or the weights as trained with.",
)
@click.option("--exclude-frozen-parameters", is_flag=True, help="Leave out parameters that were not trained.")
@click.option(
    "--hf-config",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Copy the model's configuration and tokenizer from this folder.",
)
@click.option(
    "--strip-prefix", default="", metavar="PREFIX", help="Remove this prefix from names that have it."
)
@writing
def command(
    src: Path,
    dst: Path | None,
    weights_only: bool,
    form: str | None,
    safe_serialization: bool,
    dtype: str | None,
    max_shard_size: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    copy: str | None,
    exclude_frozen_parameters: bool,
    hf_config: Path | None,
    strip_prefix: str,
    tag: str | None,
    **options: Any,
) -> None:
    """Write the weights of SRC, for inference or for other tools.

    DST may be a folder, which transformers loads, or one file (.safetensors, .pt, .bin ...). By default it is
    weights-of-SRC beside it. fp32 master weights are taken where they exist: they are what DeepSpeed's own
    zero_to_fp32 gives.
    """
    from ckpttools.checks import check_before_use
    from ckpttools.formats import hf, locate
    from ckpttools.transforms.select import DTYPE_NAMES, weights

    form = _format(form, safe_serialization, dst)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(
            "bad-usage", f"'{escape(dtype)}' is not a dtype", hint=f"choose from {', '.join(DTYPE_NAMES)}"
        )
    limit = parse_size(max_shard_size)
    single = dst is not None and dst.name.endswith(SINGLE_FILES[form])
    if single and hf_config is not None:
        raise UsageError(
            "bad-usage",
            "--hf-config needs a folder as DST",
            hint="leave the suffix off DST, or the option out",
        )
    source = locate(src, tag)
    checkpoint = check_before_use(source)
    chosen = weights(
        checkpoint,
        source=copy,
        dtype=DTYPE_NAMES[dtype] if dtype else None,
        include=include,
        exclude=exclude,
        exclude_frozen=exclude_frozen_parameters,
        strip_prefix=strip_prefix,
    )
    make = hf.plan if form == "safetensors" else hf.plan_bin
    plan = make(chosen, max_shard_size=limit, single=single)
    if not single:
        plan = _with_config(plan, hf_config, source.root)
    dst = dst or default_dst(src, "weights", "")
    write(plan, Writing(src=src, dst=dst, **options), "extract")


def _format(form: str | None, safe: bool, dst: Path | None) -> str:
    """What is asked for, else what DST's suffix says, else safetensors."""
    if safe and form == "pt":
        raise UsageError("bad-usage", "--safe-serialization and --format pt contradict each other")
    by_name = next(
        (f for f, ends in SINGLE_FILES.items() if dst is not None and dst.name.endswith(ends)), None
    )
    asked = "safetensors" if safe else form
    if asked is not None and by_name is not None and asked != by_name:
        raise UsageError(
            "bad-usage",
            f"DST is named like a {by_name} file, but {asked} is asked for",
            hint="change the suffix of DST, or leave it off for a folder",
        )
    return asked or by_name or "safetensors"


def _with_config(plan: Plan, asked: Path | None, root: Path) -> Plan:
    """Configuration and tokenizer from the folder asked for, else from beside the checkpoint."""
    from ckpttools.formats import hf
    from ckpttools.stores.links import refuse_outside, within

    heads = ("config.json", "adapter_config.json")
    near = (root, root / "hf_model", root / "hf_config")
    folder = asked or next((f for f in near if any((f / head).is_file() for head in heads)), None)
    if folder is None:
        return replace(
            plan, notes=(*plan.notes, "no config.json: transformers needs one; give it with --hf-config DIR")
        )
    if asked is None:
        with within(root):
            refuse_outside(folder)
    files = hf.config_files(folder)
    if asked is not None and not files:
        raise UsageError("no-config", "the folder holds no configuration or tokenizer", where=asked)
    names = ", ".join(file.path for file in files)
    return replace(
        plan, files=(*plan.files, *files), notes=(*plan.notes, f"copied from {escape(folder)}: {names}")
    )
