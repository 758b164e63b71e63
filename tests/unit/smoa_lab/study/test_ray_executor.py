"""Workers on Ray: what is refused and shared out, and on real clusters a dead one's job is run again, a stopped study
goes on, and the results are those of one process, bit for bit."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

import smoa
from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.basics.trust import TRUSTED, Trust
from smoa_lab.config.run import RunConfig
from smoa_lab.data.own_metric import _loaded, own_metric
from smoa_lab.study import ray_executor
from smoa_lab.study.executor import Executor
from smoa_lab.study.plan import Metrics
from smoa_lab.study.planning import prepare
from smoa_lab.study.ray_executor import Place, RayExecutor, connect, equal_share, work
from smoa_lab.study.run_study import Comparison
from smoa_lab.study.study import Job, Study, load_study
from smoa_lab.training.run_folder import RunFolder
from tests.support.metrics import named
from tests.support.own_rows import chats, rows_base, write_rows
from tests.support.processes import ROOT, environment
from tests.support.studies import ADAPTER, WrittenRuns, finished

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_workers_get_as_many_cores_as_fit_and_a_gpu_each_where_there_are_any() -> None:
    three = [(8, 0), (8, 0), (4, 0)]
    for machines, workers, cores in (([(8, 0)], 3, 2), (three, 5, 4), (three, 6, 2), ([(8, 0), (0, 0)], 8, 1)):
        assert equal_share(machines, workers, on_gpus=False) == cores
    assert [equal_share([(16, 4), (16, 1), (64, 0)], workers, on_gpus=True) for workers in (5, 2)] == [4, 16]


@pytest.mark.parametrize(("machines", "on_gpus", "most"), [([(2, 0)], False, 2), ([(1, 8)], True, 1), ([], False, 0)])
def test_more_workers_than_fit_are_refused(machines: list[tuple[int, int]], on_gpus: bool, most: int) -> None:
    with pytest.raises(ConfigError, match=rf"--workers 3: .* there is room for {most}; give at most {most}"):
        equal_share(machines, 3, on_gpus)


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Ray that finds no cluster, as the real one says it."""

    def nothing(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    found = SimpleNamespace(init=nothing)
    monkeypatch.setitem(sys.modules, "ray", found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    "address",
    [
        *("nonsense", "ray://head:10001", ":6379", "head:x", "127.0.0.1:1", "[::1]:1", "no-such-host.invalid:1"),
        "127.0.0.1:99999",
    ],
)
def test_an_address_that_is_none_or_does_not_answer_is_named_at_once(lonely: SimpleNamespace, address: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--ray-address {address}: does not answer (")):
        connect(address)


def test_where_no_cluster_is_found_the_error_says_what_to_start(lonely: SimpleNamespace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        for address in ("auto", f"127.0.0.1:{somebody.getsockname()[1]}"):
            with pytest.raises(ConfigError, match=r"may join \(Could not find .*run `ray start` on this machine too"):
                connect(address)


def test_what_is_started_here_sends_no_telemetry_unless_asked(
    lonely: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    lonely.init = lambda address, **options: began.append(f"{address} {os.environ['RAY_USAGE_STATS_ENABLED']}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert connect(None) is lonely
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    connect(None)
    assert began == ["local 1", "local 0"]


class FailedError(Exception):
    """What Ray raises for a task that raised ``cause``."""

    cause = ConfigError("r: too large")


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (FailedError(), ConfigError, "^r: too large$"),
        (
            OSError("The worker died.\nAll about it"),
            DataError,
            r"^lora/lr-1e-2-seed-0: its worker died 4 times \(The worker died\.\); wh",
        ),
    ],
)
def test_a_task_that_fails_does_so_in_its_own_words(
    lonely: SimpleNamespace, study: Study, raised: Exception, error: type[Exception], message: str
) -> None:
    def get(task: object) -> None:
        raise raised

    lonely.get, lonely.exceptions = get, SimpleNamespace(RayTaskError=FailedError, RayError=OSError)
    lonely.wait = lambda tasks: [tasks]
    executor, job = RayExecutor(study, workers=2), Job("final", "lora", 0.01, 0)
    executor._ray, executor.running = lonely, {job: None}
    _, found = executor.next_finished()
    assert isinstance(found, error)
    assert re.search(message, str(found))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "machine-7")
    mark = Path("study/.driver-1")
    mark.parent.mkdir(parents=True)
    mark.touch()
    return Place(str(tmp_path), mark)


def test_a_machine_with_another_smoa_or_without_the_folder_is_named_and_told_what_to_do(place: Place) -> None:
    place.enter()
    with pytest.raises(DataError, match=rf"machine-7: .* has smoa {smoa.__version__}, and the command 0\.1\.0; all"):
        replace(place, version="0.1.0").enter()
    place.mark.unlink()
    with pytest.raises(DataError, match="machine-7 does not see what other machines write there"):
        place.enter()
    with pytest.raises(DataError, match="must share this folder, and /no/such/place, under the same path"):
        Place("/no/such/place", place.mark).enter()


def test_a_worker_trusts_what_the_command_trusts(place: Place) -> None:
    for given in (True, False):
        replace(place, trust=Trust(given)).enter()
        assert TRUSTED.trust_remote_code == given


def test_a_worker_loads_the_metric_of_the_command_by_path_and_checks_its_file(
    place: Place, tmp_path: Path, study: Study
) -> None:
    with named(Path("own.py")):
        sent = RayExecutor(study, workers=2).place.trust
    assert (sent.metric, sent.digest) == ("own.py:score", sha256(Path("own.py").read_bytes()).hexdigest())
    try:
        replace(place, trust=sent).enter()
        first = own_metric()
        replace(place, trust=replace(sent)).enter()
        assert own_metric() is first  # for the next job too
        Path("own.py").write_text("def score(answer, row): return 0")
        _loaded.clear()  # as in another worker
        replace(place, trust=sent).enter()
        with pytest.raises(ConfigError, match=r"--metric own\.py:score: .* it isn't the file that the command read"):
            own_metric()
    finally:
        vars(TRUSTED).update(vars(Trust()))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model and rows."""
    room = tmp_path_factory.mktemp("workers")
    rows_base(room / "base")
    write_rows(room / "rows.jsonl", chats(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 they would wait for minutes on a busy machine
        yield room


def study_file(room: Path, name: str) -> Path:
    """Two entries at two seeds, and the base model: five jobs, after a few steps of each."""
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
    values = {
        "folder": str(room / name),
        "shared": {
            "model": {"name": str(room / "base")},
            "data": {"train": str(room / "rows.jsonl"), "samples": 1},
            "training": training,
            "forgetting": {"tokens": 64},
        },
        "tuning": {"max_runs": 0},
        "seeds": [0, 1],
        "entries": {
            "ours": {"method": "smoa", "adapter": ADAPTER, "learning_rate": 0.01},
            "lora": {"method": "lora", "adapter": {"r": 2, "target_modules": ["q_proj"]}, "learning_rate": 0.01},
        },
    }
    file = room / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run_study(study: Study, executor: Executor) -> None:
    with executor:
        Comparison(study, prepare(study, executor.result)).run(executor=executor)


def results(study: Study) -> dict[str, Any]:
    """What the finished runs reached, and the losses of their rows."""
    folders = [file.parent for file in study.folder.rglob("metrics.json")]
    return {
        folder.relative_to(study.folder).as_posix(): (
            json.loads((folder / "metrics.json").read_text())["evaluation"],
            gzip.decompress((folder / "rows.jsonl.gz").read_bytes()),
        )
        for folder in folders
    }


@pytest.fixture(scope="module")
def wanted(room: Path) -> dict[str, Any]:
    """The runs of one process with one thread."""
    study = load_study(study_file(room, "alone"))
    run_study(study, Executor())
    found = results(study)
    assert len(found) == 5
    return found


def wait_for(condition: Callable[[], Any], deadline: float = 300.0) -> Any:
    end = time.monotonic() + deadline
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
    return found


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes this machine for one of one core, so that a worker computes with one thread."""
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=1))


@pytest.mark.slow  # half a minute, as the next ones
def test_the_job_of_a_killed_worker_is_run_again_and_all_results_are_those_of_one_process(
    room: Path, one_core: None, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, mark = load_study(study_file(room, "killed")), room / "worker"

    def held(place: Place, threads: int, job: Job, config: RunConfig, *more: Any) -> Metrics | None:
        """What a worker does; the first one at the job stays in it, holding its lock, until it is killed."""
        if job.name == "ours/lr-1e-2-seed-0" and not mark.exists():
            with RunFolder(config.folder).alone():
                write_whole(mark, str(os.getpid()))
                time.sleep(3600)
        return work(place, threads, job, config, *more)

    def kill() -> None:
        wait_for(mark.exists)
        psutil.Process(int(mark.read_text())).kill()

    monkeypatch.setattr(ray_executor, "work", held)
    thread = Thread(target=kill)
    thread.start()
    run_study(study, RayExecutor(study, workers=1))
    thread.join()
    assert mark.exists()
    assert results(study) == wanted
    assert not list(study.folder.glob(".driver-*"))


@pytest.mark.slow  # on a busy machine the study may end before the signal comes
def test_ctrl_c_ends_all_processes_and_the_study_goes_on_from_there(room: Path, wanted: dict[str, Any]) -> None:
    file = study_file(room, "stopped")
    study = load_study(file)
    command = [sys.executable, "-m", "smoa_lab", "compare", str(file), "--workers", "2"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: list(study.folder.glob("*/lr-*/metrics.json")) or driver.poll())
    started = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == 130, told
    wait_for(lambda: not alive(started))
    *lines, last = told.splitlines()
    assert last == "interrupted; run the same command again: a run goes on from its last checkpoint"
    ours = re.compile(r"\d\d:\d\d:\d\d \S|(entry|ours|lora|2 steps) ")  # the log and the plan
    assert [line for line in lines if not ours.match(line)] == []  # nothing of Ray's own
    assert 0 < len(results(study)) < len(wanted)
    run_study(study, Executor())
    assert results(study) == wanted


def test_steps_of_all_entries_are_timed_on_one_machine(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name * 56, "Alive": True, "Resources": {"CPU": cores}} for name, cores in (("a", 1), ("b", 8))]
    asked: list[dict[str, Any]] = []
    task = SimpleNamespace(remote=lambda *_: None)
    remote = SimpleNamespace(options=lambda **options: asked.append(options) or task)
    cluster = SimpleNamespace(nodes=lambda: nodes, remote=lambda _: remote)
    monkeypatch.setattr(ray_executor, "connect", lambda address: cluster)
    executor = RayExecutor(study, workers=2)
    study.folder.mkdir()
    for stage in ("timing", "timing", "search"):
        executor.start(Job(stage, "lora", 0.01, 0))  # type: ignore[arg-type]
    where = [options.get("scheduling_strategy") for options in asked]
    assert [each and (each.node_id, each.soft) for each in where] == [("b" * 56, True)] * 2 + [None]


def test_a_study_that_is_finished_starts_no_cluster(study: Study, written: WrittenRuns) -> None:
    finished(study)
    run_study(study, RayExecutor(study, workers=2, address="nowhere:1"))
