"""Settings: every mistake is an error that names the setting and says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ckpttools.errors import UsageError
from ckpttools.trainer import SETTINGS, text
from ckpttools.trainer import config as settings
from ckpttools.trainer.config import Config, Data
from ckpttools.trainer.ds_config import ds_config
from ckpttools.trainer.options import Options, parse
from ckpttools.trainer.split import split

DEMO = Path(settings.__file__).with_name("demo.yaml")


def test_the_bundled_example_is_complete_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = settings.load(DEMO)
    assert yaml.safe_load(DEMO.read_text()).keys() == config.plain().keys()
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.plain()))
    assert settings.load(again) == config


def test_overrides_and_numbers_that_yaml_reads_as_text(config: Path) -> None:
    loaded = settings.load(config, ["optimizer.lr=3e-4", "zero.stage=1", "freeze=[a.*]", "save.epochs=off"])
    assert (loaded.optimizer.lr, loaded.zero.stage, loaded.freeze) == (3e-4, 1, ("a.*",))
    assert loaded.save.epochs is False
    assert loaded.experiment == "tiny"


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("zero: {stge: 2}", "zero.stge: no such setting", "did you mean zero.stage?"),
        ("zero: 2", "zero: expected a mapping", "zero"),
        ("zero: {stage: 4}", "zero.stage: expected 0, 1, 2 or 3, got 4", "zero.stage"),
        ("epochs: two", "epochs: expected a whole number above 0, got 'two'", "epochs"),
        ("epochs: true", "epochs: expected a whole number above 0, got True", "epochs"),
        ("epochs: 0", "epochs: expected a whole number above 0", "epochs"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast'", "optimizer.lr"),
        ("precision: int8", "precision: expected one of bf16, fp16, fp32", "precision"),
        ("freeze: model.*", "freeze: expected a list of text", "freeze"),
        ("model: {hidden_size: 30, heads: 4}", "model.hidden_size: expected a multiple", "hidden_size"),
        ("data: {source: http://x}", "data.source: expected stdlib, digits or path:FILE", "data.source"),
        ("experiment: a/b", "experiment: expected a folder name", "experiment"),
        ("training: {label_smoothing: 1}", "training.label_smoothing: expected a number from 0", "training"),
        ("training: {save_minutes: -1}", "training.save_minutes: expected a number of minutes", "training"),
        ("training: {max_keep_ckpt: 3}", "training.max_keep_ckpt: no such", "mean training.max_keep_ckpts?"),
        ("training: {max_keep_ckpts: 0}", "training.save_total_limit: expected a whole number", "training"),
        (
            "training: {weight_decay: 0.1}\noptimizer: {weight_decay: 0.2}",
            "training.weight_decay is 0.1 and optimizer.weight_decay is 0.2",
            "leave one of them out",
        ),
        ("training: {evaluation: {full: true}}", "training.evaluation.full: no such setting", "full_eval"),
        ("data: {source: digits}", "model.family: expected vit for data.source digits", "model.family"),
        ("save: {layout: monolithic}", "save.layout: expected a layout of folders", "save.layout"),
        ("save: {layout: bundle}\nzero: {stage: 0}", "save.layout: expected another layout", "save.layout"),
        ("zero: {stage: 0}\nprecision: fp16", "precision: expected bf16 or fp32", "precision"),
        ("optimizer: {lr: true}", "optimizer.lr: expected a number, got True", "optimizer.lr"),
        ("batch: {micro_batch_size: 0}", "batch.micro_batch_size: expected a whole number above 0", "batch"),
        ("save: {epochs: maybe}", "save.epochs: expected true or false, got 'maybe'", "save.epochs"),
        ("experiment: 3", "experiment: expected text, got 3", "experiment"),
        ("deepspeed: []", "deepspeed: expected a mapping, got []", "deepspeed"),
        ("data: {sequence_length: 1}", "data.sequence_length: expected 2 or more, got 1", "sequence_length"),
        ("a: [", "not a YAML file", "ckpt demo"),
        ("- 1", "the config: expected a mapping", "the config"),
    ],
)
def test_bad_settings(tmp_path: Path, content: str, message: str, hint: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        settings.load(path)
    error = caught.value
    assert (error.id, error.exit_code, error.where) == ("train-config", 2, str(path))
    assert error.message.startswith(message)
    assert hint in error.hint
    assert error.why


def test_an_empty_section_and_null_keep_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\ntraining: {save_total_limit: null, save_minutes: 5, evaluation: }\n")
    assert settings.load(path).model == Config().model
    assert settings.load(path).training.save_minutes == 5.0


def test_a_configuration_is_told_by_the_names_that_it_has() -> None:
    assert set(SETTINGS) == set(Config.__struct_fields__)


def test_deepspeed_section_is_merged() -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    extra = {"zero_optimization": {"overlap_comm": False}, "scheduler": scheduler, "gradient_clipping": None}
    config = Config(deepspeed=extra)
    merged = ds_config(config, split(config.batch, 2), total_steps=10)
    assert merged["zero_optimization"]["overlap_comm"] is False
    assert merged["zero_optimization"]["stage"] == 2
    assert merged["scheduler"] == scheduler  # another type: its parameters are not mixed with ours
    assert "gradient_clipping" not in merged
    with pytest.raises(UsageError, match=r"deepspeed\.train_batch_size"):
        ds_config(Config(deepspeed={"train_batch_size": 1}), split(config.batch, 2), total_steps=10)
    for writer in ({"type": "python", "decoupled": True}, {"type": "fast"}):
        with pytest.raises(UsageError, match=r"deepspeed\.checkpoint\.writer"):
            ds_config(
                Config(deepspeed={"checkpoint": {"writer": writer}}), split(config.batch, 2), total_steps=10
            )
    odd = Config(deepspeed={"checkpoint": "sync"})  # what DeepSpeed says of it is the answer
    assert ds_config(odd, split(config.batch, 2), total_steps=10)["checkpoint"] == "sync"


def test_text_sources(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"body": "ab"}\n\n{"body": "c\\u00e9"}\n')
    data = Data(source=f"path:{lines}", text_key="body", sequence_length=2, validation_samples=1)
    samples = text.read(data, 1)
    assert samples.tokens.tolist() == [97, 98, 256, 99, 0xC3, 0xA9, 256]
    assert (samples.held_out, samples.train) == ((0,), (1, 2))
    assert samples.sample(1).tolist() == [256, 99]
    with pytest.raises(UsageError, match='line 1 is not a JSON object with text under "text"'):
        text.read(Data(source=f"path:{lines}"), 1)
    with pytest.raises(UsageError, match="cannot read the text"):
        text.read(Data(source=f"path:{tmp_path}/none.txt"), 1)
    with pytest.raises(UsageError, match="one update needs 9"):
        text.read(data, 9)


def test_standard_library_text_is_capped_and_repeatable() -> None:
    data = Data(max_bytes=5000, sequence_length=50, validation_samples=10)
    samples = text.read(data, 8)
    assert len(samples.train) + len(samples.held_out) == len(samples.tokens) // 50
    assert 5000 < len(samples.tokens) < 5050
    assert not set(samples.train) & set(samples.held_out)
    assert samples.sha256 == text.read(data, 8).sha256


def test_options_survive_the_command_line() -> None:
    options = Options(
        config=Path("-odd name.yaml"),
        resume=True,
        resume_from=Path("run/iter_000001.pth"),
        work_dir=Path("-w"),
        max_steps=3,
        overrides=("a.b=1", "-c=2"),
        full_log=True,
        reset_optimizer=True,
        evaluate=Path("run"),
        extra_tag="-t",
        verify_saves="full",
    )
    assert parse(options.arguments()) == options
    assert parse(Options(config=Path("c")).arguments()) == Options(config=Path("c"))


def test_a_rank_that_nobody_launched_says_how_to_start_a_run() -> None:
    without = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-m", "ckpttools.trainer", str(DEMO)]
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    assert done.returncode == 2 and "hint: ckpt train" in done.stderr and "Traceback" not in done.stderr
