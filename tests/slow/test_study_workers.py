"""Several processes that run a study of a tiny model at once: beside each other, on Ray, and after kills."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from smoa_lab.study.report import report
from smoa_lab.study.run_study import work, work_on_ray, work_side_by_side
from smoa_lab.study.study import load_study
from tests.support.lab import chats, rows_base, write_rows
from tests.support.studies import tiny_study

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,  # a minute each
    pytest.mark.usefixtures("quick_pictures"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # not ours: transformers and peft
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model and rows."""
    room = tmp_path_factory.mktemp("workers")
    rows_base(room / "base")
    write_rows(room / "rows.jsonl", chats(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 they would wait for minutes on a busy machine
        yield room


def study_file(room: Path, name: str) -> Path:
    """Two entries at two seeds, and the base model: five jobs."""
    ours = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}
    lora = {"r": 2, "target_modules": ["q_proj"]}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
    return tiny_study(
        room / name,
        shared={
            "model": {"name": str(room / "base")},
            "data": {"train": str(room / "rows.jsonl"), "samples": 1},
            "training": training,
            "forgetting": {"tokens": 64},
        },
        tuning={"max_runs": 0},
        seeds=[0, 1],
        entries={
            "ours": {"method": "smoa", "adapter": ours, "learning_rate": 0.01},
            "lora": {"method": "lora", "adapter": lora, "learning_rate": 0.01},
        },
    )


def results(file: Path) -> dict[str, Any]:
    """What the finished runs reached, and the losses of their rows."""
    found = {}
    for metrics in file.parent.rglob("metrics.json"):
        rows = gzip.decompress((metrics.parent / "rows.jsonl.gz").read_bytes())
        found[metrics.parent.relative_to(file.parent).as_posix()] = json.loads(metrics.read_text())["evaluation"], rows
    return found


def bounds(file: Path) -> Any:
    budget = report(load_study(file)).summary["budgets"]["all"]
    return {key: budget[key] for key in ("pairs", "gains", "round", "level", "take")}


@pytest.fixture(scope="module")
def wanted(room: Path) -> tuple[dict[str, Any], Any]:
    """The runs of one process with one thread, and its bounds."""
    file = study_file(room, "alone")
    assert work(file) == {}
    assert len(results(file)) == 5
    return results(file), bounds(file)


def wait_for(condition: Callable[[], Any], deadline: float = 300.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def test_two_processes_of_this_machine_give_the_results_of_one(room: Path, wanted: tuple[dict[str, Any], Any]) -> None:
    file = study_file(room, "two")
    assert work_side_by_side(file, (), float("inf"), 2) == {}
    assert results(file).keys() == wanted[0].keys()


def test_two_ray_tasks_give_the_bounds_of_one_process(
    room: Path, wanted: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    address = ray.get_runtime_context().gcs_address
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)  # it is joined already
    try:
        file = study_file(room, "ray")
        assert work_on_ray(file, (), float("inf"), 2, address) == {}
    finally:
        ray.shutdown()
    assert (results(file), bounds(file)) == wanted


@pytest.mark.parametrize("number", ["1", "2"])
def test_ctrl_c_and_kills_lose_runs_that_are_done_again_to_the_same_bounds(
    number: str, room: Path, wanted: tuple[dict[str, Any], Any]
) -> None:
    file = study_file(room, f"stopped-{number}")
    command = [sys.executable, "-m", "smoa_lab", "compare", str(file), "--workers", number]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    for finished, end in enumerate((signal.SIGINT, signal.SIGKILL, signal.SIGINT), start=1):
        driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for(lambda: len(results(file)) >= finished or driver.poll() is not None)  # noqa: B023
        started = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        os.killpg(driver.pid, end) if driver.poll() is None else None
        _, told = driver.communicate(timeout=120)
        if driver.returncode:
            assert driver.returncode in (130, -signal.SIGKILL), told
        wait_for(lambda: not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])  # noqa: B023
    assert work(file) == {}
    assert results(file).keys() == wanted[0].keys()
    if number == "1":
        assert (results(file), bounds(file)) == wanted
