"""The machine of tests/lives with a fixed number of examples. `make states` runs it from a new seed."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.lives.machine import Machine
from tests.lives.served import Served


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("machine", "examples", "steps"), [(Machine, 60, 14), (Served, 15, 8)])
def test_the_machine_finds_nothing(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
