"""ckpt runs: what is known of each run is what was put there; the plot, CSV, and the log of experiments."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import run
from support import FIXTURES

import ckpttools
from ckpttools.runs import logs
from ckpttools.runs.logs.events import scalars

TRAINER = FIXTURES / "trainer"
HF = FIXTURES / "hf-trainer"


def document(*args: object) -> dict[str, dict[str, object]]:
    ran = run("runs", *args, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    return {each["tag"]: each for each in found["runs"]} | {"": found["differing"]}


def test_runs_of_the_reference_trainer() -> None:
    found = document(TRAINER)
    one = found["z2_bf16_4"]
    assert (one["framework"], one["batch"], one["step"], one["total"], one["samples"]) == (
        "ckpt train", 8, 3, 23, 24,
    )  # fmt: skip
    lines = [json.loads(line) for line in (TRAINER / "z2_bf16_4/train_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert one["losses"] == {
        "loss": {"last": losses[-1], "best": min(losses), "at": 1.0 + losses.index(min(losses))}
    }
    assert one["settings"]["optimizer.lr"] == 0.003  # type: ignore[index]
    differing = found[""]
    assert "zero.stage" in differing and "optimizer.lr" not in differing and "experiment" not in differing


def test_runs_with_other_batches_share_an_axis_of_samples(tmp_path: Path) -> None:
    assert {tag: each.get("batch") for tag, each in document(HF).items() if tag} == {
        "plain": 2, "peft": 4, "deepspeed": 4,
    }  # fmt: skip
    ran = run("runs", HF, "--plot", tmp_path / "a.svg", "-q")
    assert ran.code == 0 and ran.out == ""
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    texts = [element.text for element in root.iter() if element.text]
    assert "samples seen" in texts and {"plain", "peft", "deepspeed"} <= set(texts)
    (words,) = [t for t in texts if t.startswith("Over samples")]
    assert "plain: 3.701 at 2" in words  # one update of 2, of 4 in the others
    assert " at 4," in words.split("peft")[1]
    assert run("runs", HF, "--plot", tmp_path / "a.svg").code == 2
    assert run("runs", HF, "--plot", tmp_path / "a.svg", "--force").code == 0
    (tmp_path / "b.svg").write_text("<svg>mine</svg>")
    ran = run("runs", HF, "--plot", tmp_path / "b.svg", "--force")
    assert (
        ran.code == 2 and "not-replaced" in ran.err and (tmp_path / "b.svg").read_text() == "<svg>mine</svg>"
    )


def test_names_of_runs_print_on_one_line_and_move_no_cursor(tmp_path: Path) -> None:
    shutil.copytree(HF / "plain", tmp_path / "runs/a\nb\x1b[31m")
    shutil.copytree(HF / "peft", tmp_path / "runs/\u202ec")
    out = run("runs", tmp_path / "runs").out
    assert "\x1b" not in out and "\u202e" not in out
    assert sum(r"a\nb\x1b[31m" in line for line in out.splitlines()) == 2  # the run, and what differs


def test_csv_and_its_formulas(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(HF / "plain", folder / "=cmd|x")
    shutil.copytree(HF / "peft", folder / 'b,\n"c')
    rows = list(csv.reader(io.StringIO(run("runs", folder, "--csv").out)))
    assert len(rows) == 3 and {len(row) for row in rows} == {len(rows[0])}
    names = {row[0] for row in rows[1:]}
    assert names == {"'=cmd|x", 'b,\\n"c'}
    head = {name: i for i, name in enumerate(rows[0])}
    plain = next(row for row in rows if row[0].startswith("'="))
    assert (plain[head["batch"]], plain[head["samples"]], plain[head["val_loss"]]) == ("2", "8", "")
    assert run("runs", folder, "--csv", "--json").code == 2


@pytest.mark.parametrize("suffix", [".md", ".csv"])
def test_the_experiment_log_grows_by_what_is_new(tmp_path: Path, suffix: str) -> None:
    folder, log = tmp_path / "out", tmp_path / f"log{suffix}"
    shutil.copytree(TRAINER / "z2_bf16_2", folder / "first")
    log.write_text("# my experiments, no newline at the end")
    ran = run("runs", folder, "--log", log)
    assert ran.code == 0 and "1 row added" in ran.err
    text = log.read_text()
    assert text.startswith("# my experiments, no newline at the end\n") and "loss 5.5569" in text
    lines = text.splitlines()
    if suffix == ".md":  # what makes a table of the rows
        assert lines[1:4] == [
            "",
            "| date | run | against | changed | result |",
            "| --- | --- | --- | --- | --- |",
        ]
    else:
        assert lines[1] == "date,run,against,changed,result"
    assert "0 rows added" in run("runs", folder, "--log", log).err and log.read_text() == text
    shutil.copytree(TRAINER / "z2_bf16_4", folder / "second|<b>")
    assert "1 row added" in run("runs", folder, "--log", log).err
    new = log.read_text().removeprefix(text)
    assert "batch.ranks 2 -> 4" in new and "first" in new
    assert suffix == ".csv" or ("second\\|&lt;b>" in new and new.count("\n") == 1)
    assert run("runs", folder, "--log", tmp_path / "a.txt").code == 2
    assert run("runs", folder, "--log", log, "--parent", "none").code == 2
    (tmp_path / f"torn{suffix}").write_bytes(b"\xff\xfe")
    assert run("runs", folder, "--log", tmp_path / f"torn{suffix}").code == 2


def test_only_some_and_what_is_not_there(tmp_path: Path) -> None:
    assert set(document(HF, "--run", "peft")) == {"peft", ""}
    ran = run("runs", HF, "--run", "pefft")
    assert ran.code == 2 and "peft" in ran.err
    ran = run("runs", tmp_path)
    assert ran.code == 2 and "no-checkpoints" in ran.err
    for bad in (["--plot", tmp_path / "a.gif"], ["--plot", tmp_path / "no" / "a.svg"], ["--top", "x"]):
        assert run("runs", HF, *bad).code == 2


def test_secrets_are_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(TRAINER / "z2_bf16_2", folder)
    with (folder / "config.yaml").open("a") as file:
        file.write(
            "wandb:\n  api_key: topsecret\nmax_tokens: 5\nhub_token: hf_x\n"
            "my_token_value: hf_y\nsecret:\n  inner: hf_z\ntokens: [hf_a]\nurl: https://me:hf_b@host/x\n"
        )
    found = ckpttools.experiments(folder).runs[0].settings
    assert (
        found["wandb.api_key"] == "(hidden)" and found["hub_token"] == "(hidden)" and found["max_tokens"] == 5
    )
    page = tmp_path / "r.html"
    said = run("runs", folder, "--json").out + run("report", folder, "-o", page, "--json").out
    assert not any(word in said + page.read_text() for word in ("topsecret", "hf_"))


def test_a_loss_that_is_no_number_is_shown_as_it_is(tmp_path: Path) -> None:
    """A run that diverged: the last loss is the last one, the best the least of those that are numbers."""
    shutil.copytree(TRAINER / "z2_bf16_2", tmp_path / "run")
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": math.nan}, {"step": 2, "val_loss": math.nan}]
    (tmp_path / "run/train_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = document(tmp_path)["run"]["losses"]
    assert found == {
        "loss": {"last": "nan", "best": 3.0, "at": 1.0},
        "val_loss": {"last": "nan", "best": "nan", "at": None},
    }
    assert run("report", tmp_path, "-o", tmp_path / "a.html").code == 0
    assert "loss nan, best 3 at step 1" in (tmp_path / "a.html").read_text()
    ran = run("runs", tmp_path, "--plot", tmp_path / "a.svg")
    assert ran.code == 0 and "val" not in (tmp_path / "a.svg").read_text()


# --- logs ---------------------------------------------------------------------------------------------


def test_tensorboards_events_are_read_without_it() -> None:
    """The file is by TensorBoard's own writer: tests/oracles/tensorboard_events.py."""
    (path,) = (FIXTURES / "logs").glob("events*")
    records = list(scalars(path))
    assert [record.count for record in records] == [1, 2, 3, 4, 5, 5]
    assert records[1].values == {"train/loss": 2.5, "train/learning_rate": pytest.approx(0.05)}
    assert records[-1].values == {"val/loss": 1.5} and records[-1].time == 1_700_000_050.0
    log = logs.read(FIXTURES / "logs")
    loss, rate = log.first(logs.LOSS), log.first(logs.RATE)
    assert loss is not None and loss.points[-1] == (5, 1.0)
    assert rate is not None and log.seconds == 40


