"""Lives of studies: those that a machine draws, and scripts of what a failing example prints."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.support.studies import StudyLife

pytestmark = pytest.mark.usefixtures("quick_pictures")
METHODS = ("smoa", "lora", "full", "hira")


class Studies(RuleBasedStateMachine):
    """Whatever happens to a study, it ends as the same file does that is run by one start."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.room = pytest.MonkeyPatch(), tempfile.TemporaryDirectory()

    @initialize(
        far=st.sampled_from((1.0, 0.1)),
        keep=st.sampled_from(("best", "all", "none")),
        seeds=st.integers(1, 3),
        kind=st.sampled_from(("messages", "choices")),
    )
    def make(self, far: float, keep: str, seeds: int, kind: str) -> None:
        entries = {
            "ours": {"method": "smoa", "learning_rate": 0.01, "budget": "small"},
            "lora": {"method": "lora", "learning_rate": 0.002 * far, "budget": "small"},
        }
        values: dict[str, Any] = {"entries": entries, "keep": keep, "seeds": list(range(seeds))}
        self.life = StudyLife(Path(self.room.name) / "study", self.patch, **values)
        self.life.runs.kind = kind

    @rule(only=st.sampled_from(((), ("lora",), ("small",))))
    def start(self, only: tuple[str, ...]) -> None:
        self.life.start(*only)

    @rule(after=st.integers(0, 9))
    def kill(self, after: int) -> None:
        self.life.kill(after)

    @precondition(lambda self: len(self.life.study.entries) < 4)
    @rule(method=st.sampled_from(METHODS), budget=st.sampled_from(("small", "large")))
    def add(self, method: str, budget: str) -> None:
        self.life.add(f"entry-{len(self.life.study.entries)}", method, budget)

    @precondition(lambda self: len(self.life.study.seeds) < 5)
    @rule()
    def one_more_seed(self) -> None:
        self.life.ask(seeds=len(self.life.study.seeds) + 1)

    @rule(tolerance=st.sampled_from((0.001, 0.1, 0.5)))
    def tolerate(self, tolerance: float) -> None:
        self.life.ask(f"tolerance={tolerance}")

    @precondition(lambda self: self.life.study.tuning.max_runs < 9)
    @rule()
    def search_on(self) -> None:
        self.life.edit("tuning.max_runs=9")

    @rule(method=st.sampled_from(METHODS))
    def fail(self, method: str) -> None:
        """Until it is mended."""
        self.life.fail(method)
        try:
            self.life.start()
        except RuntimeError:  # all entries failed
            self.life.failed = {}
        self.life.fail(None)

    def teardown(self) -> None:
        try:
            if hasattr(self, "life"):
                self.life.start()
                assert self.life.said() == self.life.alone().said()
        finally:
            self.patch.undo()
            self.room.cleanup()


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_study_is_a_function_of_its_file_whatever_happened_to_it(examples: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=5,
        deadline=None,
        database=None,
        derandomize=examples < 100,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Studies, settings=chosen)


def test_a_study_is_killed_three_times_gets_an_entry_and_a_seed_and_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = StudyLife(tmp_path / "study", monkeypatch)
    life.edit("shared.data.metric=contains")
    for after in (3, 6, 2):
        life.kill(after)
    life.start("small")
    life.add("late", "hira")
    life.kill(2)
    life.ask(seeds=4)
    life.fail("full")
    life.start()
    life.fail(None)
    life.start()
    assert life.said() == life.alone().said()
