"""What the libraries' own converters make of every sample, held against the source by ckpt.

    python tests/upstream.py [--write] [NAME ...]

Runs DeepSpeed's zero_to_fp32 and ds_to_universal, torch's dcp_to_torch_save and accelerate's
merge_fsdp_weights on the samples under fixtures/, and compares what they wrote with what the source holds:
every weight bit by bit, and of ds_to_universal the optimizer's state. `--write` puts the table into
docs/pages/converters.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from support import FIXTURES, as_torch, identical  # noqa: E402

from ckpttools.checkpoint import Checkpoint  # noqa: E402
from ckpttools.formats import open_checkpoint  # noqa: E402

PAGE = HERE.parent / "docs/pages/converters.md"
BEGIN, END = "<!-- made by tests/upstream.py -->", "<!-- end -->"
Tensors = Mapping[str, torch.Tensor]
Losses = list[str]


def weights_lost(checkpoint: Checkpoint, found: Tensors) -> Losses:
    """Where the weights are not those of the source: its fp32 master where there is one."""
    best = checkpoint.best_copies()
    gone = [name for name in best if name not in found]
    out: Losses = []
    tied = [name for name in gone if name in checkpoint.shared and checkpoint.shared[name] in found]
    for what, names in (
        ("tied names", tied),
        ("buffers", [n for n in gone if n in checkpoint.buffers]),
        ("frozen weights", [n for n in gone if n in checkpoint.frozen and n not in tied]),
    ):
        if names:
            out.append(f"lacks {what}")
            gone = [name for name in gone if name not in names]
    if gone:
        out.append("lacks weights")
    other: dict[str, None] = {}
    for name, ref in best.items():
        if name in found and not identical(found[name], as_torch(ref)):
            kind = "buffers" if name in checkpoint.buffers else "weights"
            ours = as_torch(ref)
            same = found[name].shape == ours.shape and torch.equal(found[name].double(), ours.double())
            other[f"{kind} in another type" if same else f"{kind} with other values"] = None
    return [*out, *other]


def state_lost(checkpoint: Checkpoint, folder: Path) -> Losses:
    """Where the optimizer's state of a universal folder is not that of the source."""
    out: dict[str, None] = {}
    for group in checkpoint.groups:
        for name in group.params:
            for kind, refs in group.state.items():
                file = folder / "zero" / name / f"{kind}.pt"
                if not file.is_file():
                    out[f"lacks {'masters' if kind == 'fp32' else kind}"] = None
                    continue
                saved = torch.load(file, weights_only=False)
                tensor = saved["param"] if isinstance(saved, dict) else saved
                ours = as_torch(refs[name])
                if not identical(
                    tensor.reshape(ours.shape) if tensor.numel() == ours.numel() else tensor, ours
                ):
                    out[f"{kind} with other values"] = None
            steps = (folder / "zero" / name / "step.pt", folder / "zero/optimizer_state.pt")  # of stage 3
            if "step" in group.scalars and not any(file.is_file() for file in steps):
                out["lacks step"] = None
    return [*out]


# --- the converters -----------------------------------------------------------------------------------


def tag_of(source: Path) -> Path:
    return source / (source / "latest").read_text().strip()


def zero_to_fp32(source: Path, out: Path, checkpoint: Checkpoint) -> Losses:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(source))
    return weights_lost(checkpoint, {name: tensor.contiguous() for name, tensor in found.items()})


def zero_to_safetensors(source: Path, out: Path, checkpoint: Checkpoint) -> Losses:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(source), str(out), safe_serialization=True)
    found = open_checkpoint(out)
    return weights_lost(checkpoint, {name: as_torch(ref) for name, ref in found.tensors.items()})


