"""Runs are stored and found, in their own files or packed, wherever a process is killed, and damage is named."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.trials import PACK, TrialStore, pack, packed_runs, shell_command


def test_a_trial_that_diverged_is_stored_as_json_that_others_can_read(tmp_path: Path) -> None:
    result = {"config": {"training": {}}, "scores": {"all": {"gold_loss": math.inf}}, "questions": {"nll": [math.nan]}}
    store = TrialStore(tmp_path)
    first = store.get("final/lora/x", {}, lambda work: result)
    assert json.loads(store.file("final/lora/x").read_text(), parse_constant=pytest.fail) == first
    assert (first["scores"]["all"]["gold_loss"], first["questions"]["nll"]) == (None, [None])


def test_how_many_samples_a_run_shows_makes_no_other_config(tmp_path: Path) -> None:
    store, config = TrialStore(tmp_path), {"training": {"seed": 1}, "task": {"max_length": 96}}
    stored = store.get("final/lora/x", config, lambda work: {"config": config})
    config["task"] = {"max_length": 96, "samples": 3}  # which earlier releases did not store
    assert store.get("final/lora/x", config, pytest.fail) == stored


def test_a_trial_that_another_process_runs_is_waited_for(tmp_path: Path) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    began, may_end = Event(), Event()

    def slow(work: Path) -> dict[str, Any]:
        began.set()
        assert may_end.wait(60)
        return {"config": {"training": {}}}

    assert not store.is_running(name)
    other = Thread(target=store.get, args=(name, {"training": {}}, slow))
    other.start()
    assert began.wait(60)
    assert store.is_running(name)
    may_end.set()
    assert store.get(name, {"training": {}}, pytest.fail) == store.find(name)
    other.join()
    assert not store.is_running(name)
    assert not list(tmp_path.glob("work/locks/*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_trial_whose_process_died_is_free(tmp_path: Path) -> None:
    store, name = TrialStore(tmp_path), "final/ours/x"
    process = os.fork()
    if process == 0:
        store.get(name, {"training": {}}, lambda work: os.kill(os.getpid(), signal.SIGKILL) or {})
    os.waitpid(process, 0)
    assert list(tmp_path.glob("work/locks/*"))
    assert not store.is_running(name)
    result = {"config": {"training": {}}}
    assert store.get(name, {"training": {}}, lambda work: result)["name"] == name


NAMES = ["final/lora/lr-0.01-seed-0", "final/lora/lr-0.01-seed-1", "tuning/lora/lr-0.01-seed-100", "untouched"]


def run(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    """Run and store a trial, unless it is stored already."""
    config = {"model": {"name": "größe"}, "training": training}
    return TrialStore(folder).get(name, config, lambda work: {"config": config, "questions": {"nll": [0.1 + 0.2]}})


def never(work: Path) -> dict[str, Any]:
    pytest.fail(f"{work} is run again")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        run(tmp_path, name)
    (tmp_path / "summary.json").write_text("[]")
    return tmp_path


def everything(folder: Path) -> dict[str, Any]:
    store = TrialStore(folder)
    return {name: store.find(name) for name in store.names()}


def left(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.json"))


def test_packed_runs_are_found_and_never_run_again(folder: Path) -> None:
    before = everything(folder)
    assert list(before) == NAMES
    files = {name: TrialStore(folder).file(name).read_text(encoding="utf-8") for name in NAMES}
    pack(folder)
    assert left(folder) == ["summary.json"]
    assert gzip.decompress((folder / PACK).read_bytes()).decode() == "".join(files.values())
    assert everything(folder) == before
    store = TrialStore(folder)
    assert store.get(NAMES[0], {"model": {"name": "größe"}, "training": {}}, never) == before[NAMES[0]]
    assert store.names("final/lora/") == NAMES[:2]
    assert store.names("final/lor/") == []
    assert store.find("final/other/lr-0.01-seed-0") is None
    with pytest.raises(ConfigError, match=rf"{PACK}: {NAMES[0]}: was run with other values of training"):
        run(folder, NAMES[0], max_steps=3)


def test_the_same_runs_give_the_same_bytes_however_they_are_packed(folder: Path, tmp_path: Path) -> None:
    at_once, one_by_one = tmp_path / "at once", tmp_path / "one by one"
    shutil.copytree(folder / "final", at_once / "final")
    pack(at_once)
    for name in reversed(NAMES[:2]):
        TrialStore(one_by_one).file(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TrialStore(folder).file(name), TrialStore(one_by_one).file(name))
        pack(one_by_one)
    content = (at_once / PACK).read_bytes()
    assert (one_by_one / PACK).read_bytes() == content
    assert content[3:8] == bytes(5)  # neither a name nor a time in gzip's header
    pack(at_once)
    assert (at_once / PACK).read_bytes() == content


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_kill_at_any_step_loses_nothing(folder: Path, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that change the folder: one replaces the pack, then each run's file is removed."""
    pack(folder)
    for name in ("a", "b", "c", "d"):
        run(folder, f"final/{name}/lr-0.01-seed-0")
    before = everything(folder)
    steps = 0

    def until_killed(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Path, *arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if self.suffix == ".json" or self.name.startswith(f".{PACK}"):
                steps += 1
                if steps > calls:
                    raise KeyboardInterrupt
            return method(self, *arguments, **options)

        return step

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, until_killed(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt):
        pack(folder)
    assert everything(folder) == before
    monkeypatch.undo()
    assert everything(folder) == before
    pack(folder)
    assert left(folder) == ["summary.json"]
    assert everything(folder) == before


def test_several_processes_may_pack_while_another_reads(folder: Path) -> None:
    before = everything(folder)
    with ThreadPoolExecutor(8) as pool:
        packing_them = [pool.submit(pack, folder) for _ in range(4)]
        reading = [pool.submit(everything, folder) for _ in range(20)]
    assert [done.result() for done in packing_them] == [None] * 4
    assert all(done.result() == before for done in reading)


def test_another_run_of_a_packed_name_is_not_packed_over_it(folder: Path) -> None:
    pack(folder)
    content = (folder / PACK).read_bytes()
    file = TrialStore(folder).file(NAMES[0])
    file.write_text('{"config": {}}')
    with pytest.raises(DataError, match=rf"seed-0\.json: .*{PACK} contains another run of this name; delete one"):
        pack(folder)
    assert file.is_file()
    assert (folder / PACK).read_bytes() == content


def rewritten(change: Callable[[list[str]], list[str]]) -> Callable[[bytes], bytes]:
    return lambda content: gzip.compress("".join(change(gzip.decompress(content).decode().splitlines(True))).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"no gzip", r"line 1: is damaged or cut off \(Not a gzipped file"),
        (lambda content: content[:-20], r"line \d: is damaged or cut off \(Compressed file ended"),
        (lambda content: content[:-8] + bytes(8), r"line \d: is damaged or cut off \(CRC check failed"),
        (rewritten(lambda lines: [lines[0], lines[1][:40]]), r"line 2: is not a JSON object"),
        (rewritten(lambda lines: [lines[0], "[]\n"]), r"line 2: is not a JSON object"),
    ],
    ids=["no gzip", "cut off", "wrong sum", "cut line", "list"],
)
def test_damage_of_the_pack_is_one_error_and_nothing_is_run_or_packed(
    folder: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    pack(folder)
    file = folder / PACK
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{PACK}: {message}") as refused:
        TrialStore(folder).get("final/new/lr-0.01-seed-0", {}, never)
    assert "restore the file from a copy; without one, delete" in str(refused.value) or "delete one" in message
    TrialStore(folder).file("untouched").write_text(json.dumps({"config": {}}))
    with pytest.raises(DataError, match=message):
        pack(folder)
    assert file.read_bytes() == damaged
    assert TrialStore(folder).file("untouched").is_file()


@pytest.mark.parametrize("content", ['{"config": ', "[]"])
def test_a_damaged_file_of_a_run_is_named(folder: Path, content: str) -> None:
    TrialStore(folder).file(NAMES[0]).write_text(content)
    with pytest.raises(DataError, match=r"seed-0\.json: is not "):
        TrialStore(folder).find(NAMES[0])
    with pytest.raises(DataError, match=r"seed-0\.json: is not "):
        pack(folder)
    assert len(left(folder)) == len(NAMES) + 1


def test_what_the_file_of_a_run_lacks_is_named(folder: Path) -> None:
    TrialStore(folder).file(NAMES[0]).write_text('{"config": {}, "scores": {"all": {"accuracy": 0.5}}}')
    run = TrialStore(folder).find(NAMES[0])
    assert run is not None
    with pytest.raises(DataError, match=r"seed-0\.json: is damaged, it lacks 'gold_loss'; restore the file"):
        _ = run["scores"]["all"]["gold_loss"]


@pytest.mark.skipif(not (shutil.which("gzip") and shutil.which("grep")), reason="gzip or grep is not installed")
def test_the_command_that_reports_show_prints_a_run(folder: Path) -> None:
    before = everything(folder)
    pack(folder)
    for name, wanted in ((NAMES[0], NAMES[:1]), ("final/lora/", NAMES[:2]), ("untouched", NAMES[3:])):
        printed = subprocess.run(shell_command(name), shell=True, cwd=folder, capture_output=True, check=True).stdout
        assert [json.loads(line) for line in printed.decode().splitlines()] == [before[one] for one in wanted]


def test_a_changed_pack_is_read_anew(folder: Path) -> None:
    pack(folder)
    assert len(packed_runs(folder)) == len(NAMES)
    (folder / PACK).write_bytes(gzip.compress(packed_runs(folder)["untouched"].rstrip().encode()))
    assert list(packed_runs(folder)) == ["untouched"]
    new = run(folder, NAMES[0])
    pack(folder)
    assert everything(folder)[NAMES[0]] == new
