from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from smoa.errors import ConfigError
from smoa_lab.starting import measure_steps
from smoa_lab.starting.machine import Machine
from smoa_lab.starting.measure_steps import Measured, StepClock, measure, ran_out_of_memory
from smoa_lab.starting.proposal import Proposal, propose
from smoa_lab.starting.survey import look_at_data, look_at_model
from tests.support import lab
from tests.support.proposals import proposal, rows_file, talks

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # TRL sets it
]


def test_three_steps_are_measured_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    monkeypatch.chdir(room)
    model = look_at_model(str(lab.tiny_base(tmp_path / "base")))
    data = look_at_data(str(rows_file(tmp_path / "rows.jsonl", talks(30))), model)
    wanted = propose(model, data, proposal().choice, Machine(10**10))
    found, measured = measure(wanted)
    assert found == wanted
    assert 0 < measured.seconds < 60
    assert measured.memory > 10**8
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fits_two(tried: Proposal) -> Measured:
        if tried.rows > 2:
            raise error
        return Measured(1.0, 1)

    monkeypatch.setattr(measure_steps, "_three_steps", fits_two)
    found, _ = measure(proposal(rows=8))
    assert (found.rows, found.accumulation) == (2, 8)


def test_a_model_that_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Proposal) -> Measured:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure_steps, "_three_steps", never)
    with pytest.raises(ConfigError, match="does not fit into memory"):
        measure(proposal())


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Proposal) -> Measured:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(measure_steps, "_three_steps", breaks)
    with pytest.raises(RuntimeError, match="shapes"):
        measure(proposal())
    assert not ran_out_of_memory(RuntimeError("shapes do not match"))


def test_the_first_step_is_left_out_of_the_time() -> None:
    clock = StepClock()
    clock.times = [0.0, 10.0, 11.0, 13.0]
    assert clock.seconds == 1.5
