from __future__ import annotations

import os
import re
import socket
import sys
from types import SimpleNamespace

import pytest

from smoa.errors import ConfigError, DataError
from smoa_lab.study.crews.ray_session import connect, machines, result_of
from smoa_lab.study.crews.shares import Machine
from tests.support.processes import free_port


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Ray that finds no cluster, as the real one says it."""

    def nothing(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    found = SimpleNamespace(init=nothing)
    monkeypatch.setitem(sys.modules, "ray", found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("address", ["nonsense", "http://head:6379", "ray://head:10001", "head:", ":6379", "head:x"])
def test_what_is_no_address_is_refused(ray: SimpleNamespace, address: str) -> None:
    with pytest.raises(ConfigError, match=f"--ray-address {re.escape(address)}: must be HOST:PORT"):
        connect(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "no-such-host.invalid"])
def test_an_address_that_does_not_answer_is_named_at_once(ray: SimpleNamespace, host: str) -> None:
    with pytest.raises(ConfigError, match=r"does not answer \(.+\); start the cluster with `ray start --head`"):
        connect(f"{host}:{free_port()}")


def test_a_port_that_does_not_exist_is_named(ray: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"--ray-address 127\.0\.0\.1:99999: does not answer"):
        connect("127.0.0.1:99999")


def test_where_no_cluster_is_found_the_error_says_what_to_start(ray: SimpleNamespace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        for address in ("auto", f"127.0.0.1:{somebody.getsockname()[1]}"):
            with pytest.raises(ConfigError, match=r"may join \(Could not find .*run `ray start` on this machine too"):
                connect(address)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"--workers: needs ray; in a clone of smoa, run: pip install '\.\[cluster\]'"):
        connect(None)


@pytest.mark.parametrize(("wanted", "set_to"), [(None, "0"), ("1", "1")])
def test_what_is_started_here_sends_no_telemetry_unless_asked(
    ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wanted: str | None, set_to: str
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", wanted or "")
    if wanted is None:
        monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    began: list[str] = []
    ray.init = lambda address, **options: began.append(f"{address} {os.environ['RAY_USAGE_STATS_ENABLED']}")
    assert connect(None) is ray
    assert began == [f"local {set_to}"]


def test_only_machines_that_are_alive_count(ray: SimpleNamespace) -> None:
    ray.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 8.0}},
        {"Alive": True, "Resources": {"memory": 1e9}},
    ]
    assert machines(ray) == [Machine(8, gpus=2), Machine(0)]


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
            r"^x: its worker died 4 times \(The worker died\.\); wh",
        ),
    ],
)
def test_a_task_that_fails_does_so_in_its_own_words(
    ray: SimpleNamespace, raised: Exception, error: type[Exception], message: str
) -> None:
    def get(task: object) -> None:
        raise raised

    ray.get, ray.exceptions = get, SimpleNamespace(RayTaskError=FailedError, RayError=OSError)
    with pytest.raises(error, match=message):
        result_of(ray, None, "x")
