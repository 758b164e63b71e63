"""`smoa init` apart from its questions: what it finds of model, data and machine, proposes, measures and writes."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig

from smoa.errors import ConfigError
from smoa_lab import init
from smoa_lab.config import run
from smoa_lab.config.run import check_config, load_config
from smoa_lab.config.yaml_text import parse_yaml
from smoa_lab.init import (
    Machine,
    Measured,
    ModelFacts,
    Proposal,
    StepClock,
    config_text,
    duration,
    expected,
    look_at_data,
    look_at_model,
    measure,
    needed_bytes,
    propose,
    this_machine,
)
from tests.support import lab
from tests.support.chats import chat_base
from tests.support.proposals import MACHINE, MODEL, QUESTIONS, ROWS, proposal, rows_file, talks

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # TRL sets it
]
CPU_MULTIPLIES_BFLOAT16 = run.cpu_multiplies_bfloat16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFacts:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return look_at_model(str(place))


def test_a_models_sizes_are_those_of_its_config(base: ModelFacts) -> None:
    assert (base.context, base.config.vocab_size) == (512, 259)
    assert sum(base.shapes.values()) == 2 * 7  # the output is left out


def test_conversations_get_a_template_if_the_model_has_none(base: ModelFacts, tmp_path: Path) -> None:
    place = str(rows_file(tmp_path / "rows.jsonl", talks(40)))
    found = look_at_data(place, base)
    assert found.values == {"train": place, "format": "messages", "chat_template": "alpaca", "test_part": 0.05}
    assert (found.format, found.kind) == ("messages", "rows")
    assert 30 <= found.train <= 40
    assert found.max_length % 64 == 0
    own = look_at_data(place, look_at_model(str(chat_base(tmp_path / "chat"))))
    assert "chat_template" not in own.values


def test_plain_text_and_pairs_of_texts_need_no_template_and_pairs_of_turns_do(base: ModelFacts, tmp_path: Path) -> None:
    def look(rows: list[dict[str, Any]]) -> Any:
        return look_at_data(str(rows_file(tmp_path / "rows.jsonl", rows)), base)

    text = look([{"text": f"Line {i} " * (1 + 60 * (i == 3))} for i in range(300)])
    assert "chat_template" not in text.values
    assert text.max_length == 64  # one of 300 is longer
    assert (
        "chat_template"
        not in look([{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(20)]).values
    )

    def turns(i: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]

    pairs = look([{"chosen": turns(i, "Yes."), "rejected": turns(i, "No.")} for i in range(20)])
    assert (pairs.format, pairs.values["chat_template"]) == ("preference", "alpaca")


@pytest.mark.parametrize(
    ("listed", "has"), [({"avx512_bf16": True, "avx2": True}, True), ({"avx512_bf16": False}, False), (None, False)]
)
def test_a_cpu_has_bfloat16_if_its_torch_lists_instructions_for_it_and_a_gpu_comes_before_it(
    monkeypatch: pytest.MonkeyPatch, listed: dict[str, Any] | None, has: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    monkeypatch.setattr(run, "cpu_multiplies_bfloat16", CPU_MULTIPLIES_BFLOAT16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed, raising=False)
    if listed is None:  # an old torch
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert this_machine() == Machine(2**30, None, has)
    assert this_machine().name == "the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert this_machine() == Machine(7, "A GPU", True)
    assert this_machine().name == "A GPU"


CONFIG: Any = LlamaConfig(**{**MODEL.config.to_dict(), "num_hidden_layers": 100})
DEEP = replace(MODEL, config=CONFIG)
TWO_ROWS, ONE_DEEP_ROW = needed_bytes(proposal(rows=2)), needed_bytes(proposal(model=DEEP, rows=1))
MACHINES: dict[str, tuple[ModelFacts, Machine, tuple[int, bool, str]]] = {
    "a CPU with room": (MODEL, MACHINE, (4, False, "float32")),
    "a GPU with room": (MODEL, Machine(10**10, "a GPU", bfloat16=True), (16, False, "bfloat16")),
    "less memory": (MODEL, Machine(2 * TWO_ROWS), (2, False, "float32")),
    "too little for one row": (DEEP, Machine(2 * (ONE_DEEP_ROW - 1)), (4, True, "float32")),
    "too little for anything, which the measurement will tell": (MODEL, Machine(1), (1, True, "float32")),
}


@pytest.mark.parametrize("case", MACHINES)
def test_the_batch_is_what_fits_and_a_step_learns_from_as_many_rows(case: str) -> None:
    model, machine, chosen = MACHINES[case]
    found = propose(model, ROWS, proposal().choice, machine)
    assert (found.rows, found.checkpointing, found.dtype) == chosen
    assert found.rows * found.accumulation == 16
    assert propose(model, ROWS, proposal().choice, machine, "float16").dtype == "float16"


def test_what_does_not_fit_is_halved_and_at_last_computed_again() -> None:
    half = proposal(rows=2).smaller()
    assert (half.rows, half.accumulation, half.checkpointing) == (1, 16, False)
    assert half.smaller().checkpointing
    with pytest.raises(ConfigError, match="'some/model' does not fit into memory"):
        half.smaller().smaller()


def test_preferences_need_the_memory_of_two_answers() -> None:
    twice = needed_bytes(proposal(rows=8)) - needed_bytes(proposal(rows=4))
    pairs = proposal(data=replace(ROWS, format="preference"))
    assert needed_bytes(pairs) - needed_bytes(proposal()) == twice


def test_time_ends_a_run_before_its_epochs_do() -> None:
    assert proposal().steps_of_epochs == 3 * 7  # 25 batches of 4, 4 in a step
    short = proposal().within(minutes=1, seconds=6.1)
    assert short.all_steps == short.values("runs/x")["training"]["max_steps"] == 9
    long = proposal().within(minutes=60, seconds=6.1)
    assert (long.steps, long.all_steps) == (None, 21)
    assert long.values("runs/x")["training"]["num_train_epochs"] == 3
    assert proposal().within(minutes=0.01, seconds=60).steps == 1


def test_questions_have_their_length_under_task() -> None:
    values = proposal(data=QUESTIONS).values("runs/x")
    assert values["task"] == {"max_length": 256}
    assert "max_length" not in values["training"]
    assert "task" not in proposal().values("runs/x")


def test_three_steps_are_measured_and_leave_nothing_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    monkeypatch.chdir(room)
    model = look_at_model(str(place))
    data = look_at_data(str(rows_file(tmp_path / "rows.jsonl", talks(30))), model)
    wanted = propose(model, data, proposal().choice, Machine(10**10))
    found, measured = measure(wanted)
    assert found == wanted
    assert 0 < measured.seconds < 60
    assert measured.memory > 10**8
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fits_two(tried: Proposal) -> Measured:
        if tried.rows > 2:
            raise error
        return Measured(1.0, 1)

    monkeypatch.setattr(init, "_three_steps", fits_two)
    found, _ = measure(proposal(rows=8))
    assert (found.rows, found.accumulation) == (2, 8)
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        measure(proposal())


def test_the_first_step_is_left_out_of_the_time() -> None:
    clock = StepClock()
    clock.times = [10.0, 11.0, 13.0]
    assert clock.seconds == 1.5


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
def test_the_file_says_exactly_what_was_chosen_with_a_comment_on_every_line(tmp_path: Path, case: str) -> None:
    chosen = proposal(**PROPOSALS[case])
    file = tmp_path / "mine.yaml"
    file.write_text(config_text(Path("mine.yaml"), chosen, MEASURED))
    values = chosen.values("runs/mine")
    assert parse_yaml(file.read_text(), file) == values
    assert load_config(file) == check_config(values)
    lines = file.read_text().splitlines()
    assert [line for line in lines if line and " # " not in f" {line}"] == []
    assert 30 <= len(lines) <= 45
    assert max(len(line) for line in lines) <= 120 or case == "odd names"


def test_expected_time_and_memory_stand_on_top_and_reasons_beside_the_values() -> None:
    text = config_text(Path("mine.yaml"), proposal(), MEASURED)
    assert "# Expected: 21 steps of 1.5 s each on the CPU, 32 s in all, and 3.0 GB of memory.\n" in text
    assert re.search(r"learning_rate: 0\.002 +# by the size of the model; `smoa tune` finds a better one", text)
    assert "Not measured" in config_text(Path("mine.yaml"), proposal(), None)
    assert expected(proposal(), None) == []
    tight = config_text(Path("mine.yaml"), proposal(steps=12), MEASURED)
    assert "as many as the time allows; 3 times all rows would be 21 steps" in tight


@pytest.mark.parametrize(("seconds", "words"), [(8.2, "8 s"), (150, "2.5 minutes"), (9000, "2.5 hours")])
def test_a_duration_is_in_a_unit_that_people_use(seconds: float, words: str) -> None:
    assert duration(seconds) == words
