"""Models of diffusers: their files by name, and a pipeline of several, which is never one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

from ckpttools.formats import locate, open_checkpoint
from ckpttools.formats.locate import Several

STEM = "diffusion_pytorch_model"


def model(folder: Path, name: str, **tensors: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / name, {"format": "pt"})
    (folder / "config.json").write_text("{}")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return made(tmp_path / "pipeline")


def made(folder: Path, unet: float = 1.0) -> Path:
    model(folder / "unet", f"{STEM}.safetensors", w=torch.full((4,), unet))
    model(folder / "vae", f"{STEM}.safetensors", w=torch.ones(5))
    model(folder / "text_encoder", "model.safetensors", w=torch.ones(6))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def sharded(folder: Path, suffix: str = "safetensors", index: str = "") -> dict[str, torch.Tensor]:
    tensors = {f"l{i}.weight": torch.full((3,), float(i)) for i in (1, 2)}
    folder.mkdir()
    shards = {name: f"{STEM}-{i:05d}-of-00002.{suffix}" for i, name in enumerate(tensors, 1)}
    for name, shard in shards.items():
        if suffix == "bin":
            torch.save({name: tensors[name]}, folder / shard)
        else:
            save_file({name: tensors[name]}, folder / shard)
    named = folder / (index or f"{STEM}.{suffix}.index.json")
    named.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": shards}))
    return tensors


def test_a_pipeline_is_not_one_of_its_models(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(Several) as caught:
        locate(pipeline)
    assert {found.name for found in caught.value.found} == {"unet", "vae", "text_encoder"}
    other = made(tmp_path / "other", unet=7.0)
    for command in (("inspect", pipeline), ("diff", pipeline, other), ("extract", pipeline, tmp_path / "x")):
        ran = run(*command)
        assert ran.code == 2 and "error[several-checkpoints]" in ran.err, command
        assert all(name in ran.err for name in ("unet", "vae", "text_encoder"))
    assert not (tmp_path / "x").exists()
    assert run("diff", pipeline / "unet", other / "unet").code == 1


def test_a_variant_of_the_text_encoder_is_one_of_the_several(pipeline: Path) -> None:
    encoder = pipeline / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    with pytest.raises(Several) as caught:
        locate(pipeline)
    assert {found.name for found in caught.value.found} == {"unet", "vae", "text_encoder"}


def test_verify_reads_every_model_and_names_what_is_lost(pipeline: Path) -> None:
    good = run("verify", pipeline)
    assert good.code == 0 and "3 of 3 checkpoints are good" in good.out
    (pipeline / "unet" / f"{STEM}.safetensors").unlink()
    lost = run("verify", pipeline)
    assert lost.code == 1 and "[component-missing]" in lost.out and "unet" in lost.out
    assert "2 of 3 checkpoints are good" in lost.out
    for file in (pipeline / "vae").iterdir():
        file.unlink()
    (pipeline / "vae").rmdir()
    lost = run("verify", pipeline)
    assert lost.code == 1 and lost.out.count("[component-missing]") == 2
    found = run("inspect", pipeline)  # one is left, which is not the pipeline
    assert found.code == 1 and "error[component-missing]" in found.err


def test_a_damaged_model_of_a_pipeline_is_found(pipeline: Path) -> None:
    file = pipeline / "unet" / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    ran = run("verify", pipeline)
    assert ran.code == 1 and "[file-truncated]" in ran.out and "2 of 3" in ran.out


@pytest.mark.parametrize(
    "name",
    [f"{STEM}.safetensors", f"{STEM}.bin", f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.bin"],
)
def test_a_single_file_of_diffusers_is_the_model(name: str, tmp_path: Path) -> None:
    tensors = {"w": torch.arange(4.0)}
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert (found.layout.format, found.layout.stem, list(found.tensors)) == ("hf", STEM, ["w"])


@pytest.mark.parametrize(
    ("suffix", "index"),
    [
        ("safetensors", ""),
        ("bin", ""),
        ("safetensors", f"{STEM}.safetensors.index.fp16.json"),
        ("safetensors", f"{STEM}.safetensors.fp16.index.json"),
    ],
)
def test_shards_of_diffusers_are_one_model(suffix: str, index: str, tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "unet", suffix, index)
    assert open_checkpoint(tmp_path / "unet").tensors.keys() == tensors.keys()
    assert run("verify", tmp_path / "unet").code == 0
    (tmp_path / "unet" / f"{STEM}-00002-of-00002.{suffix}").unlink()
    ran = run("verify", tmp_path / "unet")
    assert ran.code == 1 and "[shard-missing]" in ran.out


def test_extract_keeps_the_name_that_diffusers_looks_for(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text("{}")
    ran = run("extract", tmp_path / "unet", tmp_path / "out")
    assert ran.code == 0 and "transformers.AutoModel" not in ran.out + ran.err
    written = load_file(tmp_path / "out" / f"{STEM}.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert written.keys() == tensors.keys()


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "tf_model-00001-of-00002.h5"])
def test_weights_of_another_framework_are_not_called_lost(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(bytes(10))
    for command in ("inspect", "verify"):
        ran = run(command, tmp_path)
        assert ran.code == 2 and "error[framework-not-read]" in ran.err and name in ran.err
    (tmp_path / name).unlink()
    assert "error[no-weights]" in run("inspect", tmp_path).err


def test_parts_without_weights_of_torch_are_not_called_lost(pipeline: Path) -> None:
    """A scheduler may lie in the pipeline's own folder, where diffusers looks; tokenizers have no weights."""
    (pipeline / "scheduler" / "scheduler_config.json").rename(pipeline / "scheduler_config.json")
    (pipeline / "scheduler").rmdir()
    (pipeline / "tokenizer").mkdir()
    (pipeline / "tokenizer/config.json").write_text("{}")
    index = json.loads((pipeline / "model_index.json").read_text())
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "_ignore_files": ["a.bin", "b.bin"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    ran = run("verify", pipeline)
    assert ran.code == 0 and "3 of 3 checkpoints are good" in ran.out, ran
    for folder in ("unet", "vae"):
        (pipeline / folder / f"{STEM}.safetensors").unlink()
        (pipeline / folder / "model.onnx").write_bytes(b"x")
    ran = run("verify", pipeline)
    assert ran.code == 2 and "framework-not-read" in ran.out and "component-missing" not in ran.out, ran
    assert run("inspect", pipeline).code == 2


def test_a_part_that_is_a_link_is_not_passed_over(pipeline: Path, tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        (pipeline / name).rename(tmp_path / name)
        (pipeline / name).symlink_to(tmp_path / name)
    ran = run("verify", pipeline)
    assert ran.code == 1 and ran.out.count("[link-outside]") == 2, ran
    assert run("inspect", pipeline).code == 1
