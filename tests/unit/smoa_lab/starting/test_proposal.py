from __future__ import annotations

from dataclasses import replace

import pytest

from smoa.errors import ConfigError
from smoa_lab.starting.machine import Machine
from smoa_lab.starting.proposal import known_dtype, needed_bytes, propose
from tests.support.proposals import MACHINE, MODEL, QUESTIONS, ROWS, proposal

CHOICE = proposal().choice


def test_a_machine_with_room_gets_the_largest_batch_and_its_own_dtype() -> None:
    on_cpu = propose(MODEL, ROWS, CHOICE, MACHINE)
    assert (on_cpu.rows, on_cpu.accumulation, on_cpu.checkpointing, on_cpu.dtype) == (4, 4, False, "float32")
    on_gpu = propose(MODEL, ROWS, CHOICE, Machine(10**10, "a GPU", bfloat16=True))
    assert (on_gpu.rows, on_gpu.accumulation, on_gpu.dtype) == (16, 1, "bfloat16")
    assert propose(MODEL, ROWS, CHOICE, Machine(10**10, bfloat16=True), "float32").dtype == "float32"


def test_less_memory_gives_smaller_batches_of_the_same_step() -> None:
    half = needed_bytes(proposal(rows=2))
    found = propose(MODEL, ROWS, CHOICE, Machine(2 * half))
    assert (found.rows, found.accumulation, found.checkpointing) == (2, 8, False)


def test_activations_are_computed_again_only_if_one_row_does_not_fit() -> None:
    deep = replace(MODEL, layers=100)
    one = needed_bytes(proposal(model=deep, rows=1))
    found = propose(deep, ROWS, CHOICE, Machine(2 * (one - 1)))
    assert found.checkpointing
    assert found.rows == 4  # which fits then
    assert needed_bytes(found) < one


def test_what_never_fits_is_left_to_the_measurement() -> None:
    found = propose(MODEL, ROWS, CHOICE, Machine(1))
    assert (found.rows, found.checkpointing) == (1, True)
    with pytest.raises(ConfigError, match="'some/model' does not fit into memory"):
        found.smaller()


def test_smaller_halves_the_batch_and_keeps_the_step() -> None:
    found = proposal(rows=2).smaller()
    assert (found.rows, found.accumulation, found.checkpointing) == (1, 16, False)
    assert found.smaller().checkpointing


def test_preferences_need_the_memory_of_two_answers() -> None:
    twice = needed_bytes(proposal(rows=8)) - needed_bytes(proposal(rows=4))
    pairs = proposal(data=replace(ROWS, format="preference"))
    assert needed_bytes(pairs) - needed_bytes(proposal()) == twice


def test_time_ends_a_run_before_its_epochs_do() -> None:
    assert proposal().steps_of_epochs == 3 * 7  # 25 batches of 4, 4 in a step
    short = proposal().within(minutes=1, seconds=6.1)
    assert (short.steps, short.all_steps) == (9, 9)
    assert short.values("runs/x")["training"]["max_steps"] == 9
    long = proposal().within(minutes=60, seconds=6.1)
    assert (long.steps, long.all_steps) == (None, 21)
    assert long.values("runs/x")["training"]["num_train_epochs"] == 3
    assert proposal().within(minutes=0.01, seconds=60).steps == 1


def test_questions_have_their_length_under_task() -> None:
    values = proposal(data=QUESTIONS).values("runs/x")
    assert values["task"] == {"max_length": 256}
    assert "max_length" not in values["training"]
    assert "task" not in proposal().values("runs/x")


def test_an_unknown_dtype_names_the_nearest() -> None:
    assert known_dtype("float16") == "float16"
    with pytest.raises(ConfigError, match="bfloat16"):
        known_dtype("bfloat")
