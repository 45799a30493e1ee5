"""Rebasing real checkpoints of every container: what changes, what must not, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from commands import run
from support import FIXTURES, ZERO_FIXTURES, decayed, name_of, tree_differences, variant_of

LIGHTNING = FIXTURES / "lightning/file/epoch=0-step=3.ckpt"
OURS = FIXTURES / "trainer/z2_bf16_2"
TRAINER = FIXTURES / "hf-trainer/plain/checkpoint-2"
PCDET = FIXTURES / "monolithic/pcdet/checkpoint_epoch_4.pth"
# a source, and the options that say what it does not
SOURCES: list[tuple[Path, tuple[object, ...]]] = [
    (LIGHTNING, ("--old-bs", 4)),
    (FIXTURES / "lightning/deepspeed/epoch=0-step=3.ckpt", ()),
    (TRAINER, ()),
    (FIXTURES / "hf-trainer/deepspeed/checkpoint-2", ()),
    (FIXTURES / "accelerate/plain", ("--old-bs", 4)),
    (FIXTURES / "accelerate/deepspeed", ()),
    (FIXTURES / "bundle/checkpoint-200", ("--counters-only",)),
    (PCDET, ("--old-bs", 4, "--old-gpus", 1, "--dataset-size", 80)),
    (OURS, ()),
    (FIXTURES / "trainer/z2_round_robin_frozen_tied_4", ()),
    (FIXTURES / "deepspeed-0.19.8/z2_fp16_skipped_ws2", ()),
    (FIXTURES / "deepspeed-0.19.8/z2_clientsched_ws2", ()),
    (FIXTURES / "deepspeed-0.19.8/z1_bf16opt_ws2", ()),
    (FIXTURES / "deepspeed-0.19.8/z2_legacy_ws2", ()),
    (FIXTURES / "deepspeed-0.10.3/z2_bf16_ws2", ()),
    (FIXTURES / "deepspeed-0.14.5/z2_bf16_ws4", ()),
    (FIXTURES / "deepspeed-0.16.9/z2_round_robin_ws2", ()),
]
IDS = [name_of(path) for path, _ in SOURCES]


def hashes(path: Path) -> dict[str, str]:
    """Every file by its path below, the manifest of the copy aside."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {
        "" if p == path else p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name != "ckpt-manifest.json"
    }


def rebased(source: Path, to: Path, *options: object) -> dict[str, Any]:
    ran = run("rebase-schedule", source, to, "--json", *options)
    assert ran.code == 0, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return document


def batch(source: Path, options: tuple[object, ...]) -> int:
    ran = run("rebase-schedule", source, "unused", "--dry-run", "--json", *options)
    assert ran.code == 0, ran.err
    size: int = json.loads(ran.out)["batch"]["old"]["micro"]
    return size


