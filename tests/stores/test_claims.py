"""What is there is the result, or somebody else's, or not whole: each is told from the others."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from commands import run
from stores.servers import Proxy
from stores.test_writing import ZERO, Objects, fail_at, here

from ckpttools.errors import CkptError
from ckpttools.execute import spread_upload, upload
from ckpttools.execute.sending import StoredShelf
from ckpttools.siblings import MANIFEST, SPREAD, UNFINISHED
from ckpttools.stores import remote

__all__ = ["here"]
FOLDER = ("reshard", ZERO, "x", "--world-size", 3)
FILE = ("convert", ZERO, "x.pt", "--to", "pt")


class Killed(BaseException):
    pass


def kill(*_: object) -> None:
    raise Killed


def command(words: tuple[object, ...], here: Objects, *more: object) -> tuple[object, ...]:
    name, src, dst, *options = words
    return (name, src, here / str(dst), *options, *more)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> str:
    """The option, for the only worker of a launcher."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(StoredShelf, "pause", 0.01)
    return "--spread"


@pytest.fixture
def failing(proxy: type[Proxy], monkeypatch: pytest.MonkeyPatch) -> type[Proxy]:
    """A store that takes one rank's file never."""
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    proxy.fault = staticmethod(fail_at("rank_1_mp_rank"))
    return proxy


def mend(proxy: type[Proxy]) -> None:
    proxy.fault = staticmethod(lambda method, path, n: "")


def test_a_result_that_something_else_is_replacing(here: Objects, failing: type[Proxy], spread: str) -> None:
    mend(failing)
    first = command(FOLDER, here, spread)
    assert run(*first).code == 0
    failing.fault = staticmethod(fail_at("rank_1_mp_rank"))
    assert run("reshard", ZERO, here / "x", "--world-size", 2, "--force").code == 2
    mend(failing)
    half = here.files()
    again = run(*first)  # its manifest is there, still
    assert again.code == 2 and "error[destination-exists]" in again.err, again
    assert here.files() == half and run("inspect", here / "x").code == 2
    assert run(*first, "--force").code == 0
    assert sum("optim" in name for name in here.meta()) == 3
    assert run("verify", here / "x").code == 0


@pytest.mark.parametrize("words", [FOLDER, FILE])
def test_a_result_of_which_a_file_is_gone(words: tuple[object, ...], here: Objects, spread: str) -> None:
    assert run(*command(words, here, spread)).code == 0
    gone = next(name for name in here.meta() if not name.endswith(MANIFEST))
    here.obstore.delete(here.store, f"{here.name}/{gone}")
    again = run(*command(words, here, spread))
    assert again.code == (2 if words is FOLDER else 0), again  # a single file is written anew
    assert (gone in here.meta()) == (words is FILE)
    assert run("verify", here / "x.pt").code == (2 if words is FOLDER else 0)


