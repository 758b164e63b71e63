from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smoa_lab.config.run import check_config, load_config
from smoa_lab.config.yaml_text import parse_yaml
from smoa_lab.starting.config_text import config_text, duration, expected, plain_report
from smoa_lab.starting.measure_steps import Measured
from smoa_lab.starting.proposal import Proposal
from smoa_lab.starting.survey import DataFacts
from tests.support.proposals import MACHINE, QUESTIONS, ROWS, proposal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # TRL sets it
]
MEASURED = Measured(1.5, 3_000_000_000)
ODD = "/rows of #1: mine/" + "long name " * 30 + ".jsonl"
PROPOSALS: dict[str, dict[str, Any]] = {
    "rows": {},
    "steps": {"steps": 12, "dtype": "bfloat16"},
    "questions": {"data": QUESTIONS},
    "odd names": {"data": replace(ROWS, values={**ROWS.values, "train": ODD, "chat_template": "alpaca"})},
    "hub": {"data": replace(ROWS, values={"hub": {"name": "some/rows"}, "format": "messages", "test_part": 0.05})},
    "tight": {"rows": 1, "checkpointing": True},
}


@pytest.mark.parametrize("case", PROPOSALS)
def test_the_file_says_exactly_what_was_chosen(tmp_path: Path, case: str) -> None:
    chosen: Proposal = proposal(**PROPOSALS[case])
    file = tmp_path / "mine.yaml"
    file.write_text(config_text(file, chosen, MACHINE, MEASURED))
    values = chosen.values("runs/mine")
    assert parse_yaml(file.read_text(), file) == values
    assert load_config(file) == check_config(values)


@pytest.mark.parametrize("case", PROPOSALS)
def test_every_line_has_a_comment(case: str) -> None:
    lines = config_text(Path("mine.yaml"), proposal(**PROPOSALS[case]), MACHINE, MEASURED).splitlines()
    assert [line for line in lines if line and " # " not in f" {line}"] == []
    assert 30 <= len(lines) <= 45
    assert max(len(line) for line in lines) <= 120 or case == "odd names"


def test_expected_time_and_memory_stand_on_top() -> None:
    text = config_text(Path("mine.yaml"), proposal(), MACHINE, MEASURED)
    assert "# Expected: 21 steps of 1.5 s each on the CPU, 32 s in all, and 3.0 GB of memory.\n" in text
    assert "Not measured" in config_text(Path("mine.yaml"), proposal(), MACHINE, None)
    assert expected(proposal(), MACHINE, None) == []


def test_a_tighter_time_is_said_beside_the_steps() -> None:
    text = config_text(Path("mine.yaml"), proposal(steps=12), MACHINE, MEASURED)
    assert "as many as the time allows; 3 times all rows would be 21 steps" in text


@pytest.mark.parametrize("data", [QUESTIONS, ROWS])
def test_the_rate_is_that_of_the_models_size_and_tune_finds_a_better_one(data: DataFacts) -> None:
    text = config_text(Path("mine.yaml"), proposal(data=data), MACHINE, None)
    assert re.search(r"learning_rate: 0\.002 +# by the size of the model; `smoa tune` finds a better one", text)


@pytest.mark.parametrize(("seconds", "words"), [(8.2, "8 s"), (150, "2.5 minutes"), (9000, "2.5 hours")])
def test_a_duration_is_in_a_unit_that_people_use(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_report_for_programs_has_the_numbers() -> None:
    report = plain_report(Path("mine.yaml"), proposal(), MEASURED)
    assert report["measured"] == {"seconds_per_step": 1.5, "peak_memory_bytes": 3_000_000_000}
    assert (report["file"], report["steps"]) == ("mine.yaml", 21)
    assert plain_report(Path("mine.yaml"), proposal(), None)["measured"] is None
