"""Workers on real Ray clusters: a dead one's job is run again, a stopped study goes on, and the results are those of
one process, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock

from smoa.atomic import write_whole
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.crews import ray_crew
from smoa_lab.study.crews.crew import Result
from smoa_lab.study.crews.ray_crew import RayCrew
from smoa_lab.study.crews.ray_worker import Place, perform
from smoa_lab.study.plan import Job
from smoa_lab.study.study_file import Study, load_study
from smoa_lab.study.trials import TrialStore
from tests.support import lab
from tests.support.processes import ROOT, environment, free_port
from tests.support.studies import ENCODER_ADAPTER
from tests.support.threads import threads

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny encoder, lines of two classes, and the cache in which they lie."""
    room = tmp_path_factory.mktemp("workers")
    lab.fill_cache(room / "cache", lab.verdicts(40, "train"), lab.verdicts(8, "test"), "headlines")
    lab.tiny_encoder(room / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 they would wait for minutes on a busy machine
        yield room


def study_file(room: Path, name: str) -> Path:
    """Two entries, each with its search and a final run: nine jobs."""
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
    values = {
        "kind": "classification",
        "folder": str(room / name),
        "shared": {
            "model": {"name": str(room / "base")},
            "data": {"tasks": ["headlines"], "train_examples": 16, "validation_examples": 4},
            "task": {"max_length": 64},
            "training": training,
        },
        "tuning": {"max_runs": 3},
        "seeds": [0],
        "entries": {
            "ours": {"method": "smoa", "adapter": ENCODER_ADAPTER, "learning_rate": 0.01},
            "lora": {"method": "lora", "adapter": {"r": 2, "target_modules": ["query"]}, "learning_rate": 0.01},
        },
    }
    file = room / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def results(study: Study) -> dict[str, dict[str, Any]]:
    """The finished runs without what differs between two runs of the same: times, and machine."""
    store = TrialStore(study.folder)
    runs = {name: store.find(name) or {} for name in store.names()}
    return {name: {k: v for k, v in run.items() if k not in ("seconds", "provenance")} for name, run in runs.items()}


@pytest.fixture(scope="module")
def wanted(room: Path) -> dict[str, dict[str, Any]]:
    """The runs of one process with one thread."""
    study = load_study(study_file(room, "alone"))
    with threads(1):
        Comparison(study).run()
    return results(study)


def wait_for(condition: Callable[[], Any], deadline: float = 300.0) -> Any:
    end = time.monotonic() + deadline
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
    return found


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes this machine for one of two cores, so that each of two workers computes with one thread."""
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))


@pytest.fixture
def cluster(room: Path) -> Iterator[str]:
    """The address of a cluster that `ray start` has started, with two cores."""
    address = f"127.0.0.1:{free_port()}"
    command = f"{RAY} start --head --block --num-cpus 2 --include-dashboard false --disable-usage-stats --port"
    with (room / "head.log").open("w") as log:
        head = subprocess.Popen([*command.split(), address.split(":")[1]], stdout=log, stderr=log, cwd=room)
        wait_for(lambda: "Ray runtime started" in (room / "head.log").read_text() or head.poll())
        yield address
        head.terminate()
        head.wait()


def test_the_job_of_a_killed_worker_is_run_again_and_all_results_are_those_of_one_process(
    room: Path, two_cores: None, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(study_file(room, "killed"))
    name, mark = "tuning/ours/lr-0.01-seed-100", room / "worker"

    def held(study: Study, place: Place, job: Job, threads: int) -> Result:
        """What a worker does; the first one at the job stays in it, holding its lock, until it is killed."""
        if job.name == name and not mark.exists():
            with FileLock(TrialStore(study.folder)._lock(name)):
                write_whole(mark, str(os.getpid()))
                time.sleep(3600)
        return perform(study, place, job, threads)

    def kill() -> None:
        wait_for(mark.exists)
        psutil.Process(int(mark.read_text())).kill()

    monkeypatch.setattr(ray_crew, "perform", held)
    thread = Thread(target=kill)
    thread.start()
    with RayCrew(study, workers=2) as crew:
        Comparison(study).run(crew=crew)
    thread.join()
    assert mark.exists()
    assert results(study) == wanted
    assert not list((study.folder / "work").glob("driver-*"))


@pytest.mark.slow  # half a minute on an idle machine
def test_workers_of_a_cluster_get_the_results_of_one_process(room: Path, cluster: str, wanted: dict[str, Any]) -> None:
    study = load_study(study_file(room, "beside"))
    with RayCrew(study, workers=2, address=cluster) as crew:
        Comparison(study).run(crew=crew)
    assert results(study) == wanted
    assert not list((study.folder / "work").glob("driver-*"))


@pytest.mark.slow  # on a busy machine the study may end before the signal comes
def test_ctrl_c_ends_all_processes_and_the_study_goes_on_from_there(room: Path, wanted: dict[str, Any]) -> None:
    file = study_file(room, "stopped")
    study = load_study(file)
    command = [sys.executable, "-m", "smoa_lab", "compare", str(file), "--workers", "2"]
    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: list(study.folder.glob("tuning/*/*.json")) or driver.poll())
    started = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == 130, told
    wait_for(lambda: not alive(started))
    *lines, last = told.splitlines()
    assert last == "interrupted; run the same command again to resume from the last checkpoint"
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d \S", line)] == []  # nothing of Ray's own
    assert 0 < len(results(study)) < len(wanted)
    with threads(1):
        Comparison(study).run()
    assert results(study) == wanted


def test_a_study_that_is_finished_starts_no_cluster(room: Path, wanted: dict[str, Any]) -> None:
    study = load_study(study_file(room, "alone"))
    with RayCrew(study, workers=2, address="nowhere:1") as crew:
        Comparison(study).run(crew=crew)
