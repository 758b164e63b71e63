from __future__ import annotations

import pytest

from smoa.errors import ConfigError
from smoa_lab.study.crews.shares import Machine, equal_share


@pytest.mark.parametrize(
    ("machines", "workers", "cores"),
    [
        ([Machine(2)], 2, 1),
        ([Machine(8)], 3, 2),
        ([Machine(8), Machine(8), Machine(4)], 4, 4),
        ([Machine(8), Machine(8), Machine(4)], 5, 4),
        ([Machine(8), Machine(8), Machine(4)], 6, 2),
        ([Machine(8), Machine(0)], 8, 1),
    ],
)
def test_workers_get_as_many_cores_as_fit(machines: list[Machine], workers: int, cores: int) -> None:
    assert equal_share(machines, workers, on_gpus=False) == Machine(cores)


def test_each_worker_gets_a_gpu_of_its_own() -> None:
    machines = [Machine(16, gpus=4), Machine(16, gpus=1), Machine(64)]
    assert equal_share(machines, 5, on_gpus=True) == Machine(4, gpus=1)
    assert equal_share(machines, 2, on_gpus=True) == Machine(16, gpus=1)


@pytest.mark.parametrize(
    ("machines", "on_gpus", "most"),
    [
        ([Machine(2)], False, 2),
        ([Machine(2, gpus=1), Machine(4)], True, 1),
        ([Machine(1, gpus=8)], True, 1),
        ([], 0, 0),
    ],
)
def test_more_workers_than_fit_are_refused(machines: list[Machine], on_gpus: bool, most: int) -> None:
    with pytest.raises(ConfigError, match=rf"--workers 3: .* there is room for {most}; give at most {most}"):
        equal_share(machines, 3, on_gpus)
