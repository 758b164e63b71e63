"""What a run writes, that any two can be paired by their rows, and runs that leave something out."""

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.data.answers import RULES
from smoa_lab.evaluate import evaluate_run
from smoa_lab.open_run import open_place
from smoa_lab.training import train as run_module
from smoa_lab.training.loaded_run import inputs, load_run
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run, score_untouched
from tests.support import lab
from tests.support.lab import chats, killed_after_saving, named, rows_base, rows_config

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps."""
    training = lab.steps(2, save_strategy="no", learning_rate=0.05)
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=training)


def changed(values: dict[str, Any], name: str = "run", **sections: Any) -> RunConfig:
    """The run in another folder, with keys of its sections changed."""
    laid = {key: {**values.get(key, {}), **own} if isinstance(own, dict) else own for key, own in sections.items()}
    folder = str(Path(values["training"]["output_dir"]).with_name(name))
    config = {**values, **laid}
    return check_config({**config, "training": {**config["training"], "output_dir": folder}})


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    with gzip.open(RunFolder(config.folder).rows, "rt", encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def test_the_digests_change_with_what_they_are_of_alone(values: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one " * 130)
    values["forgetting"] = {"text": str(text)}
    own = load_run(changed(values)).digests
    for what, change in (
        ("encoder", {"data": {"max_length": 300}}),
        ("data", {"data": {"train_examples": 7}}),
        ("forgetting", {"forgetting": {"text": str(text)}}),
    ):
        text.write_text(("one " if what != "forgetting" else "other ") * 130)
        other = load_run(changed(values, **change)).digests
        assert [name for name in own if own[name] != other[name]] == [what]


def test_the_untouched_model_is_scored_as_before_a_run_and_nothing_is_trained(values: dict[str, Any]) -> None:
    trained, untouched = changed(values), changed(values, "untouched")
    expected, found = run(trained), score_untouched(untouched)
    assert found["evaluation"] == {"before": expected["evaluation"]["before"]}
    assert found["parameters"]["trainable"] == 0
    assert found["digests"] == expected["digests"]
    kept = ("digest", "copy", "part", "tokens", "group", "before", "right_before")
    assert rows_of(untouched) == [{key: row[key] for key in kept} for row in rows_of(trained)]
    assert not RunFolder(untouched.folder).adapter.exists()
    assert not any(RunFolder(config.folder).lock.exists() for config in (trained, untouched))
    with pytest.raises(ConfigError, match="contains a finished run"):
        score_untouched(untouched)


def test_the_metrics_name_all_files_of_rows_and_whole_faults_without_folders(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "choices": "this/that", "label": 0}\n')
    places = [values["data"]["train"], str(tmp_path / "bad.jsonl")]
    told = score_untouched(changed(values, data={"train": places, "skip_bad_rows": True}))["data"]
    assert told["source"] == f"{Path(places[0]).name}, bad.jsonl"
    assert told["faults"][0].startswith("bad.jsonl, row 1: choices: found 'this/that', expected a list")


def test_a_run_that_is_told_so_scores_validation_once_and_nothing_else(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa_lab.scoring.evaluation.continue_prompts", lambda _, __, prompts, *___: prompts and 1 / 0)
    config = changed(
        values,
        scoring={"part": "validation", "before": False},
        data={"samples": 0},
        forgetting={"tokens": 0},
        training={"eval_strategy": "steps", "eval_steps": 1},
    )
    metrics = run(config)
    assert list(metrics["evaluation"]) == ["after"]
    assert (metrics["gain"], metrics["forgetting"], metrics["samples"]) == (None, None, [])
    known = {"digest", "copy", "part", "tokens", "group", "after", "right_after"}
    assert [set(row) for row in rows_of(config)] == [known] * 2
    assert {row["part"] for row in rows_of(config)} == {"validation"}
    assert [entry["step"] for entry in metrics["history"] if "eval_loss" in entry] == [1, 2]
    log = RunFolder(config.folder).log.read_text()
    assert "step 1/2: loss" in log
    assert "eval_loss" in log


def test_without_held_out_rows_a_run_is_trained_and_a_line_says_that_it_is_not_scored(values: dict[str, Any]) -> None:
    config = changed(values, data={"test_examples": 0})
    model = config.model.model_copy(update={"options": {"revision": "v2"}})
    metrics = run(config.model_copy(update={"model": model}))
    assert (metrics["evaluation"], metrics["gain"], metrics["samples"]) == ({}, None, [])
    assert metrics["training"]["steps"] == 2
    folder = RunFolder(config.folder)
    assert "No rows are held out, so none are scored" in folder.log.read_text()
    assert not folder.samples.exists()
    assert rows_of(config) == []
    assert open_place(folder.adapter).model.section.options == {"revision": "v2"}


def test_a_mixture_gives_router_logits_only_while_it_is_trained(values: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = lab.byte_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**lab.SIZES, **ends, vocab_size=len(tokenizer), num_local_experts=4, sliding_window=None)
    lab.saved(MixtralForCausalLM(config), tokenizer, tmp_path / "mixture")
    values |= {"method": "full", "adapter": {}}
    metrics = run(changed(values, model={"name": str(tmp_path / "mixture")}))
    assert metrics["evaluation"]["after"]["rows"] == 3
    assert any("aux_loss" in entry for entry in metrics["history"])
    assert not AutoConfig.from_pretrained(tmp_path / "run" / "adapter").output_router_logits


@pytest.mark.parametrize("method", ["smoa", "full"])
def test_a_run_is_scored_again_from_its_folder_which_shares_nothing_of_this_machine(
    method: str, values: dict[str, Any], tmp_path: Path
) -> None:
    values |= {"method": method} | ({"adapter": {}} if method == "full" else {})
    metrics = run(changed(values))
    own = {"config.yaml", "train.log"}  # of the user
    named = {"adapter/adapter_config.json"} if method != "full" else set()  # as PEFT does
    assert lab.files_with(tmp_path, tmp_path / "run") == own | named
    assert (metrics["parameters"]["trainable"] == metrics["parameters"]["total"]) == (method == "full")
    assert "## Prompt 2" in (tmp_path / "run" / "samples.md").read_text()
    again = evaluate_run(open_place(tmp_path / "run"))
    assert again["scores"] == metrics["evaluation"]["after"]
    assert again["trained_on"] == 0
    assert again["digests"]["encoder"] == metrics["digests"]["encoder"]
    assert again["provenance"]["seed"] == metrics["provenance"]["seed"] == 42  # the trainer's, as none is named
    base = evaluate_run(open_place(tmp_path / "run" / "config.yaml"))
    assert base["scores"] == metrics["evaluation"]["before"] or method == "full"


def test_rows_that_a_run_was_trained_on_are_counted_and_not_scored_as_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    base = rows_base(tmp_path / "base")
    trained = lab.write_rows(tmp_path / "a.jsonl", chats(6))
    mixed = lab.write_rows(tmp_path / "b.jsonl", chats(9))
    none = {"test_examples": 0, "validation_examples": 0}
    run(rows_config(tmp_path, trained, base, data=none | {"train_examples": 5}))
    folder = RunFolder(tmp_path / "run")
    for change, left in ((f"data.test={mixed}", 4), (f"data.test={trained}", 1)):
        scored = evaluate_run(open_place(folder.path, overrides=[change, "data.test_examples=400"]))
        assert (scored["trained_on"], scored["scores"]["rows"]) == (5, left)
    one = [f"data.train={tmp_path / 'c.jsonl'}", f"data.test={lab.write_rows(tmp_path / 'd.jsonl', chats(1))}"]
    lab.write_rows(tmp_path / "c.jsonl", chats(1))
    folder.trained.unlink()
    assert evaluate_run(open_place(folder.path, overrides=[*one, "data.test_examples=400"]))["trained_on"] is None
    with pytest.raises(DataError, match=r"nothing is held out that could be scored; give other rows as data\.test"):
        evaluate_run(open_place(folder.path))


def test_what_is_written_to_the_home_folder_is_written_there_by_the_trainer_and_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = check_config({**values, "training": {**values["training"], "output_dir": "~/runs/mine"}})
    assert config.folder == Path(config.arguments().output_dir or "") == tmp_path / "home" / "runs" / "mine"


def test_a_second_start_while_a_run_trains_is_refused_before_any_work(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_config(values)
    fit = run_module.fit

    def started_again(*given: Any) -> None:
        monkeypatch.setattr(run_module, "load_run", pytest.fail)
        with pytest.raises(ConfigError, match="another process trains into it"):
            run(config)
        fit(*given)

    monkeypatch.setattr(run_module, "fit", started_again)
    assert run(config)["training"]["steps"] == 2
    assert not RunFolder(config.folder).lock.exists()
    with pytest.raises(ConfigError, match="contains a finished run"):
        run(config)


def test_only_the_first_process_tells(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(values, data={"test_examples": 0})
    level = logging.getLogger("smoa_lab").level
    made = RunConfig.arguments

    def of_rank_one(run: RunConfig) -> Any:
        arguments = made(run)
        monkeypatch.setattr(type(arguments), "process_index", property(lambda self: 1))
        return arguments

    monkeypatch.setattr(RunConfig, "arguments", of_rank_one)
    run(config)
    assert "step 1/2" not in RunFolder(config.folder).log.read_text()
    assert logging.getLogger("smoa_lab").level == level
    assert json.loads((config.folder / "metrics.json").read_text())["training"]["steps"] == 2


def test_a_run_is_not_resumed_on_other_rows_or_another_base(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"save_strategy": "steps", "save_steps": 1}
    with killed_after_saving(1, monkeypatch):
        run(check_config(values))
    rows = Path(values["data"]["train"])
    before = rows.read_text()
    rows.write_text(before.replace("In train", "Of train"))
    with pytest.raises(ConfigError, match="unfinished run, and the data changed since then"):
        run(check_config(values))
    rows.write_text(before)
    weights = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    weights.lm_head.weight.data.neg_()
    weights.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="unfinished run, and the base changed since then"):
        run(check_config(values))


def test_what_a_killed_save_left_is_no_part_of_the_next(values: dict[str, Any]) -> None:
    config = check_config(values)
    run(config)
    folder = RunFolder(config.folder)
    folder.metrics.unlink()
    (folder.adapter / "half.safetensors").write_bytes(b"")
    run(config)
    assert folder.finished
    assert not (folder.adapter / "half.safetensors").exists()


def test_a_diverged_run_has_null_in_what_it_returns_and_writes(values: dict[str, Any]) -> None:
    config = changed(values, training={"learning_rate": 1e30, "max_steps": 4, "logging_steps": 1})
    metrics = run(config, may_diverge=True)
    assert metrics["evaluation"]["after"]["loss"] is None
    assert metrics["history"][-1]["grad_norm"] is None
    assert json.loads(RunFolder(config.folder).metrics.read_text()) == metrics


def test_answers_are_scored_before_and_after_training_and_when_the_run_is_scored_again(tmp_path: Path) -> None:
    rows = lab.write_rows(tmp_path / "chats.jsonl", chats(20))
    config = rows_config(tmp_path, rows, rows_base(tmp_path / "base"), data={"metric": "number", "samples": 1})
    metrics, lines = run(config), rows_of(config)
    for stage in ("before", "after"):
        right = [RULES["number"](line[f"answer_{stage}"], line["reference"]) for line in lines]
        assert metrics["evaluation"][stage]["number"] == sum(right) / len(right)
    assert metrics["gain"]["number"] == metrics["evaluation"]["after"]["number"] - sum(
        RULES["number"](line["answer_before"], line["reference"]) for line in lines
    ) / len(lines)
    assert len(metrics["samples"]) == 1
    again = evaluate_run(open_place(config.folder, overrides=["data.metric=contains"]))
    for found, stage in ((again["before"], "before"), (again["scores"], "after")):
        right = [RULES["contains"](line[f"answer_{stage}"], line["reference"]) for line in lines]
        assert found["contains"] == sum(right) / len(right)


def test_a_metric_that_fails_after_training_names_the_row_and_the_run_goes_on_with_a_mended_one(tmp_path: Path) -> None:
    rows = lab.write_rows(tmp_path / "chats.jsonl", chats(20))
    own = {"data": {"metric": "score"}, "scoring": {"before": False}, "training": {"save_strategy": "steps"}}
    config = rows_config(tmp_path, rows, rows_base(tmp_path / "base"), **own)
    source = "def score(answer, row): return {row['messages'][1]['content']: 1.0}[answer]"
    with named(tmp_path / "own.py", source), pytest.raises(DataError, match=r"^chats\.jsonl, row \d+: .* KeyError: "):
        run(config)
    assert not RunFolder(config.folder).finished
    with named(tmp_path / "own.py"):
        metrics = run(config)
        found = evaluate_run(open_place(config.folder, overrides=["data.metric=score"]))
    assert metrics["training"]["resumed"]
    lengths = [len(line["answer_after"]) / len(str(json.loads(line["own"]))) for line in rows_of(config)]
    assert (
        found["scores"]["score"]
        == metrics["evaluation"]["after"]["score"]
        == pytest.approx(sum(lengths) / len(lengths))
    )
    opened = open_place(config.folder).config
    assert opened is not None
    assert opened.data.metric is None  # and other commands need no function


def test_what_a_run_starts_from_counts_rows_of_one_prompt_once(tmp_path: Path) -> None:
    asked = [{"prompt": f"What is {i // 2}?", "completion": f" {i}."} for i in range(200)]
    rows, base = lab.write_rows(tmp_path / "rows.jsonl", asked), rows_base(tmp_path / "base")
    found, by_row = (inputs(rows_config(tmp_path, rows, base, data=data)) for data in ({}, {"group": False}))
    assert found["rows"]["test"] == by_row["rows"]["test"] == 40


def test_a_metric_that_these_rows_have_nothing_for_is_refused_when_they_are_read(tmp_path: Path) -> None:
    rows = lab.write_rows(tmp_path / "rows.jsonl", chats(20))
    config = rows_config(tmp_path, rows, rows_base(tmp_path / "base"), data={"metric": "choice"})
    with pytest.raises(DataError, match=r"data\.metric: choice scores .*, and these rows have none; leave it out"):
        inputs(config)
