"""Tables, the chart of a run, and its card."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from smoa import SmoaConfig
from smoa_lab.pages.card import NamedBase, adapter_card, named_base, run_card, samples_text
from smoa_lab.pages.charts import losses, save_picture
from smoa_lab.pages.tables import Table, metric_table, outcome
from tests.support.lab import stored_metrics

TABLE = Table(["name", "rank"], [["q_proj", 8], ["v_proj", "3 4"]])


def test_one_table_is_shown_in_markdown_and_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert TABLE.markdown() == "| name | rank |\n|---|--:|\n| q_proj | 8 |\n| v_proj | 3 4 |"
    assert TABLE.markdown(["--:"] * 2).splitlines()[1] == "|--:|--:|"
    assert Table(["a|b"], [["c|d"]]).markdown().splitlines()[::2] == [r"| a\|b |", r"| c\|d |"]
    Table(["task", "n"], [["a", 100], ["bcdefg", 1]]).print()
    assert capsys.readouterr().out == "task      n\na       100\nbcdefg    1\n"
    TABLE.print()
    assert capsys.readouterr().out.split() == ["name", "rank", "q_proj", "8", "v_proj", "3", "4"]


def test_scores_have_a_row_for_each_stage_with_their_errors() -> None:
    before = {"rows": 1200, "loss": 1.5, "accuracy": 0.25, "accuracy_stderr": 0.0123, "majority": None}
    table = metric_table({"before": before, "after": {**before, "loss": None, "won": 0.5}})
    assert table.header == ["training", "rows", "loss", "accuracy", "won"]
    assert table.rows == [
        ["before", "1,200", "1.500", "0.250 ± 0.012", "–"],
        ["after", "1,200", "–", "0.250 ± 0.012", "0.500"],
    ]
    assert metric_table({}).rows == []


HISTORY = stored_metrics()["history"]
EVALUATION = stored_metrics()["evaluation"]
ROWS = {stage: {"loss": loss, "perplexity": 9.0} for stage, loss in (("before", 3.0), ("after", 2.0))}


def rows(chart: Any) -> list[dict[str, Any]]:
    return [row for one in chart.to_dict()["datasets"].values() for row in one]


def test_training_and_validation_loss_are_drawn_by_step() -> None:
    found = {(row["data"], row["step"], row["loss"]) for row in rows(losses(HISTORY, {}, "smoa"))}
    assert found == {("training", 5, 0.8), ("training", 10, 0.4), ("training", 15, 4 / 15), ("validation", 20, 2.5)}


def test_held_out_rows_are_points_at_the_first_and_the_last_step() -> None:
    found = [row for row in rows(losses(HISTORY, ROWS, "smoa")) if row["data"] == "held-out rows"]
    assert {(row["step"], row["loss"]) for row in found} == {(0, 3.0), (20, 2.0)}


def test_held_out_rows_are_drawn_at_the_step_whose_adapter_is_kept() -> None:
    chart = losses(HISTORY, ROWS, "smoa", {"best_step": 15, "steps": 20})
    assert {row["step"] for row in rows(chart) if row["data"] == "held-out rows"} == {0, 15}


def test_one_row_has_no_standard_error() -> None:
    gain = {"loss": -0.1, "loss_stderr": math.nan, "accuracy": 0.5, "accuracy_stderr": None}
    told = outcome({"gain": gain, "forgetting": {"change": 0.25, "stderr": None}})
    assert told == [
        "The loss changed by -0.100.",
        "Accuracy changed by +50.0 points.",
        "Forgotten: +0.250 nats per token of general text.",
    ]


def test_the_loss_of_a_choice_without_its_end_is_not_drawn_with_that_of_training() -> None:
    scores = {stage: {**own, "accuracy": 0.5} for stage, own in ROWS.items()}
    assert "held-out rows" not in {row["data"] for row in rows(losses(HISTORY, scores, "smoa"))}


def test_losses_that_are_no_numbers_are_left_out() -> None:
    history = [*HISTORY[:2], {"step": 15, "loss": None}]
    diverged = {**ROWS, "after": {"loss": None, "perplexity": None}}
    found = {(row["data"], row["step"]) for row in rows(losses(history, diverged, "smoa"))}
    assert found == {("training", 5), ("training", 10), ("held-out rows", 0)}


def test_a_run_has_a_picture_unless_it_logged_nothing(tmp_path: Path) -> None:
    for number, evaluation in enumerate(({}, EVALUATION, ROWS)):
        save_picture(losses(HISTORY, evaluation, "smoa"), tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.width > 1000
    assert losses([{"step": 3, "train_loss": 1.0}], {}, "smoa") is None


CONFIG = SmoaConfig(r=8, num_blocks=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def metrics() -> dict[str, Any]:
    """What a run of two stages leaves."""
    metrics = stored_metrics()
    metrics["config"] |= {"adapter": {"r": 8}, "data": {"train": "piqa"}}
    metrics["provenance"] |= {"commit": "0123456789abcdef", "dirty": True}
    counts = {"max_length": 256, "trained_tokens": 3_000, "cut": 1_234, "tokens": {"total": 50_000}}
    parts = {"train": 1600, "test": 40}
    metrics["data"] = {"source": "piqa", "format": "choices", "parts": parts, **counts}
    return metrics


def card(metrics: dict[str, Any]) -> ModelCard:
    return ModelCard(run_card("demo", CONFIG, NamedBase("org/base (from GGUF)", "org/base"), metrics))


def test_the_card_tells_base_results_data_settings_and_versions(metrics: dict[str, Any]) -> None:
    found = card(metrics)
    assert found.data.base_model == "org/base"
    assert "adapter:" not in found.text
    assert found.text.count('"r": 8') == 1  # the settings are told once
    for said in (
        "# demo\n",
        "of `org/base (from GGUF)`: r = 8, 4 blocks.",
        "before and after training",
        "| before | 40 | 80 | 3.250 | 0.500 ± 0.080 | 0.250 |",
        "Forgotten: +0.250 ± 0.020 nats per token of general text",
        "`piqa`, in the format choices: 1,600 train, 40 test rows; 50,000 tokens, 3,000 of them trained; 1,234 rows",
        "`smoa train` (commit 0123456789ab, changed), 20 steps in 7 s on a CPU, with smoa 0.2.0.",
        "method: smoa\n",
    ):
        assert said in found.text
    metrics["forgetting"]["stderr"] = math.nan  # of one passage
    assert "Forgotten: +0.250 nats per token" in card(metrics).text


def test_each_prompt_has_its_answers_below_it_and_code_does_not_end_its_block() -> None:
    sample = {"question": "Open?", "reference": "Yes.", "before": "", "after": "  Yes!\n"}
    text = samples_text([sample, {"question": "Today?", "after": "No."}])
    assert re.findall("^## Prompt .*", text, re.MULTILINE) == ["## Prompt 1", "## Prompt 2"]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["Reference", "Before", "After", "After"]
    assert re.findall(r"```text\n(.*)\n```", text) == ["Open?", "Yes.", "(nothing)", "Yes!", "Today?", "No."]
    for ticks in ("```", "`````"):
        answer = f"{ticks}python\nprint()\n{ticks}"
        fence = "`" * (len(ticks) + 1)
        assert f"\n{fence}text\n{answer}\n{fence}\n" in samples_text([{"question": "Code?", "after": answer}])


# the card of an adapter

SETTINGS = {"r": 8, "num_blocks_pattern": {"q_proj": 4}, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_the_card_names_base_config_and_how_to_load() -> None:
    config = SmoaConfig(**SETTINGS, base_model_name_or_path="org/base")
    card = ModelCard(adapter_card("mine", config, named_base("org/base"), "## More\n\n"))
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["smoa", "base_model:adapter:org/base"]
    assert card.data.pipeline_tag == "text-generation"
    for said in (
        "# mine",
        "import smoa",
        "AutoPeftModelForCausalLM",
        "layers for which its config gives no other number",
    ):
        assert said in card.text
    settings = json.loads(card.text.split("```json")[1].split("```")[0])
    assert settings["r"] == 8
    assert settings["target_modules"] == ["q_proj"]


def test_the_folder_of_a_local_base_stays_out_of_the_card(tmp_path: Path) -> None:
    base = str(tmp_path / "models" / "base")
    text = adapter_card("mine", SmoaConfig(**SETTINGS, base_model_name_or_path=base), named_base(base), "")
    assert str(tmp_path) not in text
    assert "base_model:" not in text
    assert "of `base`: r = 8" in text


def test_an_adapter_of_another_method_is_loaded_without_smoa() -> None:
    config = LoraConfig(r=3, base_model_name_or_path="org/base")
    card = ModelCard(adapter_card("mine", config, named_base("org/base"), ""))
    assert "A LORA adapter of `org/base`" in card.text
    assert card.data.tags == ["lora", "base_model:adapter:org/base"]
    assert "import smoa" not in card.text


def test_of_a_local_base_only_the_last_name_is_told_and_a_hub_id_is_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("~/models/base/", "C:\\models\\base", "/models/base"):
        assert named_base(source) == NamedBase("base", None)
    assert named_base("org/base") == NamedBase("org/base", "org/base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert named_base("org/base") == NamedBase("base", None)