def ds_to_universal(source: Path, out: Path, checkpoint: Checkpoint) -> Losses:
    from deepspeed.checkpoint import ds_to_universal as tool

    tool.main(
        SimpleNamespace(
            input_folder=str(tag_of(source)),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    return state_lost(checkpoint, out)


def dcp_to_torch(source: Path, out: Path, checkpoint: Checkpoint) -> Losses:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    inner = source / "pytorch_model_fsdp_0"
    dcp_to_torch_save(inner if inner.is_dir() else source, out)
    state = torch.load(out, weights_only=False)
    while isinstance(state, dict) and not {"model", "optimizer"} & state.keys() and "app" in state:
        state = state["app"]
    model = state.get("model", state)
    losses = weights_lost(checkpoint, {k: v for k, v in model.items() if isinstance(v, torch.Tensor)})
    saved = state.get("optimizer", state.get("optim", {}))
    if any(isinstance(key, str) for key in saved.get("state", saved)):
        losses.append("optimizer state by name, which torch.optim cannot load")
    return losses


def accelerate_merge(source: Path, out: Path, checkpoint: Checkpoint) -> Losses:
    from accelerate.utils import merge_fsdp_weights

    inner = source / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(inner if inner.is_dir() else source), str(out))
    found = open_checkpoint(out / "model.safetensors")
    return weights_lost(checkpoint, {name: as_torch(ref) for name, ref in found.tensors.items()})


Tool = Callable[[Path, Path, Checkpoint], Losses]
ZERO = [*FIXTURES.glob("deepspeed-*/z*"), *FIXTURES.glob("trainer/z*")]
DCP = [path for path in (FIXTURES / "dcp").iterdir() if path.name != "truth"]
TOOLS: dict[str, tuple[Tool, list[Path], str]] = {
    "zero_to_fp32": (zero_to_fp32, ZERO, "the optimizer"),
    "zero_to_fp32 --safe_serialization": (zero_to_safetensors, ZERO, "the optimizer"),
    "ds_to_universal": (ds_to_universal, ZERO, "-"),
    "torch dcp_to_torch_save": (dcp_to_torch, DCP, "-"),
    "accelerate merge-weights": (accelerate_merge, DCP, "the optimizer, counters"),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def outcome(tool: Tool, source: Path) -> tuple[str, str]:
    """("right" | "refused" | "wrong", why)."""
    checkpoint = open_checkpoint(source)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quiet():
                losses = tool(source, Path(folder) / "out", checkpoint)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            text = (str(error).strip().splitlines() or [""])[0]
            text = re.sub(r"['\"]?/[\w./-]+['\"]?|<.*", "...", text)[:80].replace("|", "/")
            return "refused", f"{type(error).__name__}: {text}"
    return ("wrong", "; ".join(losses)) if losses else ("right", "")


def name_of(source: Path) -> str:
    return source.relative_to(FIXTURES).as_posix().removeprefix("deepspeed-")


def readable(sources: list[Path]) -> Iterator[Path]:
    """The samples whose content ckpt knows: only those can be compared."""
    for source in sorted(sources):
        with contextlib.suppress(Exception):
            open_checkpoint(source)
            yield source


def table(names: list[str]) -> str:
    lines = ["| converter | samples | right | always leaves out | refused | silently lost or wrong |"]
    lines.append("|---|---|---|---|---|---|")
    for name, (tool, sources, without) in TOOLS.items():
        if names and name.split()[0] not in names and name not in names:
            continue
        found = {source: outcome(tool, source) for source in readable(sources)}
        cells = {
            kind: [s for s, (k, _) in found.items() if k == kind] for kind in ("right", "refused", "wrong")
        }

        def reasons(kind: str, found: Any = found, cells: Any = cells) -> str:
            by: dict[str, list[str]] = {}
            for source in cells[kind]:
                by.setdefault(found[source][1], []).append(name_of(source))
            some = [
                f"{why} ({len(which)}: {', '.join(which[:3])}{' ...' if len(which) > 3 else ''})"
                for why, which in sorted(by.items(), key=lambda each: -len(each[1]))
            ]
            return f"{len(cells[kind])}" + (": " + "<br>".join(some) if some else "")

        lines.append(
            f"| {name} | {len(found)} | {len(cells['right'])} | {without} | {reasons('refused')} "
            f"| {reasons('wrong')} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TOOLS)}; default all")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = table(options.names)
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")
    else:
        print(made)


if __name__ == "__main__":
    main()