def test_files_that_are_written_at_once_are_the_same_time(tmp_path: Path) -> None:
    (path,) = (FIXTURES / "logs").glob("events*")
    for name in ("rank0", "rank1"):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
    assert logs.read(tmp_path).seconds == 40


def test_torn_and_foreign_logs(tmp_path: Path) -> None:
    (path,) = (FIXTURES / "logs").glob("events*")
    whole = path.read_bytes()
    torn = tmp_path / path.name
    last = 0
    for size in range(0, len(whole), 7):
        torn.write_bytes(whole[:size] or b"\0")
        try:
            count = len(list(scalars(torn)))
        except ckpttools.CkptError:
            continue
        assert count >= last
        last = count
    torn.write_bytes(b"no events at all, but long enough")
    (tmp_path / "train_log.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo'
    )
    log = logs.read(tmp_path)
    assert log.series["loss"].points == ((1, 3), (2, 2)) and any("TensorBoard" in note for note in log.notes)


def test_a_resumed_run_counts_what_was_logged_last(tmp_path: Path) -> None:
    lines = [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (3, 3.5), (4, 2.5)]
    text = "".join(json.dumps({"step": s, "loss": v, "samples_seen": 8 * s}) + "\n" for s, v in lines)
    (tmp_path / "train_log.jsonl").write_text(text)
    series = logs.read(tmp_path).series["loss"]
    assert series.points == ((1, 5), (2, 4), (3, 3.5), (4, 2.5))
    assert series.samples == ((8, 5), (16, 4), (24, 3.5), (32, 2.5))
