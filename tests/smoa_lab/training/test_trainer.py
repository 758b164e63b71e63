"""Runs on rows against TRL's own trainers, and what is refused before any work."""

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import smoa
from smoa.errors import ConfigError, SmoaError
from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.data.encoding import Tokens
from smoa_lab.scoring.losses import row_losses
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.train import run as train
from smoa_lab.training.trainer import ProgressReport, Stopwatch
from tests.support.lab import chat, chats, losses, rows_base, rows_config, rows_values, tiny_gpt2, write_rows

ALL = {"test_examples": 0, "validation_examples": 0}
"""Every row is trained on."""
VALIDATED = {"test_examples": 0, "validation_examples": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose chat template has marks."""
    return rows_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a test."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Conversations of unequal lengths."""
    rows = [
        *chats(8),
        *({"messages": chat(f"Open on day {i}?", "Yes.", "Sure?", f"Very {i}." * (i + 1))} for i in range(8)),
    ]
    return write_rows(tmp_path / "chats.jsonl", rows)


def by_trl(values: dict[str, Any], rows: Path, folder: Path) -> list[float]:
    """The loss curve of TRL's own trainer on the same file."""
    messages = "messages" in json.loads(rows.read_text().splitlines()[0])
    kinds = trl.SFTConfig, trl.SFTTrainer
    own = {**values["training"], "output_dir": str(folder), "max_length": values["data"].get("max_length", 1024)}
    given = {"report_to": "none", "bf16": False, **own}
    arguments: Any = kinds[0](**given, **({"assistant_only_loss": True} if messages else {}))
    arguments.dataloader_pin_memory = False
    set_seed(arguments.seed)
    trainer = kinds[1](
        AutoModelForCausalLM.from_pretrained(values["model"]["name"]),
        args=arguments,
        train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
        processing_class=AutoTokenizer.from_pretrained(values["model"]["name"]),
        peft_config=smoa.SmoaConfig(task_type="CAUSAL_LM", **values["adapter"]),
    )
    trainer.train()
    return losses({"history": trainer.state.log_history})


TRAINING: dict[str, dict[str, Any]] = {
    "cut and accumulated": {"data": {"max_length": 60}, "gradient_accumulation_steps": 3},
    "packed": {"packing": True, "data": {"max_length": 128}},
    "padding free": {"padding_free": True, "data": {"max_length": None}},
}


@pytest.mark.parametrize("training", TRAINING.values(), ids=TRAINING)
def test_the_loss_curve_is_that_of_trls_own_trainer(
    training: dict[str, Any], talks: Path, base: Path, tmp_path: Path
) -> None:
    own = dict(training)
    data = ALL | own.pop("data", {})
    values = rows_values(tmp_path, talks, base, data=data, training={"max_steps": 4, "learning_rate": 0.01, **own})
    curve = losses(train(check_config(values)))
    assert len(curve) == 4
    assert curve == pytest.approx(by_trl(values, talks, tmp_path / "trl"), abs=1e-4)


STOPPING = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 8, "per_device_eval_batch_size": 64}


def test_the_best_adapter_is_kept_and_not_the_last(talks: Path, base: Path, tmp_path: Path) -> None:
    training = {**STOPPING, "learning_rate": 3.0, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    training["per_device_train_batch_size"] = 8
    data = VALIDATED
    config = rows_config(tmp_path, talks, base, data=data, training=training, early_stopping=2)
    metrics = train(config)
    history = [entry["eval_loss"] for entry in metrics["history"] if "eval_loss" in entry]
    run = load_run(config)
    model = PeftModel.from_pretrained(run.base, str(config.folder / "adapter"))
    rows = [Tokens(row["input_ids"], row["labels"]) for row in run.data.part("validation")]
    assert min(history) < history[-1]
    assert row_losses(model, rows, pad=0).mean == pytest.approx(min(history), abs=1e-4)
    best = history.index(min(history)) + 1
    assert metrics["training"]["best_step"] == best < metrics["training"]["steps"]
    assert f"(the best, step {best}, is kept)" in (config.folder / "adapter" / "README.md").read_text()


def test_time_for_steps_is_counted_from_the_end_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, now = Stopwatch(most=5, limit=30), iter((62.0, 91.0, 93.0))
    monkeypatch.setattr(time, "perf_counter", now.__next__)
    for is_over in (False, False, True):
        control = SimpleNamespace(should_training_stop=False)
        watch.on_step_end(None, None, control)
        assert control.should_training_stop is is_over
    assert watch.ends == [62, 91, 93]


def refused(config: RunConfig, error: type[SmoaError] = ConfigError) -> str:
    """The message of a run that is refused before any work: in one line, and without a folder."""
    with pytest.raises(error) as caught:
        train(config)
    assert not config.folder.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_of_all_the_models_positions_are_trained_and_answered_and_longer_ones_refused(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "gpt2", positions=128)
    file = write_rows(tmp_path / "long.jsonl", [{"text": f"{i} " + "word " * 60} for i in range(10)])
    adapter = {"r": 4, "num_blocks": 2, "target_modules": ["c_attn"]}
    long, endless, fitting = (
        rows_config(tmp_path, file, base, data={"max_length": length}, adapter=adapter) for length in (129, None, 128)
    )
    assert refused(long).startswith("data.max_length: rows of up to 129 tokens would be given to this model, which has")
    assert refused(endless).startswith("data.max_length: rows of up to 304 tokens ")
    assert refused(endless).endswith("set it to 128")
    short = write_rows(tmp_path / "short.jsonl", [{"text": f"{i} words"} for i in range(10)])
    packed = rows_config(tmp_path, short, base, data={"max_length": 129}, adapter=adapter, training={"packing": True})
    assert refused(packed).startswith("data.max_length: rows of up to 129 tokens ")
    wider = tiny_gpt2(tmp_path / "wider", positions=512)  # for the template's words
    choices = [{"prompt": f"{i}?", "choices": ["Yes.", "no " * 199], "label": 0} for i in range(10)]
    write_rows(tmp_path / "wrong.jsonl", choices)  # the long answer is the wrong one
    long = rows_config(tmp_path, tmp_path / "wrong.jsonl", wider, data={"template": "alpaca"}, adapter=adapter)
    assert refused(long).endswith("which has 512 positions; set it to 512")
    metrics = train(fitting)
    assert metrics["data"]["cut"] == 10
    assert [set(sample) for sample in metrics["samples"]] == [{"question", "reference", "before", "after"}]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_bar_follows_the_run_on_a_terminal_alone(on_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = io.StringIO()
    stream.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    report, arguments = ProgressReport(), SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)
    report.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    state.global_step = 2
    report.on_step_end(arguments, state, None)  # type: ignore[arg-type]
    report.on_log(arguments, state, None, {"loss": 1.5})  # type: ignore[arg-type]
    report.on_train_end(arguments, state, None)
    assert ("2/4" in stream.getvalue() and "loss 1.5" in stream.getvalue()) == on_terminal
    assert on_terminal or not stream.getvalue()  # not even an empty line
