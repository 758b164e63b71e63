"""The machine of tests/states with a fixed number of examples. `make states` runs it from a new seed."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests import mutants
from tests.states.machine import Machine
from tests.states.served import Served


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


def test_each_mutant_fits_the_source_and_has_tests_near_it() -> None:
    texts = {file: (mutants.SOURCE / file).read_text(encoding="utf-8") for file in mutants.NEAR}
    assert [each.name for each in mutants.MUTANTS if texts[each.file].count(each.old) != 1] == []
    near = {tests.partition("::")[0] for of_file in mutants.NEAR.values() for tests in of_file}
    assert [name for name in sorted(near) if not (mutants.SOURCE.parent / name).exists()] == []
