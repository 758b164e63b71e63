"""Runs that leave something out: the untouched model's scores, held-out questions, validation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import ModelSection, RunConfig, check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.open_run import base_section, open_run
from smoa_lab.scoring.evaluation import Evaluation
from smoa_lab.training import train_run
from smoa_lab.training.loaded_run import LoadedRun, load_run
from smoa_lab.training.run_folder import RunFolder
from tests.support import lab
from tests.support.kills import killed_after_saving

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps."""
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(2, save_strategy="no"))


@pytest.fixture
def untested(values: dict[str, Any]) -> RunConfig:
    """The same with nothing held out."""
    values["data"]["test_examples"] = 0
    return check_config(values)


def test_without_held_out_questions_a_run_is_trained_and_a_line_says_that_it_is_not_scored(
    untested: RunConfig,
) -> None:
    model = untested.model.model_copy(update={"options": {"revision": "v2"}})
    metrics = train_run.train(untested.model_copy(update={"model": model}))
    assert metrics["evaluation"] == {}
    assert metrics["training"]["steps"] == 2
    assert "No questions are held out, so none are scored" in RunFolder(untested.folder).log.read_text()
    adapter = RunFolder(untested.folder).adapter
    assert (adapter / "adapter_model.safetensors").is_file()
    assert base_section(adapter) == ModelSection(name=model.name, options={"revision": "v2"})


def test_a_mixture_gives_no_router_logits_once_it_is_trained(values: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = lab.byte_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**lab.SIZES, **ends, vocab_size=len(tokenizer), num_local_experts=4, sliding_window=None)
    lab.saved(MixtralForCausalLM(config), tokenizer, tmp_path / "mixture")
    values["model"]["name"] = str(tmp_path / "mixture")
    metrics = train_run.train(check_config({**values, "method": "full", "adapter": {}}))
    assert metrics["evaluation"]["after"]["all"]["questions"] == 3
    assert not AutoConfig.from_pretrained(tmp_path / "run" / "adapter").output_router_logits


def test_the_base_is_scored_on_the_device_that_trains_it(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(train_run, "to_device", lambda _, device: done.append(device.type))
    monkeypatch.setattr(Evaluation, "measure", lambda *_: done.append("scored"))
    train_run.train(check_config(values))
    assert done == ["cpu", "scored", "scored"]


def test_the_validation_loss_is_measured_and_the_untouched_model_not_scored_where_the_run_asks_for_it(
    values: dict[str, Any],
) -> None:
    values["task"] = {"baseline": False}
    values["training"] |= {"eval_strategy": "steps", "eval_steps": 1}
    metrics = train_run.train(check_config(values))
    assert list(metrics["evaluation"]) == ["after"]
    assert [entry["step"] for entry in metrics["history"] if "eval_loss" in entry] == [1, 2]
    log = RunFolder(Path(values["training"]["output_dir"])).log.read_text()
    assert "step 1/2: loss" in log
    assert "eval_loss" in log


@pytest.mark.parametrize("method", ["smoa", "full"])
def test_a_run_is_scored_again_from_its_folder_which_shares_nothing_of_this_machine(
    method: str, values: dict[str, Any], tmp_path: Path
) -> None:
    values |= {"method": method, "adapter": {"r": 4, "target_modules": ["q_proj"]} if method != "full" else {}}
    values["data"]["files"] = {"arc_easy": own_questions(tmp_path)}
    metrics = train_run.train(check_config(values))
    own = {"config.yaml", "train.log"}  # of the user
    named = {"adapter/adapter_config.json"} if method != "full" else set()  # as PEFT does
    assert lab.files_with(tmp_path, tmp_path / "run") == own | named
    assert (metrics["parameters"]["trainable"] == metrics["parameters"]["total"]) == (method == "full")
    again = evaluate_run(*open_run(tmp_path / "run"))
    assert again["scores"] == metrics["evaluation"]["after"]


def test_questions_that_a_run_was_trained_on_are_not_scored_as_held_out(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"]["files"] = {"arc_easy": own_questions(tmp_path)}
    config = check_config(values)
    used = train_run.train(config)["data"]["used"]
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("\n" + (tmp_path / "train.jsonl").read_text())
    scored = evaluate_run(*open_run(config.folder), RunFolder(config.folder))
    assert scored["trained_on"] == used["train"]["examples"] > 0
    with pytest.raises(DataError, match=r"data\.tasks: arc_easy leave no training examples"):
        load_run(config)


def own_questions(room: Path) -> dict[str, Any]:
    for part in ("train", "test"):
        rows = [json.dumps({"prompt": f"{part} {i}", "answer": str(i)}) for i in range(20)]
        (room / f"{part}.jsonl").write_text("\n".join(rows))
    return {"train": str(room / "train.jsonl"), "test": str(room / "test.jsonl"), "columns": {"answer": "answer"}}


def test_a_second_start_while_a_run_trains_is_refused_before_any_work(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_config(values)
    fit = LoadedRun.fit

    def started_again(run: LoadedRun, *given: Any) -> Any:
        monkeypatch.setattr(train_run, "load_run", pytest.fail)
        with pytest.raises(ConfigError, match="another process trains into it"):
            train_run.train(config)
        return fit(run, *given)

    monkeypatch.setattr(LoadedRun, "fit", started_again)
    assert train_run.train(config)["training"]["steps"] == 2
    assert not RunFolder(config.folder).lock.exists()
    with pytest.raises(ConfigError, match="contains a finished run"):
        train_run.train(config)


def test_only_the_first_process_tells(
    untested: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger("smoa_lab").level
    made = LoadedRun.arguments

    def of_rank_one(run: LoadedRun) -> Any:
        arguments = made(run)
        monkeypatch.setattr(type(arguments), "process_index", property(lambda self: 1))
        return arguments

    monkeypatch.setattr(LoadedRun, "arguments", of_rank_one)
    train_run.train(untested)
    assert "step 1/2" not in RunFolder(untested.folder).log.read_text()
    assert logging.getLogger("smoa_lab").level == level
    assert json.loads((untested.folder / "metrics.json").read_text())["training"]["steps"] == 2


def test_an_adapter_that_does_not_fit_the_model_leaves_nothing_behind(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["adapter"]["target_modules"] = ["q_prj"]
    monkeypatch.setattr(train_run, "load_run", pytest.fail)
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        train_run.train(check_config(values))
    assert not Path(values["training"]["output_dir"]).exists()


def test_a_run_is_not_resumed_on_other_questions_or_another_base(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"save_strategy": "steps", "save_steps": 1}
    with killed_after_saving(1, monkeypatch):
        train_run.train(check_config(values))
    lab.fill_cache(tmp_path / "cache", lab.questions(20, "other"), lab.questions(3, "test"))
    with pytest.raises(ConfigError, match="unfinished run, and the data changed since then"):
        train_run.train(check_config(values))
    lab.fill_cache(tmp_path / "cache", lab.questions(20, "train"), lab.questions(3, "test"))
    weights = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    weights.lm_head.weight.data.neg_()
    weights.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="unfinished run, and the base model changed since then"):
        train_run.train(check_config(values))
