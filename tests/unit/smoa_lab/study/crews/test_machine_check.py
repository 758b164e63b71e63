from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import smoa
from smoa.errors import DataError
from smoa_lab.study.crews import machine_check
from smoa_lab.study.crews.machine_check import check_machines
from smoa_lab.study.crews.ray_worker import Place

cloudpickle = pytest.importorskip("ray.cloudpickle")


class Task:
    """A function that is called as Ray does it: pickled here, and unpickled where it runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.sent = cloudpickle.dumps(function)

    def options(self, **_: Any) -> Task:
        return self

    def remote(self, *arguments: Any) -> Any:
        return pickle.loads(self.sent)(*arguments)


@pytest.fixture
def ray() -> SimpleNamespace:
    """A cluster of one machine, which is this process, and of one that is gone."""
    offers = {"NodeID": "1", "Resources": {"CPU": 2.0}}
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: None)
    return SimpleNamespace(
        nodes=lambda: [{"Alive": True, **offers}, {"Alive": False, **offers}],
        remote=Task,
        get=lambda told: told,
        util=SimpleNamespace(scheduling_strategies=strategies),
        exceptions=SimpleNamespace(RayTaskError=(), RayError=()),
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "machine-7")
    mark = Path("study/work/driver-1")
    mark.parent.mkdir(parents=True)
    mark.touch()
    return Place(str(tmp_path), mark)


def test_a_machine_with_this_smoa_that_shares_the_folder_is_accepted(ray: SimpleNamespace, place: Place) -> None:
    check_machines(ray, place)


def test_a_machine_without_smoa_is_named_with_its_python_and_what_to_install(
    ray: SimpleNamespace, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("smoa_lab", "smoa_lab.study.crews.ray_worker", machine_check.__name__):
        monkeypatch.setitem(sys.modules, name, None)
    message = (
        rf"machine-7: {sys.executable} cannot run a study's runs \(.*smoa_lab.*\); install smoa {smoa.__version__} "
        "there with its extra cluster"
    )
    with pytest.raises(DataError, match=message):
        check_machines(ray, place)


def test_a_machine_with_another_smoa_is_named(
    ray: SimpleNamespace, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.get = lambda told: told and (*told[:2], "0.1.0", "")
    with pytest.raises(DataError, match=rf"machine-7: .* has smoa 0\.1\.0, and this machine {smoa.__version__}; ins"):
        check_machines(ray, place)


def test_a_machine_that_does_not_share_the_folder_is_named(ray: SimpleNamespace, place: Place) -> None:
    place.mark.unlink()
    with pytest.raises(DataError, match="machine-7 does not see what other machines write there"):
        check_machines(ray, place)