def test_a_file_of_somebody_elses(here: Objects, spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(FILE, here, spread)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(spread_upload._Share, "send", kill)
        run(*words)
    assert any(SPREAD in name for name in here.meta())  # this plan was begun
    here.put("x.pt", b"somebody's own")
    ran = run(*words)
    assert ran.code == 2 and "error[destination-exists]" in ran.err, ran
    assert here.get("x.pt") == b"somebody's own"
    here.obstore.delete(here.store, f"{here.name}/x.pt")
    put = spread_upload._Share._make_room

    def late(self: Any, place: Any) -> None:
        here.put("x.pt", b"somebody's own")
        put(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(spread_upload._Share, "_make_room", late)
        assert run(*words).code == 2
    assert here.get("x.pt") == b"somebody's own"


def test_whoever_was_replaced_does_not_commit(
    here: Objects, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it read back, another program has taken the place by --force."""
    compare = spread_upload.compare

    def late(*args: Any) -> int:
        here.put(f"x/{UNFINISHED}", json.dumps({"plan": "another", "files": []}).encode())
        return compare(*args)

    monkeypatch.setattr(spread_upload, "compare", late)
    ran = run(*command(FOLDER, here, spread))
    assert ran.code == 2 and "error[destination-exists]" in ran.err, ran
    assert f"x/{UNFINISHED}" in here.meta()
    assert not any(name.endswith(MANIFEST) for name in here.meta())


def test_whoever_was_replaced_takes_no_marker_away(here: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> int:
        here.put(f"x/{UNFINISHED}", json.dumps({"plan": "another", "files": []}).encode())
        raise CkptError("checksum", "the source is damaged")

    monkeypatch.setattr(upload, "compare", late)
    assert run(*command(FOLDER, here)).code == 1
    assert list(here.meta()) == [f"x/{UNFINISHED}"]


def test_half_replaced_stays_unfinished(
    here: Objects, failing: type[Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--force that was killed before what it had replaced was on record, then fails at once."""
    mend(failing)
    assert run(*command(FOLDER, here)).code == 0
    words = ("reshard", ZERO, here / "x", "--world-size", 2, "--force")
    failing.fault = staticmethod(fail_at("rank_1_mp_rank"))
    with monkeypatch.context() as patch:
        patch.setattr(upload._Upload, "leave", lambda self: None)
        assert run(*words).code == 2
    failing.fault = staticmethod(fail_at("states.pt"))
    assert run(*words).code == 2
    ran = run("inspect", here / "x")
    assert ran.code == 2 and "error[upload-unfinished]" in ran.err, ran
    mend(failing)
    assert run(*words).code == 0 and run("verify", here / "x").code == 0


def test_a_damaged_source_under_force(here: Objects, tmp_path: Path) -> None:
    assert run("reshard", ZERO, here / "x", "--world-size", 4).code == 0
    shutil.copytree(ZERO, tmp_path / "run")
    shard = max(tmp_path.rglob("*optim_states.pt"))
    with zipfile.ZipFile(shard) as file:
        tensor = max((file.read(name) for name in file.namelist() if "/data/" in name), key=len)
    shard.write_bytes(shard.read_bytes().replace(tensor, b"?!" + tensor[2:]))
    ran = run("reshard", tmp_path / "run", here / "x", "--world-size", 3, "--force")
    assert ran.code == 1 and "error[checksum]" in ran.err and "is no checkpoint now" in ran.err, ran
    ran = run("inspect", here / "x")
    assert ran.code == 2 and "error[upload-unfinished]" in ran.err, ran
    assert run("reshard", ZERO, here / "x", "--world-size", 3, "--force").code == 0
    assert sum("optim" in name for name in here.meta()) == 3
    assert run("verify", here / "x").code == 0


def test_a_marker_deletes_nothing_outside(here: Objects) -> None:
    here.put("other/weights.bin", b"mine")
    outside = [f"/{here.name}/other/weights.bin", "../other/weights.bin"]
    said = {"plan": "", "files": outside, "replaces": outside}
    here.put(f"x/{UNFINISHED}", json.dumps(said).encode())
    assert run(*command(FOLDER, here, "--force")).code == 0
    assert here.get("other/weights.bin") == b"mine"


@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize("more", [(), ("--spread",)])
def test_force_judges_what_lies_beside_an_ended_upload(
    more: tuple[str, ...], here: Objects, failing: type[Proxy]
) -> None:
    assert run(*command(FOLDER, here)).code == 2
    mend(failing)
    said = json.loads(bytes(here.get(f"x/{UNFINISHED}")))
    assert said["finished"], "nothing was sent"
    words = ("reshard", ZERO, here / "x", "--world-size", 2, "--force", *more)
    here.put("x/notes.txt", b"mine")
    here.put(f"x/{UNFINISHED}", json.dumps({**said, "replaces": ["notes.txt"]}).encode())
    before = here.files()
    ran = run(*words)
    assert ran.code == 2 and "error[not-replaced]" in ran.err and "notes.txt" in ran.err, ran
    assert here.files() == before
    here.obstore.delete(here.store, f"{here.name}/x/notes.txt")
    ran = run(*words)
    assert ran.code == 0, ran
    assert sum("optim" in name for name in here.meta()) == 2
    assert run("verify", here / "x").code == 0


def test_a_dry_run_says_of_an_ended_upload_what_the_run_says(here: Objects, failing: type[Proxy]) -> None:
    assert run(*command(FOLDER, here)).code == 2
    other = ("reshard", ZERO, here / "x", "--world-size", 2)
    for words in (other, (*other, "--dry-run")):
        ran = run(*words)
        assert ran.code == 2 and "error[destination-exists]" in ran.err and "not finished" in ran.err, ran
    assert run(*command(FOLDER, here), "--dry-run").code == 0  # it would go on


@pytest.mark.parametrize("words", [FOLDER, FILE])
def test_force_by_one_process_leaves_nothing_of_many(
    words: tuple[object, ...], here: Objects, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(spread_upload._Share, "send", kill)
        run(*command(words, here, spread))
    assert any(SPREAD in name for name in here.meta())
    assert run(*command(words, here, "--force")).code == 0
    assert not any(SPREAD in name for name in here.meta()), here.meta()
    assert run("verify", here / str(words[2])).code == 0


def test_a_source_by_the_address_of_its_server(here: Objects, endpoint: str, spread: str) -> None:
    """What a server hands out by https is what s3:// would replace."""
    assert run(*command(FILE, here)).code == 0
    before = here.files()
    src = f"{endpoint}/runs/{here.name}/x.pt"
    for more in ((), (spread,), ("--dry-run",)):
        ran = run("convert", src, here / "x.pt", "--to", "pt", "--dtype", "fp16", "--force", *more)
        assert ran.code == 2 and "error[destination-in-source]" in ran.err, ran
        ran = run("convert", src, here, "--to", "hf", "--force", *more)
        assert ran.code == 2 and "error[" in ran.err, ran
    assert here.files() == before
    assert run("convert", src, here / "y.pt", "--to", "pt", "-q").code == 0


@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize("more", [(), ("--spread",)])
def test_a_manifest_of_a_file_that_is_gone(more: tuple[str, ...], here: Objects) -> None:
    here.put(f"x.pt.{MANIFEST}", b'{"format": "ckpttools-manifest", "version": 1, "files": {}}')
    assert run(*command(FILE, here, *more)).code == 0
    assert run("verify", here / "x.pt").code == 0


def test_what_replaces_a_result_is_left_alone(
    here: Objects, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever finds that his own result is there."""
    assert run(*command(FILE, here, spread)).code == 0
    other = command((*FILE, "--dtype", "fp16"), here, spread, "--force")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(spread_upload._Share, "send", kill)
        run(*other)
    begun = {name for name in here.meta() if SPREAD in name}
    assert begun and run(*command(FILE, here, spread)).code == 0
    assert begun == {name for name in here.meta() if SPREAD in name}


@pytest.mark.usefixtures("bucket")
def test_places_that_make_no_sense(spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("reshard", ZERO, "s3://runs", "--world-size", 3, spread)
    assert ran.code == 2 and "error[bad-usage]" in ran.err, ran
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "runs")
    same = {remote.place(scheme, f"{scheme}://runs/x") for scheme in ("az", "azure", "adl")}
    assert len(same) == 1  # else --force might write over what it reads