@pytest.mark.parametrize(("source", "options"), SOURCES, ids=IDS)
def test_the_same_batch_changes_no_byte(source: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    size = batch(source, options)
    document = rebased(source, tmp_path / "out", *options, "--new-bs", size, "--batch-is", "per-gpu")
    assert document["changes"] == []
    assert hashes(tmp_path / "out") == hashes(source)


@pytest.mark.parametrize(("source", "options"), SOURCES, ids=IDS)
def test_only_what_is_said_changes(source: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    """Three times the batch: every difference that torch.load and json see is in the list of changes."""
    before = hashes(source)
    new = batch(source, options) * 3
    document = rebased(source, tmp_path / "out", *options, "--new-bs", new, "--batch-is", "per-gpu")
    assert hashes(source) == before
    said: dict[str, set[str]] = {}
    for change in document["changes"]:
        said.setdefault(change["file"], set()).add(change["field"])
    root = source if source.is_dir() else source.parent
    found = sorted(
        p.relative_to(root) for p in ([source] if source.is_file() else root.rglob("*")) if p.is_file()
    )
    renames = renamed(document, source, tmp_path / "out")
    for relative in found:
        old = root / relative
        copy = tmp_path / "out" if source.is_file() else tmp_path / "out" / renames(relative)
        name = source.name if source.is_file() else relative.as_posix()
        assert leaves(old, copy) <= said.get(name, set()) | {
            "",
            *({"ckpttools_rebase"} & said.get(name, set())),
        }
        if name not in said and old.name != "latest":
            assert old.read_bytes() == copy.read_bytes()
    ran = run("verify", tmp_path / "out")
    assert ran.code == 0, ran.out


def renamed(document: dict[str, Any], source: Path, out: Path) -> Any:
    """Where a file of the source is in the copy: a tag folder may have got another number."""
    position = document["position"]
    old, new = (f"global_step{position[key]}" for key in ("old", "new"))
    return lambda p: Path(*(new if part == old and not (out / p).exists() else part for part in p.parts))


def leaves(old: Path, new: Path) -> set[str]:
    """The places at which two files differ, as the command writes them."""
    if old.suffix == ".json":
        a, b = json.loads(old.read_text()), json.loads(new.read_text())
        return {line.partition(":")[0].removeprefix(".") for line in tree_differences(a, b)}
    if old.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        x, y = (torch.load(p, weights_only=False) for p in (old, new))
        if not isinstance(x, dict):
            return set() if old.read_bytes() == new.read_bytes() else {"?"}
        mark = "ckpttools_rebase"
        y.pop(mark, None)
        return {line.partition(":")[0].removeprefix(".") for line in tree_differences(x, y)}
    return set()


@pytest.mark.parametrize(("source", "options"), SOURCES, ids=IDS)
def test_there_and_back_is_within_a_unit(source: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    size = batch(source, options)
    per_gpu = ("--batch-is", "per-gpu", *(o for o in options if o != "--old-bs" and o != 4))
    there = rebased(source, tmp_path / "a", "--old-bs", size, "--new-bs", 2 * size, *per_gpu)
    back = rebased(
        tmp_path / "a", tmp_path / "b", "--old-bs", 2 * size, "--new-bs", size, *per_gpu, "--again"
    )
    if there["position"]["old"] is not None:
        assert there["position"]["old"] - 1 <= back["position"]["new"] <= there["position"]["old"]
    if source.is_file():
        assert leaves(source, tmp_path / "b") <= {c["field"] for c in there["changes"]}


def test_every_shard_gets_the_same_learning_rate(tmp_path: Path) -> None:
    for source in (p for p in ZERO_FIXTURES if "trainer" in p.parts or variant_of(p) == "z2_groups"):
        ran = run(
            "rebase-schedule", source, tmp_path / name_of(source).replace("/", "_"), "--json", "--new-bs", 1
        )
        if ran.code:
            said = ran.out + ran.err
            assert "run-finished" in said or "no-schedule" in said, said
            continue
        shards = list(Path(json.loads(ran.out)["destination"]).rglob("*optim_states.pt"))
        states = [torch.load(p, weights_only=False)["optimizer_state_dict"] for p in shards]
        groups = [state["base_optimizer_state"]["param_groups"] for state in states]
        rates = {tuple(group["lr"] for group in each) for each in groups}
        assert len(rates) == 1 and len(shards) > 0


# --- the mark -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "options"), SOURCES, ids=IDS)
def test_a_second_rebase_is_refused(source: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    size = batch(source, options)
    args = ("--batch-is", "per-gpu", *options)
    rebased(source, tmp_path / "a", "--new-bs", 2 * size, *args)
    args = args[:2] + tuple(o for o in options if o not in ("--old-bs", 4))  # the mark knows its batch
    again = run("rebase-schedule", tmp_path / "a", tmp_path / "b", "--new-bs", 4 * size, *args)
    assert again.code == 2 and "rebased-already" in again.err
    assert not (tmp_path / "b").exists()
    assert (
        run("rebase-schedule", tmp_path / "a", tmp_path / "b", "--new-bs", 4 * size, *args, "--again").code
        == 0
    )


def test_a_run_that_went_on_is_not_refused(tmp_path: Path) -> None:
    """Training code that saves the keys it loaded carries the mark on: the count tells."""
    rebased(LIGHTNING, tmp_path / "a.ckpt", "--old-bs", 4, "--new-bs", 2)
    tree = torch.load(tmp_path / "a.ckpt", weights_only=False)
    tree["global_step"] += 1
    tree["lr_schedulers"][0]["last_epoch"] += 1
    torch.save(tree, tmp_path / "b.ckpt")
    options = ("--old-bs", 2, "--new-bs", 1, "--old-accum", 1, "--counters-only")
    ran = run("rebase-schedule", tmp_path / "b.ckpt", tmp_path / "c.ckpt", *options)
    assert ran.code == 0, ran.err


# --- learning rate scaling ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("adam-sde", 2.0)])
def test_scaling_reaches_every_copy_of_the_learning_rate(rule: str, factor: float, tmp_path: Path) -> None:
    plain = rebased(LIGHTNING, tmp_path / "a", "--old-bs", 4, "--new-bs", 16)
    scaled = rebased(LIGHTNING, tmp_path / "b", "--old-bs", 4, "--new-bs", 16, "--lr-scaling", rule)
    assert scaled["next_lr"]["new"] == pytest.approx(plain["next_lr"]["new"] * factor)
    one, two = (torch.load(tmp_path / n, weights_only=False) for n in "ab")
    group, bigger = (
        one["optimizer_states"][0]["param_groups"][0],
        two["optimizer_states"][0]["param_groups"][0],
    )
    assert bigger["initial_lr"] == group["initial_lr"] * factor
    state, larger = one["lr_schedulers"][0], two["lr_schedulers"][0]
    assert larger["base_lrs"] == [base * factor for base in state["base_lrs"]]
    assert larger["_last_lr"] == pytest.approx([lr * factor for lr in state["_last_lr"]])
    if rule == "adam-sde":
        assert bigger["betas"] == pytest.approx((1 - 4 * 0.1, 1 - 4 * 0.001))
        assert bigger["eps"] == pytest.approx(group["eps"] / 2)
    else:
        assert bigger["betas"] == group["betas"]


def test_scaling_reaches_deepspeeds_configuration(tmp_path: Path) -> None:
    """Where a schedule starts from the optimizer's own setting, that one follows, and no key is invented."""
    rebased(OURS, tmp_path / "a", "--old-bs", 8, "--new-bs", 4, "--lr-scaling", "linear")
    model = next((tmp_path / "a").rglob("mp_rank_00_model_states.pt"))
    source = next(OURS.rglob("mp_rank_00_model_states.pt"))
    new, old = (torch.load(p, weights_only=False)["ds_config"] for p in (model, source))
    assert new["optimizer"]["params"]["lr"] == old["optimizer"]["params"]["lr"] / 2
    assert list(new["scheduler"]["params"]) == list(old["scheduler"]["params"])


def test_adam_sde_is_refused_where_it_has_no_answer(tmp_path: Path) -> None:
    ran = run(
        "rebase-schedule",
        LIGHTNING,
        tmp_path / "a",
        "--old-bs",
        1,
        "--new-bs",
        10,
        "--lr-scaling",
        "adam-sde",
    )
    assert ran.code == 2 and "lr-scaling" in ran.err and not (tmp_path / "a").exists()


# --- bad input ----------------------------------------------------------------------------------------

BAD: dict[str, tuple[Path, tuple[object, ...], str]] = {
    "zero": (LIGHTNING, ("--old-bs", 4, "--new-bs", 0), "bad-usage"),
    "negative": (LIGHTNING, ("--old-bs", -4, "--new-bs", 2), "bad-usage"),
    "no old batch": (LIGHTNING, ("--new-bs", 2), "batch-unknown"),
    "another old batch": (OURS, ("--old-bs", 5, "--new-bs", 2), "batch-differs"),
    "does not divide": (OURS, ("--old-bs", 8, "--new-bs", 7), "batch-indivisible"),
    "wrong dataset": (OURS, ("--new-bs", 4, "--dataset-size", 1000), "dataset-differs"),
    "empty epoch": (OURS, ("--new-bs", 1000, "--batch-is", "per-gpu"), "epoch-empty"),
    "ambiguous dataset": (PCDET, ("--old-bs", 4, "--new-bs", 3), "dataset-ambiguous"),
    "no scheduler": (FIXTURES / "bundle/checkpoint-200", ("--new-bs", 1), "no-schedule"),
    "weights": (FIXTURES / "hf/single", ("--old-bs", 4, "--new-bs", 2), "weights-only"),
    "bare weights": (FIXTURES / "monolithic/bare/model.pth", ("--old-bs", 4, "--new-bs", 2), "weights-only"),
    "finished": (FIXTURES / "hf-trainer/plain/checkpoint-4", ("--new-bs", 1), "run-finished"),
    "unit": (
        FIXTURES / "monolithic/full/epoch_2_step_40.pt",
        ("--old-bs", 4, "--new-bs", 2),
        "schedule-unit",
    ),
    "no plot there": (OURS, ("--new-bs", 4, "--plot", "/nowhere/a.png"), "not-found"),
    "no picture": (OURS, ("--new-bs", 4, "--plot", "a.txt"), "bad-usage"),
    "nothing there": (FIXTURES / "nothing", ("--new-bs", 4), "not-found"),
}


@pytest.mark.parametrize(("source", "options", "id"), BAD.values(), ids=BAD)
def test_bad_input(source: Path, options: tuple[object, ...], id: str, tmp_path: Path) -> None:
    ran = run("rebase-schedule", source, tmp_path / "out", *options)
    assert ran.code == 2, ran.err
    assert f"[{id}]" in ran.err and "Traceback" not in ran.err
    assert "hint:" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    ran = run("rebase-schedule", OURS, tmp_path / "out", "--new-bs", 4)
    assert ran.code == 2 and "destination-exists" in ran.err
    assert (tmp_path / "out").read_text() == "mine"


def test_an_unknown_scheduler_is_refused(tmp_path: Path) -> None:
    tree = torch.load(LIGHTNING, weights_only=False)
    tree["lr_schedulers"] = [{"wobble": 3, "last_epoch": 3}]
    torch.save(tree, tmp_path / "a.ckpt")
    ran = run("rebase-schedule", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--old-bs", 4, "--new-bs", 2)
    assert ran.code == 2 and "schedule-unknown" in ran.err, ran.err
    assert not (tmp_path / "b.ckpt").exists()
    only = ("--counters-only",)
    assert (
        run(
            "rebase-schedule", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--old-bs", 4, "--new-bs", 2, *only
        ).code
        == 0
    )


# --- names, plots, dry runs ---------------------------------------------------------------------------


def test_the_default_destination_is_a_sibling(tmp_path: Path) -> None:
    source = tmp_path / "a.ckpt"
    source.write_bytes(LIGHTNING.read_bytes())
    ran = run("rebase-schedule", source, "--old-bs", 4, "--new-bs", 2)
    assert ran.code == 0 and ran.out.strip() == str(source.with_name(f"bs2-of-{source.name}"))


def test_a_tag_named_after_its_step_follows(tmp_path: Path) -> None:
    rebased(FIXTURES / "hf-trainer/deepspeed/checkpoint-2", tmp_path / "out", "--new-bs", 1, "--old-bs", 2)
    assert (tmp_path / "out/latest").read_text() == "global_step4"
    assert (tmp_path / "out/global_step4").is_dir() and not (tmp_path / "out/global_step2").exists()
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 4


def test_a_dry_run_writes_nothing_and_shows_old_and_new(tmp_path: Path) -> None:
    ran = run(
        "rebase-schedule",
        OURS,
        tmp_path / "out",
        "--old-bs",
        8,
        "--new-bs",
        4,
        "--dry-run",
        "--plot",
        tmp_path / "a.png",
    )
    assert ran.code == 0 and list(tmp_path.iterdir()) == []
    line = next(line for line in ran.out.splitlines() if "last_batch_iteration" in line)
    assert line.split()[2:4] == ["2", "5"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    ran = run("rebase-schedule", OURS, tmp_path / "out", "--new-bs", 4, "--plot", tmp_path / "a.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "out"]


def test_a_drawing_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run("rebase-schedule", OURS, tmp_path / "out", "--new-bs", 4, "--plot", tmp_path / "a.svg")
    assert ran.code == 0, ran.err
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    words = [element.text or "" for element in root.iter() if element.tag.endswith("desc")]
    assert "after: batch 16" in words[0] and "before: batch 8" in words[0]


# --- a client's own copies ------------------------------------------------------------------------------

SAMPLE = FIXTURES / "deepspeed-0.19.8/z2_clientsched_ws2"  # 3 updates of 60 x 2


def with_client(tmp_path: Path, client: dict[str, object], info: dict[str, object]) -> Path:
    """A bundle of a DeepSpeed folder with keys of a client's, and training_info.json."""
    bundle = tmp_path / "checkpoint-3"
    shutil.copytree(SAMPLE, bundle / "deepspeed")
    for file in bundle.rglob("mp_rank_*states.pt"):
        torch.save(torch.load(file, weights_only=False) | client, file)
    (bundle / "training_info.json").write_text(json.dumps(info))
    return bundle


def test_a_clients_own_copies_follow(tmp_path: Path) -> None:
    info = {"global_step": 3, "epoch": 0, "batch_size": 60, "gradient_accumulation_steps": 1, "world_size": 2}
    bundle = with_client(tmp_path, {"global_step": 3, "dataset_size": 2400}, info)
    rebased(bundle, tmp_path / "out", "--new-bs", 30, "--batch-is", "per-gpu")
    new = json.loads((tmp_path / "out/training_info.json").read_text())
    assert new == info | {"global_step": 6, "batch_size": 30}
    model = torch.load(next((tmp_path / "out").rglob("mp_rank_*")), weights_only=False)
    assert (model["global_step"], model["global_steps"], model["dataset_size"]) == (6, 6, 2400)
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("stated", "new", "said"),
    [
        ({"world_size": 2, "batch_size": 60}, {"world_size": 1, "batch_size": 60}, True),
        ({"world_size": 8}, {"world_size": 8}, False),  # of something else: left as it is
        ({"epoch": 0}, {"epoch": 0}, False),
    ],
)
def test_a_clients_number_of_ranks_follows_a_reshard(
    tmp_path: Path, stated: dict[str, object], new: dict[str, object], said: bool
) -> None:
    info = {"gradient_accumulation_steps": 1, **stated}
    bundle = with_client(tmp_path, {}, info)
    made = run("reshard", bundle, tmp_path / "out", "--world-size", 1)
    assert made.code == 0, made.err
    found = json.loads((tmp_path / "out/training_info.json").read_text())
    assert found == {**new, "gradient_accumulation_steps": 2}  # the global batch stays
    assert ("training_info.json: world_size 2 -> 1" in made.err) is said
    assert "gradient_accumulation_steps 1 -> 2" in made.err


def test_a_torn_training_info_ends_in_the_command_that_goes_without_it(tmp_path: Path) -> None:
    bundle = shutil.copytree(FIXTURES / "bundle/checkpoint-200", tmp_path / "checkpoint-200")
    (bundle / "training_info.json").write_text('{"global_step": 3,')
    tag = bundle / "deepspeed/global_step3"
    refused = run("reshard", bundle, tmp_path / "out", "--world-size", 4)
    assert refused.code == 1 and f"give {tag} alone" in refused.err and not (tmp_path / "out").exists()
    assert run("reshard", tag, tmp_path / "out", "--world-size", 4).code == 0


def test_a_bundle_of_the_reference_trainer_follows(tmp_path: Path) -> None:
    run_folder = FIXTURES / "trainer/z2_bf16_2"
    source = run_folder / Path((run_folder / "last_checkpoint").read_text().strip()).name
    bundle = tmp_path / "checkpoint-3"
    shutil.copytree(source, bundle / "deepspeed")
    model = torch.load(next(bundle.rglob("mp_rank_*")), weights_only=False)
    step, size = model["global_step"], model["config"]["batch"]["global_batch_size"]
    info = {"global_step": step, "epoch": model["epoch"], "batch_size": None, "world_size": 2}
    (bundle / "training_info.json").write_text(json.dumps(info))
    rebased(bundle, tmp_path / "out", "--old-bs", size, "--new-bs", size // 2)
    new = json.loads((tmp_path / "out/training_info.json").read_text())
    assert new == info | {"global_step": 2 * step}
    assert run("verify", tmp_path / "out").code == 0


def test_a_clients_count_of_something_else_is_named(tmp_path: Path) -> None:
    bundle = with_client(tmp_path, {}, {"global_step": 200, "batch_size": 7})
    document = rebased(bundle, tmp_path / "out", "--new-bs", 30, "--batch-is", "per-gpu")
    notes = " ".join(document["rebase_notes"])
    assert "training_info.json's global_step is 200, and DeepSpeed counted 3" in notes
    assert "training_info.json's batch_size is 7" in notes


def test_a_clients_dataset_size_makes_epochs_exact(tmp_path: Path) -> None:
    """350 samples are 3 updates of 120 and 6 of 60: the end of an epoch, and not 360 samples."""
    bundle = with_client(tmp_path, {"dataset_size": 350}, {})
    document = rebased(bundle, tmp_path / "out", "--new-bs", 30, "--batch-is", "per-gpu")
    assert document["samples"]["old"] == 350


def test_every_setting_of_the_new_run_is_printed(tmp_path: Path) -> None:
    for new, says in ((1, "per_device_train_batch_size = 1 (was 2)"), (2, "_batch_size = 2 (as before)")):
        ran = run("rebase-schedule", TRAINER, "x", "--new-bs", new, "--batch-is", "per-gpu", "--dry-run")
        assert ran.code == 0 and says in ran.out, ran.out + ran.err
        assert "gradient_accumulation_steps = 1 (as before)" in ran.out
        assert "processes = 1 (as before)" in ran.out


def test_the_batch_just_written_is_accepted(tmp_path: Path) -> None:
    """MMEngine's configuration is text that still names the old batch: the rebase's own note is newer."""
    source = FIXTURES / "mmengine-deepspeed/iter_50.pth"
    rebased(source, tmp_path / "a", "--old-bs", 8, "--new-bs", 4, "--batch-is", "global")
    again = ("--old-bs", 4, "--new-bs", 8, "--batch-is", "auto")
    ran = run("rebase-schedule", tmp_path / "a", tmp_path / "b", *again, "--force")
    assert ran.code == 2 and "rebased-already" in ran.err and "--again" in ran.err
    assert "meta.cfg" in run("reshard", source, tmp_path / "c", "--world-size", 4).err
    document = rebased(tmp_path / "a", tmp_path / "b", *again, "--again")
    assert any("meta.cfg" in note and "log_scalars" in note for note in document["rebase_notes"])
    assert document["batch"]["old"]["total"] == 4 and document["batch"]["new"]["total"] == 8
    assert document["position"] == {"old": 100, "new": 50}


# --- a class that only looks like another -----------------------------------------------------------------


def test_a_schedule_that_contradicts_its_own_rate_is_refused(tmp_path: Path) -> None:
    """A class of the user's own with PolynomialLR's fields and another formula."""
    decayed(tmp_path / "a.pt")
    sizes = ("--old-bs", 4, "--new-bs", 2)
    ran = run("rebase-schedule", tmp_path / "a.pt", tmp_path / "b.pt", *sizes)
    assert ran.code == 2 and "schedule-contradicts" in ran.err, ran.err
    assert "0.0125" in ran.err and "0.093" in ran.err
    assert run("rebase-schedule", tmp_path / "a.pt", tmp_path / "b.pt", *sizes, "--counters-only").code == 0


class Warmup:
    def __init__(self, steps: int) -> None:
        self.steps, self.floor = steps, 0.1

    def __call__(self, step: int) -> float:
        return min(1, max(self.floor, step / self.steps))


def test_constants_of_a_function_that_the_state_holds_are_refused(tmp_path: Path) -> None:
    """LambdaLR saves the fields of an object and loads them over those of the new run."""
    from torch.optim.lr_scheduler import LambdaLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = LambdaLR(optimizer, Warmup(10))
    new = LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), Warmup(20))
    new.load_state_dict(schedule.state_dict())
    assert isinstance(new.lr_lambdas[0], Warmup) and new.lr_lambdas[0].steps == 10
    tree = {"global_step": 0, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    torch.save(tree | {"model": {"w": torch.zeros(2)}}, tmp_path / "a.pt")
    sizes = ("--old-bs", 4, "--new-bs", 2, "--schedule-unit", "update")
    ran = run("rebase-schedule", tmp_path / "a.pt", tmp_path / "b.pt", *sizes)
    assert ran.code == 2 and "schedule-unknown" in ran.err and "steps" in ran.err, ran.err
    assert "floor" not in ran.err
    assert run("rebase-schedule", tmp_path / "a.pt", tmp_path / "b.pt", *sizes, "--counters-only").code == 0


def test_one_table_of_keys(tmp_path: Path) -> None:
    """What inspect shows is what rebase moves."""
    torch.save({"it": 7, "iter": 9, "model": {"w": torch.zeros(2)}}, tmp_path / "a.pt")
    shown = json.loads(run("inspect", tmp_path / "a.pt", "--json").out)
    sizes = ("--old-bs", 4, "--new-bs", 2, "--counters-only", "--dry-run", "--json")
    moved = json.loads(run("rebase-schedule", tmp_path / "a.pt", "x", *sizes).out)
    assert shown["step"] == moved["position"]["old"] == 9


def test_what_stays_and_where_it_goes_on_is_said_once(tmp_path: Path) -> None:
    """Our trainer goes on at the very next sample; a bundle's own note of the learning rate is not moved."""
    ran = run("rebase-schedule", FIXTURES / "trainer/z2_bf16_2", "--new-bs", 4, "--dry-run")
    assert "no sample is seen again" in ran.out + ran.err and "of them seen again" not in ran.out + ran.err
    options = ("--old-bs", 8, "--new-bs", 16, "--counters-only", "--lr-scaling", "linear", "--dry-run")
    ran = run("rebase-schedule", FIXTURES / "bundle/checkpoint-200", *options)
    assert "8 of them seen again" in ran.out
    assert "training_info.json's learning_rate is 0.01" in ran.out + ran.err


def plain_file(path: Path, updates: int, schedule: Any = None, **more: Any) -> Path:
    """Of plain training code, after so many updates of Adam."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = schedule(optimizer) if schedule is not None else None
    for update in range(updates):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(update / 10)  # as torch documents it: 10 batches an epoch
    state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    if scheduler is not None:
        state["scheduler_state_dict"] = scheduler.state_dict()
    torch.save({**state, **more}, path)
    return path


def test_warm_restarts_by_parts_of_an_epoch_are_no_contradiction(tmp_path: Path) -> None:
    """Such a schedule counts epochs, whatever the batch: it stays, and what follows is the code's."""
    restarts = partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=4)
    source = plain_file(tmp_path / "a.pt", 26, restarts, global_step=26)
    assert "rate-unexpected" not in run("verify", source).out
    ran = run("resume-check", source)
    assert ran.code == 0 and "stepped by parts of an epoch" in ran.out, ran
    assert run("rebase-schedule", source, tmp_path / "b.pt", "--old-bs", 8, "--new-bs", 4).code == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert after["scheduler_state_dict"] == before["scheduler_state_dict"]
    assert after["global_step"] == 52
    before["optimizer_state_dict"]["param_groups"][0]["lr"] *= 5  # another rate than T_cur gives
    torch.save(before, source)
    assert "rate-unexpected" in run("verify", source).out


def test_the_batch_that_a_plain_file_states_is_read_and_follows(tmp_path: Path) -> None:
    source = plain_file(
        tmp_path / "a.pt",
        10,
        partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
        global_step=40,
        train_batch_size=8,
        gradient_accumulation_steps=4,
        world_size=1,
    )
    ran = run("rebase-schedule", source, tmp_path / "b.pt", "--old-bs", 8, "--new-bs", 4)
    assert ran.code == 0 and "micro-batch 40" in ran.err, ran
    made = torch.load(tmp_path / "b.pt", weights_only=True)
    assert made["train_batch_size"] == 4 and made["global_step"] == 80
    assert run("rebase-schedule", source, "--old-bs", 16, "--new-bs", 4, "--dry-run").code == 2
    for lacks in ("world_size", "gradient_accumulation_steps"):  # it stands for 1 nowhere
        other = {key: value for key, value in torch.load(source, weights_only=True).items() if key != lacks}
        torch.save(other, tmp_path / "c.pt")
        ran = run("rebase-schedule", tmp_path / "c.pt", "--new-bs", 4, "--dry-run")
        assert ran.code == 2 and "batch-unknown" in ran.err, ran


@pytest.mark.parametrize("options", [(), ("--unit", "update"), ("--unit", "micro", "--old-accum", 2)])
def test_a_count_that_the_optimizer_does_not_share_is_said(options: Any, tmp_path: Path) -> None:
    restarts = partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=4)
    source = plain_file(tmp_path / "a.pt", 20, restarts, global_step=60)
    ran = run("rebase-schedule", source, "--old-bs", 8, "--new-bs", 4, "--dry-run", *options)
    said = "the counter is 60, and the optimizer made 20 updates" in ran.err + ran.out
    assert ran.code == 0 and said is (not options), ran
